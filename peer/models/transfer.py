"""Parts from one peer to another: bounded chunks, hashed before use, from several sources.

`fetch` is the shell around `sources`: it asks, writes and measures, and decides nothing. All disk
work is done in threads; no await is without an end, because `ask` has a deadline of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import TypeVar

from peer.errors import ModelError, PartError, PeerError
from peer.models import disk
from peer.models.manifest import Manifest
from peer.models.partial import Busy, Partial, arrived_bytes
from peer.models.sources import Sources, Start, Stop
from peer.models.store import Store
from peer.protocol import (
    CHUNK_BYTES_MAX,
    ChunkHere,
    ChunkWanted,
    ManifestHere,
    ManifestWanted,
    NotHere,
)

log = logging.getLogger("halka.models.transfer")

IN_FLIGHT = 3  # chunks of one part; two parts of a source make 1.5 MiB, 10 ms of a gigabit
QUICK_S = 0.15  # a chunk that took longer is followed by one at a time, so heartbeats get through
TICK_S = 0.25  # between looks at who offers what now

Offers = Callable[[], Mapping[str, Collection[str]]]
"""Peer id → names of the parts of this model that it has, as of now."""

Ask = Callable[[str, ManifestWanted | ChunkWanted], Awaitable[ManifestHere | ChunkHere]]
"""Send a question to a peer and await its answer; fills in `request`. Raises PeerError (lost,
silent) and PartError (the peer says NotHere)."""

Progress = Callable[[int, int], None]
"""done_bytes, total_bytes"""

Rest = Callable[[float], float]
"""Seconds that a chunk took → seconds without a question after it."""

T = TypeVar("T")


def answer(
    store: Store, message: ManifestWanted | ChunkWanted
) -> ManifestHere | ChunkHere | NotHere:
    """Answer a peer's question about a model. Blocking: call it in a thread."""
    try:
        if isinstance(message, ManifestWanted):
            data = store.manifest(message.digest).data
            return ManifestHere(message.request, message.digest, data)
        chunk = store.read_chunk(message.digest, message.part, message.offset, message.length)
        return ChunkHere(message.request, chunk)
    except ModelError as error:
        why = str(error)
        if not isinstance(error, PartError) or str(store.root) in why:
            log.warning("unreadable=%s because=%s", message.digest[:12], error)
            why = "it cannot be read here"  # paths of this machine are nobody else's business
        return NotHere(message.request, why[:1000])


async def fetch(
    store: Store,
    digest: str,
    parts: Sequence[str],
    offers: Offers,
    ask: Ask,
    progress: Progress | None = None,
    rest: Rest | None = None,
) -> Manifest:
    """Have all of `parts` in the store; what is there already is not fetched again.

    rest: for what can wait: one chunk of a part at a time, and so long nothing after it.

    May be cancelled and called again: it goes on where it was. Raises PartError, naming the part
    and what each source did wrong, or the path and the bytes that the disk lacks; ModelError.
    """
    manifest = await _manifest(store, digest, offers, ask)
    missing = await _in_thread(store.missing, digest, parts)
    if missing:
        await _Fetch(store, manifest, missing, offers, ask, progress, rest).run()
    return manifest


async def _manifest(store: Store, digest: str, offers: Offers, ask: Ask) -> Manifest:
    try:
        return await _in_thread(store.manifest, digest)
    except PartError:
        pass  # not here yet, or damaged: ask for it
    whys: list[str] = []
    for peer in offers():
        try:
            found = await ask(peer, ManifestWanted(0, digest))
        except (PeerError, PartError) as error:
            whys.append(f"{peer}: {error}")
            continue
        if not isinstance(found, ManifestHere):
            whys.append(f"{peer}: it answered something else")
            continue
        try:
            return await _in_thread(store.adopt_manifest, digest, found.data)
        except PartError as error:
            whys.append(f"{peer}: {error}")
    reason = "; ".join(whys[:8]) or "no peer offers it"
    raise PartError(f"the manifest of {digest[:12]}… cannot be fetched from anyone: {reason}")


