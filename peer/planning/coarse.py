"""A split in proportion to memory, for models of more layers than a search can look at. Pure.

No model has so many; a header that says so gets a plan all the same, and quickly: O(layers log
layers) a peer, see `cuts`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from peer.planning.costs import UNREACHED_S, Able, Problem
from peer.planning.cuts import Cuts, Needs, nearest
from peer.planning.rings import Ring, made

_WINDOWS_MAX = 1_200_000  # of all peers that are looked at: some 0.3 GiB of tables


def needed(of: Problem) -> bool:
    """Whether a search would take too much memory and time."""
    return len(of.peers) * (of.shape.layers + 1) ** 2 > _WINDOWS_MAX


def in_proportion(of: Problem, everyone: bool) -> Ring | None:
    """Windows nearest to the peers' shares of memory, one a peer; None where nothing fits.

    everyone: a peer is left out only where it cannot be given a layer. Peers stay in their order,
    those with most memory first: the ends need more than the middle.
    """
    rooms = [able.gpu_bytes if able.gpu and (able.whole or not able.unified) else able.ram_bytes
             for able in of.peers]  # fmt: skip
    order = sorted(range(len(rooms)), key=lambda i: (-rooms[i], i))
    order = _together(of, order)
    cuts = Cuts(of.shape)
    needs: dict[int, Needs] = {}
    for able in of.peers:
        if id(able.held) not in needs:
            needs[id(able.held)] = _needs(of, able, cuts)
    each = [needs[id(of.peers[i].held)] for i in order]
    edges = nearest(each, [rooms[i] for i in order], everyone) if each else []
    steps = [(i, a, b) for i, (a, b) in zip(order, edges, strict=False) if a < b]
    layers = [of.shape.layers if of.peers[i].gpu else 0 for i, _, _ in steps]
    return made(of, steps, 1, layers) if steps else None


def _needs(of: Problem, able: Able, cuts: Cuts) -> Needs:
    """Of a peer, and of all others that keep the model in memory as it does."""
    held = able.held
    return Needs(
        cuts,
        np.array(held.layer_bytes, np.int64)
        + of.size.kv_cells * np.array(held.layer_kv_bytes, np.int64),
        compute=of.compute_bytes + able.scratch_bytes,
        embed=held.embed_bytes,
        tail=held.output_bytes + of.logits_bytes,
        tied=held.embed_bytes if held.tied else 0,
    )


def _together(of: Problem, order: Sequence[int]) -> list[int]:
    """Of these peers those that all reach each other, as far as this order goes."""
    kept: list[int] = []
    for peer in order:
        if all(of.hop_s[peer, other] < UNREACHED_S for other in kept):
            kept.append(peer)
    return kept
