"""Who is to hold which parts besides those of its windows, so that a loss costs no transfer. Pure.

A part that only one peer holds is lost with it, so each gets a second holder first; then every peer
gets what it would need in the plans that would follow the losses. What a peer holds already, or was
asked to hold before, stays with it: parts do not travel around the house with every new plan.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from peer.planning.plan import Plan
from peer.planning.profile import ModelShape

HOLDERS = 2  # of each part: one may be lost


def part_sizes(shape: ModelShape) -> dict[str, int]:
    """The bytes of weights in each of a model's parts, in order; files are a few KiB larger."""
    ends = {"head": shape.head_bytes, "embed": shape.embed_bytes, "output": shape.output_bytes}
    layers = {f"layer-{i:03d}": size for i, size in enumerate(shape.layer_bytes)}
    return {part: (ends | layers)[part] for part in shape.window_parts(0, shape.layers)}


def total_bytes(shape: ModelShape, parts: Collection[str]) -> int:
    """The weights in these parts; names that the model has not count as nothing."""
    sizes = part_sizes(shape)
    return sum(sizes.get(part, 0) for part in parts)


def own_parts(plan: Plan, peer_id: str) -> frozenset[str]:
    """What a peer needs for this plan: head.gguf, and the parts of its windows, if it has any."""
    windows = (plan.split.windows[index] for index in plan.windows_of(peer_id))
    parts = (part for w in windows for part in plan.shape.window_parts(w.first, w.last))
    return frozenset(("head", *parts))


def held_besides_bytes(plan: Plan, peer_id: str, held: Collection[str]) -> int:
    """What of `Profile.spare_bytes` is used already by the parts that a peer holds."""
    return total_bytes(plan.shape, set(held) - own_parts(plan, peer_id))


@dataclass(frozen=True, slots=True)
class Holding:
    """What is asked of `assign`. All by peer id.

    peers: those that count as holders, and may become some. held: all parts that they have.
    spare_bytes: as in their profiles. asked: what they were to hold until now. needed: for each
    loss, what those who would go on need besides the parts of their windows.
    """

    plan: Plan
    peers: Sequence[str]
    held: Mapping[str, frozenset[str]]
    spare_bytes: Mapping[str, int]
    asked: Mapping[str, Collection[str]] = field(default_factory=dict)
    needed: Mapping[str, Mapping[str, frozenset[str]]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Assigned:
    """parts: by peer, in the model's order, those held already among them; what they weigh is
    within the peer's spare_bytes. single: parts with one holder, for which no other has room."""

    parts: Mapping[str, tuple[str, ...]]
    single: frozenset[str]


def assign(holding: Holding) -> Assigned:
    """Who is to hold what, the most important first, as far as there is room."""
    work = _Assignment(holding)
    single = frozenset(part for part in work.order if not work.second_holder(part))
    work.fallbacks()
    work.keepers()
    return Assigned(work.listed(), single)


class _Assignment:
    """One call of `assign`."""

    def __init__(self, holding: Holding) -> None:
        self._of = holding
        self._sizes = part_sizes(holding.plan.shape)
        self.order = tuple(self._sizes)
        self._place = {part: place for place, part in enumerate(self.order)}
        self._peers = sorted(holding.peers)
        self._own = {p: own_parts(holding.plan, p) for p in self._peers}
        # What serves is there, whether its owner has told so yet or not.
        told = {p: holding.held.get(p, frozenset()) & self._sizes.keys() for p in self._peers}
        self._has = {p: self._own[p] | told[p] for p in self._peers}
        self._wanted: dict[str, set[str]] = {p: set() for p in self._peers}  # besides their own
        self._fetched: dict[str, set[str]] = {p: set() for p in self._peers}  # of these, to come
        self._room = {p: self._room_of(p) for p in self._peers}
        needs = holding.needed.values()
        self._useful = {
            p: frozenset(part for by_peer in needs for part in by_peer.get(p, ()))
            for p in self._peers
        }

    def _room_of(self, peer_id: str) -> int:
        used = held_besides_bytes(self._of.plan, peer_id, self._has[peer_id])
        return max(0, self._of.spare_bytes.get(peer_id, 0) - used)

    def second_holder(self, part: str) -> bool:
        """See to it that as many as can hold the part. False where it stays with one."""
        holders = [p for p in self._peers if part in self._has[p]]
        for _ in range(len(holders), HOLDERS):
            able = [p for p in self._peers if p not in holders and self._fits(p, part)]
            if not able:
                return False
            chosen = min(able, key=self._preference(part))
            self._take(chosen, part)
            holders.append(chosen)
        return True

    def _preference(self, part: str) -> Callable[[str], tuple[bool, bool, int, str]]:
        """Whose it is to be: who was asked for it before, needs it after a loss, has most room."""

        def order(peer_id: str) -> tuple[bool, bool, int, str]:
            asked = part in self._of.asked.get(peer_id, ())
            useful = part in self._useful[peer_id]
            return not asked, not useful, -self._room[peer_id], peer_id

        return order

    def _fits(self, peer_id: str, part: str) -> bool:
        # (A peer that offers nothing gets nothing, not even what weighs nothing.)
        return max(1, self._sizes[part]) <= self._room[peer_id]

    def _take(self, peer_id: str, part: str) -> None:
        self._wanted[peer_id].add(part)
        if part not in self._has[peer_id] and part not in self._fetched[peer_id]:
            self._fetched[peer_id].add(part)
            self._room[peer_id] -= self._sizes[part]

    def fallbacks(self) -> None:
        """What the plans after a loss need, those that lack least first: more of them are whole."""
        for lost in sorted(self._of.needed, key=lambda x: (self._lacking_bytes(x), x)):
            for peer_id, parts in sorted(self._of.needed[lost].items()):
                for part in sorted(parts, key=self._place.__getitem__):
                    if peer_id not in self._has or part in self._own[peer_id]:
                        continue
                    if part in self._has[peer_id] or self._fits(peer_id, part):
                        self._take(peer_id, part)

    def keepers(self) -> None:
        """Who holds already what nobody was asked for, so that it is known to be relied upon."""
        for part in self.order:
            holders = [p for p in self._peers if part in self._has[p]]
            known = sum(part in self._own[p] or part in self._wanted[p] for p in self._peers)
            kept = [p for p in holders if part not in self._own[p] | self._wanted[p]]
            for peer_id in sorted(kept, key=self._preference(part))[: max(0, HOLDERS - known)]:
                self._wanted[peer_id].add(part)

    def _lacking_bytes(self, lost: str) -> int:
        return sum(
            self._sizes[part]
            for peer_id, parts in self._of.needed[lost].items()
            for part in parts
            - self._has.get(peer_id, frozenset())
            - self._fetched.get(peer_id, set())
        )

    def listed(self) -> dict[str, tuple[str, ...]]:
        """What each peer is told: no more than it offers room for, what it holds already first.
        One that was pulled there holds more than it offers; that counts, and need not be told."""
        told = {}
        for peer_id in self._peers:
            left, parts = self._of.spare_bytes.get(peer_id, 0), []
            order = sorted(self._wanted[peer_id], key=lambda p: (p in self._fetched[peer_id], p))
            for part in order:
                if self._sizes[part] <= left:
                    left -= self._sizes[part]
                    parts.append(part)
            if parts:
                told[peer_id] = tuple(sorted(parts, key=self._place.__getitem__))
        return told
