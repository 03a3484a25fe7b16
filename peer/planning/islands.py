"""Islands: Macs on each other's Thunderbolt cables that compute every layer together. Pure.

To the planner an island is one peer: the first of its peers, with the memory of all and with the
speed that they have together. That speed is worked out of what each measured: a layer takes the
slowest of them its share of the time, and beside it two sums over all of them, after attention and
after the feed-forward part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from msgspec.structs import replace

from peer.planning import thunderbolt, trust
from peer.planning.abilities import SCORES_BYTES
from peer.planning.plan import ISLAND_MAX, PlanWindow, Split
from peer.planning.profile import PEERS_MAX, ModelShape, Profile, Speed

BACKEND = "mlx"
SUMS = 2  # over all ranks for each layer: after attention, and after the feed-forward part
# A sum among neighbours over RDMA and over TCP, before its bytes. Not measured by us: "less than
# 50 us" is what Apple says of RDMA over Thunderbolt 5, the other is the round trip of its IP.
RDMA_S = 5e-5
TCP_S = 3e-4
CABLE_SHARE = 0.5  # of a cable's bits that arrive as payload
CABLE_BITS_PER_S = 2e10  # of a cable whose speed nobody tells
CABLE_BITS_LEAST = 1e6  # what is told below it is nonsense, and dividing by it may give infinity
GROUPS_MAX = 16  # that are looked at
ROWS = 512  # of the longest step, see `split.BATCH_TOKENS`


@dataclass(frozen=True, slots=True)
class Found:
    """Peers that could be an island, by rank, and their RDMA devices (see backends.base.Island)."""

    ranks: tuple[str, ...]
    devices: tuple[tuple[str, ...], ...] = ()


def possible(profiles: Sequence[Profile], shape: ModelShape) -> tuple[Found, ...]:
    """The islands that these peers could be for a model: every peer in one at most, large first.
    None where the model's shape contradicts itself: the planner says so."""
    if not shape.sound:
        return ()
    may = {p.peer_id: p for p in profiles if _may(p, shape)}
    found: list[Found] = []
    taken: set[str] = set()
    for group in thunderbolt.fully_cabled(may.values())[:GROUPS_MAX]:
        free = [peer_id for peer_id in group if peer_id not in taken]
        ranks = _largest(free, may, shape)
        if ranks:
            taken.update(ranks)
            members = [may[peer_id] for peer_id in ranks]
            found.append(Found(ranks, thunderbolt.device_matrix(ranks, members)))
    return tuple(found)


def _may(profile: Profile, shape: ModelShape) -> bool:
    """Whether a peer wants to, and is known to be able to, compute this model's layers on MLX."""
    return (
        profile.islands == "auto"
        and not profile.leaving
        and not trust.fault(profile)
        and profile.engine_for(shape) == BACKEND
        and _speed(profile, shape) is not None
    )


def _largest(free: Sequence[str], may: Mapping[str, Profile], shape: ModelShape) -> tuple[str, ...]:
    """The most of these peers, with the most memory, that can share a layer; () where none can."""
    room = {peer_id: may[peer_id].memory_available_bytes for peer_id in free}
    by_room = sorted(free, key=lambda peer_id: (-room[peer_id], peer_id))[:ISLAND_MAX]
    for count in range(len(by_room), 1, -1):
        for ranks in combinations(by_room, count):
            policies = {may[peer_id].weights for peer_id in ranks}
            fit = shape.fit(BACKEND, min(policies)) if len(policies) == 1 else None
            if fit is not None and count in fit.ranks and not _apart(ranks, may):
                return ranks
    return ()


def _apart(ranks: Sequence[str], may: Mapping[str, Profile]) -> bool:
    """Whether any two of them do not reach each other, whatever cable there is."""
    return any(other in may[one].unreachable for one in ranks for other in ranks)


# As one peer -----------------------------------------------------------------------------------


def seen(profiles: Sequence[Profile], shape: ModelShape, split: Split) -> Sequence[Profile]:
    """These profiles, each island of a split as the one peer that it is to the planner."""
    found = tuple(
        Found((window.peer_id, *window.island), window.devices)
        for window in split.windows
        if window.island
    )
    return as_peers(profiles, shape, found) if found else profiles


def as_peers(
    profiles: Sequence[Profile], shape: ModelShape, found: Sequence[Found]
) -> list[Profile]:
    """The profiles, with each of these islands in place of its peers; without what is left of one
    that lost a peer."""
    named = {profile.peer_id: profile for profile in profiles}
    whole = [each for each in found if all(peer_id in named for peer_id in each.ranks)]
    within = {peer_id for each in found for peer_id in each.ranks}
    others = [profile for profile in profiles if profile.peer_id not in within]
    return [
        *others,
        *(merged([named[p] for p in each.ranks], shape, bool(each.devices)) for each in whole),
    ]


