"""One real stage between two doubles: what it does with frames that it must not believe."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zmq
import zmq.asyncio

from backends.base import Batch
from peer.models.imports import import_gguf
from peer.models.store import Store
from peer.planning.plan import Plan, PlanId, PlanState
from peer.protocol import Sampling, StageConnect, StageNews
from peer.ring.frames import Fault, Frame, FrameHeader, Open, decode, encode_frame, pack_index
from peer.ring.sockets import Doorkeeper, as_client, as_server
from peer.ring.supervisor import Supervisor
from tests import fake_models
from tests.e2e.rings import plan_of
from tests.plans import PEERS

ME = PEERS[1]
ROW = Batch(np.array([0], np.int32), np.array([0], np.int32), np.array([True]))
X = np.arange(65, 73, dtype=np.float32).reshape(1, 8)
OPEN = (Open(0, Sampling()),)


class Neighbours:
    """The stages before and after the real one, played by the test with their keys."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.news: asyncio.Queue[StageNews] = asyncio.Queue()
        self.exited: asyncio.Queue[str] = asyncio.Queue()
        self.supervisor = Supervisor(
            lambda _, news: self.news.put_nowait(news), lambda _, why: self.exited.put_nowait(why)
        )
        self.context = zmq.asyncio.Context()
        self.public, self.secret = zmq.curve_keypair()
        self.door = Doorkeeper(zmq.Context(self.context))
        self.pull = self.context.socket(zmq.PULL)
        as_server(self.pull, self.public, self.secret, "ring", 1 << 20)
        self.push = self.context.socket(zmq.PUSH)
        self.sent = 0

    async def start(self, folder: Path) -> None:
        await self.supervisor.start(
            PlanState(self.plan, "loading"), ME, folder,
            threads=1, step_s=20.0, bind="127.0.0.1", admitted=(),
        )  # fmt: skip
        ready = await self.until("ready")
        self.door.admit("ring", [ready.key])
        port = self.pull.bind_to_random_port("tcp://127.0.0.1")
        key = self.public.decode()
        self.supervisor.send(
            self.plan.id, StageConnect(f"tcp://127.0.0.1:{port}", key, previous_key=key)
        )
        as_client(self.push, ready.key.encode(), self.public, self.secret, 1 << 20)
        self.push.connect(f"tcp://127.0.0.1:{ready.ring_port}")
        await self.until("linked")

    async def until(self, phase: str) -> StageNews:
        async with asyncio.timeout(30):
            while True:
                self.door.answer()  # the real stage is linked once it is let in here
                with contextlib.suppress(TimeoutError):
                    news = await asyncio.wait_for(self.news.get(), 0.02)
                    if news.phase == phase:
                        return news

    async def dropped(self, count: int) -> StageNews:
        """Wait until the stage says that it dropped so many frames."""
        while True:
            news = await asyncio.wait_for(self.news.get(), 10)
            if news.dropped >= count:
                return news

    async def send(
        self, step: int, batch: Batch = ROW, x: np.ndarray = X, **changes: object
    ) -> None:
        plain = FrameHeader(self.plan.id, step, 1, len(batch.slots), 8)
        header = msgspec.structs.replace(plain, **changes)
        await self.push.send_multipart(encode_frame(header, pack_index(batch), x))

    async def receive(self) -> Frame:
        """The next frame that the stage sends on."""
        while True:
            self.door.answer()
            if await self.pull.poll(20):
                parts = [memoryview(part) for part in await self.pull.recv_multipart()]
                came = decode(parts, self.plan)
                assert isinstance(came, Frame)
                return came

    async def close(self) -> None:
        await self.supervisor.close()
        self.push.close(0)
        self.pull.close(0)
        self.door.close()
        self.context.term()


@pytest.fixture
async def ring(tmp_path: Path) -> AsyncIterator[Neighbours]:
    file = fake_models.write(tmp_path / "fake.gguf", end_every=0)
    store = Store(tmp_path)
    manifest = import_gguf(file, store)
    neighbours = Neighbours(plan_of(store, manifest, [4, 8], "fake"))
    try:
        await neighbours.start(store.folder(manifest.digest))
        yield neighbours
    finally:
        await neighbours.close()


async def answered(ring: Neighbours) -> Frame:
    return await asyncio.wait_for(ring.receive(), 10)


async def test_a_replayed_frame_is_dropped_and_the_answer_is_not_disturbed(
    ring: Neighbours,
) -> None:
    await ring.send(1, ops=OPEN)
    first = await answered(ring)
    assert (first.header.step, first.header.window) == (1, 2)
    await ring.send(1, ops=OPEN)
    await ring.dropped(1)
    later = Batch(ROW.slots, np.array([1], np.int32), ROW.outputs)
    await ring.send(2, later)
    # The fake engine refuses a position that does not follow: a replay that was run would show.
    assert (await answered(ring)).header.step == 2


async def test_stale_oversized_and_senseless_frames_are_dropped(ring: Neighbours) -> None:
    await ring.send(1, plan=PlanId(1, 7))
    await ring.push.send_multipart([b"\xc1\xc1", b"", b""])
    await ring.push.send_multipart([b"x"] * 5)
    await ring.send(1, window=0)
    await ring.send(1, window=2)
    await ring.send(1, rows=60)
    await ring.dropped(6)
    await ring.send(1, ops=OPEN)
    assert (await answered(ring)).header.step == 1


async def test_a_frame_beyond_the_size_limit_ends_its_link_and_nothing_else(
    ring: Neighbours,
) -> None:
    await ring.push.send_multipart([b"x" * (6 << 20)])
    await ring.send(1, ops=OPEN)  # over the link that was made anew
    assert (await answered(ring)).header.step == 1


async def test_numbers_that_are_not_finite_are_blamed_on_the_peer_before(ring: Neighbours) -> None:
    rows = Batch(np.array([0, 3], np.int32), np.array([0, 0], np.int32), np.array([True, True]))
    x = np.concatenate([X, X])
    x[1, 5] = np.nan
    await ring.send(1, rows, x, ops=(Open(0, Sampling()), Open(3, Sampling())))
    came = await answered(ring)
    assert came.header.faults == (Fault(3, PEERS[0]),)
    assert np.isfinite(came.x).all()
    alone = came.x[0].copy()
    await ring.send(2, ROW, X, ops=OPEN, faults=())
    # Slot 0 was not touched by the other's fault: its next row is refused only by its position.
    why = await asyncio.wait_for(ring.exited.get(), 10)
    assert "position" in why
    assert alone.any()


async def test_a_missing_frame_ends_the_stage_rather_than_leave_a_hole(ring: Neighbours) -> None:
    await ring.send(1, ops=OPEN)
    await answered(ring)
    await ring.send(3, Batch(ROW.slots, np.array([2], np.int32), ROW.outputs))
    why = await asyncio.wait_for(ring.exited.get(), 10)
    assert "lost on the way" in why


async def test_a_stage_ends_when_its_agent_is_gone(ring: Neighbours) -> None:
    (stage,) = ring.supervisor._stages.values()
    assert stage.process.stdin is not None
    stage.process.stdin.close()
    await asyncio.wait_for(stage.process.wait(), 5)
    assert stage.process.returncode == 0
