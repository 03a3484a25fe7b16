"""What is asked of a solver, what it gives, and what windows cost it at a time of a token. Pure.

`Prices` turns the tables of one number of rounds into one square of costs a peer, which the
searches (`subsets`, `ring_order`) add up without knowing what they mean. `Ring` is made from what
they found by `costs.part` and `costs.evaluate` alone, so that a search can be wrong about what is
best, never about what a ring costs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from peer.planning import costs
from peer.planning.costs import Floats, Part, Problem
from peer.planning.plan import Forecast
from peer.planning.tables import Table, Tables
from peer.planning.wishes import Objective

Ints = NDArray[np.int64]
Step = tuple[int, int, int]  # peer, first, last: [first, last) of every round


@dataclass(frozen=True, slots=True)
class Before:
    """A ring that lost peers. order: those that are left, as they were; rounds: that it had. worth:
    share of the best ring's cost, by this objective, that staying like it may cost."""

    order: tuple[int, ...]
    rounds: int
    worth: float
    objective: Objective = "latency"


@dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    """What is asked. everyone: each peer of the problem gets a window. rounds: exactly so many, 0:
    chosen. pinned: peer -> [first, last), which it must have, in one round. missing: [peers,
    layers] bytes of each layer that a peer would have to fetch; ends: [peers, 2] what counts like
    such bytes where it becomes head, and tail. within: share of the best TPOT that fewer of them
    may cost, 0: as usual. order: of a ring that is there. before: keep as much of it as can be.
    """

    objective: Objective = "latency"
    everyone: bool = False
    rounds: int = 0
    pinned: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    missing: Floats | None = None
    ends: Floats | None = None
    within: float = 0.0
    order: tuple[int, ...] = ()
    before: Before | None = None

    def missing_bytes(self, ring: Ring, layers: int) -> float:
        """That would have to be fetched for a ring of a model of so many layers."""
        total = 0.0
        for peer, edge in zip(ring.order, ring.edges, strict=True):
            if self.missing is not None:
                for a, b in costs.windows(layers, ring.rounds, edge):
                    total += float(self.missing[peer, a:b].sum())
        if self.ends is not None:
            total += float(self.ends[ring.order[0], 0] + self.ends[ring.order[-1], 1])
        return total


@dataclass(frozen=True, slots=True)
class Ring:
    """An answer. order: peers' indices, head first; edges, gpu_layers, parts: one a peer in that
    order, [first, last) of every round and how many of those layers are on the GPU."""

    order: tuple[int, ...]
    edges: tuple[tuple[int, int], ...]
    rounds: int
    gpu_layers: tuple[int, ...]
    parts: tuple[Part, ...]
    forecast: Forecast

    @property
    def throttled(self) -> bool:
        """Whether the share of a processor, and no sum, makes its token as long as it is."""
        sums = sum(p.decode_s + p.disk_s for p in self.forecast.peers)
        return self.forecast.tpot_s > (sums + self.forecast.hops_s) * (1 + 1e-6)

    @property
    def broken(self) -> bool:
        """Whether two that do not reach each other are neighbours in it."""
        return self.forecast.hops_s >= costs.UNREACHED_S


def made(of: Problem, steps: Sequence[Step], rounds: int, gpu_layers: Sequence[int]) -> Ring | None:
    """The ring of these windows; None where one of its peers cannot hold its own."""
    parts = []
    for (peer, first, last), layers in zip(steps, gpu_layers, strict=True):
        windows = costs.windows(of.shape.layers, rounds, (first, last))
        part = costs.part(of, of.peers[peer], windows, layers)
        if part is None:
            return None
        parts.append(part)
    order = tuple(peer for peer, _, _ in steps)
    edges = tuple((first, last) for _, first, last in steps)
    told = costs.evaluate(of, order, rounds, parts)
    return Ring(order, edges, rounds, tuple(gpu_layers), tuple(parts), told)


@dataclass(frozen=True, slots=True)
class Lean:
    """What is added to the seconds of a token: so many for each second of TTFT and each byte that
    is missing. load_s: windows that take their stage up longer for each token of many answers are
    not allowed, links no more than between two that do not reach each other. uneven: seconds for
    the square of a peer's missing bytes, as all peers load at the same time."""

    ttft: float = 0.0
    missing: float = 0.0
    load_s: float = np.inf
    uneven: float = 0.0


PLAIN = Lean()