class _Fetch:
    """One call of `fetch`."""

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        missing: Sequence[str],
        offers: Offers,
        ask: Ask,
        progress: Progress | None,
        rest: Rest | None,
    ) -> None:
        self._store, self._manifest, self._missing = store, manifest, tuple(dict.fromkeys(missing))
        self._offers, self._ask, self._progress, self._rest = offers, ask, progress, rest
        self._arrived: dict[str, int] = {}
        self._total = sum(manifest.part(name).data_bytes for name in self._missing)
        self._fatal: ModelError | None = None

    async def run(self) -> None:
        """Until all parts are present. Raises ModelError."""
        self._arrived = await _in_thread(self._look)
        self._sources = Sources(
            {n: (self._manifest.part(n).data_bytes, self._arrived[n]) for n in self._missing}
        )
        self._show()
        tasks: dict[str, asyncio.Task[None]] = {}
        why = ""
        async with asyncio.TaskGroup() as group:
            while not (self._sources.done or self._fatal or why):
                offers = self._offers()
                for action in self._sources.step(offers, time.monotonic()):
                    if isinstance(action, Stop):
                        tasks[action.part].cancel()
                    else:
                        tasks[action.part] = group.create_task(self._part(action))
                why = self._sources.stuck(offers, time.monotonic())
                if running := [task for task in tasks.values() if not task.done()]:
                    await asyncio.wait(running, timeout=TICK_S, return_when=asyncio.FIRST_COMPLETED)
                elif not why and not self._sources.done and not self._fatal:
                    await asyncio.sleep(TICK_S)  # a source rests, or another fetch has the part
            for task in tasks.values():
                task.cancel()
        if self._fatal:
            await _in_thread(self._give_up)
            raise self._fatal
        if why:
            raise PartError(why)

    def _look(self) -> dict[str, int]:
        """What is here of the missing parts, and whether the rest fits on the disk."""
        arrived = {n: arrived_bytes(self._store, self._manifest, n) for n in self._missing}
        sizes = sum(self._manifest.part(n).file_bytes for n in self._missing)
        disk.require(self._store.folder(self._manifest.digest), sizes - sum(arrived.values()))
        return arrived

    def _give_up(self) -> None:
        """Free the space of what arrived: the disk is full, or the model is not usable."""
        for name in self._missing:
            with contextlib.closing(Partial(self._store, self._manifest, name)) as partial:
                try:
                    if partial.open():
                        partial.discard()
                except (Busy, ModelError, OSError) as error:
                    log.debug("kept=%s because=%s", name, error)

    async def _part(self, start: Start) -> None:
        """Fetch one part from one source, and tell the machine how it went."""
        name, now = start.part, time.monotonic
        partial = Partial(self._store, self._manifest, name)
        try:
            if not await _in_thread(partial.open):  # another fetch was quicker
                self._arrived[name] = partial.part.data_bytes
                self._sources.finished(name)
                self._show()
                return
            if start.fresh:
                await _in_thread(partial.restart)
            await self._pump(partial, start.peer)
            if await _in_thread(partial.finish):
                self._sources.finished(name)
            else:
                log.warning("thrown_away=%s from=%s because=wrong_hash", name, start.peer)
                self._arrived[name] = 0
                self._sources.damaged(name)
        except PeerError as error:
            self._sources.lost(name, str(error), now())
        except _NoChunk as error:
            self._sources.refused(name, str(error))
        except ModelError as error:
            self._fatal = error
        except Busy:
            await asyncio.sleep(TICK_S)
            self._sources.stopped(name)
        except asyncio.CancelledError:
            self._sources.stopped(name)  # an idle source takes over, or the fetch is over
            raise
        finally:
            await _in_thread(partial.close)

    @property
    def _digest(self) -> str:
        return self._manifest.digest

    async def _pump(self, partial: Partial, peer: str) -> None:
        """Append chunks in order, a few in flight. Raises PeerError, _NoChunk, ModelError."""
        size, asked = partial.part.data_bytes, partial.done
        self._count(partial)
        flying: deque[asyncio.Task[ChunkHere | Exception]] = deque()
        width = 1
        try:
            while partial.done < size:
                while asked < size and len(flying) < width:
                    length = min(CHUNK_BYTES_MAX, size - asked)
                    wanted = ChunkWanted(0, self._digest, partial.part.name, asked, length)
                    flying.append(asyncio.create_task(self._chunk(peer, wanted)))
                    asked += length
                began = time.monotonic()
                found = await flying.popleft()
                if isinstance(found, Exception):
                    raise found
                await _in_thread(partial.append, found.data)
                took_s = time.monotonic() - began
                width = IN_FLIGHT if took_s < QUICK_S and self._rest is None else 1
                self._count(partial)
                if self._rest is not None and partial.done < size:
                    await asyncio.sleep(self._rest(took_s))
        finally:
            for task in flying:
                task.cancel()
            if flying:
                await asyncio.wait(flying)

    async def _chunk(self, peer: str, wanted: ChunkWanted) -> ChunkHere | Exception:
        """The chunk, or what went wrong, as a value: nobody may be waiting for it any more."""
        try:
            found = await self._ask(peer, wanted)
        except PeerError as error:
            return error
        except PartError as error:
            return _NoChunk(str(error))
        if not isinstance(found, ChunkHere) or len(found.data) != wanted.length:
            return _NoChunk("it did not send the bytes that it was asked for")
        return found

    def _count(self, partial: Partial) -> None:
        self._arrived[partial.part.name] = partial.done
        self._sources.got(partial.part.name, partial.done, time.monotonic())
        self._show()

    def _show(self) -> None:
        if self._progress:
            self._progress(sum(self._arrived.values()), self._total)


class _NoChunk(Exception):
    """The source will not give this part."""


async def _in_thread(work: Callable[..., T], *arguments: object) -> T:
    """Do disk work in a thread; when cancelled, its end is awaited, so that no file is closed
    under it."""
    future = asyncio.get_running_loop().run_in_executor(None, lambda: work(*arguments))
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        while not future.done():
            try:
                await asyncio.wait([future])
            except asyncio.CancelledError:
                continue
        raise
