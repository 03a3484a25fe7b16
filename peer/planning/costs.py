"""What a split takes: seconds and bytes, from profiles and a model's shape. Pure.

One token visits the windows one after another: TPOT is the sum of all windows (see `abilities`) and
hops, and of the disk time that nothing hides. How long a prompt takes is `pipeline`'s.

Many answers. Groups of them are in flight in all stages at once: what counts is the slowest stage
or link. A step of a group reads weights once for all its rows, and beside it prompts are read.

Streaming. A peer that holds less than it needs reads X bytes again for each token, at the disk's
speed: D = X / speed. With one round the memory is full of what was used last when its turn comes,
so all of D is waited for. With k rounds it can keep a buffer of F bytes for the window that comes
next and fill it while the others compute: k F bytes are then read for a token, F fewer stay
resident. The best F that the free time T - busy - E allows leaves
E = max(0, k D - (k - 1) (T - busy)), and the buffer cannot be larger than what the peer has room
for. T, the time of a token, stands on both sides: `token_s` finds the least one. (halka's own: the
paper lets nothing overlap, so its objective can never prefer k > 1; arXiv:2504.08791, section 3.2.)

Left to itself the kernel would read all of a cyclic scan again. That only X or k F bytes are read
is the stage's doing: see `ring.residence`, which was measured to read what is said here.

Throttling. A control group that allows a share of the processor's time does not slow a short turn
down, but T cannot be less than the turn divided by the share.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from peer.planning.abilities import FILL_TOKENS as FILL_TOKENS
from peer.planning.abilities import GPU_HEADROOM_BYTES as GPU_HEADROOM_BYTES
from peer.planning.abilities import Able as Able
from peer.planning.abilities import Floats as Floats
from peer.planning.abilities import Size as Size
from peer.planning.pipeline import (
    GROUP_TOKENS,
    NOTHING,
    Curve,
    Reading,
    Ways,
    best_chunk,
    in_flight,
    ttft_s,
)
from peer.planning.pipeline import PROMPT_TOKENS as PROMPT_TOKENS
from peer.planning.plan import Forecast, PeerForecast, Split
from peer.planning.problems import BYTES_PER_S as BYTES_PER_S
from peer.planning.problems import HOP_S as HOP_S
from peer.planning.problems import RTT_S as RTT_S
from peer.planning.problems import UNREACHED_S as UNREACHED_S
from peer.planning.problems import Problem as Problem
from peer.planning.problems import compute_bytes as compute_bytes
from peer.planning.problems import cut_off as cut_off
from peer.planning.problems import logits_bytes as logits_bytes
from peer.planning.problems import of_split as of_split
from peer.planning.problems import problem as problem
from peer.planning.profile import ModelShape, Profile

PROMPT_SHARE = 2.0  # tokens of prompts that are read for each token of an answer, where many run
HEAD_S = 3.3e-4  # of the head for each token: scheduling, and telling the entry peer
HOP_CPU_S = 3.8e-4  # of a stage's processor for each hop; a part of it overlaps with the wire
AnyFloats = TypeVar("AnyFloats", float, Floats)


# One peer's part -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Part:
    """What a peer's windows take together.

    busy_s: computing, for a token; cpu_s: its processor's time, with what hops take of it. read_s:
    D; room_s: reading, once, all that could stay resident. gpu_layers: of each window, the last
    ones. memory_bytes: with what is streamed. group_s, group_cpu_s: as busy_s and cpu_s, for each
    token of a step of GROUP_TOKENS. prefill_s: of the longest step, all of it prompt; reading: of
    any.
    """

    busy_s: float
    cpu_s: float
    prefill_s: float
    read_s: float
    room_s: float
    memory_bytes: int
    gpu_bytes: int
    streamed_bytes: int
    gpu_layers: int
    group_s: float = 0.0
    group_cpu_s: float = 0.0
    reading: Reading = NOTHING

    def reading_at(self, share: float) -> Reading:
        """Of prompts, where the peer may use this share of its processor's time."""
        on_cpu = min(1.0, self.cpu_s / self.busy_s)
        return replace(self.reading, slower=1 + on_cpu * (1 / share - 1))

    def load_s(self, share: float, batch_tokens: int) -> float:
        """What each token of many answers takes the stage up, with its share of prompts."""
        told = self.group_s, self.group_cpu_s, self.busy_s, self.cpu_s, self.prefill_s, self.read_s
        return float(load_s(*told, share, batch_tokens))

    def waits_s(self, rounds: int, token_s: float) -> float:
        """E: disk time for a token of `token_s` that nothing hides."""
        return exposed(self.read_s, self.room_s, self.busy_s, rounds, token_s)

    def ahead_bytes(self, rounds: int, token_s: float) -> int:
        """F: the buffer that leaves so much to be waited for; -1 where nothing streams."""
        if not self.streamed_bytes:
            return -1
        hidden = 1 - self.waits_s(rounds, token_s) / self.read_s
        return int(self.streamed_bytes * hidden) // (rounds - 1) if rounds > 1 else 0


