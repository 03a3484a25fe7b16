"""The unmodified `openai` client against the real endpoint, over a service that a test plays."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest

from peer.api.service import Piece, ServedModel
from peer.errors import AnswerFailed, NoPlan
from tests.conftest import Until
from tests.fake_service import CONTEXT, MODEL, Asked, FakeService, says, serving

HI: list[Any] = [{"role": "user", "content": "hi"}]


@asynccontextmanager
async def asking(service: FakeService, **limits: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        serving(service, **limits) as server,
        openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


async def test_a_chat_whole_and_streamed_with_usage() -> None:
    service = FakeService(lambda asked: says("Merhaba dünya 😀"))
    async with asking(service) as client:
        whole = await client.chat.completions.create(model=MODEL, messages=HI, temperature=0)
        assert whole.choices[0].message.content == "Merhaba dünya 😀"
        assert whole.choices[0].finish_reason == "stop"
        assert whole.usage
        assert whole.usage.total_tokens == 8 + len("Merhaba dünya 😀".encode())
        text, finishes, usages = "", [], []
        stream = await client.chat.completions.create(
            model=MODEL, messages=HI, stream=True, stream_options={"include_usage": True}
        )
        async for chunk in stream:
            usages += [chunk.usage] if chunk.usage else []
            for choice in chunk.choices:
                text += choice.delta.content or ""
                finishes += [choice.finish_reason] if choice.finish_reason else []
        assert text == "Merhaba dünya 😀"
        assert finishes == ["stop"]
        assert [usage.total_tokens for usage in usages] == [whole.usage.total_tokens]


async def test_the_stream_helper_puts_the_whole_answer_together() -> None:
    async with (
        asking(FakeService(lambda asked: says("one two"))) as client,
        client.chat.completions.stream(model=MODEL, messages=HI) as stream,
    ):
        async for _ in stream:
            pass
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == "one two"
    assert final.choices[0].finish_reason == "stop"


async def test_completions_whole_and_streamed() -> None:
    async with asking(FakeService(lambda asked: says(asked.prompt[::-1], "length"))) as client:
        whole = await client.completions.create(model=MODEL, prompt="abc")
        assert (whole.choices[0].text, whole.choices[0].finish_reason) == ("cba", "length")
        text = ""
        async for chunk in await client.completions.create(model=MODEL, prompt="xyz", stream=True):
            text += chunk.choices[0].text
        assert text == "zyx"


def test_the_synchronous_client_works_too() -> None:
    async def both() -> str:
        service = FakeService()
        async with serving(service) as server:

            def ask() -> str:
                with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
                    stream = client.chat.completions.create(model=MODEL, messages=HI, stream=True)
                    return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

            return await asyncio.to_thread(ask)

    assert asyncio.run(both()) == "Hello"


async def test_models_are_listed_and_retrieved() -> None:
    async with asking(FakeService()) as client:
        assert [model.id async for model in client.models.list()] == [MODEL]
        assert (await client.models.retrieve(MODEL)).id == MODEL
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("other")


async def test_errors_become_the_clients_own_exceptions() -> None:
    service = FakeService()
    async with asking(service) as client:
        create = client.chat.completions.create
        with pytest.raises(openai.NotFoundError, match=MODEL) as missing:
            await create(model="gpt-7", messages=HI)
        assert missing.value.code == "model_not_found"
        long: list[Any] = [{"role": "user", "content": "x" * CONTEXT}]
        with pytest.raises(openai.BadRequestError) as overflow:
            await create(model=MODEL, messages=long)
        assert overflow.value.code == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError) as tools:
            await create(
                model=MODEL,
                messages=HI,
                tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
            )
        assert tools.value.param == "tools"
        service.served = [ServedModel(MODEL, 0, CONTEXT, False, "oak is missing")]
        with pytest.raises(openai.InternalServerError, match="oak is missing"):
            await create(model=MODEL, messages=HI, stream=True)


async def fails_after(text: str, error: Exception | None) -> AsyncGenerator[Piece, None]:
    yield Piece(tuple(text.encode()))
    if error is not None:
        raise error


@pytest.mark.parametrize(
    "error", [AnswerFailed("the peer oak was lost"), None], ids=["peer lost", "truncated"]
)
async def test_an_answer_that_breaks_off_raises_and_never_looks_finished(
    error: Exception | None,
) -> None:
    async with asking(FakeService(lambda asked: fails_after("Hel", error))) as client:
        text = ""
        stream = await client.chat.completions.create(model=MODEL, messages=HI, stream=True)
        while not text:
            chunk = await anext(stream.__aiter__())
            text += chunk.choices[0].delta.content or ""
            assert chunk.choices[0].finish_reason is None
        with pytest.raises(openai.APIError, match="oak" if error else "before it was finished"):
            await anext(stream.__aiter__())
        assert text == "Hel"
        with pytest.raises(openai.APIError):
            await client.chat.completions.create(model=MODEL, messages=HI)


async def test_the_clients_own_retry_gets_the_answer_once_there_is_a_plan() -> None:
    tries = 0

    async def later(asked: Asked) -> AsyncGenerator[Piece, None]:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise NoPlan("a peer is missing")
        yield Piece(tuple(b"here"), "stop")

    async with asking(FakeService(later)) as client:
        answer = await client.with_options(max_retries=1).chat.completions.create(
            model=MODEL, messages=HI
        )
    assert answer.choices[0].message.content == "here"
    assert tries == 2


async def test_a_client_that_closes_its_stream_ends_the_answer(until: Until) -> None:
    async def endless() -> AsyncGenerator[Piece, None]:
        while True:
            yield Piece((97,))
            await asyncio.sleep(0.001)

    service = FakeService(lambda asked: endless())
    async with asking(service) as client:
        stream = await client.chat.completions.create(model=MODEL, messages=HI, stream=True)
        assert await anext(stream.__aiter__())
        await stream.close()
        await until(lambda: service.running == 0, 5, "the answer ended")
