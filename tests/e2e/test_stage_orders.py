"""What an agent orders together with a stage's first order is not lost."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import psutil
import pytest

from peer.models.imports import import_gguf
from peer.models.store import Store
from peer.planning.plan import PlanState
from peer.protocol import Message, Sampling, StageAdmit, StageOrder, StageStop
from peer.ring.supervisor import Supervisor
from tests import fake_models
from tests.conftest import Until
from tests.e2e.rings import Ring, plan_of


@pytest.fixture
def order(tmp_path: Path) -> StageOrder:
    """To be the whole ring of a fake model."""
    store = Store(tmp_path)
    manifest = import_gguf(fake_models.write(tmp_path / "fake.gguf", end_every=0), store)
    plan = plan_of(store, manifest, [], "fake")
    folder = str(store.folder(manifest.digest))
    return StageOrder(PlanState(plan, "loading"), plan.head, folder, 1, bind="127.0.0.1")


def lines(*messages: Message) -> bytes:
    return b"".join(msgspec.json.encode(message) + b"\n" for message in messages)


def test_a_stage_that_is_stopped_at_once_ends_by_itself(order: StageOrder) -> None:
    stage = subprocess.Popen(
        [sys.executable, "-m", "peer.ring.stage"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert stage.stdin is not None
    try:
        stage.stdin.write(lines(order, StageStop()))
        stage.stdin.flush()  # and is left open: nothing else tells the stage to end
        assert stage.wait(20) == 0
        assert stage.stdout is not None
        assert b"ready" not in stage.stdout.read(), "it loaded for nothing"
    finally:
        stage.kill()
        stage.communicate()


async def test_a_peer_that_is_admitted_at_once_may_submit(order: StageOrder) -> None:
    ring = Ring(order.plan.plan)
    (supervisor,) = ring.supervisors.values()
    began = time.monotonic()
    try:
        await supervisor.start(
            order.plan, order.peer_id, Path(order.folder),
            threads=1, step_s=20.0, bind="127.0.0.1", admitted=(),
        )  # fmt: skip
        supervisor.send(order.plan.plan.id, StageAdmit((ring.key,)))
        await ring.until("ready")
        head = ring.news[order.peer_id]
        ring.entry.open(ring.plan.id, f"tcp://127.0.0.1:{head.submit_port}", head.key)
        ring.entry.serve(ring.offer)
        async with asyncio.timeout(20):
            assert len(await ring.tokens([256, 65], 5, Sampling(temperature=0.0))) == 5
    finally:
        await ring.close()
    assert time.monotonic() - began < 20


class Begun:
    """The supervisor of one peer, and which processes there are because of it."""

    def __init__(self, order: StageOrder) -> None:
        self.order = order
        self.exits: list[str] = []
        self.supervisor = Supervisor(lambda plan, news: None, lambda _, why: self.exits.append(why))
        self.before = {child.pid for child in psutil.Process().children()}

    async def start(self) -> None:
        await self.supervisor.start(
            self.order.plan, self.order.peer_id, Path(self.order.folder),
            threads=1, step_s=20.0, bind="127.0.0.1", admitted=(),
        )  # fmt: skip

    @property
    def running(self) -> set[int]:
        ended = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        found = psutil.Process().children()
        return {child.pid for child in found if child.status() not in ended} - self.before


async def test_a_plan_that_is_begun_twice_has_one_stage(order: StageOrder, until: Until) -> None:
    """A plan that was over for a moment may be begun again while its stage waited to begin."""
    begun = Begun(order)
    try:
        await asyncio.gather(begun.start(), begun.start())
        await until(lambda: len(begun.running) <= 1, 20, "one of them ended")
        assert begun.running == set(begun.supervisor.pids().values())
    finally:
        await begun.supervisor.close()
    assert begun.running == set()
    assert not begun.exits


async def test_a_stage_that_begins_while_the_agent_ends_ends_with_it(order: StageOrder) -> None:
    begun = Begun(order)
    await begun.supervisor.close()
    await asyncio.wait_for(begun.start(), 20)
    assert begun.running == set()
    assert not begun.exits
