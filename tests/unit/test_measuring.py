"""A peer measures what is wanted when nothing else computes, keeps it, and tells it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from msgspec.structs import replace

from peer import measuring
from peer.config import Config
from peer.errors import BackendError, PeerError
from peer.measuring import Measuring
from peer.planning import correction
from peer.planning.plan import Plan, PlanId, PlanWindow, Split
from peer.planning.profile import EngineProfile, Fit, Link, ModelShape, Profile, Speed
from peer.protocol import Timed
from tests.conftest import Until
from tests.coordinator import A, B, profile, shape

MODEL = shape()
SPEED = Speed(MODEL.digest, "fake", "cpu", 4, (1e-3,), (0.1,), 512)
Measure = Callable[[Config, Path, ModelShape, str], Awaitable[tuple[Speed, ...]]]


class Double:
    """An agent as measuring sees it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.computes, self.told = folder, False, list[Profile]()
        self.changed = asyncio.Event()
        self.fault: PeerError | None = None
        self.shape = MODEL

    def busy(self) -> bool:
        return self.computes

    def wanted(self) -> Sequence[ModelShape]:
        return [self.shape]

    async def header(self, shape: ModelShape) -> Path:
        if self.fault:
            raise self.fault
        return self.folder

    def introduce(self, profile: Profile) -> None:
        self.told.append(profile)
        self.changed.set()

    async def tells(self) -> Profile:
        """The next profile that is introduced."""
        await asyncio.wait_for(self.changed.wait(), 10)
        self.changed.clear()
        return self.told[-1]


@asynccontextmanager
async def running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measure: Measure
) -> AsyncIterator[tuple[Double, Measuring]]:
    monkeypatch.setattr(measuring.survey, "speeds", measure)
    monkeypatch.setattr(measuring, "LOOK_S", 0.01)
    monkeypatch.setattr(correction, "CONFIRM_S", 0.0)
    host = Double(tmp_path)
    config = Config.fast_test(home=tmp_path, backend="fake")
    found = Measuring(config, host, profile(A, unmeasured=()))
    task = asyncio.create_task(found.run())
    try:
        yield host, found
    finally:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def at_once(
    config: Config, folder: Path, shape: ModelShape, backend: str
) -> tuple[Speed, ...]:
    return (SPEED,)


async def test_what_was_measured_is_told_and_found_again_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path, monkeypatch, at_once) as (host, _):
        assert (await host.tells()).speeds == (SPEED,)

    async def never(
        config: Config, folder: Path, shape: ModelShape, backend: str
    ) -> tuple[Speed, ...]:
        raise AssertionError("it was measured before")

    async with running(tmp_path, monkeypatch, never) as (host, _):
        assert (await host.tells()).speeds == (SPEED,)


async def test_the_engine_is_measured_that_would_run_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    async def watched(
        config: Config, folder: Path, shape: ModelShape, backend: str
    ) -> tuple[Speed, ...]:
        asked.append(backend)
        return (replace(SPEED, backend=backend, digest=shape.digest),)

    cpu = EngineProfile("mlx", "CPU", "cpu", 1 << 30, 1 << 30)
    both = (cpu, replace(cpu, backend="llama_cpp"))
    async with running(tmp_path, monkeypatch, watched) as (host, found):
        await host.tells()
        no = Fit("mlx", "auto", "no", "MLX has no IQ4_XS")
        host.shape = replace(MODEL, digest="1" * 64, fits=(no,))
        found.change(engines=both)
        while not any(s.backend == "llama_cpp" for s in (await host.tells()).speeds):
            pass
        found.change(engines=(cpu,))  # none that can: nothing to measure, and no trouble
        host.shape = replace(host.shape, digest="2" * 64)
        found.change(engines=both)
        while asked.count("llama_cpp") < 2:
            await host.tells()
    assert asked[1:] == ["llama_cpp", "llama_cpp"]


async def test_an_answer_ends_a_measurement_and_it_begins_anew_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, ended = asyncio.Event(), asyncio.Event()
    tries = 0

    async def slow(
        config: Config, folder: Path, shape: ModelShape, backend: str
    ) -> tuple[Speed, ...]:
        nonlocal tries
        tries += 1
        if tries > 1:
            return (SPEED,)
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        return ()

    async with running(tmp_path, monkeypatch, slow) as (host, _):
        await asyncio.wait_for(begun.wait(), 10)
        host.computes = True
        await asyncio.wait_for(ended.wait(), 10)
        assert host.told == []
        assert tries == 1
        host.computes = False
        assert (await host.tells()).speeds == (SPEED,)
        assert tries == 2