def exposed(read_s: float, room_s: float, busy_s: float, rounds: int, token_s: float) -> float:
    """E of this module's first lines."""
    if rounds == 1 or read_s == 0:
        return read_s
    hidden = rounds * read_s - (rounds - 1) * (token_s - busy_s)
    return max(0.0, hidden, read_s - (rounds - 1) * room_s)


def part(
    of: Problem, able: Able, windows: Sequence[tuple[int, int]], gpu_layers: int
) -> Part | None:
    """What [first, last) of every round would take with so many of each window's last layers on the
    GPU; None where the peer cannot hold it."""
    shape, cells = able.held, of.size.kv_cells
    gpu_layers = _on_gpu(able, windows, gpu_layers)
    head, tail = windows[0][0] == 0, windows[-1][1] == shape.layers
    cpu, gpu = _placed(windows, gpu_layers)
    scratch = len(windows) * of.compute_bytes
    weights = sum(shape.layer_bytes[i] for i in cpu)
    ram = weights + cells * sum(shape.layer_kv_bytes[i] for i in cpu) + scratch
    ends = of.end_bytes(able, head, tail)
    ram += 0 if gpu else ends
    vram = sum(shape.layer_bytes[i] + cells * shape.layer_kv_bytes[i] for i in gpu)
    vram += scratch + ends if gpu else 0
    if able.unified:
        ram += vram - (scratch if gpu else 0)
    streamed = max(0, ram - able.ram_bytes)
    if vram > (able.gpu_bytes if gpu else 0) or streamed > weights:
        return None
    if streamed and not able.disk_bytes_per_s:
        return None
    spent = _times(able, cpu, gpu, len(windows), tail)
    whole = len(cpu) + len(gpu) == shape.layers
    head_s, hops_cpu_s = HEAD_S * head, HOP_CPU_S * len(windows) * (not whole)
    rate = able.disk_bytes_per_s or 1.0
    return Part(
        busy_s=spent.busy_s + head_s,
        cpu_s=spent.cpu_s + head_s + hops_cpu_s,
        group_s=spent.group_s + head_s,
        group_cpu_s=spent.group_cpu_s + head_s + hops_cpu_s / GROUP_TOKENS,
        prefill_s=spent.prefill_s,
        reading=Reading(
            spent.around_s + head_s + hops_cpu_s, spent.rows, spent.output_s, streamed / rate
        ),
        read_s=streamed / rate,
        room_s=(weights - streamed) / rate,
        memory_bytes=ram,
        gpu_bytes=vram,
        streamed_bytes=streamed,
        gpu_layers=gpu_layers,
    )


def _on_gpu(able: Able, windows: Sequence[tuple[int, int]], gpu_layers: int) -> int:
    """Of so many that are wanted there."""
    if able.whole:
        return max(b - a for a, b in windows)
    return gpu_layers if able.gpu else 0


def _placed(windows: Sequence[tuple[int, int]], gpu_layers: int) -> tuple[list[int], list[int]]:
    """The layers on the processor and on the GPU: there the last ones of each window."""
    cpu = [i for a, b in windows for i in range(a, max(a, b - gpu_layers))]
    return cpu, [i for a, b in windows for i in range(max(a, b - gpu_layers), b)]


@dataclass(frozen=True, slots=True)
class _Spent:
    """Seconds of layers, their windows and the output head; names as in Part and Reading."""

    busy_s: float
    cpu_s: float
    group_s: float
    group_cpu_s: float
    prefill_s: float
    around_s: float
    output_s: float
    rows: tuple[tuple[float, Curve], ...]


