"""Answers as they are made, whatever dialect they are told in.

Each job pulls its pieces from the service, turns them into text and gives that to a sink. Leaving,
for whatever reason, closes the pieces' iterator, which ends the computation in every stage.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from peer.api.service import Service, Words
from peer.api.shapes import Finished
from peer.api.sse import paced
from peer.errors import AnswerFailed
from peer.models.deltas import Deltas
from peer.protocol import Sampling

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Job:
    """One answer to make. ids: its prompt. endless: end tokens do not end it."""

    index: int
    request_id: str
    model_id: str
    words: Words
    ids: Sequence[int]
    sampling: Sampling
    tokens_max: int
    stops: tuple[str, ...]
    endless: bool = False


class Sink(Protocol):
    """Where text goes as it comes."""

    async def text(self, index: int, text: str) -> None:
        """More of answer `index`."""
        ...

    async def pause(self) -> None:
        """Nothing came for a while."""
        ...


class Nowhere:
    """The sink of answers that are told whole."""

    async def text(self, index: int, text: str) -> None:
        """It is in Finished."""

    async def pause(self) -> None:
        """Nobody hears it."""


async def make(service: Service, job: Job, sink: Sink, pause_s: float) -> Finished:
    """One answer. Raises NoPlan or RequestError before its first piece, AnswerFailed later."""
    deltas = Deltas(job.words.pieces, job.stops)
    shown: list[str] = []
    first_s = 0.0
    pieces = service.answer(
        job.request_id,
        job.model_id,
        job.ids,
        job.sampling,
        job.tokens_max,
        () if job.endless else tuple(sorted(job.words.ends)),
    )
    async with aclosing(paced(pieces, pause_s)) as steps:
        async for piece in steps:
            if piece is None:
                await sink.pause()
                continue
            first_s = first_s or time.monotonic()
            text = deltas.feed(piece.ids)
            if piece.finish:
                text += deltas.flush()
            if text:
                shown.append(text)
                await sink.text(job.index, text)
            if finish := "stop" if deltas.stopped else piece.finish:
                return Finished(job.index, "".join(shown), finish, deltas.tokens, first_s)
    raise AnswerFailed("the answer ended before it was finished")


async def together(parts: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results. The first error ends the others and is raised by itself."""
    if len(parts) == 1:
        return [await parts[0]]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(part) for part in parts]
    except BaseExceptionGroup as errors:
        first: BaseException = errors
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from None
    return [task.result() for task in tasks]
