"""api.openai and what it stands on: bodies in, chunks and errors out, over real HTTP."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from peer.api.service import Piece, ServedModel
from peer.errors import AnswerFailed, NoPlan
from tests.fake_service import CONTEXT, MODEL, Asked, FakeService, says, serving

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


class Client:
    """Posts JSON and reads what comes back."""

    def __init__(self, http: aiohttp.ClientSession) -> None:
        self.http = http

    async def ask(self, path: str, body: Any) -> tuple[int, dict[str, Any]]:
        async with self.http.post(path, json=body) as response:
            assert response.content_type == "application/json"
            return response.status, await response.json()

    async def chat(self, text: str = "hi", **body: Any) -> tuple[int, dict[str, Any]]:
        messages = [{"role": "user", "content": text}]
        return await self.ask(CHAT, {"messages": messages, **body})

    async def stream(self, path: str = CHAT, **body: Any) -> list[Any]:
        """The stream's events as they are: JSON, "[DONE]", or ":" for a comment."""
        body.setdefault(
            *("messages", [{"role": "user", "content": "hi"}]) if path == CHAT else ("prompt", "hi")
        )
        events: list[Any] = []
        async with self.http.post(path, json={"stream": True, **body}) as response:
            assert (response.status, response.content_type) == (200, "text/event-stream")
            assert response.headers["X-Accel-Buffering"] == "no"
            assert "no-cache" in response.headers["Cache-Control"]
            async for line in response.content:
                if line.startswith(b"data: "):
                    data = line[6:].strip()
                    events.append("[DONE]" if data == b"[DONE]" else json.loads(data))
                elif line.startswith(b":"):
                    events.append(":")
        return events


@asynccontextmanager
async def client(service: FakeService, **limits: Any) -> AsyncIterator[Client]:
    async with (
        serving(service, **limits) as server,
        aiohttp.ClientSession(server.url) as http,
    ):
        yield Client(http)


def script(make: Callable[[], AsyncGenerator[Piece, None]]) -> FakeService:
    return FakeService(lambda asked: make())


async def test_a_chat_is_answered_whole_with_usage() -> None:
    service = FakeService()
    async with client(service) as ask:
        status, body = await ask.chat(model=MODEL)
    assert status == 200
    assert body["object"] == "chat.completion"
    assert body["model"] == MODEL
    assert body["id"].startswith("chatcmpl-")
    [choice] = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello", "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert body["usage"] == {"prompt_tokens": 8, "completion_tokens": 5, "total_tokens": 13}
    assert service.asked[0].prompt == "<user>hi"
    assert service.asked[0].ends == (256,)


async def test_a_streamed_chat_opens_with_the_role_and_ends_once_and_with_done() -> None:
    async with client(FakeService(lambda asked: says("Hi 😀!", "length"))) as ask:
        events = await ask.stream(model=MODEL)
    *chunks, done = events
    assert done == "[DONE]"
    for chunk in chunks:
        assert chunk["object"] == "chat.completion.chunk"
        assert chunk["id"] == chunks[0]["id"]
        assert chunk["created"] == chunks[0]["created"]
        assert chunk["model"] == MODEL
        assert "usage" not in chunk
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert [d["content"] for d in deltas[1:-1]] == ["H", "i", " ", "😀", "!"]
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * 6 + ["length"]


async def test_usage_comes_in_a_chunk_of_its_own_only_where_it_was_asked_for() -> None:
    async with client(FakeService()) as ask:
        events = await ask.stream(stream_options={"include_usage": True})
    assert events[-1] == "[DONE]"
    assert events[-2]["choices"] == []
    assert events[-2]["usage"]["completion_tokens"] == 5
    assert all(event["usage"] is None for event in events[:-2])


async def test_completions_take_a_text_token_ids_or_several() -> None:
    service = FakeService(lambda asked: says(asked.prompt.upper()))
    async with client(service) as ask:
        for prompt, texts, tokens in (
            ("ab", ["AB"], 2),
            (["ab"], ["AB"], 2),
            ([97, 98, 99], ["ABC"], 3),
            (["a", "bc"], ["A", "BC"], 3),
            ([[97], [98]], ["A", "B"], 2),
        ):
            status, body = await ask.ask(COMPLETIONS, {"prompt": prompt})
            assert status == 200
            assert body["object"] == "text_completion"
            assert [c["text"] for c in body["choices"]] == texts
            assert [c["index"] for c in body["choices"]] == list(range(len(texts)))
            assert body["usage"]["prompt_tokens"] == tokens
        events = await ask.stream(COMPLETIONS, prompt="xy")
    assert events[-1] == "[DONE]"
    assert "".join(e["choices"][0]["text"] for e in events[:-1]) == "XY"
    assert events[-2]["choices"][0]["finish_reason"] == "stop"


