"""Which peer runs which layers: profiles and a model's shape in, a split out. Pure.

`solve` is the one door to the planner. It decides who may take part and how long a context there is
room for, has `halda` find the best ring of each size, and puts the reasons into words.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from peer.errors import NoPlan
from peer.planning import after_loss, coarse, costs, halda, kv, reasons, trust
from peer.planning.abilities import mapping
from peer.planning.costs import Floats, Problem, Size
from peer.planning.halda import Ring, Wanted
from peer.planning.plan import LeftOut, PlanWindow, Split
from peer.planning.profile import ModelShape, Profile
from peer.planning.wishes import Wishes as Wishes

SLOTS = 32  # answers at once and finished ones that are kept; more wait for their turn
SLOTS_RECURRENT = 8  # each has a state of its own in every recurrent layer, used or not
WHOLE_ANSWERS = 8  # of the longest context, for which there is KV cache where there is room
BATCH_TOKENS = 512  # rows of a prefill chunk: llama.cpp's own default
CONTEXT_DEFAULT = 32768  # tokens; a longer context is taken only when it is asked for
CONTEXT_GOOD = 8192  # tokens; so much is not given up for speed
CONTEXT_LEAST = 512  # tokens; with less there is no use in answering
CONTEXT_WORTH = 1.1  # a longer context may take so many times as long a token
TOKEN_S_MAX = 600.0  # a token in ten minutes answers nobody
HEARD_WORTH = 0.1  # share of a token's time for a head that everybody here reaches
PEER_WORTH = 1.05  # and one peer fewer: each is a hop, and a machine that may be switched off
_FEWER_MAX = 4  # peers of a ring for which fewer are tried
BYTES_MAX = 1 << 60  # the bound of `Bytes`: no sum beyond it can be told to a peer


@dataclass(frozen=True, slots=True)
class _Found:
    """A ring for one size of the context."""

    of: Problem
    ring: Ring

    @property
    def streams(self) -> bool:
        return any(part.streamed_bytes for part in self.ring.parts)

    @property
    def comfort(self) -> tuple[bool, int]:
        """Greater where memory is less of a want."""
        return not self.streams, min(self.of.size.context, CONTEXT_GOOD)

    def cost_s(self, objective: str) -> float:
        return self.ring.forecast.cost_s(objective)


def solve(profiles: Sequence[Profile], shape: ModelShape, wishes: Wishes | None = None) -> Split:
    """Give every layer of `shape` to a window, with the least time of a token.

    Raises: NoPlan, saying what is missing and the smallest thing that would help.
    """
    wishes = wishes or Wishes()
    if why := unusable(shape):
        raise NoPlan(why)
    able, left_out = _able(reasons.told_apart(profiles), shape, wishes)
    if not able:
        raise NoPlan(
            f"no peer here can run {shape.model}: "
            + ("; ".join(left.why for left in left_out) or "no profile has arrived yet")
        )
    here = {profile.peer_id for profile in able}
    if lost := min(wishes.pinned.keys() - here, default=""):
        why = next((left.why for left in left_out if left.peer_id == lost), "it is not here")
        raise NoPlan(f"peer {lost} cannot have the window that is asked for: {why}")
    kv_type, not_wanted = kv.possible(shape, wishes.kv_type, wishes.flash)
    shape = kv.sized(shape, kv_type)
    search, found = _searched(able, shape, kv_type, wishes)
    able = search.able
    if found is None:
        why = reasons.missing(able, shape, search.smallest, wishes) if not search.broken else ""
        raise NoPlan(why or reasons.broken(search.broken, shape))
    if (token_s := found.ring.forecast.tpot_s) > TOKEN_S_MAX:
        raise NoPlan(
            f"a token of {shape.model} would take {reasons.seconds(token_s)} here: start a faster "
            "peer, or pull a smaller model"
        )
    of = _with_more_cells(found)
    windows = _windows(of, found.ring)
    busy = {window.peer_id for window in windows}
    taking_part = [p for p in able if p.peer_id in busy]
    left_out += [
        LeftOut(p.peer_id, reasons.left_out(p, taking_part, found.of, found.ring, wishes)[:1000])
        for p in able
        if p.peer_id not in busy
    ]
    why = reasons.chosen(of, found.ring, search.context_wanted)
    why += f"; {not_wanted}" if not_wanted else ""
    why += reasons.engines(of, found.ring)
    if wishes.before is not None:
        why += f"; {reasons.stayed(of.shape, windows, wishes.before)}"
    return Split(
        windows=windows,
        context=of.size.context,
        kv_cells=of.size.kv_cells,
        slots=SLOTS if all(shape.layer_kv_bytes) else SLOTS_RECURRENT,
        batch_tokens=BATCH_TOKENS,
        left_out=tuple(left_out),
        why=why[:1000],
        chunk_tokens=found.ring.forecast.chunk_tokens,
        kv_type=kv_type,
        flash=wishes.flash,
        speculation=wishes.speculation,
    )


def unusable(shape: ModelShape) -> str:
    """Why no plan can be made of a shape, whatever peers there are, or ""."""
    if not shape.layers or not shape.sound:
        return f"the header of {shape.model} contradicts itself: remove it and pull it again"
    least = _size(min(shape.context or CONTEXT_LEAST, CONTEXT_LEAST))
    if _whole_bytes(shape, least) > BYTES_MAX:
        return (
            f"the header of {shape.model} speaks of more than {BYTES_MAX >> 50:,} PiB: remove it "
            "and pull it again"
        )
    return ""


# Who and how much ------------------------------------------------------------------------------


def _able(
    profiles: Sequence[Profile], shape: ModelShape, wishes: Wishes
) -> tuple[list[Profile], list[LeftOut]]:
    """Peers that could take part, by peer id, and those that cannot."""
    able, left_out = [], []
    for profile in sorted(profiles, key=lambda p: p.peer_id):
        why = trust.fault(profile)
        if profile.peer_id in wishes.without:
            why = f"{profile.name} is to be done without"
        elif wishes.only and profile.peer_id not in wishes.only:
            why = f"{profile.name} is not among those that are wanted"
        why = why or profile.why_not(shape)
        if why:
            left_out.append(LeftOut(profile.peer_id, why[:1000]))
        else:
            able.append(profile)
    return able, left_out


def _size(context: int, kv_cells: int = 0, kv_type: str = "f16") -> Size:
    return Size(context, kv_cells or context, BATCH_TOKENS, kv_type)


def _whole_bytes(shape: ModelShape, size: Size) -> int:
    """What one stage with all layers needs, on the engine that needs most; in Python's integers,
    which cannot overflow."""
    ends = costs.compute_bytes(shape, size) + costs.logits_bytes(shape, size)
    cache = size.kv_cells * sum(shape.layer_kv_bytes)
    kept = [shape.in_memory(fit.backend, fit.weights) for fit in shape.fits]
    return max(each.window_bytes(0, each.layers) for each in (shape, *kept)) + cache + ends


def _contexts(shape: ModelShape, wanted: int) -> list[int]:
    """Tokens to try, the most first, halved down to CONTEXT_LEAST."""
    context = min(shape.context or CONTEXT_DEFAULT, wanted or CONTEXT_DEFAULT)
    least, found = min(context, CONTEXT_LEAST), []
    while True:
        if _whole_bytes(shape, _size(context)) <= BYTES_MAX:
            found.append(context)
        if context <= least:
            return found
        context = max(least, context // 2)


def _searched(
    able: list[Profile], shape: ModelShape, kv_type: str, wishes: Wishes
) -> tuple[_Search, _Found | None]:
    """By the engines that peers prefer; where their copies of the weights leave too little memory,
    by those that map the files, if that is better."""
    search = _Search(able, shape, kv_type, wishes)
    found = search.best()
    mapped = mapping(able, shape)
    if mapped == able or (found and found.comfort == (True, min(search.contexts[0], CONTEXT_GOOD))):
        return search, found
    other = _Search(mapped, shape, kv_type, wishes)
    second = other.best()
    better = second is not None and (found is None or second.comfort > found.comfort)
    return (other, second) if better else (search, found)


class _Search:
    """The best ring of each size of the context, and the choice among them."""

    def __init__(
        self, able: list[Profile], shape: ModelShape, kv_type: str, wishes: Wishes
    ) -> None:
        self.able, self._shape, self._kv_type, self._wishes = able, shape, kv_type, wishes
        self.contexts = _contexts(shape, wishes.context)
        self.smallest = _size(self.contexts[-1], kv_type=kv_type)
        self.broken: tuple[tuple[str, str], ...] = ()  # links that a ring would have needed
        self._known: dict[tuple[int, bool], _Found | None] = {}

    @property
    def context_wanted(self) -> int:
        """Tokens, of which fewer are for want of memory."""
        before = self._wishes.before
        return self._before_context if before else self.contexts[0]

    @property
    def _before_context(self) -> int:
        """What running answers have to fit into, 0: there are none."""
        before = self._wishes.before
        return min(before.context, self._shape.context or before.context) if before else 0

    def best(self) -> _Found | None:
        """Everyone where that is wanted and possible; else whoever is best."""
        return (self._choose(True) if self._everyone else None) or self._choose(False)

    @property
    def _everyone(self) -> list[Profile]:
        """Whom to give a layer for the sake of it: all that could hold one; [] where it is not
        wanted, or there are not layers enough."""
        if not self._wishes.spread_all:
            return []
        of, least = costs.problem(self.able, self._shape, self.smallest), reasons.least_bytes
        can = [a.profile for a in of.peers if max(a.ram_bytes, a.gpu_bytes) >= least(of, a)]
        return can if len(can) <= self._shape.layers else []

    def _choose(self, everyone: bool) -> _Found | None:
        """The longest context that is worth its time. Weights are read from disk for each token
        only where no context is short enough for all of them to stay in memory."""
        # Answers that run have to go on: no other context is better than the one that they had.
        if self._before_context and (found := self._at(self._before_context, everyone)):
            return found
        contexts = self.contexts
        good = [c for c in contexts if c >= CONTEXT_GOOD or self._wishes.context] or contexts[:1]
        if self._wishes.context:
            good = good[:1]
        shortest = self._at(good[-1], everyone)
        if shortest is not None and not shortest.streams:
            limit = shortest.cost_s(self._wishes.objective) * CONTEXT_WORTH
            for context in good:
                found = self._at(context, everyone)
                if found and found.cost_s(self._wishes.objective) <= limit:
                    return found
        shorter = [self._at(c, everyone) for c in contexts if c < good[-1]]
        held = next((found for found in shorter if found and not found.streams), None)
        return held or shortest or next((found for found in shorter if found), None)

    def _at(self, context: int, everyone: bool) -> _Found | None:
        key = context, everyone
        if key not in self._known:
            found = self._found(self._everyone if everyone else self.able, context, everyone)
            free = found and not everyone and self._wishes.before is None
            self._known[key] = self._simpler(found) if found and free else found
        return self._known[key]

    def _found(self, peers: list[Profile], context: int, everyone: bool) -> _Found | None:
        """The best ring in which all neighbours reach each other. Where everyone is to be in it and
        there is none, those are left out that fewest others reach, one after another."""
        while True:
            of = costs.problem(peers, self._shape, _size(context, kv_type=self._kv_type))
            ring = self._ring(of, everyone)
            if ring is None or not ring.broken:
                return _Found(of, ring) if ring else None
            self.broken = reasons.broken_links(of, ring)
            if not everyone:
                return None
            apart = (of.hop_s >= costs.UNREACHED_S).sum(axis=1)
            worst = max(range(len(peers)), key=lambda i: (apart[i], *self._spared(peers[i])))
            peers = [peer for i, peer in enumerate(peers) if i != worst]

    def _spared(self, profile: Profile) -> tuple[bool, str]:
        """Greater for one that is rather left out: whoever is not in the ring of now."""
        return profile.peer_id not in self._wishes.order, profile.peer_id

    def _simpler(self, found: _Found) -> _Found:
        """With fewer peers, where that takes hardly longer. Without this, of two equal machines one
        would get a layer whenever it was measured to be a percent faster."""
        objective, unheard = self._wishes.objective, self._wishes.unheard
        limit = found.cost_s(objective) * PEER_WORTH
        while 1 < len(found.ring.order) <= _FEWER_MAX and not self._wishes.pinned:
            fewer, head = [], _head(found.of, found.ring)
            for left in found.ring.order:
                profiles = [found.of.peers[i].profile for i in found.ring.order if i != left]
                of = costs.problem(sorted(profiles, key=_id), self._shape, found.of.size)
                ring = self._ring(of, False)
                if ring and unheard.get(_head(of, ring), 0) <= unheard.get(head, 0):
                    fewer.append(_Found(of, ring))
            best = min(fewer, key=lambda f: f.cost_s(objective), default=None)
            if best is None or best.cost_s(objective) > limit:
                break
            found = best
        return found

    def _ring(self, of: Problem, everyone: bool) -> Ring | None:
        wishes = self._wishes
        if coarse.needed(of):
            return coarse.in_proportion(of, everyone)
        index = {able.peer_id: i for i, able in enumerate(of.peers)}
        wanted = Wanted(
            # Where everyone is to take part for the sake of it, the load is to be shared.
            objective="throughput" if everyone else wishes.objective,
            everyone=everyone,
            rounds=wishes.rounds,
            pinned={index[p]: window for p, window in wishes.pinned.items() if p in index},
            missing=_missing(of, wishes.held) if wishes.held else None,
            order=tuple(index[p] for p in wishes.order if p in index),
        )
        wanted = _with_heads(of, wanted, wishes.unheard)
        if wishes.before is None:
            return halda.solve(of, wanted)
        ring = halda.solve(of, after_loss.wanted(of, wanted, wishes))
        return after_loss.with_gpu_layers(of, ring, wishes.before) if ring else None


def _with_heads(of: Problem, wanted: Wanted, unheard: Mapping[str, int]) -> Wanted:
    """Every peer that does not reach the head counts like a model that would have to be fetched:
    its clients would get no answers, and that is worth a little of everybody's time."""
    counts = [unheard.get(able.peer_id, 0) for able in of.peers]
    if not any(counts):
        return wanted
    whole = float(sum(of.shape.layer_bytes)) * after_loss.FETCHED
    ends = np.array([[count * whole, 0.0] for count in counts])
    return replace(wanted, ends=ends, within=HEARD_WORTH)