def _times(able: Able, cpu: list[int], gpu: list[int], windows: int, tail: bool) -> _Spent:
    """cpu, gpu: layers on each."""
    paces = [(able.cpu, cpu), *([(able.gpu, gpu)] if able.gpu else [])]
    cpu_s, *gpu_s = [float(pace.decode_s[layers].sum()) for pace, layers in paces]
    last = able.gpu if gpu and able.gpu else able.cpu
    output_s = last.output_s if tail else 0.0
    around_s = windows * max(p.window_s for p, layers in paces if layers)
    prefill = [(float(p.prefill_s[layers].sum()), p) for p, layers in paces if layers]
    cpu_ends_s = 0.0 if gpu else output_s
    group_cpu_s = (cpu_s + cpu_ends_s) * able.cpu.by.group + around_s / GROUP_TOKENS
    group_gpu_s = (sum(gpu_s) + output_s - cpu_ends_s) * last.by.group
    return _Spent(
        busy_s=cpu_s + sum(gpu_s) + output_s + around_s,
        cpu_s=cpu_s + around_s + cpu_ends_s,
        group_s=group_cpu_s + group_gpu_s,
        group_cpu_s=group_cpu_s,
        prefill_s=sum(seconds for seconds, _ in prefill) + output_s,
        around_s=around_s,
        output_s=output_s,
        rows=tuple((p.row_s(seconds), p.by) for seconds, p in prefill),
    )


def busy_s(of: Problem, able: Able, windows: Sequence[tuple[int, int]], gpu_layers: int) -> float:
    """Seconds that a stage computes for a token, whether its windows fit or not."""
    cpu, gpu = _placed(windows, _on_gpu(able, windows, gpu_layers))
    return _times(able, cpu, gpu, len(windows), windows[-1][1] == of.shape.layers).busy_s


