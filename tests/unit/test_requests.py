"""api.requests and api.intake: what may be asked, and by which name the rest is refused."""

from __future__ import annotations

from typing import Any

from tests.api_client import CHAT, COMPLETIONS, client
from tests.fake_service import CONTEXT, FakeService


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
