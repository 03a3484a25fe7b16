"""Stages that compute one window together: fed alike, started and ended with each other."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path

import psutil
import pytest
from msgspec.structs import replace

from peer.errors import AnswerFailed
from peer.models.imports import import_gguf
from peer.models.store import Store
from peer.planning.plan import Plan, check
from tests import fake_models
from tests.e2e.rings import plan_of, running
from tests.plans import PEERS

E_, F_, G_ = ((letter * 16,) for letter in "efg")
PROMPT = list(range(5, 45))


def with_islands(plan: Plan, islands: dict[int, tuple[str, ...]]) -> Plan:
    """The plan with these peers beside those that have the windows."""
    windows = tuple(
        replace(window, island=islands.get(i, ())) for i, window in enumerate(plan.split.windows)
    )
    made = replace(plan, split=replace(plan.split, windows=windows))
    assert not check(made)
    return made


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


# On the fake engine all ranks compute all of it; so whether each is given each step is to be seen
# by what the next test ends, and whether nothing else goes around by the answer.
@pytest.mark.parametrize(
    ("bounds", "islands"),
    [
        ((), {0: E_}),
        ((5,), {0: (*E_, *F_)}),
        ((5,), {1: E_}),
        ((4, 8), {0: E_, 1: F_, 2: G_}),
    ],
    ids=["alone", "head", "tail", "all of three"],
)
async def test_answers_are_the_same_whoever_computes_them_together(
    tmp_path: Path, store: Store, bounds: tuple[int, ...], islands: dict[int, tuple[str, ...]]
) -> None:
    model = fake_models.write(tmp_path / "fake.gguf", end_every=0)
    manifest = import_gguf(model, store)
    plan = with_islands(plan_of(store, manifest, bounds, "fake"), islands)
    async with running(plan, store.folder(manifest.digest)) as ring:
        first = await ring.tokens(PROMPT, 30)
        assert first == fake_models.truth(model, PROMPT, 30)
        again = [*PROMPT, *first, 7, 8, 9]  # goes on in the slot that was kept
        assert await ring.tokens(again, 20) == fake_models.truth(model, again, 20)
        await ring.idle()
        while len(steps := {ring.news[peer].steps for peer in plan.peers}) > 1 or min(steps) < 20:
            ring.changed.clear()  # they are told twice a second
            await asyncio.wait_for(ring.changed.wait(), 10)
        assert not any(ring.news[peer].dropped for peer in plan.peers)


async def test_a_follower_that_dies_is_told_of_and_ends_nobody_else_by_itself(
    tmp_path: Path, store: Store
) -> None:
    manifest = import_gguf(fake_models.write(tmp_path / "fake.gguf", end_every=0), store)
    plan = with_islands(plan_of(store, manifest, (5,), "fake"), {0: E_})
    async with running(plan, store.folder(manifest.digest)) as ring:
        assert len(await ring.tokens(PROMPT, 5)) == 5
        (pid,) = ring.supervisors[PEERS[4]].pids().values()
        os.kill(pid, signal.SIGKILL)
        while PEERS[4] not in ring.exits:
            ring.changed.clear()
            await ring.changed.wait()
        assert set(ring.exits) == {PEERS[4]}


def test_an_islands_plan_names_each_peer_once(tmp_path: Path, store: Store) -> None:
    manifest = import_gguf(fake_models.write(tmp_path / "fake.gguf"), store)
    plan = plan_of(store, manifest, (5,), "fake")

    def wrong(islands: dict[int, tuple[str, ...]]) -> str:
        windows = tuple(
            replace(w, island=islands.get(i, ())) for i, w in enumerate(plan.split.windows)
        )
        return check(replace(plan, split=replace(plan.split, windows=windows)))

    assert "another place" in wrong({0: (PEERS[1],)})
    assert "another place" in wrong({0: (PEERS[4], PEERS[4])})
    assert "another place" in wrong({0: (PEERS[4],), 1: (PEERS[4],)})
    rounds = plan_of(store, manifest, (3, 6, 9), "fake", peers=2)
    windows = (replace(rounds.split.windows[0], island=(PEERS[4],)), *rounds.split.windows[1:])
    assert "rounds" in check(replace(rounds, split=replace(rounds.split, windows=windows)))


@pytest.mark.timeout(200)
async def test_an_island_of_two_mlx_processes_in_a_ring_with_llama_cpp(tmp_path: Path) -> None:
    """Gives what one MLX process gives in its place, and is over with any of its processes."""
    pytest.importorskip("mlx.core", reason="the engine is not installed: pip install halka[mlx]")
    from tests.mlx_models import written

    store = Store(tmp_path)
    manifest = import_gguf(written("llama", tmp_path / "model.gguf"), store)
    plan = plan_of(store, manifest, (3,), "llama_cpp", context=256, kv_cells=512)
    first = replace(plan.split.windows[0], backend="mlx")
    split = replace(plan.split, windows=(first, plan.split.windows[1]), speculation="off")
    plan = replace(plan, split=split)
    folder = store.folder(manifest.digest)
    async with running(plan, folder) as ring:
        expected = await ring.tokens(PROMPT, 40)
    island = with_islands(plan, {0: E_})
    async with running(island, folder) as ring:
        assert await ring.tokens(PROMPT, 40) == expected
        again = [*PROMPT, *expected, 7, 8, 9]
        assert len(await ring.tokens(again, 10)) == 10
        weights = {peer: ring.news[peer].weights_bytes for peer in island.peers}
        assert weights[PEERS[0]] == weights[E_[0]]
        (pid,) = ring.supervisors[E_[0]].pids().values()
        children = psutil.Process(pid).children(recursive=True)
        assert children
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        with pytest.raises(AnswerFailed):
            await asyncio.wait_for(ring.tokens([*again, 11], 40), 60)
        while not {PEERS[0], *E_} <= set(ring.exits):  # both say so, whoever noticed first
            ring.changed.clear()
            await asyncio.wait_for(ring.changed.wait(), 60)
        assert "island" in " ".join(ring.exits.values())
