"""Who takes part with how many layers, for many peers: a mixed integer programme on HiGHS. Pure.

The paper's programme (arXiv:2504.08791, section 3.2) with what it lacks: whether a peer takes part
at all, the tail and where it runs, hops, throttling, and the disk time that other peers hide. The
sets of the paper become variables: what is streamed is whatever does not fit. It sees layers of
average size and hops of half of each peer's shortest ways, so that its answer is where the search
on the real costs begins (`ring_order`), never the plan.

One thread, a fixed seed and a bound on branches instead of on seconds: the same each time.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import highspy
import numpy as np

from peer.planning.costs import Able, Problem

GAP = 2e-3  # of the objective: closer than what averages leave out
BRANCHES_MAX = 60  # that are looked at: more take time, and the search on the real costs follows
_MIB, _MS = 1.0 / (1 << 20), 1e3  # units that keep all coefficients near 1


@dataclass(slots=True)
class _Model:
    """Columns and rows as HiGHS takes them."""

    lower: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)
    whole: list[bool] = field(default_factory=list)
    rows: list[tuple[dict[int, float], float, float]] = field(default_factory=list)

    def column(self, lower: float, upper: float, whole: bool = False) -> int:
        self.lower.append(lower)
        self.upper.append(upper)
        self.whole.append(whole)
        return len(self.lower) - 1

    def at_most(self, terms: dict[int, float], upper: float) -> None:
        self.rows.append((terms, -highspy.kHighsInf, upper))

    def equal(self, terms: dict[int, float], value: float) -> None:
        self.rows.append((terms, value, value))


@dataclass(frozen=True, slots=True)
class _Peer:
    """Columns of one peer: used, tail, tail on the GPU, GPU used; layers of a round on each
    processor; MiB read for a token; milliseconds waited."""

    used: int
    tail: int
    tail_gpu: int
    gpu_used: int
    cpu: int
    gpu: int
    read: int
    waits: int
    busy_ms: dict[int, float]


def order(of: Problem, rounds: int, must: frozenset[int]) -> tuple[int, ...]:
    """The peers that take part, those with most layers first, the tail last; () where HiGHS finds
    none. must: those that have to."""
    model = _Model()
    token = model.column(0.0, highspy.kHighsInf)
    peers = [_peer(model, of, i, rounds, i in must, token) for i in range(len(of.peers))]
    width = of.shape.layers // rounds
    model.equal({c: 1.0 for p in peers for c in (p.cpu, p.gpu)}, width)
    model.equal({p.tail: 1.0 for p in peers}, 1.0)
    total = {token: -1.0}
    for index, peer in enumerate(peers):
        for column, weight in peer.busy_ms.items():
            total[column] = total.get(column, 0.0) + weight
        total[peer.used] = total.get(peer.used, 0.0) + _MS * rounds * _way_s(of, index)
        total[peer.waits] = 1.0
    model.at_most(total, 0.0)
    values = _solved(model, token)
    if values is None:
        return ()
    layers = [values[p.cpu] + values[p.gpu] for p in peers]
    taking = [i for i in range(len(peers)) if layers[i] > 0.5 or i in must]
    return tuple(sorted(taking, key=lambda i: (values[peers[i].tail] > 0.5, -layers[i], i)))


def _way_s(of: Problem, peer: int) -> float:
    """Half of the shortest way to the peer and half of the shortest from it."""
    if len(of.peers) < 2:
        return 0.0
    others = np.arange(len(of.peers)) != peer
    return float(of.hop_s[others, peer].min() + of.hop_s[peer, others].min()) / 2


def _peer(model: _Model, of: Problem, index: int, rounds: int, must: bool, token: int) -> _Peer:
    able, width = of.peers[index], of.shape.layers // rounds
    gpu_most = float(width) if able.gpu else 0.0
    used = model.column(float(must), 1, True)
    tail = model.column(0, 1, True)
    tail_gpu, gpu_used = (model.column(0, float(able.gpu is not None), True) for _ in range(2))
    cpu_most = 0.0 if able.whole else float(width)
    cpu, gpu = model.column(0, cpu_most, True), model.column(0, gpu_most, True)
    read = model.column(0, highspy.kHighsInf if able.disk_bytes_per_s else 0.0)
    waits = model.column(0, highspy.kHighsInf)
    pace, fast = able.cpu, able.gpu or able.cpu
    cpu_ms = {
        cpu: _MS * rounds * float(pace.decode_s.mean()),
        used: _MS * rounds * pace.window_s,
        tail: _MS * pace.output_s,
        tail_gpu: -_MS * pace.output_s,
    }
    busy_ms = cpu_ms | {
        gpu: _MS * rounds * float(fast.decode_s.mean()),
        tail_gpu: _MS * (fast.output_s - pace.output_s),
    }
    peer = _Peer(used, tail, tail_gpu, gpu_used, cpu, gpu, read, waits, busy_ms)
    model.at_most({cpu: 1.0, gpu: 1.0, used: -width}, 0.0)
    model.at_most({used: 1.0, cpu: -1.0, gpu: -1.0}, 0.0)
    model.at_most({gpu: 1.0, gpu_used: -width}, 0.0)
    model.at_most({tail: 1.0, used: -1.0}, 0.0)
    model.at_most({tail_gpu: 1.0, tail: -1.0}, 0.0)
    model.at_most({tail_gpu: 1.0, gpu: -1.0}, 0.0)
    share = max(1e-6, able.profile.cpu_share)
    model.at_most({**cpu_ms, token: -share}, 0.0)
    _memory(model, of, able, peer, rounds)
    _disk(model, of, able, peer, rounds, token)
    return peer


def _memory(model: _Model, of: Problem, able: Able, peer: _Peer, rounds: int) -> None:
    """What is read for each token makes up for what the processor's memory lacks."""
    held = able.held
    weights, kept = _MIB * rounds * _mean(held.layer_bytes), _MIB * rounds * of.size.kv_cells
    layer = weights + kept * _mean(held.layer_kv_bytes)
    scratch, least = _MIB * rounds * of.compute_bytes, of.end_bytes(able, False, False)
    scratch, tail = scratch + _MIB * least, _MIB * (of.end_bytes(able, False, True) - least)
    ram = {peer.cpu: layer, peer.used: scratch, peer.tail: tail, peer.read: -1.0}
    if able.unified:
        ram[peer.gpu] = layer
    else:
        ram[peer.tail_gpu] = -tail
    model.at_most(ram, _MIB * able.ram_bytes)
    if able.gpu:
        vram = {peer.gpu: layer, peer.gpu_used: scratch, peer.tail_gpu: tail}
        model.at_most(vram, _MIB * able.gpu_bytes)
    model.at_most({peer.read: 1.0, peer.cpu: -weights}, 0.0)


