"""This peer's numbers: its speed with the models that are wanted, its disk, links, memory. A shell.

Measured when nothing else is computed here, in a process that is ended the moment an answer comes;
kept from start to start; corrected by what the stages really take. What is found goes into the
peer's profile, which tells everybody.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from msgspec.structs import replace

from peer.clockwork import Retries
from peer.config import Config
from peer.errors import BackendError, ModelError, PeerError
from peer.planning import survey
from peer.planning.correction import Corrections
from peer.planning.plan import Plan
from peer.planning.profile import PEERS_MAX, SPEEDS_MAX, Link, ModelShape, Profile
from peer.planning.speeds import Speeds
from peer.protocol import Timed

log = logging.getLogger("halka.measuring")

T = TypeVar("T")

LOOK_S = 0.25  # between looks whether something is to be measured, or an answer has come
MEMORY_S = 15.0  # between looks at what is free
MEMORY_NEWS = 0.1  # of change; less is not told
AGAIN_S, AGAIN_MAX_S = 30.0, 3600.0  # after measuring failed


class Host(Protocol):
    """What measuring needs of its agent."""

    def busy(self) -> bool:
        """Whether this peer computes or loads, or serves an answer."""
        ...

    def wanted(self) -> Sequence[ModelShape]:
        """The models whose speeds are wanted."""
        ...

    async def header(self, shape: ModelShape) -> Path:
        """The model's folder, once its head is in it. Raises ModelError or PeerError."""
        ...

    def introduce(self, profile: Profile) -> None:
        """This peer's profile has changed."""
        ...


class Measuring:
    """Keeps the numbers of one peer's profile true. holds: whether a stage of this peer has memory:
    what is free then is not what there is for stages."""

    def __init__(
        self,
        config: Config,
        host: Host,
        profile: Profile,
        holds: Callable[[], bool] = lambda: False,
    ) -> None:
        self._config, self._host, self._holds = config, host, holds
        self._memory_at = time.monotonic() + MEMORY_S  # the profile is new
        self.profile = profile
        self._speeds = Speeds(config.home)
        self._retries = Retries(AGAIN_S, AGAIN_MAX_S)
        self._corrections = Corrections(time.monotonic())
        self._unwritten: dict[tuple[str, str, str], float] = {}  # corrections

    def change(self, **changes: object) -> None:
        """Put something new into the profile and tell it."""
        profile = replace(self.profile, **changes)
        if profile != self.profile:
            self.profile = profile
            self._host.introduce(profile)

    def linked(self, link: Link) -> None:
        """A link was measured."""
        others = [known for known in self.profile.links if known.peer_id != link.peer_id]
        self.change(links=(*others[-PEERS_MAX + 1 :], link))

    def corrected(self, plan: Plan, timed: Timed) -> None:
        """The stage of this peer told what its steps take."""
        found = self._corrections.told(self.profile, plan, timed, time.monotonic())
        self._correct(found, "stage")

    def _correct(self, found: Profile | None, because: str) -> None:
        """Tell and keep what is corrected now, None: nothing."""
        new = set(found.speeds).difference(self.profile.speeds) if found else ()
        for speed in new:
            log.info(
                "correction=%.2f model=%s… kind=%s because=%s",
                speed.correction, speed.digest[:12], speed.kind, because,
            )  # fmt: skip
            self._unwritten[speed.digest, speed.backend, speed.kind] = speed.correction
        if found:
            self.change(speeds=found.speeds)

    async def run(self) -> None:
        """Measure what is wanted, when there is time for it, until cancelled."""
        while True:
            for shape in self._host.wanted():
                if self.profile.engines and not self._known(shape):
                    await self._learn(shape)
            if self.profile.speeds and not self._host.busy():
                self.change(disk_read_bytes_per_s=await self._disk())
            await self._look_at_memory()
            mine, now = self.profile, time.monotonic()
            self._correct(self._corrections.passed(mine, self._holds(), now), "no stage")
            while self._unwritten:
                told, correction = self._unwritten.popitem()
                await asyncio.to_thread(self._speeds.correct, *told, correction)
            await asyncio.sleep(LOOK_S)

    def _known(self, shape: ModelShape) -> bool:
        due = self._retries.due(shape.digest, time.monotonic())
        mine = self.profile
        return mine.has_speed(shape) or not due or not mine.engine_for(shape)

    async def _learn(self, shape: ModelShape) -> None:
        """From what is kept, else by measuring."""
        began = time.monotonic()
        try:
            folder = await self._host.header(shape)
            backend = self.profile.engine_for(shape)
            engines = [e for e in self.profile.engines if e.backend == backend]
            known = self._config, shape, engines
            kept = await asyncio.to_thread(self._speeds.find, *known)
            if not kept and self._host.busy():
                return
            found = kept or await self._undisturbing(
                survey.speeds(self._config, folder, shape, backend)
            )
            if not found:
                return  # an answer came: again when it has ended
            if not kept:
                await asyncio.to_thread(self._speeds.keep, *known, found)
        except (BackendError, ModelError, PeerError) as error:
            log.warning("measured=no model=%s because=%s", shape.model, error)
            self._retries.failed(shape.digest, time.monotonic())
            if isinstance(error, BackendError):  # otherwise its header may still come
                self.change(unmeasured=(*self.profile.unmeasured, shape.digest)[-SPEEDS_MAX:])
            return
        self._retries.worked(shape.digest)
        log.info(
            "measured=%s seconds=%.1f kept=%s kinds=%s",
            shape.model, time.monotonic() - began, bool(kept), ",".join(s.kind for s in found),
        )  # fmt: skip
        disk_read_bytes_per_s = await self._disk()
        others = [speed for speed in self.profile.speeds if speed.digest != shape.digest]
        self.change(
            speeds=(*others, *found)[-SPEEDS_MAX:],
            unmeasured=tuple(d for d in self.profile.unmeasured if d != shape.digest),
            disk_read_bytes_per_s=disk_read_bytes_per_s,
        )

    async def _disk(self) -> float:
        """Its disk's speed, measured once, and only for engines whose weights fill memory; 0 where
        an answer came, or it failed: again later."""
        known, now = self.profile.disk_read_bytes_per_s, time.monotonic()
        if known or self._config.backend == "fake" or not self._retries.due("disk", now):
            return known
        rate = await self._undisturbing(survey.disk_read_bytes_per_s(self._config.home))
        if rate == 0.0:
            self._retries.failed("disk", time.monotonic())
        return rate or 0.0

    async def _look_at_memory(self) -> None:
        """What is free for stages now, where none of them has some of it already."""
        if time.monotonic() < self._memory_at or self._holds():
            return
        mine = self.profile
        new = await asyncio.to_thread(survey.profile, self._config, mine.peer_id, mine.engines)
        self._memory_at = time.monotonic() + MEMORY_S
        if not self._holds() and any(map(_is_news, _free(mine), _free(new))):
            self.change(memory_available_bytes=new.memory_available_bytes, engines=new.engines)

    async def _undisturbing(self, work: Coroutine[Any, Any, T]) -> T | None:
        """What the work finds; None where an answer came and ended it."""
        task = asyncio.create_task(work)
        try:
            while not task.done():
                await asyncio.wait([task], timeout=LOOK_S)
                if self._host.busy() and not task.done():
                    return None
            return task.result()
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, BackendError):
                await task


def _free(profile: Profile) -> list[int]:
    """Bytes, of the machine and of its processors."""
    return [profile.memory_available_bytes, *(e.memory_free_bytes for e in profile.engines)]


def _is_news(before: int, now: int) -> bool:
    return abs(now - before) > MEMORY_NEWS * before