def windows(layers: int, rounds: int, edge: tuple[int, int]) -> list[tuple[int, int]]:
    """A peer's windows [first, last), round after round; edge: where they lie in each round."""
    starts = range(0, layers, layers // rounds)
    return [(start + edge[0], start + edge[1]) for start in starts]


# All of them -----------------------------------------------------------------------------------


def token_s(
    rounds: int,
    hops_s: float,
    busy_s: Sequence[float],
    cpu_least_s: Sequence[float],
    read_s: Sequence[float],
    room_s: Sequence[float],
) -> float:
    """T: the least time of a token that hops, computing, throttling and disks allow. One entry a
    peer; cpu_least_s: its cpu_s divided by its share.

    What the disks leave to be waited for falls with T, and convexly: Newton's method from below
    ends after as many steps as there are peers, at most twice.
    """
    least = hops_s + sum(busy_s)
    token = max(least, *cpu_least_s)
    for _ in range(4 * len(busy_s) + 4):
        waits = [exposed(*m, rounds, token) for m in zip(read_s, room_s, busy_s, strict=True)]
        wanted = least + sum(waits)
        if wanted <= token * (1 + 1e-12):
            return token
        floors = zip(waits, read_s, room_s, strict=True)
        slope = sum(rounds - 1 for e, d, r in floors if e > max(0.0, d - (rounds - 1) * r))
        token = (wanted + slope * token) / (1 + slope)
    return token


def load_s(
    group_s: Floats | float,
    group_cpu_s: Floats | float,
    busy_s: Floats | float,
    cpu_s: Floats | float,
    prefill_s: Floats | float,
    read_s: Floats | float,
    share: float,
    batch_tokens: int,
) -> Floats:
    """What each token of many answers takes a stage up, with its share of prompts: computing, on
    its processor where that is throttled, or reading. The rest: as in Part."""
    row = PROMPT_SHARE / batch_tokens
    on_cpu = np.minimum(1.0, cpu_s / np.maximum(busy_s, 1e-12))
    throttled_s = (group_cpu_s + row * prefill_s * on_cpu) / share
    computing_s = np.maximum(group_s + row * prefill_s, throttled_s)
    each: Floats = np.maximum(computing_s, read_s * (1 / GROUP_TOKENS + row))
    return each


def hops_s(of: Problem, order: Sequence[int], rounds: int) -> float:
    """What the links take of a token's time. order: indices of peers, head first."""
    return _around(of.hop_s, order, rounds) + _closing(of, order)


def _around(matrix: Floats, order: Sequence[int], rounds: int) -> float:
    if len(order) == 1:
        return 0.0
    along = sum(float(matrix[a, b]) for a, b in itertools.pairwise(order))
    return rounds * along + (rounds - 1) * float(matrix[order[-1], order[0]])


def _closing(of: Problem, order: Sequence[int]) -> float:
    return float(of.close_s[order[-1], order[0]]) if len(order) > 1 else 0.0


def evaluate(
    of: Problem, order: Sequence[int], rounds: int, parts: Sequence[Part], chunk_tokens: int = 0
) -> Forecast:
    """What this ring would do. parts: one a peer, as `order`. chunk_tokens: 0: what is best."""
    shares = [max(1e-6, of.peers[i].profile.cpu_share) for i in order]
    hops, ways, batch = hops_s(of, order, rounds), _ways(of, order, rounds), of.size.batch_tokens
    token = token_s(
        rounds,
        hops,
        [p.busy_s for p in parts],
        [p.cpu_s / share for p, share in zip(parts, shares, strict=True)],
        [p.read_s for p in parts],
        [p.room_s for p in parts],
    )
    reading = [p.reading_at(share) for p, share in zip(parts, shares, strict=True)]
    chunk = chunk_tokens or best_chunk(reading, ways, rounds, batch)
    peers = tuple(
        PeerForecast(
            peer_id=of.peers[i].peer_id,
            decode_s=p.busy_s,
            prefill_s=p.reading.computing_s(min(chunk, PROMPT_TOKENS)),
            disk_s=p.waits_s(rounds, token),
            memory_bytes=p.memory_bytes - p.streamed_bytes,
            gpu_bytes=p.gpu_bytes,
            streamed_bytes=p.streamed_bytes,
            measured=of.peers[i].cpu.measured or bool((g := of.peers[i].gpu) and g.measured),
        )
        for i, p in zip(order, parts, strict=True)
    )
    loads = [p.load_s(share, batch) for p, share in zip(parts, shares, strict=True)]
    return Forecast(
        tpot_s=token,
        ttft_s=ttft_s(PROMPT_TOKENS, chunk, reading, ways, rounds),
        prompt_tokens=PROMPT_TOKENS,
        hops_s=hops,
        stage_s=_stage_s(parts, shares, hops, ways, rounds),
        peers=peers,
        chunk_tokens=chunk,
        load_s=max(*loads, link_load_s(ways.busiest_s)),
    )


def link_load_s(row_s: AnyFloats) -> AnyFloats:
    """What each token of many answers takes a link up, with its share of prompts."""
    return row_s * (1 + PROMPT_SHARE)


def _stage_s(
    parts: Sequence[Part], shares: Sequence[float], hops_s: float, ways: Ways, rounds: int
) -> float:
    """Of the slowest stage or link for each token of many answers; or what the way around allows,
    with as many groups on it as there may be."""
    each = [
        max(p.group_s, p.group_cpu_s / share, p.read_s / GROUP_TOKENS)
        for p, share in zip(parts, shares, strict=True)
    ]
    around = sum(p.group_s for p in parts) + (hops_s + sum(p.read_s for p in parts)) / GROUP_TOKENS
    return max(*each, ways.busiest_s, around / in_flight(len(parts), rounds))


def _ways(of: Problem, order: Sequence[int], rounds: int) -> Ways:
    """What the links take of a prompt."""
    if len(order) == 1:
        return Ways()
    along = max(float(of.wire_s[a, b]) for a, b in itertools.pairwise(order))
    back = float(of.wire_s[order[-1], order[0]])
    row_s = _around(of.wire_s, order, rounds)
    return Ways(
        along_s=_around(of.hop_s, order, rounds) - row_s,
        row_s=row_s,
        busiest_s=max(rounds * along, (rounds - 1) * back),
        closing_s=_closing(of, order),
    )


def forecast(profiles: Sequence[Profile], shape: ModelShape, split: Split) -> Forecast | None:
    """What a split would do with these profiles; None where one of its peers is not among them, has
    its engine no more, or cannot hold its windows."""
    of = of_split(profiles, shape, split)
    index = {able.peer_id: i for i, able in enumerate(of.peers)}
    ring = list(dict.fromkeys(w.peer_id for w in split.windows))
    if not all(peer_id in index for peer_id in ring):
        return None
    parts, order = [], [index[peer_id] for peer_id in ring]
    for at, peer_id in zip(order, ring, strict=True):
        mine = [w for w in split.windows if w.peer_id == peer_id]
        layers = mine[0].gpu_layers if mine[0].gpu_layers >= 0 else shape.layers
        found = part(of, of.peers[at], [(w.first, w.last) for w in mine], layers)
        if found is None:
            return None
        parts.append(found)
    chunk_tokens = split.chunk_tokens or split.batch_tokens
    return evaluate(of, order, len(split.windows) // len(ring), parts, chunk_tokens)