def _disk(model: _Model, of: Problem, able: Able, peer: _Peer, rounds: int, token: int) -> None:
    """How long is waited for it: `costs.exposed`. What may not be locked is left to the search."""
    if not able.disk_bytes_per_s:
        return
    each_ms = _MS / (able.disk_bytes_per_s * _MIB)
    if rounds == 1:
        model.at_most({peer.read: each_ms, peer.waits: -1.0}, 0.0)
        return
    again = rounds - 1
    hidden = {column: again * weight for column, weight in peer.busy_ms.items()}
    hidden |= {peer.read: rounds * each_ms, token: -float(again), peer.waits: -1.0}
    model.at_most(hidden, 0.0)
    weights = _MIB * rounds * _mean(able.held.layer_bytes)
    room = {peer.read: rounds * each_ms, peer.cpu: -again * each_ms * weights, peer.waits: -1.0}
    model.at_most(room, 0.0)


def _mean(values: tuple[int, ...]) -> float:
    return sum(values) / max(1, len(values))


def _solved(model: _Model, token: int) -> list[float] | None:
    """The values of all columns with the least `token`."""
    program = highspy.HighsLp()
    program.num_col_, program.num_row_ = len(model.lower), len(model.rows)
    program.col_cost_ = np.eye(1, len(model.lower), token)[0]
    program.col_lower_, program.col_upper_ = np.array(model.lower), np.array(model.upper)
    program.row_lower_ = np.array([lower for _, lower, _ in model.rows])
    program.row_upper_ = np.array([upper for _, _, upper in model.rows])
    matrix = program.a_matrix_
    matrix.format_ = highspy.MatrixFormat.kRowwise
    sizes = [len(terms) for terms, _, _ in model.rows]
    matrix.start_ = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    matrix.index_ = np.array([c for terms, _, _ in model.rows for c in terms], np.int32)
    matrix.value_ = np.array([v for terms, _, _ in model.rows for v in terms.values()])
    kinds = highspy.HighsVarType
    program.integrality_ = [kinds.kInteger if w else kinds.kContinuous for w in model.whole]
    highs = highspy.Highs()  # type: ignore[no-untyped-call]
    options = {
        "output_flag": False, "threads": 1, "random_seed": 0, "mip_rel_gap": GAP,
        "mip_max_nodes": BRANCHES_MAX, "mip_detect_symmetry": False,
    }  # fmt: skip
    for name, value in options.items():
        highs.setOptionValue(name, value)
    highs.passModel(program)
    highs.run()
    if highs.getInfo().primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        return None
    return [float(value) for value in highs.getSolution().col_value]
