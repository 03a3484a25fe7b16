"""What a split takes: seconds and bytes, from profiles and a model's shape. Pure.

Decoding reads every active weight once for a token, so a layer's time is what was measured for its
kind, and grows with the KV cache that is read beside it. One token visits the windows one after
another: TPOT is the sum of all windows and hops, and of the disk time that nothing hides.

Streaming. A peer that holds less than it needs reads X bytes again for each token, at the disk's
speed: D = X / speed. With one round the memory is full of what was used last when its turn comes,
so all of D is waited for. With k rounds it can keep a buffer of F bytes for the window that comes
next and fill it while the others compute: k F bytes are then read for a token, F fewer stay
resident. The best F that the free time T - busy - E allows leaves
E = max(0, k D - (k - 1) (T - busy)), and the buffer cannot be larger than what the peer has room
for. T, the time of a token, stands on both sides: `token_s` finds the least one. (halka's own: the
paper lets nothing overlap, so its objective can never prefer k > 1; arXiv:2504.08791, section 3.2.)

Left to itself the kernel drops what was used for the longest time, and a cyclic scan of 400 MiB
within 300 MiB reads all 400 again, every time. That only X or k F bytes are read is the stage's
doing: see `ring.residence`, which was measured to read what is said here.

Throttling. A control group that allows a share of the processor's time does not slow a short turn
down, but T cannot be less than the turn divided by the share.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from peer.planning.abilities import FILL_TOKENS as FILL_TOKENS
from peer.planning.abilities import GPU_HEADROOM_BYTES as GPU_HEADROOM_BYTES
from peer.planning.abilities import Able as Able
from peer.planning.abilities import Floats as Floats
from peer.planning.abilities import Pace as Pace
from peer.planning.abilities import Size as Size
from peer.planning.abilities import able
from peer.planning.plan import Forecast, PeerForecast, Split
from peer.planning.profile import Link, ModelShape, Profile

PROMPT_TOKENS = 512  # of the prompt whose TTFT is told
HEAD_S = 3.3e-4  # of the head for each token: scheduling, and telling the entry peer
HOP_CPU_S = 3.8e-4  # of a stage's processor for each hop; a part of it overlaps with the wire
HOP_S = 2e-4  # of the two stages' Python and ZeroMQ around a frame, beyond the wire
RTT_S = 1e-3  # of a link that was not measured: Ethernet and a switch
BYTES_PER_S = 6e7  # of such a link: half a Gbit/s
# Of a hop between two that do not reach each other: longer than any token that is waited for, so
# that every search goes another way where there is one; finite, so that sums stay numbers.
UNREACHED_S = 1e4


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """All that a solver needs. hop_s, chunk_s, close_s: [peers, peers], from row to column: the
    hidden state of a token, of a prefill chunk, and the sampled ids from tail to head."""

    shape: ModelShape
    size: Size
    peers: tuple[Able, ...]
    hop_s: Floats
    chunk_s: Floats
    close_s: Floats
    compute_bytes: int  # of each window, wherever it runs
    logits_bytes: int  # of the tail

    @property
    def tail_bytes(self) -> int:
        """What the last window needs besides its layers. (The first one's embedding is mapped, and
        a step touches only the rows of its tokens.)"""
        shape = self.shape
        return self.logits_bytes + shape.output_bytes + (shape.embed_bytes if shape.tied else 0)


def problem(profiles: Sequence[Profile], shape: ModelShape, size: Size) -> Problem:
    """What these peers could do with the model. Profiles without an engine are passed over."""
    peers = tuple(able(p, shape, size) for p in profiles if p.engines)
    bytes_hop, bytes_chunk = 4 * shape.hidden, 4 * shape.hidden * size.batch_tokens
    links = [[_link(a.profile, b.profile) for b in peers] for a in peers]
    apart = [[a is not b and cut_off(a.profile, b.profile) for b in peers] for a in peers]
    broken = np.array(apart, np.bool_).reshape(len(peers), len(peers))

    def matrix(carried: int) -> Floats:
        rows = [[0.0 if a is b else way(links[i][j], carried) for j, b in enumerate(peers)]
                for i, a in enumerate(peers)]  # fmt: skip
        ways = np.array(rows, np.float64).reshape(len(peers), len(peers))
        return np.where(broken, UNREACHED_S, ways)

    return Problem(
        shape, size, peers, matrix(bytes_hop), matrix(bytes_chunk), matrix(0),
        compute_bytes(shape, size), logits_bytes(shape, size),
    )  # fmt: skip


def compute_bytes(shape: ModelShape, size: Size) -> int:
    """An engine's scratch memory for one step, generously: activations and mask."""
    return 4 * size.batch_tokens * (16 * shape.hidden + size.kv_cells)