async def test_n_answers_differ_in_seed_and_index_streamed_and_whole() -> None:
    service = FakeService(lambda asked: says(f"seed {asked.sampling.seed}"))
    async with client(service) as ask:
        _, body = await ask.chat(n=3, seed=7)
        events = await ask.stream(n=3, seed=7)
    assert [c["message"]["content"] for c in body["choices"]] == ["seed 7", "seed 8", "seed 9"]
    assert body["usage"]["prompt_tokens"] == 8
    texts = ["", "", ""]
    finishes = []
    for event in events[:-1]:
        [choice] = event["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
        finishes.append(choice["finish_reason"])
    assert texts == ["seed 7", "seed 8", "seed 9"]
    assert finishes.count("stop") == 3
    assert service.asked[0].request_id != service.asked[1].request_id


async def test_sampling_arrives_as_it_was_asked_for() -> None:
    service = FakeService()
    async with client(service) as ask:
        await ask.chat(
            temperature=0, top_p=0.5, top_k=7, min_p=0.1, repetition_penalty=1.2, repeat_last_n=-1,
            frequency_penalty=-2, presence_penalty=2.0, logit_bias={"5": -100, "97": 1.5}, seed=42,
            max_completion_tokens=9, max_tokens=3, user="me", metadata={}, unheard_of=[1],
        )  # fmt: skip
        await ask.chat(temperature=None, seed=-1, max_tokens=10.0)
        await ask.chat()
        await ask.chat()
    one, two, three, four = (asked.sampling for asked in service.asked)
    assert (one.temperature, one.top_p, one.top_k, one.min_p, one.seed) == (0, 0.5, 7, 0.1, 42)
    assert (one.repeat_penalty, one.repeat_last_n) == (1.2, -1)
    assert (one.frequency_penalty, one.presence_penalty) == (-2, 2)
    assert one.logit_bias == ((5, -100.0), (97, 1.5))
    assert two.temperature == three.temperature == 0.8
    assert two.seed == (1 << 63) - 1
    assert three.seed != four.seed
    assert [asked.tokens_max for asked in service.asked] == [9, 10, CONTEXT - 8, CONTEXT - 8]


async def test_more_tokens_than_the_context_has_left_are_clamped() -> None:
    service = FakeService()
    async with client(service) as ask:
        assert (await ask.chat(max_tokens=1 << 31))[0] == 200
    assert service.asked[0].tokens_max == CONTEXT - 8


async def test_a_stop_string_over_several_tokens_ends_the_answer_everywhere() -> None:
    async def forever() -> AsyncGenerator[Piece, None]:
        while True:
            yield Piece(tuple(b"one END two "))

    service = script(forever)
    async with client(service) as ask:
        _, body = await ask.chat(stop=["END", ""])
        events = await ask.stream(stop="END")
        assert service.running == 0
    assert body["choices"][0]["message"]["content"] == "one "
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == 7
    assert [e["choices"][0]["delta"].get("content") for e in events[:-1]] == ["", "one ", None]
    assert events[-1] == "[DONE]"


async def test_text_held_back_for_a_stop_string_comes_at_the_end() -> None:
    async with client(FakeService(lambda asked: says("so E"))) as ask:
        events = await ask.stream(stop="END")
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in events[:-1]) == "so E"


