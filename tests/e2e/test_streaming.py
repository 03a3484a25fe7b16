"""Models larger than a peer's memory, and larger than all of it: planned, run, the same tokens.

Stages run in control groups of memory, so small that the kernel would kill a stage which kept too
much. What they read from disk is the kernel's own count.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

import backends
from peer.models.parts import shape_of
from peer.planning import costs, families, split
from peer.planning.plan import Forecast, Plan, PlanId, check
from peer.planning.profile import EngineProfile, ModelShape, Profile, Speed
from peer.planning.split import Wishes
from peer.planning.survey import available_bytes
from tests.e2e import limited
from tests.e2e.limited import Large
from tests.e2e.rings import Ring, plan_of, running
from tests.plain_llama import PlainLlama
from tests.plans import PEERS

pytestmark = pytest.mark.skipif(bool(limited.why_not()), reason=limited.why_not())

MIB = 1 << 20
PROMPT = (1, 150, 7, 9)
TOKENS = 24
WARM = 6  # of them: until what stays is in memory
CONTEXT = 256


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Large:
    return limited.large(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def truth(model: Large) -> list[int]:
    """What one process without limits answers."""
    with PlainLlama(model.file, cells=CONTEXT, batch=32) as plain:
        answer = plain.greedy(PROMPT, TOKENS, 32)
    assert len(set(answer)) > 10, "an answer of one token proves little"
    return answer


@pytest.fixture(scope="module")
def shape(model: Large) -> ModelShape:
    engine = backends.load("llama_cpp")
    return shape_of(model.folder, engine.cuts, engine.kv_bytes_per_cell)


@dataclass
class Limited:
    """A ring whose stages have limits. groups: one a peer, in ring order."""

    ring: Ring
    groups: list[Path]

    async def answer(self) -> tuple[list[int], list[float]]:
        """The greedy answer, and bytes that each stage had read for each token, once warm."""
        ids = await self.ring.tokens(PROMPT, WARM)
        before = self._read()
        again = await self.ring.tokens(PROMPT, TOKENS)
        assert again[: len(ids)] == ids
        steps = TOKENS  # one of them is the prompt's
        return again, [(b - a) / steps for a, b in zip(before, self._read(), strict=True)]

    def _read(self) -> list[int]:
        stages = (supervisor.pids() for supervisor in self.ring.supervisors.values())
        return [limited.read_bytes(pid) for pids in stages for pid in pids.values()]


@asynccontextmanager
async def within(plan: Plan, model: Large, limits: Sequence[int]) -> AsyncIterator[Limited]:
    """The plan's ring with so many bytes for each stage, in ring order."""
    model.forget()
    with contextlib.ExitStack() as stack:
        groups = [stack.enter_context(limited.group(f"{i}", n)) for i, n in enumerate(limits)]
        stack.enter_context(limited.stages_in({i: str(g) for i, g in enumerate(groups)}))
        async with running(plan, model.folder) as ring:
            yield Limited(ring, groups)
            assert not ring.exits, ring.exits


