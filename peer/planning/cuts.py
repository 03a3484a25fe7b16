"""Which windows of a model are allowed and fit, and which of them lie nearest to shares. Pure.

A matrix over all windows of 4,096 layers takes 2 GiB. None is needed: for every end b, the allowed
and fitting beginnings are those between two bounds that only grow with b. So prefix sums and
searches in sorted arrays tell whether a ring can hold a model, in O(layers) a peer; and since the
cost of a window is convex in its length, the nearest windows are found in O(layers log layers) a
peer by bisection (row minima of a totally monotone matrix: Aggarwal et al., "Geometric applications
of a matrix-searching algorithm", 1987).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from peer.planning.profile import ModelShape

_ABSENT = 1e12  # cost of leaving a peer out where all are wanted; > any sum of squared layers

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


class Cuts:
    """What `ModelShape.refusal` allows, as bounds.

    starts: layers from 1 on before which a window may begin, ascending. begins: whether one other
    than the whole may begin at 0. ends: [layers + 1], whether a window may end there. latest:
    [layers + 1], the last beginning with which a window ending there has a layer of every group.
    """

    def __init__(self, shape: ModelShape) -> None:
        n = self.layers = shape.layers
        may = np.zeros(n + 1, np.bool_)
        if not shape.whole_why:
            may[[start for start in shape.cut_starts if start < n]] = True
        self.begins = bool(may[0])
        self.ends = may.copy()
        self.ends[n] = not shape.whole_why
        self.starts: Ints = np.flatnonzero(may[1:]) + 1
        self.latest: Ints = np.arange(n + 1) - 1
        for group in shape.cut_groups:
            layers = np.array([layer for layer in group if layer < n], np.int64)
            members = np.full(n + 1, -1, np.int64)
            members[layers + 1] = layers
            self.latest = np.minimum(self.latest, np.maximum.accumulate(members))
        self._after = np.searchsorted(self.starts, self.latest, "right")

    def band(self, earliest: Ints) -> tuple[Ints, Ints]:
        """([layers + 1], [layers + 1]): indices into `starts` between which the beginnings of a
        window lie that ends there, where none may be before `earliest`. The second is not in it."""
        left = np.searchsorted(self.starts, earliest)
        right = np.where(self.ends, self._after, 0)
        return np.minimum(left, right), right


@dataclass(slots=True, eq=False)
class Needs:
    """Bytes that stages need for windows of one model with so much KV cache.

    each: [layers], weights and KV. compute: of every stage. embed: the head's besides. tail: the
    last one's besides; tied: what that needs, too, where it is not the head.
    """

    cuts: Cuts
    each: Ints
    compute: int
    embed: int
    tail: int
    tied: int
    _sums: Ints = field(init=False)
    _fits: dict[int, _Fits] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._sums = np.concatenate([[0], np.cumsum(self.each)])

    @property
    def whole(self) -> int:
        """Of one stage with all layers."""
        return int(self._sums[-1]) + self.compute + self.embed + self.tail

    @property
    def least(self) -> int:
        """Of the smallest window that is allowed."""
        cuts = self.cuts
        _, right = cuts.band(np.zeros(cuts.layers + 1, np.int64))
        ends = np.flatnonzero(right)
        sizes = self._sums[ends] - self._sums[cuts.starts[right[ends] - 1]] + self.compute
        sizes[ends == cuts.layers] += self.tail + self.tied
        heads = self._heads()[cuts.ends & (cuts.latest >= 0) & cuts.begins]
        return int(np.concatenate([[self.whole], sizes, heads]).min())

    def _heads(self) -> Ints:
        """[layers + 1]: of the window [0, b)."""
        heads: Ints = self._sums + (self.compute + self.embed)
        heads[-1] += self.tail
        return heads

    def fits(self, memory_bytes: int) -> _Fits:
        """The windows that a stage with so much memory can have."""
        if memory_bytes not in self._fits:
            cuts, spare = self.cuts, memory_bytes - self.compute
            wanted = self._sums - spare
            wanted[-1] += self.tail + self.tied
            left, right = cuts.band(np.searchsorted(self._sums, wanted))
            heads = cuts.ends & (cuts.latest >= 0) & cuts.begins
            heads[-1] = True  # the whole is always allowed
            heads &= self._heads() <= memory_bytes
            self._fits[memory_bytes] = _Fits(cuts, left, right, heads)
        return self._fits[memory_bytes]


@dataclass(frozen=True, slots=True, eq=False)
class _Fits:
    """The windows [a, b) that one peer can have. left, right: as `Cuts.band` says, for a > 0.
    heads: [layers + 1], whether it can have [0, b)."""

    cuts: Cuts
    left: Ints
    right: Ints
    heads: Flags

    def reach(self, reached: Flags, may_skip: bool) -> Flags:
        """[layers + 1]: where the layers so far can end with this peer, from where without it."""
        count = np.concatenate([[0], np.cumsum(reached[self.cuts.starts])])
        ends: Flags = count[self.right] > count[self.left]
        if reached[0]:
            ends |= self.heads
        return ends | reached if may_skip else ends

    def nearest(self, best: Floats, share: float, absent: float) -> tuple[Floats, Ints]:
        """One step of `nearest`: ([layers + 1] least costs, [layers + 1] beginnings)."""
        costs = best + (share**2 + absent)
        begins: Ints = np.arange(len(best))
        here = np.isfinite(best[self.cuts.starts])
        columns = self.cuts.starts[here]
        count = np.concatenate([[0], np.cumsum(here)])
        left, right = count[self.left], count[self.right]
        rows = np.flatnonzero(right > left)
        if len(rows):
            found = _row_minima(rows, columns, best[columns], left[rows], right[rows], share)
            at = columns[found]
            row_costs = best[at] + (rows - at - share) ** 2
            better = row_costs <= costs[rows]
            costs[rows[better]] = row_costs[better]
            begins[rows[better]] = at[better]
        head_costs = best[0] + (np.arange(len(best)) - share) ** 2
        better = self.heads & (head_costs <= costs) & np.isfinite(head_costs)
        return np.where(better, head_costs, costs), np.where(better, 0, begins)


def reaches(needs: Needs, memories: Sequence[int], may_skip: bool) -> bool:
    """Whether peers with so much memory can hold all layers, in this order. may_skip: with some of
    them left out."""
    reached = np.zeros(needs.cuts.layers + 1, np.bool_)
    reached[0] = True
    for memory_bytes in memories:
        reached = needs.fits(memory_bytes).reach(reached, may_skip)
    return bool(reached[-1])


def nearest(
    needs: Sequence[Needs], memories: Sequence[int], want_all: bool
) -> list[tuple[int, int]]:
    """The window [a, b) of each peer in ring order, (a, a) for none; [] where nothing fits. needs,
    memories: one a peer.

    A dynamic programme over (peers so far, layers so far): the least sum of squared distances
    between what a peer gets and its share, so that allowed cuts nearest to the shares are taken.
    want_all: a peer without a window costs more than any distance.
    """
    n, total = needs[0].cuts.layers, sum(memories) or 1
    best = np.full(n + 1, np.inf)
    best[0] = 0.0
    steps = []
    for of_peer, memory_bytes in zip(needs, memories, strict=True):
        share = n * memory_bytes / total
        fits = of_peer.fits(memory_bytes)
        best, begins = fits.nearest(best, share, _ABSENT if want_all else 0.0)
        steps.append(begins)
    if not np.isfinite(best[n]):
        return []
    edges, b = [], n
    for begins in reversed(steps):
        a = int(begins[b])
        edges.append((a, b))
        b = a
    return edges[::-1]


def _row_minima(
    rows: Ints, columns: Ints, best: Floats, left: Ints, right: Ints, share: float
) -> Ints:
    """[rows]: for each b, the first index in left … right of the a with the least
    best[a] + (b - a - share)².

    The bounds grow with the rows and every row has one column at least. Where the minimum lies
    grows with the rows, too: once every second row is known, the others are searched in between.
    """
    size = len(rows)
    top = 1 << size.bit_length()
    found = np.full(top + 1, len(columns) - 1, np.int64)  # of row i at i + 1, between two edges
    found[0] = 0
    half = top // 2
    while half:
        at = np.arange(half, size + 1, 2 * half)
        low = np.maximum(left[at - 1], found[at - half])
        counts = np.minimum(right[at - 1] - 1, found[at + half]) - low + 1
        offsets = np.cumsum(counts) - counts
        tried = np.arange(int(counts.sum())) + np.repeat(low - offsets, counts)
        distances = np.repeat(rows[at - 1], counts) - columns[tried]
        costs = best[tried] + (distances - share) ** 2
        least = np.flatnonzero(costs == np.repeat(np.minimum.reduceat(costs, offsets), counts))
        found[at] = tried[least[np.searchsorted(least, offsets)]]
        half //= 2
    return found[1 : size + 1]
