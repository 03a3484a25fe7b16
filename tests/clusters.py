"""Random clusters and models for the planner's tests, and an oracle that tries everything."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from peer.planning import costs
from peer.planning.costs import Part, Problem
from peer.planning.pipeline import GROUP_TOKENS
from peer.planning.plan import Forecast
from peer.planning.profile import EngineProfile, Link, ModelShape, Profile, Speed
from tests.plans import shape

SIZE = costs.Size(context=64, kv_cells=64, batch_tokens=8)
_LAYER_BYTES = 1_000_000


def peer_id(index: int) -> str:
    """Of the peer with this number."""
    return "".join("abcdefghij"[int(digit)] for digit in f"{index:016d}")


def small(seed: int, peers: tuple[int, int] = (1, 4), layers: tuple[int, ...] = (4, 6, 8),
          throttled: bool = True) -> Problem:  # fmt: skip
    """A cluster and a model with everything that is possible: peers and layers drawn from these."""
    draw = random.Random(seed)
    model = _model(draw, draw.choice(layers))
    count = draw.randint(*peers)
    need = sum(model.layer_bytes) / count
    profiles = [_profile(draw, i, need, model, throttled) for i in range(count)]
    profiles = [_linked(draw, profile, profiles[i + 1 :]) for i, profile in enumerate(profiles)]
    return costs.problem(profiles, model, SIZE)


def _model(draw: random.Random, layers: int) -> ModelShape:
    uneven, cuts, groups = draw.random() < 0.5, tuple(range(layers)), ()
    if draw.random() < 0.3:
        cuts = tuple(i for i in range(layers) if i == 0 or draw.random() < 0.6)
    elif draw.random() < 0.2:
        cuts = tuple(range(0, layers, 2))
    if draw.random() < 0.2:
        groups = (tuple(i for i in range(layers) if i % 3 == 1),)
    each = [int(_LAYER_BYTES * (draw.uniform(0.5, 2) if uneven else 1)) for _ in range(layers)]
    return shape(
        layers, hidden=64, layer_bytes=tuple(each),
        layer_kv_bytes=tuple(draw.choice([0, 64, 256]) if uneven else 64 for _ in range(layers)),
        layer_kinds=tuple(draw.choice([0, 0, 1]) if uneven else 0 for _ in range(layers)),
        tied=draw.random() < 0.5, embed_bytes=draw.choice([0, 600_000]),
        output_bytes=draw.choice([0, 800_000]), vocabulary=draw.choice([100, 5000]),
        cut_starts=cuts, cut_groups=groups,
        whole_why="its layers share weights" if draw.random() < 0.05 else "",
    )  # fmt: skip


def _profile(
    draw: random.Random, index: int, need: float, model: ModelShape, throttled: bool
) -> Profile:
    ram = int(need * draw.choice([0.3, 0.6, 1, 1.3, 2, 5])) + draw.choice([300_000, 1_500_000])
    engines = [EngineProfile("llama_cpp", "CPU", "cpu")]
    speeds = [_speed(draw, model, "cpu", draw.choice([1e-3, 3e-3, 1e-2]))]
    unified, kind = False, draw.choice(["", "", "cuda", "metal"])
    if kind:
        unified = kind == "metal"
        free = int(need * draw.choice([0.2, 0.5, 1, 3])) + 700_000
        free += 0 if unified else costs.GPU_HEADROOM_BYTES
        engines.append(EngineProfile("llama_cpp", "GPU", kind, free))
        speeds.append(_speed(draw, model, kind, draw.choice([2e-4, 1e-3, 4e-3])))
    return Profile(
        peer_id(index), f"peer{index}", "linux", 4, ram, ram, engines=tuple(engines),
        unified_memory=unified, speeds=tuple(speeds),
        disk_read_bytes_per_s=draw.choice([0, 1e8, 4e8, 2e9]),
        cpu_share=draw.choice([1, 1, 0.5, 0.2]) if throttled else 1.0,
    )  # fmt: skip


def _speed(draw: random.Random, model: ModelShape, kind: str, decode_s: float) -> Speed:
    decode = (decode_s, decode_s * draw.uniform(0.5, 2))
    prefill = tuple(each * draw.uniform(1, 10) for each in decode)
    return Speed(model.digest, "llama_cpp", kind, 4, decode, prefill, 8,
                 draw.choice([0, 2e-4]), draw.choice([0, decode_s]))  # fmt: skip


def _linked(draw: random.Random, profile: Profile, others: list[Profile]) -> Profile:
    links = tuple(
        Link(other.peer_id, draw.choice([2e-4, 1e-3, 6e-3]), draw.choice([0, 1e7, 1e9]))
        for other in others
        if draw.random() < 0.8
    )
    values = {name: getattr(profile, name) for name in profile.__struct_fields__}
    return Profile(**(values | {"links": links}))


# The oracle ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tried:
    """The best of all rings, and how many there were."""

    forecast: Forecast
    rounds: int
    count: int


def everything(of: Problem, throughput: bool = False) -> Tried | None:
    """The best of all subsets, orders, cuts, rounds and GPU layers: `costs.part` says what each
    window takes, and `costs.evaluate` what the best ring takes. Several rounds where a peer has a
    disk, and where nothing fits in one; for throughput only there."""
    layers, best, count = of.shape.layers, None, 0
    streams = any(able.disk_bytes_per_s for able in of.peers)
    for rounds in (k for k in range(1, 17) if layers % k == 0):
        if rounds > 1 and best and (throughput or not streams):
            break
        parts = _parts(of, rounds)
        for order in _orders(len(of.peers)):
            found = _best_of(of, order, rounds, parts, throughput)
            if found:
                count += found[2]
                if best is None or found[0] < best[0]:
                    best = (found[0], order, rounds, found[1])
    if best is None:
        return None
    _, order, rounds, chosen = best
    return Tried(costs.evaluate(of, order, rounds, chosen), rounds, count)


def _orders(peers: int) -> Iterator[tuple[int, ...]]:
    for size in range(1, peers + 1):
        yield from itertools.permutations(range(peers), size)


def _parts(of: Problem, rounds: int) -> dict[tuple[int, int, int], list[Part]]:
    """Of each peer and window of a round: what it takes, with any number of GPU layers."""
    width, parts = of.shape.layers // rounds, {}
    for index, able in enumerate(of.peers):
        for first, last in itertools.combinations(range(width + 1), 2):
            windows = [(at + first, at + last) for at in range(0, of.shape.layers, width)]
            if any(of.shape.refusal(a, b) for a, b in windows):
                continue
            layers = range(last - first + 1 if able.gpu else 1)
            found = [costs.part(of, able, windows, each) for each in layers]
            parts[index, first, last] = [part for part in found if part]
    return parts


def _best_of(
    of: Problem, order: tuple[int, ...], rounds: int,
    parts: dict[tuple[int, int, int], list[Part]], throughput: bool,
) -> tuple[float, list[Part], int] | None:  # fmt: skip
    """(value, parts, rings tried) of the best ring with this order."""
    width, best, count = of.shape.layers // rounds, None, 0
    shares = [max(1e-6, of.peers[i].profile.cpu_share) for i in order]
    hops_s = costs.hops_s(of, order, rounds)
    for inner in itertools.combinations(range(1, width), len(order) - 1):
        edges = list(itertools.pairwise((0, *inner, width)))
        each = [parts.get((i, a, b), []) for i, (a, b) in zip(order, edges, strict=True)]
        if not all(each):
            continue
        if throughput:
            values = _loads(each, shares, _link_s(of, order, rounds), of.size.batch_tokens)
        else:
            values = _values(each, shares, hops_s, rounds)
        count += values.size
        at = np.unravel_index(int(values.argmin()), values.shape)
        if best is None or values[at] < best[0]:
            best = float(values[at]), [p[i] for p, i in zip(each, at, strict=True)], 0
    return best and (best[0], best[1], count)


def _columns(each: list[list[Part]], name: str) -> list[np.ndarray]:
    """A field of every choice of one part a peer: an axis a peer."""
    columns = [np.array([getattr(part, name) for part in parts]) for parts in each]
    return list(np.meshgrid(*columns, indexing="ij"))


def _link_s(of: Problem, order: tuple[int, ...], rounds: int) -> float:
    """What a token, and the share of prompts beside it, takes the busiest link of a ring up."""
    along = [rounds * of.wire_s[a, b] for a, b in itertools.pairwise(order)]
    back = (rounds - 1) * of.wire_s[order[-1], order[0]]
    return max([0.0, *along, back]) * (1 + costs.PROMPT_SHARE) if len(order) > 1 else 0.0


def _loads(
    each: list[list[Part]], shares: list[float], link_s: float, batch_tokens: int
) -> np.ndarray:
    """What each token of many answers takes the busiest stage or link up."""
    names = "group_s", "group_cpu_s", "busy_s", "cpu_s", "prefill_s", "read_s"
    columns = [_columns(each, name) for name in names]
    loads = [np.full_like(columns[0][0], link_s)]
    for group, group_cpu, busy, cpu, prefill, read, share in zip(*columns, shares, strict=True):
        prompt = costs.PROMPT_SHARE * prefill / batch_tokens
        loads.append(group + prompt)
        loads.append((group_cpu + prompt * np.minimum(1, cpu / busy)) / share)
        loads.append(read / GROUP_TOKENS + read * costs.PROMPT_SHARE / batch_tokens)
    return np.maximum.reduce(loads)


def _values(each: list[list[Part]], shares: list[float], hops_s: float, rounds: int) -> np.ndarray:
    """TPOT of every choice of one part a peer."""
    busy, cpu = _columns(each, "busy_s"), _columns(each, "cpu_s")
    read, room = _columns(each, "read_s"), _columns(each, "room_s")
    floor = np.maximum.reduce([c / share for c, share in zip(cpu, shares, strict=True)])

    def least(token: np.ndarray) -> np.ndarray:
        total = np.full_like(floor, hops_s)
        for b, d, r in zip(busy, read, room, strict=True):
            hidden = rounds * d - (rounds - 1) * (token - b)
            kept = np.maximum(np.maximum(0, hidden), d - (rounds - 1) * r)
            total += b + (d if rounds == 1 else kept)
        return np.maximum(total, floor)

    high = least(np.zeros_like(floor))
    if rounds == 1:
        return high
    low = np.zeros_like(high)
    for _ in range(45):
        middle = (low + high) / 2
        enough = least(middle) <= middle
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return high