def logits_bytes(shape: ModelShape, size: Size) -> int:
    """What the tail needs besides: a row of logits for each row of the batch.

    A shape that does not tell its vocabulary: a quantised row of the embedding has about as many
    bytes as it has columns, which gives its number of rows.
    """
    told = max(shape.embed_bytes, shape.output_bytes) // max(1, shape.hidden)
    return 4 * size.batch_tokens * (shape.vocabulary or told)


# Links -----------------------------------------------------------------------------------------


def _link(a: Profile, b: Profile) -> Link:
    """The way from one peer to another, as either of them measured it."""
    there = next((link for link in a.links if link.peer_id == b.peer_id), None)
    back = next((link for link in b.links if link.peer_id == a.peer_id), None)
    if there is None:
        return Link(b.peer_id, back.rtt_s, back.bytes_per_s) if back else Link(b.peer_id, RTT_S)
    rtt_s = min(there.rtt_s, back.rtt_s) if back else there.rtt_s
    return Link(b.peer_id, rtt_s, there.bytes_per_s or (back.bytes_per_s if back else 0.0))


def cut_off(a: Profile, b: Profile) -> bool:
    """Whether two peers do not reach each other: the word of either is enough, as frames go one way
    and what they are answered with the other."""
    return b.peer_id in a.unreachable or a.peer_id in b.unreachable


def way(link: Link, carried_bytes: int) -> float:
    """Seconds for so many bytes from stage to stage."""
    return HOP_S + link.rtt_s / 2 + carried_bytes / (link.bytes_per_s or BYTES_PER_S)