def _head(of: Problem, ring: Ring) -> str:
    return of.peers[ring.order[0]].peer_id


def _missing(of: Problem, held: Mapping[str, Collection[str]]) -> Floats:
    """[peers, layers] bytes that each peer would have to fetch. held: names of parts, by peer."""
    names = [f"layer-{i:03d}" for i in range(of.shape.layers)]
    sizes = list(zip(names, of.shape.layer_bytes, strict=True))
    rows = [[0.0 if name in held.get(able.peer_id, ()) else float(size) for name, size in sizes]
            for able in of.peers]  # fmt: skip
    return np.array(rows)


def _id(profile: Profile) -> str:
    return profile.peer_id


def _with_more_cells(found: _Found) -> Problem:
    """The same ring, with KV cache for as many more answers as there is room for."""
    of, context = found.of, found.of.size.context
    cells = min(WHOLE_ANSWERS * context, max(context, CONTEXT_DEFAULT))
    while cells > context:
        size = _size(context, cells, of.size.kv_type)
        if _whole_bytes(of.shape, size) <= BYTES_MAX:
            larger = costs.problem([able.profile for able in of.peers], of.shape, size)
            if _holds(larger, found.ring):
                return larger
        cells = max(context, cells // 2)
    return of


def _holds(of: Problem, ring: Ring) -> bool:
    """Whether it fits, with no more to be read from disk than before."""
    for at, edge, layers, before in zip(
        ring.order, ring.edges, ring.gpu_layers, ring.parts, strict=True
    ):
        part = costs.part(
            of, of.peers[at], costs.windows(of.shape.layers, ring.rounds, edge), layers
        )
        if part is None or part.streamed_bytes > before.streamed_bytes:
            return False
    return True


def _windows(of: Problem, ring: Ring) -> tuple[PlanWindow, ...]:
    """The plan's windows, in ring order and round after round."""
    cells, rows = of.size.kv_cells, []
    for number in range(ring.rounds):
        for place, at in enumerate(ring.order):
            able, part = of.peers[at], ring.parts[place]
            a, b = costs.windows(of.shape.layers, ring.rounds, ring.edges[place])[number]
            layers, held = ring.gpu_layers[place], able.held
            rows.append(
                PlanWindow(
                    peer_id=able.peer_id,
                    first=a,
                    last=b,
                    backend=able.backend,
                    memory_bytes=held.window_bytes(a, b) + cells * sum(held.layer_kv_bytes[a:b]),
                    gpu_layers=-1 if able.gpu and layers >= b - a else layers,
                    streamed_bytes=part.streamed_bytes // ring.rounds,
                    ahead_bytes=part.ahead_bytes(ring.rounds, ring.forecast.tpot_s),
                )
            )
    return tuple(rows)