def merged(peers: Sequence[Profile], shape: ModelShape, rdma: bool) -> Profile:
    """An island as one peer. peers: by rank. Where one of them has no measured speed of the model
    on MLX (any more), the island has none."""
    first, count = peers[0], len(peers)
    least = min(peer.memory_available_bytes for peer in peers)
    # Each of them holds the embedding and the output head whole, and computes a step's rows.
    ends = shape.in_memory(BACKEND, first.weights)
    scratch = SCORES_BYTES + 4 * ROWS * (16 * shape.hidden + shape.vocabulary)
    ends_bytes = (count - 1) * (ends.embed_bytes + ends.output_bytes + scratch)
    engines = [
        replace(
            e,
            memory_free_bytes=_all(e.memory_free_bytes, count, ends_bytes),
            memory_total_bytes=count * e.memory_total_bytes,
        )
        for e in first.engines
        if e.backend == BACKEND
    ]
    return replace(
        first,
        name=" + ".join(peer.name for peer in peers)[:128],
        memory_total_bytes=count * min(peer.memory_total_bytes for peer in peers),
        memory_available_bytes=_all(least, count, ends_bytes),
        engines=tuple(engines),
        speeds=_together(peers, shape, rdma),
        disk_read_bytes_per_s=0.0,  # MLX streams nothing
        cpu_share=min(peer.cpu_share for peer in peers),
        unreachable=tuple(dict.fromkeys(u for peer in peers for u in peer.unreachable))[:64],
    )


def _all(one_bytes: int, count: int, ends_bytes: int) -> int:
    return max(0, count * one_bytes - ends_bytes)


def _speed(profile: Profile, shape: ModelShape) -> Speed | None:
    """Of the processor that MLX uses here; all of a model's layers run on one."""
    found = [
        s
        for s in profile.speeds
        if (s.digest, s.backend) == (shape.digest, BACKEND) and not any(trust.of_speed(s))
    ]
    return max(found, key=lambda s: s.kind != "cpu", default=None)


def _together(peers: Sequence[Profile], shape: ModelShape, rdma: bool) -> tuple[Speed, ...]:
    """The speed of all of them together, () where it is not known."""
    speeds = [speed for peer in peers if (speed := _speed(peer, shape))]
    count = len(peers)
    if len(speeds) < count:
        return ()
    first = speeds[0]
    sum_s = RDMA_S if rdma else TCP_S
    wire = CABLE_SHARE * _cable_bits_per_s(peers) / 8
    row_s = 2 * (count - 1) / count * 4 * shape.hidden / wire  # of float32, as rings sum
    kinds = range(min(len(s.decode_s) for s in speeds))

    def slowest(seconds: Callable[[Speed], float]) -> float:
        return max(s.correction * seconds(s) for s in speeds)

    def decode_s(kind: int) -> float:
        return slowest(lambda s: s.decode_s[kind]) / count + SUMS * (sum_s + row_s)

    def prefill_s(kind: int) -> float:
        tokens = first.prefill_tokens
        each = slowest(lambda s: s.prefill_s[min(kind, len(s.prefill_s) - 1)] / s.prefill_tokens)
        return tokens * each / count + SUMS * (sum_s + tokens * row_s)

    together = replace(
        first,
        decode_s=tuple(decode_s(kind) for kind in kinds),
        prefill_s=tuple(prefill_s(kind) for kind in kinds),
        window_s=slowest(lambda s: s.window_s),
        output_s=slowest(lambda s: s.output_s),
        correction=1.0,
    )
    return (together,)


def _cable_bits_per_s(peers: Sequence[Profile]) -> float:
    """Of the slowest cable between them."""
    told = [cable.bits_per_s or CABLE_BITS_PER_S for cable in thunderbolt.cables(peers)]
    return max(CABLE_BITS_LEAST, min(told, default=CABLE_BITS_PER_S))


# Into plans ------------------------------------------------------------------------------------


def applied(split: Split, found: Sequence[Found]) -> Split:
    """A split that was made with islands as single peers, naming all of their peers."""
    by_first = {each.ranks[0]: each for each in found}

    def window(of: PlanWindow) -> PlanWindow:
        each = by_first.get(of.peer_id)
        if each is None or of.backend != BACKEND:
            return of
        return replace(
            of,
            island=each.ranks[1:],
            devices=each.devices,
            memory_bytes=of.memory_bytes // len(each.ranks),
        )

    # What is said of an island that is left out is said of each of its peers.
    others = [
        replace(out, peer_id=peer_id)
        for out in split.left_out
        if out.peer_id in by_first
        for peer_id in by_first[out.peer_id].ranks[1:]
    ]
    left_out = (*split.left_out, *others)[:PEERS_MAX]
    return replace(split, windows=tuple(window(each) for each in split.windows), left_out=left_out)
