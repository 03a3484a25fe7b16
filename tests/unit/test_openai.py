"""api.openai and what it stands on: answers, chunks and errors, over real HTTP."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any

import aiohttp
import pytest

from peer.api.service import Piece, ServedModel
from peer.errors import AnswerFailed, NoPlan
from tests.api_client import CHAT, COMPLETIONS, client
from tests.fake_service import CONTEXT, MODEL, Asked, FakeService, says


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
