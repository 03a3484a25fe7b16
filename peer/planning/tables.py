"""What every peer would take for every window of a round: `costs.part` for all at once. Pure.

A ring of k rounds over L layers gives each peer the window [a, b) of every round's W = L / k
layers, so that its layers are c W + a … c W + b for c < k. Sums over those layers are differences
of sums folded over the rounds: a table of all (a, b) takes a few operations on square arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from peer.planning.costs import HEAD_S, HOP_CPU_S, Able, Floats, Problem, load_s
from peer.planning.cuts import Cuts, Flags, Ints
from peer.planning.pipeline import GROUP_TOKENS
from peer.planning.profile import ModelShape

_Number = TypeVar("_Number", np.int64, np.float64)

ALL_CHOICES_WIDTH = 24  # layers of a round up to which every number of GPU layers is looked at


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """One peer's windows, [..., W + 1, W + 1] each: row a, column b. fits: it can have [a, b) in
    every round. The others: see `costs.Part`; undefined where it does not fit."""

    rounds: int
    fits: Flags
    busy_s: Floats
    cpu_s: Floats
    group_s: Floats
    group_cpu_s: Floats
    prefill_s: Floats
    read_s: Floats
    room_s: Floats
    gpu_layers: Ints
    share: float
    batch_tokens: int

    def token_s(self, token_s: float) -> Floats:
        """[W + 1, W + 1] what the window adds to a token of so many seconds; inf where it does not
        fit, or where throttling would make the token longer than that."""
        allowed = self.fits & (self.cpu_s <= self.share * token_s)
        busy, k = self.busy_s, self.rounds
        waits = self.read_s
        if k > 1:
            hidden = k * self.read_s - (k - 1) * (token_s - busy)
            waits = np.maximum(np.maximum(0.0, hidden), self.read_s - (k - 1) * self.room_s)
        return np.where(allowed, busy + waits, np.inf)

    @property
    def load_s(self) -> Floats:
        """[W + 1, W + 1] how long each token of many answers, with its share of prompts, takes the
        stage up; inf where it does not fit."""
        each = load_s(
            self.group_s, self.group_cpu_s, self.busy_s, self.cpu_s, self.prefill_s, self.read_s,
            self.share, self.batch_tokens,
        )  # fmt: skip
        return np.where(self.fits, each, np.inf)


class Tables:
    """The tables of all peers of a problem for so many rounds, which must divide the layers."""

    def __init__(self, of: Problem, rounds: int) -> None:
        if of.shape.layers % rounds:
            raise ValueError(f"{rounds} rounds do not divide {of.shape.layers} layers")
        self.of, self.rounds, self.width = of, rounds, of.shape.layers // rounds
        self._allowed = _allowed(of.shape, rounds)
        self._sums: dict[int, tuple[Ints, Ints]] = {}  # by the id of what a peer holds

    @cached_property
    def peers(self) -> tuple[Table, ...]:
        """One a peer, [W + 1, W + 1]: with as many GPU layers as fit, where the GPU is faster."""
        return tuple(self._table(able, self._gpu_from(able)) for able in self.of.peers)

    @cached_property
    def choices(self) -> tuple[Table, ...]:
        """One a peer, [choices, W + 1, W + 1]: with different numbers of GPU layers: which is
        best can depend on how long a token takes. All numbers where a round has few layers; where
        it has many, those between which the costs are linear if a GPU is faster than the processor
        for all kinds of layers or for none."""
        return tuple(self._table(able, self._gpu_choices(able)) for able in self.of.peers)

    def _bytes(self, able: Able) -> tuple[Ints, Ints]:
        """[W + 1] each, as `_folded`: of weights and of KV cache. Most peers hold the same."""
        held = able.held
        if id(held) not in self._sums:
            kv = np.array(held.layer_kv_bytes, np.int64) * self.of.size.kv_cells
            weights = np.array(held.layer_bytes, np.int64)
            self._sums[id(held)] = self._folded(weights), self._folded(kv)
        return self._sums[id(held)]

    def _folded(self, each: NDArray[_Number]) -> NDArray[_Number]:
        """[W + 1]: of x, the sum over the rounds of what lies in their first x layers."""
        sums = each.reshape(self.rounds, self.width).sum(axis=0)
        return np.concatenate([np.zeros(1, sums.dtype), np.cumsum(sums)])

    def _table(self, able: Able, starts: Ints) -> Table:
        """starts: [..., W + 1, W + 1], from which layer on the window [a, b) is on the GPU."""
        of, k = self.of, self.rounds
        n = self.width
        weights, kv = self._bytes(able)
        a, b = np.arange(n + 1)[:, None], np.arange(n + 1)[None, :]
        tail = b == n
        on_gpu = starts < b
        end = self._ends(able)
        scratch = k * of.compute_bytes
        cpu_weights = weights[starts] - weights[a]
        ram = cpu_weights + kv[starts] - kv[a] + scratch + np.where(on_gpu, 0, end)
        both = weights + kv
        vram = np.where(on_gpu, both[b] - both[starts] + scratch + end, 0)
        if able.unified:
            ram += vram - np.where(on_gpu, scratch, 0)
        streamed = np.maximum(0, ram - able.ram_bytes)
        fits = self._allowed & (streamed <= cpu_weights) & (vram <= able.gpu_bytes * on_gpu)
        if not able.disk_bytes_per_s:
            fits &= streamed == 0
        rate = able.disk_bytes_per_s or 1.0
        kept = cpu_weights - streamed
        return Table(
            k, fits, *self._times(able, a, b, starts, on_gpu, tail),
            streamed / rate, kept / rate, b - starts,
            max(1e-6, able.profile.cpu_share), of.size.batch_tokens,
        )  # fmt: skip

    def _times(
        self, able: Able, a: Ints, b: Ints, starts: Ints, on_gpu: Flags, tail: Flags
    ) -> tuple[Floats, Floats, Floats, Floats, Floats]:
        """busy, of that on the processor, the same two for a token of a group, and prefill."""
        cpu, gpu = able.cpu, able.gpu or able.cpu

        def spent(slow: Floats, fast: Floats) -> tuple[Floats, Floats]:
            slow, fast = self._folded(slow), self._folded(fast)
            return slow[starts] - slow[a], fast[b] - fast[starts]

        cpu_s, gpu_s = spent(cpu.decode_s, gpu.decode_s)
        output_s = np.where(on_gpu, gpu.output_s, cpu.output_s) * tail
        with_cpu = np.where(starts > a, cpu.window_s, 0.0)
        around_s = self.rounds * np.maximum(with_cpu, np.where(on_gpu, gpu.window_s, 0.0))
        hops_cpu_s = self.rounds * HOP_CPU_S * ~((a == 0) & tail)
        slow_s, fast_s = spent(cpu.prefill_s, gpu.prefill_s)
        cpu_s, gpu_s = cpu_s + np.where(on_gpu, 0.0, output_s), gpu_s + output_s * on_gpu
        head_s = HEAD_S * (a == 0)
        group_cpu_s = cpu_s * cpu.by.group + around_s / GROUP_TOKENS + head_s
        return (
            cpu_s + gpu_s + around_s + head_s,
            cpu_s + around_s + head_s + hops_cpu_s,
            group_cpu_s + gpu_s * gpu.by.group,
            group_cpu_s + hops_cpu_s / GROUP_TOKENS,
            slow_s + fast_s + output_s,
        )

    def _gpu_from(self, able: Able) -> Ints:
        """[W + 1, W + 1] from which layer on the window [a, b) is on the GPU: as many of the last
        as there is room for, where it is the faster one; b where none is."""
        if able.whole:
            return self._all
        if able.gpu is None or able.gpu.decode_s.sum() >= able.cpu.decode_s.sum():
            return self._none
        return self._most(able)

    def _gpu_choices(self, able: Able) -> Ints:
        """[choices, W + 1, W + 1] from which layer on the window [a, b) is on the GPU. In a wide
        round: nowhere; as many as fit; with memory of its own, as few as leave nothing to stream;
        else, as many as leave the processor enough to hide the streaming of what does not fit."""
        n = self.width
        a, b = np.arange(n + 1)[:, None], np.arange(n + 1)[None, :]
        if able.gpu is None:
            return self._none[None]
        if able.whole:
            return self._all[None]
        if n <= ALL_CHOICES_WIDTH:
            starts: Ints = b - np.arange(n + 1)[:, None, None]
            return np.minimum(np.maximum(starts, a), np.maximum(a, b))
        most, scratch = self._most(able), self.rounds * self.of.compute_bytes
        weights, kv = self._bytes(able)
        both = weights + kv
        if not able.unified:
            room = able.ram_bytes - scratch
            other = np.searchsorted(both, both[a] + room, side="right")
        elif self.rounds > 1:  # all of what is streamed needs a buffer besides: see `costs`
            need = both[b] - both[a] + scratch + self._ends(able)
            kept = np.maximum(0, need - able.ram_bytes) * self.rounds // (self.rounds - 1)
            other = np.searchsorted(weights, weights[a] + kept)
        else:
            return np.stack([self._none, most])
        # A layer more or less: what is left of one may be read, or not hidden, for less.
        around = [np.minimum(np.maximum(each, most), self._none) for each in (other, other - 1)]
        return np.stack([self._none, most, *around])

    @property
    def _none(self) -> Ints:
        b = np.arange(self.width + 1)[None, :]
        return np.broadcast_to(b, (self.width + 1, self.width + 1))

    @property
    def _all(self) -> Ints:
        """Every window from its first layer on."""
        a = np.arange(self.width + 1)[:, None]
        return np.broadcast_to(a, (self.width + 1, self.width + 1))

    def _ends(self, able: Able) -> Ints:
        """[W + 1, W + 1] what windows need besides their layers, most at the ends of the ring."""
        ends = np.full((self.width + 1,) * 2, self.of.end_bytes(able, False, False), np.int64)
        ends[0] = self.of.end_bytes(able, True, False)
        ends[:, -1] = self.of.end_bytes(able, False, True)
        ends[0, -1] = self.of.end_bytes(able, True, True)
        return ends

    def _most(self, able: Able) -> Ints:
        n = self.width
        a, b = np.arange(n + 1)[:, None], np.arange(n + 1)[None, :]
        scratch, ends = self.rounds * self.of.compute_bytes, self._ends(able)
        weights, kv = self._bytes(able)
        both = weights + kv
        room = able.gpu_bytes - scratch - ends
        starts = np.searchsorted(both, both[b] - room)
        if able.unified:  # all but the processor's weights has to stay in the same memory
            room = able.ram_bytes - scratch - ends - (kv[b] - kv[a])
            starts = np.maximum(starts, np.searchsorted(weights, weights[b] - room))
        inside: Ints = np.minimum(np.maximum(starts, a), np.maximum(a, b))
        return inside


def _allowed(shape: ModelShape, rounds: int) -> Flags:
    """[W + 1, W + 1]: whether the architecture allows [a, b) in every round."""
    cuts, width = Cuts(shape), shape.layers // rounds
    begins = cuts.ends.copy()
    begins[0] = cuts.begins
    begins[-1] = False
    ok = np.ones((width + 1, width + 1), np.bool_)
    for start in range(0, shape.layers, width):
        here = slice(start, start + width + 1)
        ok &= begins[here, None] & cuts.ends[None, here]
        ok &= cuts.latest[None, here] >= np.arange(start, start + width + 1)[:, None]
    if rounds == 1:
        ok[0, width] = True
    return np.triu(ok, 1)