async def test_content_parts_and_the_developer_role_become_plain_messages() -> None:
    service = FakeService()
    messages = [
        {"role": "developer", "content": "brief"},
        {"role": "assistant", "content": None},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    async with client(service) as ask:
        assert (await ask.ask(CHAT, {"messages": messages}))[0] == 200
    assert service.asked[0].prompt == "<system>brief<assistant><user>a\nb"


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {"tools": [{"type": "function"}]}, "tools"),
    (CHAT, {"functions": [{}]}, "functions"),
    (CHAT, {"tool_choice": "required"}, "tool_choice"),
    (CHAT, {"response_format": {"type": "json_object"}}, "response_format"),
    (CHAT, {"logprobs": True}, "logprobs"),
    (CHAT, {"top_logprobs": 2}, "top_logprobs"),
    (CHAT, {"modalities": ["text", "audio"]}, "modalities"),
    (CHAT, {"n": 0}, "n"),
    (CHAT, {"n": 1_000_000}, "n"),
    (CHAT, {"n": True}, "n"),
    (CHAT, {"temperature": -1}, "temperature"),
    (CHAT, {"temperature": 1e9}, "temperature"),
    (CHAT, {"temperature": "warm"}, "temperature"),
    (CHAT, {"temperature": True}, "temperature"),
    (CHAT, {"top_p": 2}, "top_p"),
    (CHAT, {"top_k": -2}, "top_k"),
    (CHAT, {"top_k": 1.5}, "top_k"),
    (CHAT, {"min_p": -0.1}, "min_p"),
    (CHAT, {"repeat_penalty": 0}, "repeat_penalty"),
    (CHAT, {"frequency_penalty": 1 << 70}, "frequency_penalty"),
    (CHAT, {"seed": 1 << 70}, "seed"),
    (CHAT, {"seed": "x"}, "seed"),
    (CHAT, {"max_tokens": -1}, "max_tokens"),
    (CHAT, {"max_tokens": 0}, "max_tokens"),
    (CHAT, {"max_tokens": 1 << 63}, "max_tokens"),
    (CHAT, {"max_completion_tokens": 5, "max_tokens": []}, "max_tokens"),
    (CHAT, {"stop": [""] * 100_000}, "stop"),
    (CHAT, {"stop": [1]}, "stop"),
    (CHAT, {"stop": "x" * 10_000}, "stop"),
    (CHAT, {"stop": {}}, "stop"),
    (CHAT, {"logit_bias": {"x": 1}}, "logit_bias"),
    (CHAT, {"logit_bias": {"-1": 1}}, "logit_bias"),
    (CHAT, {"logit_bias": {"99999": 1}}, "logit_bias"),
    (CHAT, {"logit_bias": {"5": 1e9}}, "logit_bias"),
    (CHAT, {"logit_bias": {str(i): 1 for i in range(5000)}}, "logit_bias"),
    (CHAT, {"logit_bias": [1]}, "logit_bias"),
    (CHAT, {"stream": "yes"}, "stream"),
    (CHAT, {"stream_options": 1}, "stream_options"),
    (CHAT, {"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    (CHAT, {"model": 5}, "model"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": "hi"}, "messages"),
    (CHAT, {"messages": ["hi"]}, "messages[0]"),
    (CHAT, {"messages": [{"role": "king", "content": ""}]}, "messages[0].role"),
    (CHAT, {"messages": [{"role": ["user"], "content": ""}]}, "messages[0].role"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "messages[0]"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0]",
    ),
    (CHAT, {"messages": [{"role": "user", "content": "template!"}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": "x" * CONTEXT}]}, "messages"),
    (COMPLETIONS, {"prompt": None}, "prompt"),
    (COMPLETIONS, {"prompt": ""}, "prompt"),
    (COMPLETIONS, {"prompt": []}, "prompt"),
    (COMPLETIONS, {"prompt": [1, True]}, "prompt"),
    (COMPLETIONS, {"prompt": [1, "x"]}, "prompt"),
    (COMPLETIONS, {"prompt": [-1]}, "prompt"),
    (COMPLETIONS, {"prompt": [100_000]}, "prompt"),
    (COMPLETIONS, {"prompt": [1] * CONTEXT}, "prompt"),
    (COMPLETIONS, {"prompt": ["x"] * 1000}, "prompt"),
    (COMPLETIONS, {"prompt": ["x"] * 9, "n": 9}, "prompt"),
    (COMPLETIONS, {"suffix": "x"}, "suffix"),
    (COMPLETIONS, {"echo": True}, "echo"),
    (COMPLETIONS, {"logprobs": 0}, "logprobs"),
    (COMPLETIONS, {"best_of": 3}, "best_of"),
]


async def test_absurd_values_and_wishes_that_cannot_be_met_are_refused_by_name() -> None:
    service = FakeService()
    base: dict[str, dict[str, Any]] = {
        CHAT: {"messages": [{"role": "user", "content": "hi"}]},
        COMPLETIONS: {"prompt": "hi"},
    }
    async with client(service) as ask:
        for path, body, param in REFUSED:
            for stream in (False, True):
                asked = {"stream": stream, **base[path], **body}
                status, answer = await ask.ask(path, asked)
                error = answer["error"]
                assert (status, error["param"]) == (400, param), (str(body)[:100], answer)
                assert error["type"] == "invalid_request_error"
                assert error["code"]
                assert len(error["message"]) < 500
    assert service.asked == []


async def test_a_prompt_longer_than_the_context_names_both_numbers() -> None:
    async with client(FakeService()) as ask:
        status, body = await ask.chat("x" * CONTEXT)
    assert status == 400
    assert body["error"]["code"] == "context_length_exceeded"
    assert str(CONTEXT) in body["error"]["message"]
    assert str(CONTEXT + 6) in body["error"]["message"]


BAD_BODIES: list[tuple[bytes, str, int]] = [
    (b"{", "application/json", 400),
    (b"", "application/json", 400),
    (b"[]", "application/json", 400),
    (b'"text"', "application/json", 400),
    (b"\xff\xfe", "application/json", 400),
    (b'{"a": "\xff"}', "application/json", 400),
    (b'{"messages": "\\ud800 and more"}', "application/json", 400),
    (b'{"temperature": NaN}', "application/json", 400),
    (b'{"temperature": 1e999}', "application/json", 400),
    (b'{"seed": ' + b"9" * 5000 + b"}", "application/json", 400),
    (b"[" * 200_000, "application/json", 400),
    (b'{"a":' * 100_000, "application/json", 400),
    (b'{"messages": []}', "text/plain", 415),
    (b"messages=[]", "application/x-www-form-urlencoded", 415),
]


async def test_bodies_that_are_not_json_objects_get_an_error_in_the_known_shape() -> None:
    async with client(FakeService()) as ask:
        for data, kind, wanted in BAD_BODIES:
            headers = {"Content-Type": kind}
            async with ask.http.post(CHAT, data=data, headers=headers) as response:
                body = await response.json()
                assert response.status == wanted, (data[:40], body)
                assert set(body["error"]) == {"message", "type", "param", "code"}
                assert "Traceback" not in body["error"]["message"]


async def test_models_are_listed_and_found_by_ids_with_slashes() -> None:
    async with client(FakeService()) as ask:
        async with ask.http.get("/v1/models") as response:
            body = await response.json()
        assert body["object"] == "list"
        assert [m["id"] for m in body["data"]] == [MODEL]
        assert body["data"][0]["object"] == "model"
        assert body["data"][0]["created"] == 1_700_000_000
        async with ask.http.get(f"/v1/models/{MODEL}") as response:
            assert (await response.json())["id"] == MODEL
        async with ask.http.get("/v1/models/other") as response:
            assert response.status == 404
            assert MODEL in (await response.json())["error"]["message"]


@pytest.mark.parametrize("name", [None, "", "default", "halka", f"{MODEL}:latest", "dummy", MODEL])
async def test_no_name_and_aliases_mean_the_model_that_is_served(name: str | None) -> None:
    async with client(FakeService()) as ask:
        status, body = await ask.chat(model=name)
    assert (status, body["model"]) == (200, MODEL)


async def test_an_unknown_model_is_a_404_with_the_list() -> None:
    async with client(FakeService()) as ask:
        for name in ("gpt-7", "../../etc/passwd", "x" * 100_000):
            status, body = await ask.chat(model=name)
            assert (status, body["error"]["code"]) == (404, "model_not_found")
            assert MODEL in body["error"]["message"]
            assert len(body["error"]["message"]) < 400


async def test_a_model_that_is_not_ready_says_what_it_waits_for_and_when_to_come_again() -> None:
    waiting = [ServedModel(MODEL, 0, CONTEXT, False, "fetching 3 of 7 parts")]
    async with client(FakeService(served=waiting)) as ask:
        for body in ({"model": MODEL}, {}):
            message = {"messages": [{"role": "user", "content": "hi"}]}
            async with ask.http.post(CHAT, json={**message, **body}) as response:
                assert response.status == 503
                assert int(response.headers["Retry-After"]) > 0
                error = (await response.json())["error"]
                assert error["message"] == "fetching 3 of 7 parts"
    async with client(FakeService(served=[])) as ask:
        status, body = await ask.chat()
        assert status == 503
        assert "halka pull" in body["error"]["message"]


async def no_plan() -> AsyncGenerator[Piece, None]:
    raise NoPlan("a peer is missing")
    yield


async def fails() -> AsyncGenerator[Piece, None]:
    yield Piece(tuple(b"Hel"))
    raise AnswerFailed("the peer oak was lost")


async def ends() -> AsyncGenerator[Piece, None]:
    yield Piece(tuple(b"Hel"))


async def breaks() -> AsyncGenerator[Piece, None]:
    yield Piece(tuple(b"Hel"))
    raise ZeroDivisionError("secret prompt")


async def _collect(response: aiohttp.ClientResponse, lines: list[Any]) -> None:
    async for line in response.content:
        lines.append(line)


@pytest.mark.parametrize(
    ("make", "says_why"),
    [
        (fails, "the peer oak was lost"),
        (ends, "before it was finished"),
        (breaks, "made a mistake"),
    ],
)
async def test_an_answer_that_breaks_never_looks_finished(
    make: Callable[[], AsyncGenerator[Piece, None]],
    says_why: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    service = script(make)
    async with client(service) as ask:
        status, body = await ask.chat()
        assert status >= 500
        assert says_why in body["error"]["message"]
        events: list[Any] = []
        asked = {"stream": True, "messages": [{"role": "user", "content": "hi"}]}
        async with ask.http.post(CHAT, json=asked) as response:
            with pytest.raises(aiohttp.ClientPayloadError):  # the body has no proper end
                await _collect(response, events)
    text = b"".join(events)
    assert b"Hel" in text
    last = json.loads(text.strip().rsplit(b"data: ", 1)[1])
    assert set(last["error"]) == {"message", "type", "param", "code"}
    assert says_why in last["error"]["message"]
    assert b"[DONE]" not in text
    assert b'"finish_reason":"' not in text
    assert "secret prompt" not in caplog.text


async def test_what_goes_wrong_before_the_first_text_has_its_own_status_in_streams_too() -> None:
    async with client(script(no_plan)) as ask:
        for stream in (False, True):
            status, body = await ask.chat(stream=stream)
            assert (status, body["error"]["code"]) == (503, "no_plan")
            assert body["error"]["message"] == "a peer is missing"


async def test_a_long_wait_is_filled_with_comments_and_then_the_answer_comes() -> None:
    go_on = asyncio.Event()

    async def slow() -> AsyncGenerator[Piece, None]:
        await go_on.wait()
        yield Piece(tuple(b"at last"), "stop")

    async with client(script(slow), pause_s=0.02) as ask:
        messages = [{"role": "user", "content": "hi"}]
        async with ask.http.post(CHAT, json={"stream": True, "messages": messages}) as response:
            lines = []
            async for line in response.content:
                lines.append(line)
                if lines.count(b": still working\n") == 3:
                    go_on.set()
    assert lines[0].startswith(b":")
    assert b"at last" in b"".join(lines)
    assert lines[-2] == b"data: [DONE]\n"


async def test_one_of_several_answers_failing_ends_all() -> None:
    def one_fails(asked: Asked) -> AsyncGenerator[Piece, None]:
        return fails() if asked.sampling.seed == 2 else endless()

    async def endless() -> AsyncGenerator[Piece, None]:
        while True:
            yield Piece((97,))
            await asyncio.sleep(0)

    service = FakeService(one_fails)
    async with client(service) as ask:
        status, body = await ask.chat(n=3, seed=1)
        assert status == 503
        assert "oak" in body["error"]["message"]
        assert service.running == 0


async def test_prompts_and_answers_are_never_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with client(FakeService(lambda asked: says("canary-out"))) as ask:
        await ask.chat("canary-in")
        await ask.stream(messages=[{"role": "user", "content": "canary-in"}])
        await ask.chat("canary-in", temperature="canary-in")
        await ask.ask(COMPLETIONS, {"prompt": "canary-in"})
    assert caplog.text.count("outcome=stop") == 3
    assert "prompt_tokens=9 tokens=10" in caplog.text
    assert "canary" not in caplog.text