class Prices:
    """Costs of all windows of all peers for one number of rounds.

    edges: where in a round windows may begin and end, ascending, from 0 to the width; squares of
    costs have a row and a column for each. must: the peers that the ring needs.
    """

    def __init__(self, of: Problem, wanted: Wanted, rounds: int, streams: bool) -> None:
        self.of, self.rounds, self._wanted = of, rounds, wanted
        self.tables = Tables(of, rounds)
        self._tables = [self._kept(i, t, streams) for i, t in enumerate(self.tables.choices)]
        used = np.zeros(self.tables.width + 1, np.bool_)
        used[[0, -1]] = True
        for table in self._tables:
            used |= table.fits.any(axis=(0, 1)) | table.fits.any(axis=(0, 2))
        self.edges: Ints = np.flatnonzero(used)
        if len(self.edges) <= self.tables.width:
            self._tables = [_at(table, self.edges) for table in self._tables]
        self.must = frozenset(range(len(of.peers)) if wanted.everyone else wanted.pinned)
        self._chunks = -(-costs.PROMPT_TOKENS // of.size.batch_tokens)

    def _kept(self, peer: int, table: Table, streams: bool) -> Table:
        """Without what is not wanted."""
        fits = table.fits if streams else table.fits & (table.read_s == 0)
        if peer in self._wanted.pinned:
            first, last = self._wanted.pinned[peer]
            only = np.zeros(fits.shape[-2:], np.bool_)
            if 0 <= first < last <= self.tables.width:
                only[first, last] = True
            fits = fits & only
        return replace(table, fits=fits)

    def hops(self, lean: Lean = PLAIN) -> Floats:
        """[peers, peers] of a token, from each window to the next."""
        of = self.of
        each = self.rounds * (of.hop_s + lean.ttft * self._chunks * of.chunk_s)
        if lean.load_s == np.inf:
            return each
        slow = costs.link_load_s(self.rounds * of.wire_s) > lean.load_s
        return np.where(slow, costs.UNREACHED_S, each)

    def closing(self, lean: Lean = PLAIN) -> Floats:
        """[peers, peers] of a token, from the last window of a round to the first."""
        of, again = self.of, self.rounds - 1
        late = self._chunks * again * of.chunk_s + of.close_s
        return again * of.hop_s + of.close_s + lean.ttft * late

    def costs(self, token_s: float, lean: Lean = PLAIN) -> Floats:
        """[peers, edges, edges] seconds that a window adds to a token of so many; inf where it
        cannot be. With the best number of GPU layers."""
        each = [self._costs(i, token_s, lean).min(axis=0) for i in range(len(self._tables))]
        return np.stack(each)

    def stages(self) -> Floats:
        """[peers, edges, edges] seconds that each token of many answers takes the stage up; inf as
        above."""
        return np.stack([table.load_s.min(axis=0) for table in self._tables])

    def _costs(self, peer: int, token_s: float, lean: Lean) -> Floats:
        """[choices, edges, edges]."""
        table = self._tables[peer]
        each = table.token_s(token_s)
        if lean.ttft:
            on_cpu = np.minimum(1.0, table.cpu_s / np.maximum(table.busy_s, 1e-12))
            late = 1 + on_cpu * (1 / table.share - 1)  # as costs.evaluate has it
            each = each + lean.ttft * self._chunks * (table.prefill_s * late + table.read_s)
        if lean.missing:
            each = each + lean.missing * self._missing[peer]
        if lean.uneven:
            each = each + lean.uneven * self._missing[peer] ** 2
        if lean.load_s < np.inf:
            each = np.where(table.load_s <= lean.load_s, each, np.inf)
        return each

    @cached_property
    def _missing(self) -> Floats:
        """[peers, edges, edges] bytes that would have to be fetched."""
        peers, wanted = len(self.of.peers), self._wanted
        each = np.zeros((peers, self.of.shape.layers)) if wanted.missing is None else wanted.missing
        folded = each.reshape(peers, self.rounds, -1).sum(axis=1)
        sums = np.concatenate([np.zeros((len(folded), 1)), np.cumsum(folded, axis=1)], axis=1)
        sums = sums[:, self.edges]
        bytes_: Floats = np.maximum(0.0, sums[:, None, :] - sums[:, :, None])
        if wanted.ends is not None:
            bytes_[:, 0, :] += wanted.ends[:, :1]
            bytes_[:, :, -1] += wanted.ends[:, 1:]
        return bytes_

    def ring(self, steps: Sequence[Step], token_s: float, lean: Lean = PLAIN) -> Ring:
        """What a search found, with the GPU layers that are best for a token of so many seconds.
        steps: in indices of `edges`."""
        layers = []
        for peer, a, b in steps:
            best = int(self._costs(peer, token_s, lean)[:, a, b].argmin())
            layers.append(int(self._tables[peer].gpu_layers[best, a, b]))
        real = [(p, int(self.edges[a]), int(self.edges[b])) for p, a, b in steps]
        ring = made(self.of, real, self.rounds, layers)
        assert ring is not None, "the tables and costs.part disagree about what fits"
        return ring


def _at(table: Table, edges: Ints) -> Table:
    """The rows and columns of these edges."""
    rows, columns = edges[:, None], edges[None, :]
    here = (..., rows, columns)
    return replace(
        table,
        fits=table.fits[here],
        busy_s=table.busy_s[here],
        cpu_s=table.cpu_s[here],
        group_s=table.group_s[here],
        group_cpu_s=table.group_cpu_s[here],
        prefill_s=table.prefill_s[here],
        read_s=table.read_s[here],
        room_s=table.room_s[here],
        gpu_layers=table.gpu_layers[here],
    )