# A plan by hand ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [1, 2])
async def test_a_ring_that_streams_gives_the_same_tokens_and_reads_no_more_than_it_must(
    model: Large, truth: list[int], rounds: int
) -> None:
    """Two peers with 98 MiB of weights each and 112 MiB in all; 40 MiB of them are too many."""
    excess = 40 * MIB
    bounds = [8 * i // (2 * rounds) for i in range(1, 2 * rounds)]
    plan = plan_of(model.store, model.manifest, bounds, "llama_cpp", peers=2, context=CONTEXT,
                   kv_cells=CONTEXT, batch_tokens=32, slots=1)  # fmt: skip
    windows = tuple(
        msgspec.structs.replace(window, streamed_bytes=excess // rounds)
        for window in plan.split.windows
    )
    plan = msgspec.structs.replace(plan, split=msgspec.structs.replace(plan.split, windows=windows))
    async with within(plan, model, [112 * MIB] * 2) as ring:
        answer, read = await ring.answer()
        assert answer == truth
        for group, each in zip(ring.groups, read, strict=True):
            wanted = excess * rounds  # with two rounds: the excess, and a buffer as large
            assert each > 0.7 * wanted, "it did not stream"
            # Left to itself, the kernel has all 103 MB read again.
            assert each < 1.2 * wanted, "it read what should have stayed in memory"
            assert limited.most_bytes(group) <= 113 * MIB, "the kernel itself may add pages"


# Plans by the planner ---------------------------------------------------------------------------


def peer(i: int, limit: int, model: ModelShape, *, layer_s: float = 0.004) -> Profile:
    """A profile as a peer with such a limit has, and a disk that reads 1 GB a second."""
    available = available_bytes(0, limit, limit)
    cpu = EngineProfile("llama_cpp", "cpu", "cpu", available, available)
    kinds = len(set(model.kinds))
    speed = Speed(
        model.digest, "llama_cpp", "cpu", 1, (layer_s,) * kinds, (0.1,) * kinds, 512, 1e-4, 1e-4
    )
    return Profile(
        PEERS[i], f"peer{i}", "linux", 1, available, available, engines=(cpu,), threads=1,
        disk_read_bytes_per_s=1e9, speeds=(speed,),
    )  # fmt: skip


def planned(profiles: list[Profile], shape: ModelShape, wishes: Wishes) -> tuple[Plan, Forecast]:
    """The planner's choice, and what it is expected to do."""
    chosen = split.solve(profiles, shape, wishes)
    forecast = costs.forecast(profiles, shape, chosen)
    assert forecast is not None
    plan = Plan(PlanId(1, 1), PEERS[0], shape, chosen)
    assert check(plan) == ""
    return plan, forecast


def limits_of(plan: Plan, limits: Sequence[int]) -> list[int]:
    """In ring order."""
    return [limits[PEERS.index(peer_id)] for peer_id in plan.ring]


async def test_a_model_larger_than_each_peers_limit_is_split_so_that_each_part_fits(
    model: Large, truth: list[int], shape: ModelShape
) -> None:
    limits = [190 * MIB, 150 * MIB, 130 * MIB]
    assert shape.window_bytes(0, shape.layers) > max(limits)
    profiles = [peer(i, limit, shape) for i, limit in enumerate(limits)]
    plan, forecast = planned(profiles, shape, Wishes(context=CONTEXT))
    assert len(plan.ring) >= 2
    assert all(window.streamed_bytes == 0 for window in plan.split.windows)
    for part in forecast.peers:
        declared = limits[PEERS.index(part.peer_id)]
        assert part.memory_bytes <= available_bytes(0, declared, declared)
    async with within(plan, model, limits_of(plan, limits)) as ring:
        answer, read = await ring.answer()
        assert answer == truth
        assert max(read) < 0.1 * MIB, "a part that fits is read from disk again"


@pytest.mark.parametrize("rounds", [0, 2])
async def test_a_model_larger_than_the_whole_cluster_is_streamed_and_the_plan_says_so(
    model: Large, truth: list[int], shape: ModelShape, rounds: int
) -> None:
    limits = [170 * MIB, 140 * MIB]
    profiles = [peer(i, limit, shape) for i, limit in enumerate(limits)]
    plan, forecast = planned(profiles, shape, Wishes(context=CONTEXT, rounds=rounds))
    streamed = sum(part.streamed_bytes for part in forecast.peers)
    assert streamed > 0
    assert sum(window.streamed_bytes for window in plan.split.windows) == pytest.approx(streamed, 8)
    assert f"{-(-streamed // MIB)} MiB do not stay in memory" in plan.split.why
    for part in forecast.peers:
        declared = limits[PEERS.index(part.peer_id)]
        assert part.memory_bytes <= available_bytes(0, declared, declared)
    async with within(plan, model, limits_of(plan, limits)) as ring:
        answer, _ = await ring.answer()
        assert answer == truth


def test_rounds_are_chosen_where_others_turns_hide_the_disk() -> None:
    """70B in 38 GiB of two peers: while the second computes, the first one can read."""
    large = families.shape("70B:q4_k_m")
    gib = 1 << 30
    profiles = [peer(0, 24 * gib, large, layer_s=0.012), peer(1, 20 * gib, large, layer_s=0.012)]
    plan, forecast = planned(profiles, large, Wishes(context=4096))
    once, one_round = planned(profiles, large, Wishes(context=4096, rounds=1))
    rounds = len(plan.split.windows) // len(plan.ring)
    assert len(once.split.windows) == len(once.ring) == 2
    assert rounds > 1
    assert f"in {rounds} rounds" in plan.split.why
    assert "do not stay in memory and are read from disk for each token" in plan.split.why
    assert forecast.tpot_s < 0.95 * one_round.tpot_s
    assert sum(p.disk_s for p in forecast.peers) < sum(p.disk_s for p in one_round.peers)


def test_one_round_is_kept_where_nothing_is_to_be_hidden(shape: ModelShape) -> None:
    profiles = [peer(i, 190 * MIB, shape, layer_s=0.05) for i in range(2)]
    plan, _ = planned(profiles, shape, Wishes(context=CONTEXT))
    assert len(plan.split.windows) == len(plan.ring) == 2
    assert "rounds" not in plan.split.why
