"""Links between stages: a process that sleeps a while breaks none, a broken one ends the ring."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from peer.models.imports import import_gguf
from peer.models.store import Store
from peer.ring.lease import Bounds
from peer.ring.sockets import BROKEN_S
from tests import fake_models
from tests.conftest import Until
from tests.e2e.rings import Ring, plan_of, running

PROMPT = [256, *b"What is a ring?"]
TOKENS = 60


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return fake_models.write(tmp_path / "fake.gguf", end_every=0, delay_s=0.01)


@pytest.fixture
async def ring(tmp_path: Path, model: Path) -> AsyncIterator[Ring]:
    """Three stages; each answer takes seconds."""
    store = Store(tmp_path)
    manifest = import_gguf(model, store)
    plan = plan_of(store, manifest, [4, 8], "fake")
    # A machine sleeps with all of its processes: who is awake would find the stages hung.
    asleep = Bounds(quiet_s=30.0)
    async with running(plan, store.folder(manifest.digest), bounds=asleep) as ring:
        yield ring


def pid_of(ring: Ring, place: int) -> int:
    return ring.supervisors[ring.plan.ring[place]].pids()[ring.plan.id]


@pytest.mark.parametrize("places", [(0,), (1, 2)], ids=["head", "middle and tail"])
async def test_stages_that_sleep_for_five_seconds_go_on_where_they_were(
    ring: Ring, model: Path, places: tuple[int, ...], until: Until
) -> None:
    given: list[int] = []

    async def ask() -> None:
        async for piece in ring.answer(PROMPT, TOKENS):
            given.extend(piece.ids)

    async with asyncio.timeout(60):
        answer = asyncio.create_task(ask())
        await until(lambda: len(given) >= 5, 20, "the answer flows")
        pids = [pid_of(ring, place) for place in places]
        try:
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            _, pending = await asyncio.wait({answer}, timeout=5.0)
            assert pending, "the answer went on without them"
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
        await answer
    assert given == fake_models.truth(model, PROMPT, TOKENS)


async def test_a_broken_link_ends_the_stage_that_sends_into_it(ring: Ring, until: Until) -> None:
    head, middle, tail = ring.plan.ring
    os.kill(pid_of(ring, 2), signal.SIGKILL)
    await until(lambda: middle in ring.exits, BROKEN_S + 5, "the stage before it gave up")
    assert "SIGKILL" in ring.exits[tail]
    assert ring.exits[middle] == f"the link to peer {tail} broke"
    await until(lambda: head in ring.exits, BROKEN_S + 5, "the head gave up, too")
