"""Every other split on a coarse grid, run for real and beside the planned one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec

from peer.planning import costs
from peer.planning.plan import Plan, PlanId, PlanWindow, Split
from peer.planning.profile import ModelShape, Profile
from tests.bench.uneven_ring import Answer, Ring, Rings, summed

STEP = 5  # layers
AT_ONCE = 8  # rings that are loaded together, the planned one among them
FIRST_ANSWERS, LAST_ANSWERS = 3, 9
FINALISTS = 4
TOKENS = 96


@dataclass(frozen=True)
class Tried:
    """What trying came to. gain: of the fastest split that was found, as a share of the planned
    one's TPOT; negative where the plan was faster than all others. told: each split and its
    TPOT as a multiple of the plan's, the fastest first."""

    count: int
    fastest: str
    gain: float
    plan_tpot_s: float
    fastest_tpot_s: float
    told: tuple[tuple[str, float], ...]


def others_than(
    planned: Split, profiles: Sequence[Profile], shape: ModelShape, everyone: bool
) -> list[Split]:
    """All subsets (everyone: only all), in all orders, in steps of STEP layers, that have room."""
    chosen = [(w.peer_id, w.first, w.last) for w in planned.windows]
    found = []
    for windows in _grid([p.peer_id for p in profiles], shape.layers, everyone):
        if windows == chosen:
            continue
        split = msgspec.structs.replace(
            planned, windows=tuple(PlanWindow(*w, gpu_layers=0) for w in windows)
        )
        if costs.forecast(profiles, shape, split) is not None:
            found.append(split)
    return found


def _grid(
    peers: Sequence[str], layers: int, everyone: bool
) -> Iterator[list[tuple[str, int, int]]]:
    for count in (len(peers),) if everyone else range(1, len(peers) + 1):
        for ring in itertools.permutations(peers, count):
            for cuts in itertools.combinations(range(STEP, layers, STEP), count - 1):
                edges = (0, *cuts, layers)
                yield [(p, *e) for p, e in zip(ring, itertools.pairwise(edges), strict=True)]


async def try_out(
    running: Rings,
    planned: Plan,
    others: Sequence[Split],
    names: dict[str, str],
    prompt: Sequence[int],
) -> Tried:
    """Run them all, some at a time, each batch with the planned ring; the best ones once more."""
    numbers = itertools.count(2)
    times: dict[int, float] = {}  # as multiples of the planned one's in the same batch
    for batch in _batches(len(others)):
        plan_s, found = await _beside(
            running, planned, [others[i] for i in batch], names, prompt, FIRST_ANSWERS, numbers
        )
        times |= {i: tpot_s / plan_s for i, tpot_s in zip(batch, found, strict=True)}
    ranked = sorted(times, key=lambda i: times[i])
    finalists = ranked[:FINALISTS]
    plan_s, found = await _beside(
        running, planned, [others[i] for i in finalists], names, prompt, LAST_ANSWERS, numbers
    )
    final = sorted(zip(found, finalists, strict=True))
    fastest_s, fastest = final[0] if final else (plan_s, -1)
    told = {i: tpot_s / plan_s for tpot_s, i in final}
    ranked = [*sorted(told, key=lambda i: told[i]), *ranked[FINALISTS:]]
    return Tried(
        len(others),
        _words(others[fastest], names) if final else "-",
        1 - fastest_s / plan_s,
        plan_s,
        fastest_s,
        tuple((_words(others[i], names), round((times | told)[i], 3)) for i in ranked),
    )


async def _beside(
    running: Rings,
    planned: Plan,
    others: Sequence[Split],
    names: dict[str, str],
    prompt: Sequence[int],
    answers: int,
    numbers: Iterator[int],
) -> tuple[float, list[float]]:
    """TPOTs of the planned ring and of these, asked in turn, so that all meet the same weather."""
    made: list[Ring] = []
    for split in (planned.split, *others):
        plan = Plan(PlanId(2, next(numbers)), split.windows[0].peer_id, planned.shape, split)
        made.append(await running.start(plan, names))
    found: list[list[Answer]] = [[] for _ in made]
    for turn in range(answers + 1):
        for ring, told in zip(made, found, strict=True):
            answer = await running.ask(ring, prompt, TOKENS if turn else TOKENS // 4)
            if turn:  # the first one maps the weights
                told.append(answer)
    for ring in made:
        await running.end(ring)
    plan_s, *rest = (summed(answers).tpot_s for answers in found)
    return plan_s, rest


def _batches(count: int) -> Iterator[range]:
    for first in range(0, count, AT_ONCE - 1):
        yield range(first, min(count, first + AT_ONCE - 1))


def _words(split: Split, names: dict[str, str]) -> str:
    return " + ".join(f"{names[w.peer_id]} {w.last - w.first}" for w in split.windows)