async def test_what_cannot_be_measured_is_told_so_that_nobody_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(
        config: Config, folder: Path, shape: ModelShape, backend: str
    ) -> tuple[Speed, ...]:
        raise BackendError("a layer of it does not fit here")

    async with running(tmp_path, monkeypatch, broken) as (host, found):
        assert (await host.tells()).unmeasured == (MODEL.digest,)
        assert found.profile.speeds == ()


async def test_a_header_that_has_not_come_yet_is_no_reason_to_give_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "AGAIN_S", 0.01)
    async with running(tmp_path, monkeypatch, at_once) as (host, _):
        host.fault = PeerError("nobody has it now")
        await asyncio.wait({asyncio.ensure_future(host.changed.wait())}, timeout=0.05)
        assert all(told.unmeasured == () for told in host.told)
        host.fault = None
        assert (await host.tells()).speeds == (SPEED,)


async def test_links_and_corrections_become_part_of_the_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path, monkeypatch, at_once) as (host, found):
        await host.tells()
        found.linked(Link(B, 1e-3, 1e8))
        assert (await host.tells()).links == (Link(B, 1e-3, 1e8),)
        found.linked(Link(B, 2e-3, 1e7))
        assert (await host.tells()).links == (Link(B, 2e-3, 1e7),)
        split = Split((PlanWindow(A, 0, 12, "fake"),), 512, 512, 8, 512)
        plan = Plan(PlanId(1, 1), A, MODEL, split)
        found.corrected(plan, Timed(decode_s=1.0))
        corrected = (await host.tells()).speeds[0]
        assert corrected.correction > 10
        assert replace(corrected, correction=1.0) == SPEED
        before = len(host.told)
        found.corrected(plan, Timed(decode_s=1.0))
        assert len(host.told) == before, "nothing new"


async def test_a_disk_whose_measurement_an_answer_ended_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, tries = asyncio.Event(), 0

    async def disk(home: Path) -> float:
        nonlocal tries
        tries += 1
        if tries == 1:
            begun.set()
            await asyncio.Event().wait()
        return 1e9

    monkeypatch.setattr(measuring.survey, "disk_read_bytes_per_s", disk)
    monkeypatch.setattr(measuring.survey, "speeds", at_once)
    monkeypatch.setattr(measuring, "LOOK_S", 0.01)
    monkeypatch.setattr(correction, "CONFIRM_S", 0.0)
    host = Double(tmp_path)
    config = Config.fast_test(home=tmp_path, backend="llama_cpp")
    found = Measuring(config, host, profile(A, unmeasured=()))
    task = asyncio.create_task(found.run())
    try:
        await asyncio.wait_for(begun.wait(), 10)
        host.computes = True
        told = await host.tells()
        assert (told.speeds != (), told.disk_read_bytes_per_s) == (True, 0.0)
        host.computes = False
        assert (await host.tells()).disk_read_bytes_per_s == 1e9
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_memory_that_became_free_is_told_where_no_stage_has_some_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked, holds = asyncio.Event(), True
    free = 1000

    def now(config: Config, peer_id: str, engines: object) -> Profile:
        looked.set()
        return profile(peer_id, free)

    monkeypatch.setattr(measuring.survey, "profile", now)
    monkeypatch.setattr(measuring, "LOOK_S", 0.01)
    monkeypatch.setattr(measuring, "MEMORY_S", 0.0)
    monkeypatch.setattr(measuring.survey, "speeds", at_once)
    host = Double(tmp_path)
    mine = profile(A, 1000)
    found = Measuring(Config.fast_test(home=tmp_path, backend="fake"), host, mine, lambda: holds)
    task = asyncio.create_task(found.run())
    try:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(looked.wait(), 0.1)
        assert not looked.is_set(), "a stage has memory of its own"
        holds = False
        await asyncio.wait_for(looked.wait(), 10)
        assert (await host.tells()).speeds == (SPEED,)
        assert len(host.told) == 1, "no more memory than before is no news"
        free = 2000
        assert (await host.tells()).memory_available_bytes == 2000 << 20
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_what_has_faded_is_faded_after_a_restart_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, until: Until
) -> None:
    async def slow_once(
        config: Config, folder: Path, shape: ModelShape, backend: str
    ) -> tuple[Speed, ...]:
        return (replace(SPEED, correction=4.0),)

    def written() -> bool:
        return b'"correction":4.0' not in (tmp_path / "speeds.json").read_bytes()

    monkeypatch.setattr(correction, "FADE_S", 0.0)
    async with running(tmp_path, monkeypatch, slow_once) as (host, found):
        await until(lambda: found.profile.speeds == (SPEED,), 10, "it has faded")
        await until(written, 10, "the file says so")
    assert host.told[0].speeds[0].correction == 4.0
