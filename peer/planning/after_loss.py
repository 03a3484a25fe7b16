"""After a loss: the parts that the survivors hold stay where they are. Pure.

A ring that lost a peer is not made anew from nothing. Among the rings that take hardly longer than
the best one, that one is taken for which the fewest bytes have to be loaded: a window that grows
into the hole needs only what it lacks, and its peer has the rest in its page cache. What a peer
does not even have on disk weighs more, because it has to come through the network first.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace

import numpy as np

from peer.planning import costs, rings
from peer.planning.costs import Problem
from peer.planning.plan import Split
from peer.planning.rings import Before, Ring, Wanted
from peer.planning.wishes import Wishes

# Share of the objective's cost. Less than making.WORTH: the next look at what there is would change
# the plan once more.
AFTER_LOSS_WORTH = 0.10
NEAR = 0.01  # of a token's time
FETCHED = 5.0  # times as long as from a disk takes a byte from another peer: 500 MB/s, 110 MB/s


def wanted(of: Problem, wanted: Wanted, wishes: Wishes) -> Wanted:
    """The same, with as much of `wishes.before` as can be where it was."""
    before = wishes.before
    if before is None:
        return wanted
    index = {able.peer_id: i for i, able in enumerate(of.peers)}
    ring = list(dict.fromkeys(window.peer_id for window in before.windows))
    order = tuple(index[peer_id] for peer_id in ring if peer_id in index)
    rounds = len(before.windows) // max(1, len(ring))
    layers, ends = np.zeros((len(of.peers), of.shape.layers)), np.zeros((len(of.peers), 2))
    for i, able in enumerate(of.peers):
        layers[i], ends[i] = _loaded_anew(of, able.peer_id, wishes)
    return replace(
        wanted,
        missing=layers,
        ends=ends if wanted.ends is None else ends + wanted.ends,
        before=Before(order, rounds, AFTER_LOSS_WORTH, wishes.objective),
    )


def _loaded_anew(of: Problem, peer_id: str, wishes: Wishes) -> tuple[list[float], list[float]]:
    """(what each layer weighs where this peer gets it, what being head, and tail, weighs besides),
    in bytes from disk; nothing where it had it before."""
    shape, held = of.shape, wishes.held.get(peer_id, frozenset())
    windows = wishes.before.windows if wishes.before else ()
    mine = [window for window in windows if window.peer_id == peer_id]
    had = {part for w in mine for part in shape.window_parts(w.first, w.last)}

    def weight(part: str, size: int, loaded: Container[str] = had) -> float:
        return 0.0 if part in loaded else size * (1.0 if part in held else FETCHED)

    layers = [weight(f"layer-{at:03d}", size) for at, size in enumerate(shape.layer_bytes)]
    head = weight("embed", shape.embed_bytes)
    if not shape.tied:
        return layers, [head, weight("output", shape.output_bytes)]
    # A head has this part as well, but only maps it: what the tail reads of it is all of it.
    was_tail = any(window.last == shape.layers for window in mine)
    return layers, [head, weight("embed", shape.embed_bytes, had if was_tail else ())]


def with_gpu_layers(of: Problem, ring: Ring, before: Split) -> Ring:
    """With as many layers on the GPU as before on every peer whose windows are as before, where
    that fits and takes no longer than can be measured: it is known to load there."""
    old: dict[str, list[tuple[int, int, int]]] = {}
    for w in before.windows:
        old.setdefault(w.peer_id, []).append((w.first, w.last, w.gpu_layers))
    layers = list(ring.gpu_layers)
    for place, (peer, (a, b)) in enumerate(zip(ring.order, ring.edges, strict=True)):
        windows = costs.windows(of.shape.layers, ring.rounds, (a, b))
        had = old.get(of.peers[peer].peer_id, [])
        if of.peers[peer].gpu and [(first, last) for first, last, _ in had] == windows:
            layers[place] = had[0][2] if 0 <= had[0][2] < b - a else b - a
    if tuple(layers) == ring.gpu_layers:
        return ring
    steps = [(peer, a, b) for peer, (a, b) in zip(ring.order, ring.edges, strict=True)]
    other = rings.made(of, steps, ring.rounds, layers)
    limit_s = ring.forecast.tpot_s * (1 + NEAR)
    if other is None or other.forecast.tpot_s > limit_s:
        return ring
    read = zip(other.parts, ring.parts, strict=True)
    return other if all(new.streamed_bytes <= p.streamed_bytes for new, p in read) else ring
