"""Which windows of a model to run on random weights, and what their times say. Pure.

Layers of a model are of kinds (`ModelShape.layer_kinds`). Kinds whose layers have the same tensors
in the same shapes, and differ in types alone, are a family: a random layer of one may stand in the
place of another, so that a window can be made of one kind even where the model mixes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from peer.planning.profile import ModelShape

LENGTH_MAX = 64  # layers of a trial; longer ones tell nothing more
STARTS_MAX = 160  # places at which trials are looked for
PAIRS_MAX = 16  # short windows for which one of twice the layers is looked for
CONDITION_MAX = 30.0  # of the equations: beyond it they would tell noise
_LEAST_ROWS = 16  # of a prefill chunk


@dataclass(frozen=True, slots=True)
class Trial:
    """A window [first, last) to be run. sources: for each layer, the one that it is a copy of.

    counts: how many layers of each kind it holds.
    """

    first: int
    last: int
    sources: tuple[int, ...]
    counts: tuple[int, ...]

    @property
    def layers(self) -> int:
        """How many it has."""
        return self.last - self.first


@dataclass(frozen=True, slots=True)
class Trials:
    """What to run. kinds: in the order in which they matter.

    short: for prefill chunks, long: for decode steps, middle: for them where steps of a long one
    are never let alone, by kind. single and several: windows of the same mixture, several having
    `times` as many layers; None where there are no such two.
    """

    kinds: tuple[int, ...]
    short: dict[int, Trial]
    middle: dict[int, Trial]
    long: dict[int, Trial]
    single: Trial | None
    several: Trial | None
    times: int


def choose(
    shape: ModelShape, families: Sequence[int], budget_bytes: int, wanted_bytes: int
) -> Trials:
    """The trials of a model.

    families: of each layer. budget_bytes: weights of one trial at most. wanted_bytes: of active
    weights in a long one, so that they do not stay in a processor's cache.
    """
    kinds = shape.kinds
    order = tuple(sorted(set(kinds), key=lambda kind: (-kinds.count(kind), kind)))
    windows = _allowed(shape)
    short: dict[int, Trial] = {}
    middle: dict[int, Trial] = {}
    long: dict[int, Trial] = {}
    for kind in order:
        made = [
            trial
            for first, last in windows
            if (trial := _trial(shape, families, order, kind, first, last)).counts[kind]
            and sum(shape.layer_bytes[source] for source in trial.sources) <= budget_bytes
        ]
        if made:
            short[kind] = min(made, key=lambda trial: _size(trial, kind))
            long[kind] = min(made, key=_reach(shape, kind, wanted_bytes))
            active = shape.active_bytes[kinds.index(kind)] * long[kind].counts[kind]
            middle[kind] = min(made, key=_reach(shape, kind, active // 4))
            if kind == order[0]:
                candidates = made
    if order[0] not in short:
        return Trials(order, short, middle, long, None, None, 0)
    single, several, times = _pair(candidates, order[0])
    return Trials(order, short, middle, long, single, several, times)


def tail(shape: ModelShape, budget_bytes: int) -> Trial | None:
    """The shortest window that ends in the output head, None where it is too large to try."""
    starts = [
        first for first in shape.cut_starts if first and not shape.refusal(first, shape.layers)
    ]
    for first in sorted(starts, reverse=True):
        if shape.window_bytes(first, shape.layers) <= budget_bytes:
            return itself(shape, first, shape.layers)
        break
    return None


def itself(shape: ModelShape, first: int, last: int) -> Trial:
    """The window [first, last) as it is in the model."""
    inside = shape.kinds[first:last]
    counts = tuple(inside.count(kind) for kind in range(max(shape.kinds) + 1))
    return Trial(first, last, tuple(range(first, last)), counts)


def _allowed(shape: ModelShape) -> list[tuple[int, int]]:
    """Windows that are neither the whole model nor its end: those have more to do than layers."""
    edges = [*shape.cut_starts[: STARTS_MAX + 1]]
    return [
        (first, last)
        for first in edges
        for last in edges
        if first < last <= first + LENGTH_MAX
        and last < shape.layers
        and not shape.refusal(first, last)
    ]


def _trial(
    shape: ModelShape,
    families: Sequence[int],
    order: Sequence[int],
    kind: int,
    first: int,
    last: int,
) -> Trial:
    """The window with every layer that can be one of `kind` made so, the others of main kinds."""
    kinds = shape.kinds
    wanted = kinds.index(kind)
    stand_in: dict[int, int] = {families[wanted]: wanted}
    for other in order:
        stand_in.setdefault(families[kinds.index(other)], kinds.index(other))
    sources = tuple(stand_in.get(families[layer], layer) for layer in range(first, last))
    counts = [0] * (max(kinds) + 1)
    for source in sources:
        counts[kinds[source]] += 1
    return Trial(first, last, sources, tuple(counts))


def _size(trial: Trial, kind: int) -> tuple[bool, int, bool]:
    """Orders short trials: of one kind alone, few layers, without the token embedding."""
    return trial.counts[kind] < trial.layers, trial.layers, trial.first == 0


def _reach(
    shape: ModelShape, kind: int, wanted_bytes: int
) -> Callable[[Trial], tuple[bool, float, float, int, bool]]:
    """Orders long trials: of one kind alone, of the bytes that are wanted, then as pure and few."""
    active = max(1, shape.active_bytes[shape.kinds.index(kind)])

    def key(trial: Trial) -> tuple[bool, float, float, int, bool]:
        count = trial.counts[kind]
        missing = max(0.0, 1 - count * active / max(1, wanted_bytes))
        mixed = trial.layers - count
        return mixed > 0, missing, mixed / trial.layers, trial.layers, trial.first == 0

    return key


def _pair(made: Sequence[Trial], kind: int) -> tuple[Trial | None, Trial | None, int]:
    """A short window and one of the same mixture with several times its layers, and how many."""
    for single in sorted(made, key=lambda trial: _size(trial, kind))[:PAIRS_MAX]:
        for times in (2, 3, 4):
            wanted = tuple(count * times for count in single.counts)
            fitting = [trial for trial in made if trial.counts == wanted]
            if fitting:
                return single, min(fitting, key=lambda trial: _size(trial, kind)), times
    return None, None, 0


# What the times say ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sample:
    """One step. held: something else took a processor away from it meanwhile."""

    seconds: float
    held: bool = False


def quick_s(samples: Sequence[Sample]) -> float:
    """The time of a step that nothing held up.

    The median of the faster two thirds of those from which nothing was taken (of the faster half it
    was 8 % less than llama.cpp took alone); where there are none, the fastest.
    """
    if not samples:
        raise ValueError("no step was timed")
    free = sorted(sample.seconds for sample in samples if not sample.held)
    if not free:
        return min(sample.seconds for sample in samples)
    return median(free[: max(1, 2 * len(free) // 3)])


def is_free(samples: Sequence[Sample]) -> bool:
    """Whether there is any that nothing held up."""
    return any(not sample.held for sample in samples)


def around_s(single_s: float, several_s: float, times: int) -> float:
    """What a step costs around the layers, of a window and one of `times` as many layers."""
    return min(single_s, max(0.0, (times * single_s - several_s) / (times - 1)))


def by_kind(
    rows: Sequence[tuple[Sequence[int], float]], weights: Sequence[int]
) -> tuple[float, ...]:
    """Seconds for one layer of each kind.

    rows: (layers of each kind in a window, its seconds). weights: what a kind should cost compared
    with the others (bytes); it decides where the rows do not.
    """
    if not rows:
        raise ValueError("no window was timed")
    counts = np.array([row for row, _ in rows], dtype=np.float64)
    seconds = np.maximum(np.array([value for _, value in rows], dtype=np.float64), 0.0)
    scale = np.maximum(np.array(weights, dtype=np.float64), 1.0)
    work = counts @ scale
    rate = float(seconds.sum() / max(work.sum(), 1.0))
    costs: list[float] = (scale * rate).tolist()
    seen = np.flatnonzero(counts.any(axis=0))
    relative = counts[:, seen] * scale[seen] / work[:, None]
    if len(rows) >= len(seen) and np.linalg.cond(relative) <= CONDITION_MAX:
        rates = np.linalg.lstsq(relative, seconds / work, rcond=None)[0]
        if (rates > 0).all():
            for place, kind in enumerate(seen.tolist()):
                costs[kind] = float(rates[place] * scale[kind])
    return tuple(costs)


def short_chunks(took: Mapping[int, float], window_s: float) -> tuple[tuple[int, float], ...]:
    """(rows, what a row takes) of all chunks but the longest, as a multiple of what it takes there;
    less than once is noise.

    took: seconds of a window by rows; window_s: what a step costs around its layers.
    """
    longest = max(took, default=0)

    def row_s(rows: int) -> float:
        return max(took[rows] - window_s, took[rows] / 2) / rows

    shorter = (rows for rows in sorted(took) if 1 < rows < longest)
    return tuple((rows, max(1.0, round(row_s(rows) / row_s(longest), 3))) for rows in shorter)


def chunk_rows(some_rows: int, some_s: float, longest_s: float, rows_max: int) -> int:
    """Rows of a prefill chunk: `rows_max`, or the largest half of it that is not too long.

    some_s: what `some_rows` took.
    """
    rows = rows_max
    while rows > _LEAST_ROWS and some_s * rows / some_rows > longest_s:
        rows //= 2
    return rows