# One peer's part -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Part:
    """What a peer's windows take together.

    busy_s: computing, for a token; cpu_s: its processor's time, with what hops take of it. read_s:
    D; room_s: reading, once, all that could stay resident. gpu_layers: of each window, the last
    ones. memory_bytes: with what is streamed.
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
    shape, cells = of.shape, of.size.kv_cells
    gpu_layers = gpu_layers if able.gpu else 0
    tail = windows[-1][1] == shape.layers
    cpu, gpu = _placed(windows, gpu_layers)
    scratch = len(windows) * of.compute_bytes
    weights = sum(shape.layer_bytes[i] for i in cpu)
    ram = weights + cells * sum(shape.layer_kv_bytes[i] for i in cpu) + scratch
    ram += of.tail_bytes * (tail and not gpu)
    vram = sum(shape.layer_bytes[i] + cells * shape.layer_kv_bytes[i] for i in gpu)
    vram += (scratch + of.tail_bytes * tail) if gpu else 0
    if able.unified:
        ram += vram - (scratch if gpu else 0)
    streamed = max(0, ram - able.ram_bytes)
    if vram > (able.gpu_bytes if gpu else 0) or streamed > weights:
        return None
    if streamed and not able.disk_bytes_per_s:
        return None
    busy, on_cpu, prefill = _times(able, cpu, gpu, len(windows), tail)
    head, whole = windows[0][0] == 0, len(cpu) + len(gpu) == shape.layers
    head_s, hops_cpu_s = HEAD_S * head, HOP_CPU_S * len(windows) * (not whole)
    rate = able.disk_bytes_per_s or 1.0
    return Part(
        busy_s=busy + head_s,
        cpu_s=on_cpu + head_s + hops_cpu_s,
        prefill_s=prefill,
        read_s=streamed / rate,
        room_s=(weights - streamed) / rate,
        memory_bytes=ram,
        gpu_bytes=vram,
        streamed_bytes=streamed,
        gpu_layers=gpu_layers,
    )


def _placed(windows: Sequence[tuple[int, int]], gpu_layers: int) -> tuple[list[int], list[int]]:
    """The layers on the processor and on the GPU: there the last ones of each window."""
    cpu = [i for a, b in windows for i in range(a, max(a, b - gpu_layers))]
    return cpu, [i for a, b in windows for i in range(max(a, b - gpu_layers), b)]


def _times(
    able: Able, cpu: list[int], gpu: list[int], windows: int, tail: bool
) -> tuple[float, float, float]:
    """busy, of that on the processor, and prefill, in seconds. cpu, gpu: layers on each."""
    paces = [(able.cpu, cpu), *([(able.gpu, gpu)] if able.gpu else [])]
    cpu_s, *gpu_s = [float(pace.decode_s[layers].sum()) for pace, layers in paces]
    last = able.gpu if gpu and able.gpu else able.cpu
    output_s = last.output_s if tail else 0.0
    around_s = windows * max(p.window_s for p, layers in paces if layers)
    prefill_s = sum(float(p.prefill_s[layers].sum()) for p, layers in paces)
    on_cpu_s = cpu_s + around_s + (0.0 if gpu else output_s)
    return cpu_s + sum(gpu_s) + output_s + around_s, on_cpu_s, prefill_s + output_s


def busy_s(of: Problem, able: Able, windows: Sequence[tuple[int, int]], gpu_layers: int) -> float:
    """Seconds that a stage computes for a token, whether its windows fit or not."""
    gpu_layers = gpu_layers if able.gpu else 0
    cpu, gpu = _placed(windows, gpu_layers)
    return _times(able, cpu, gpu, len(windows), windows[-1][1] == of.shape.layers)[0]


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


def prefill_s(sum_s: float, slowest_s: float, chunks: int, pipelined: bool) -> float:
    """Seconds until the last of so many chunks of a prompt came around: the first one visits all
    stages; the others follow it at the pace of the slowest, or, not pipelined, one by one."""
    return sum_s + (chunks - 1) * (slowest_s if pipelined else sum_s)


PIPELINED = False  # the scheduler keeps one step in flight


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


def evaluate(of: Problem, order: Sequence[int], rounds: int, parts: Sequence[Part]) -> Forecast:
    """What this ring would do. parts: one a peer, as `order`."""
    shares = [max(1e-6, of.peers[i].profile.cpu_share) for i in order]
    least = [p.cpu_s / share for p, share in zip(parts, shares, strict=True)]
    hops = hops_s(of, order, rounds)
    busy = [p.busy_s for p in parts]
    reads = [p.read_s for p in parts]
    token = token_s(rounds, hops, busy, least, reads, [p.room_s for p in parts])
    chunks = -(-PROMPT_TOKENS // of.size.batch_tokens)
    slow = [
        p.prefill_s * (1 + min(1.0, p.cpu_s / p.busy_s) * (1 / share - 1)) + p.read_s
        for p, share in zip(parts, shares, strict=True)
    ]
    around = _around(of.chunk_s, order, rounds)
    first = prefill_s(sum(slow) + around, max(slow), chunks, PIPELINED) + _closing(of, order)
    stages = [max(b, r, at_least) for b, r, at_least in zip(busy, reads, least, strict=True)]
    peers = tuple(
        PeerForecast(
            peer_id=of.peers[i].peer_id,
            decode_s=p.busy_s,
            prefill_s=p.prefill_s,
            disk_s=p.waits_s(rounds, token),
            memory_bytes=p.memory_bytes - p.streamed_bytes,
            gpu_bytes=p.gpu_bytes,
            streamed_bytes=p.streamed_bytes,
            measured=of.peers[i].cpu.measured or bool((g := of.peers[i].gpu) and g.measured),
        )
        for i, p in zip(order, parts, strict=True)
    )
    return Forecast(token, first, PROMPT_TOKENS, hops, max(stages), peers)


def forecast(profiles: Sequence[Profile], shape: ModelShape, split: Split) -> Forecast | None:
    """What a split would do with these profiles; None where one of its peers is not among them, or
    cannot hold its windows."""
    of = problem(profiles, shape, Size(split.context, split.kv_cells, split.batch_tokens))
    index = {able.peer_id: i for i, able in enumerate(of.peers)}
    ring = list(dict.fromkeys(w.peer_id for w in split.windows))
    if not all(peer_id in index for peer_id in ring):
        return None
    parts = []
    for peer_id in ring:
        mine = [w for w in split.windows if w.peer_id == peer_id]
        layers = mine[0].gpu_layers if mine[0].gpu_layers >= 0 else shape.layers
        able = of.peers[index[peer_id]]
        found = part(of, able, [(w.first, w.last) for w in mine], layers)
        if found is None:
            return None
        parts.append(found)
    order = [index[peer_id] for peer_id in ring]
    return evaluate(of, order, len(split.windows) // len(ring), parts)
