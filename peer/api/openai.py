"""OpenAI's dialect: /v1/chat/completions, /v1/completions, /v1/models."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import msgspec
from aiohttp import web

from peer.api import requests
from peer.api.answers import Job, Nowhere, make, together
from peer.api.intake import check_ids, named, pick, read_json
from peer.api.limits import Limits, Places
from peer.api.service import ServedModel, Service, Words
from peer.api.shapes import (
    Chat,
    Completion,
    Finished,
    Shape,
    Usage,
    json_response,
    problem_of,
)
from peer.api.sse import EVENTS, Events
from peer.errors import AnswerFailed, HalkaError, RequestError

log = logging.getLogger("halka.api")

_GOODBYE_S = 1.0  # for all clients together to be told that this peer stops
_SEED_MASK = (1 << 63) - 1


class OpenAI:
    """The handlers. Whatever they raise is answered by `server`."""

    def __init__(self, service: Service, limits: Limits) -> None:
        self._service, self._limits = service, limits
        self.places = Places(limits.answers)
        self._streams: set[Events] = set()

    def routes(self) -> list[web.RouteDef]:
        """Where the handlers go."""
        return [
            web.post("/v1/chat/completions", self.chat),
            web.post("/v1/completions", self.completion),
            web.get("/v1/models", self.models),
            web.get("/v1/models/{id:.+}", self.model),
        ]

    async def end(self, why: str) -> None:
        """End the streams that run, each with an error event."""
        problem = problem_of(AnswerFailed(why))
        opened = [events.fail(problem) for events in self._streams if events.opened]
        if opened:
            with suppress(TimeoutError):  # who does not read will not hear it
                async with asyncio.timeout(_GOODBYE_S):
                    await asyncio.gather(*opened, return_exceptions=True)

    async def models(self, request: web.Request) -> web.Response:
        """GET /v1/models"""
        data = [_model(model) for model in self._service.models()]
        return json_response(msgspec.json.encode({"object": "list", "data": data}))

    async def model(self, request: web.Request) -> web.Response:
        """GET /v1/models/{id}; ids may contain slashes."""
        model = named(self._service.models(), request.match_info["id"])
        return json_response(msgspec.json.encode(_model(model)))

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/chat/completions"""
        began_s = time.monotonic()
        wish = requests.chat(await read_json(request, self._limits))
        model = pick(self._service.models(), wish.common.model)
        with self.places.taken(wish.common.choices):
            words, context = await self._service.text(model.id), self._service.context(model.id)
            ids = await words.ids_of_chat(wish.messages, context_tokens=context)
            check_ids(ids, len(words.pieces), context, "messages")
            shape = Chat(secrets.token_hex(12), model.id, int(time.time()))
            jobs = _jobs(shape, model, words, wish.common, [ids], context)
            return await self._answer(request, shape, jobs, wish.common, len(ids), began_s)

    async def completion(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/completions"""
        began_s = time.monotonic()
        wish = requests.completion(await read_json(request, self._limits))
        model = pick(self._service.models(), wish.common.model)
        with self.places.taken(len(wish.prompts) * wish.common.choices):
            words, context = await self._service.text(model.id), self._service.context(model.id)
            prompts = []
            for given in wish.prompts:
                ids = given
                if isinstance(ids, str):
                    ids = await words.ids_of_prompt(ids, context_tokens=context)
                check_ids(ids, len(words.pieces), context, "prompt")
                prompts.append(ids)
            shape = Completion(secrets.token_hex(12), model.id, int(time.time()))
            jobs = _jobs(shape, model, words, wish.common, prompts, context)
            count = sum(map(len, prompts))
            return await self._answer(request, shape, jobs, wish.common, count, began_s)

    async def _answer(
        self,
        request: web.Request,
        shape: Shape,
        jobs: Sequence[Job],
        wish: requests.Wish,
        prompt_tokens: int,
        began_s: float,
    ) -> web.StreamResponse:
        """Make all answers and tell them, as a stream or whole; log one line about it."""
        report = Report(shape.id, jobs[0].model_id, prompt_tokens, began_s)
        events = request[EVENTS] = Events(request, self._limits.write_s)
        sink = Stream(events, shape, wish.include_usage) if wish.stream else Nowhere()
        pause_s = self._limits.pause_s
        self._streams.add(events)
        try:
            made = await together([make(self._service, job, sink, pause_s) for job in jobs])
            report.made(made)
            usage = Usage(prompt_tokens, report.tokens)
            if not isinstance(sink, Stream):
                return json_response(shape.whole(made, usage))
            await sink.end(made, usage)
        except HalkaError as error:
            report.outcome = f"failed why={error}"
            if not events.opened:
                raise
            await events.fail(problem_of(error))
        finally:
            self._streams.discard(events)
            log.info("%s", report)
        return events.response


class Stream:
    """The sink of a streamed answer: chunks of `shape`."""

    def __init__(self, events: Events, shape: Shape, include_usage: bool) -> None:
        self._events, self._shape, self._include_usage = events, shape, include_usage
        self._more: dict[str, Any] = {"usage": None} if include_usage else {}
        self._begun: set[int] = set()

    async def text(self, index: int, text: str) -> None:
        """A chunk with text, after the one that opens the answer."""
        await self._send(*self._opening(index), self._shape.delta(index, text))

    async def pause(self) -> None:
        """A sign of life."""
        await self._events.pause()

    async def end(self, made: Sequence[Finished], usage: Usage) -> None:
        """What ends each answer, the usage where it was asked for, and the stream's own end."""
        for answer in made:
            last = self._shape.last(answer.index, answer.finish)
            await self._send(*self._opening(answer.index), last)
        if self._include_usage:
            await self._events.send(self._shape.chunk([], usage=usage.plain()))
        await self._events.done()

    def _opening(self, index: int) -> list[dict[str, Any]]:
        first = None if index in self._begun else self._shape.first(index)
        self._begun.add(index)
        return [] if first is None else [first]

    async def _send(self, *choices: dict[str, Any]) -> None:
        await self._events.send(*(self._shape.chunk([c], **self._more) for c in choices))


class Report:
    """What the log says about a request: figures, never its words."""

    def __init__(self, request_id: str, model: str, prompt_tokens: int, began_s: float) -> None:
        self._of = f"request={request_id} model={model} prompt_tokens={prompt_tokens}"
        self._began_s = began_s
        self._figures = ""  # nothing is better than a wrong number, where the answer failed
        self.tokens = 0
        self.outcome = "client_gone"

    def made(self, answers: Sequence[Finished]) -> None:
        """All answers are whole."""
        self.tokens = sum(answer.tokens for answer in answers)
        ttft_s = min(answer.first_s for answer in answers) - self._began_s
        self._figures = f" tokens={self.tokens} ttft_s={ttft_s:.3f}"
        self.outcome = answers[0].finish

    def __str__(self) -> str:
        return (
            f"{self._of}{self._figures} total_s={time.monotonic() - self._began_s:.3f} "
            f"outcome={self.outcome}"
        )


def _jobs(
    shape: Shape,
    model: ServedModel,
    words: Words,
    wish: requests.Wish,
    prompts: Sequence[Sequence[int]],
    context: int,
) -> list[Job]:
    """One job for each answer; the n answers to one prompt differ in their seed only.

    Raises: RequestError, where logit_bias names a token that the model does not have.
    """
    if any(token >= len(words.pieces) for token, _ in wish.sampling.logit_bias):
        raise RequestError(
            f"`logit_bias`: token ids of this model are 0 to {len(words.pieces) - 1}",
            param="logit_bias",
            code="invalid_value",
        )
    seed = secrets.randbits(63) if wish.seed is None else wish.seed
    jobs: list[Job] = []
    for ids in prompts:
        room = context - len(ids)
        tokens_max = room if wish.tokens_max is None else min(room, wish.tokens_max)
        for choice in range(wish.choices):
            index = len(jobs)
            sampling = msgspec.structs.replace(wish.sampling, seed=(seed + choice) & _SEED_MASK)
            name = f"{shape.id}-{index}"
            of = (index, name, model.id, words, ids, sampling, tokens_max, wish.stops)
            jobs.append(Job(*of, endless=wish.endless))
    return jobs


def _model(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.id,
        "object": "model",
        "created": model.created_s,
        "owned_by": "halka",
        "context_length": model.context,
        "ready": model.ready,
    }
