"""Peers, the links between them and a model, as numbers that a solver can add up. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from peer.planning import islands
from peer.planning.abilities import Able, Floats, Size, able
from peer.planning.kv import sized
from peer.planning.plan import Split
from peer.planning.profile import Link, ModelShape, Profile

HOP_S = 2e-4  # of the two stages' Python and ZeroMQ around a frame, beyond the wire
RTT_S = 1e-3  # of a link that was not measured: Ethernet and a switch
BYTES_PER_S = 6e7  # of such a link: half a Gbit/s
# Of a hop between two that do not reach each other: longer than any token that is waited for, so
# that every search goes another way where there is one; finite, so that sums stay numbers.
UNREACHED_S = 1e4


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """All that a solver needs. hop_s, chunk_s, close_s: [peers, peers], from row to column: the
    hidden state of a token, of the longest step, and the sampled ids from tail to head. wire_s:
    what a row's bytes take the link up."""

    shape: ModelShape
    size: Size
    peers: tuple[Able, ...]
    hop_s: Floats
    chunk_s: Floats
    close_s: Floats
    wire_s: Floats
    compute_bytes: int  # of each window, wherever it runs
    logits_bytes: int  # of the tail

    def end_bytes(self, able: Able, head: bool, tail: bool) -> int:
        """What a peer's windows need together besides their layers, by which ends of the ring they
        are."""
        found = able.scratch_bytes + (self.logits_bytes + able.tail_bytes if tail else 0)
        if head:
            found += able.head_bytes - (able.shared_bytes if tail else 0)
        return found


def problem(
    profiles: Sequence[Profile],
    shape: ModelShape,
    size: Size,
    engines: Mapping[str, str] = MappingProxyType({}),
) -> Problem:
    """What these peers could do with the model. Those that cannot run it are passed over. engines:
    by peer id, where it is not the one that would run it."""
    found = (able(p, shape, size, engines.get(p.peer_id, "")) for p in profiles)
    peers = tuple(peer for peer in found if peer is not None)
    bytes_hop, bytes_chunk = 4 * shape.hidden, 4 * shape.hidden * size.batch_tokens
    links = [[_link(a.profile, b.profile) for b in peers] for a in peers]
    apart = [[a is not b and cut_off(a.profile, b.profile) for b in peers] for a in peers]
    broken = np.array(apart, np.bool_).reshape(len(peers), len(peers))

    def matrix(of: Callable[[Link], float]) -> Floats:
        rows = [[0.0 if a is b else of(links[i][j]) for j, b in enumerate(peers)]
                for i, a in enumerate(peers)]  # fmt: skip
        return np.array(rows, np.float64).reshape(len(peers), len(peers))

    def ways(carried: int) -> Floats:
        return np.where(broken, UNREACHED_S, matrix(lambda link: way(link, carried)))

    wire = matrix(lambda link: bytes_hop / (link.bytes_per_s or BYTES_PER_S))
    return Problem(
        shape, size, peers, ways(bytes_hop), ways(bytes_chunk), ways(0), wire,
        compute_bytes(shape, size), logits_bytes(shape, size),
    )  # fmt: skip


def of_split(profiles: Sequence[Profile], shape: ModelShape, split: Split) -> Problem:
    """What these peers could do with the model in a split's size, with its engines and islands."""
    size = Size(split.context, split.kv_cells, split.batch_tokens, split.kv_type)
    engines = {window.peer_id: window.backend for window in split.windows}
    as_peers = islands.seen(profiles, shape, split)
    return problem(as_peers, sized(shape, split.kv_type), size, engines)


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
