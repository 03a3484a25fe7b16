"""Server-sent events to one client: written as they come, dropped when nobody reads.

A stream that cannot be finished never ends cleanly: after an error event there is no [DONE] and no
last chunk of the HTTP body, so that a client that overlooks the event still sees a broken answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from aiohttp import web

from peer.api.shapes import Problem

T = TypeVar("T")

HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache, no-store",
    "X-Accel-Buffering": "no",  # nginx would collect the answer before it passes it on
    "X-Content-Type-Options": "nosniff",
}


class Events:
    """One stream. write_s: a client that takes nothing for so long is dropped.

    What waits for a slow client is bounded by the transport's own buffers (about 128 KiB): `send`
    waits beyond that, and meanwhile no more of the answer is taken.
    """

    def __init__(self, request: web.Request, write_s: float) -> None:
        self.response = web.StreamResponse(headers=HEADERS)
        self.opened = False
        self._request, self._write_s = request, write_s
        self._turn = asyncio.Lock()

    async def send(self, *data: bytes) -> None:
        """One event for each JSON text. Raises ConnectionError when the client is gone."""
        await self._write(b"".join(b"data: %b\n\n" % text for text in data))

    async def pause(self) -> None:
        """A comment, so that nobody between here and the client thinks that the line is dead."""
        await self._write(b": still working\n\n")

    async def fail(self, problem: Problem) -> None:
        """Say what went wrong and cut the connection before the answer looks finished."""
        try:
            await self.send(problem.body())
        finally:
            if self._request.transport is not None:
                self._request.transport.close()  # what is written still goes out; no end follows

    async def done(self) -> None:
        """[DONE], and the body's proper end."""
        await self.send(b"[DONE]")
        async with self._deadline():
            await self.response.write_eof()

    async def _write(self, data: bytes) -> None:
        async with self._turn, self._deadline():
            if not self.opened:
                self.opened = True
                await self.response.prepare(self._request)
            await self.response.write(data)

    @asynccontextmanager
    async def _deadline(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._write_s):
                yield
        except TimeoutError:
            if self._request.transport is not None:
                self._request.transport.abort()
            raise ConnectionAbortedError("the client does not read") from None


EVENTS = web.RequestKey("events", Events)
"""Where a request keeps its stream, for the outermost handler."""


async def paced(items: AsyncGenerator[T, None], pause_s: float) -> AsyncGenerator[T | None, None]:
    """`items`, and None after each `pause_s` in which there is none. Closes `items` at its end."""
    waiting: asyncio.Future[T] | None = None
    try:
        while True:
            waiting = asyncio.ensure_future(anext(items))
            while not (await asyncio.wait({waiting}, timeout=pause_s))[0]:
                yield None
            try:
                item = waiting.result()
            except StopAsyncIteration:
                return
            yield item
    finally:
        await _surely(_end(waiting, items))


async def _end(waiting: asyncio.Future[T] | None, items: AsyncGenerator[T, None]) -> None:
    if waiting is not None:
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    await items.aclose()


async def _surely(work: Coroutine[Any, Any, None]) -> None:
    """Do `work` to its end, even when cancelled meanwhile: aiohttp cancels more than once."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as again:
            cancelled = again
    task.result()
    if cancelled is not None:
        raise cancelled
