"""A planner of simple costs: it answers the coordinator's questions in microseconds.

It fills the peers that it takes in proportion to their room, keeps a ring that still can be, stays
near the one that was before a loss, and puts no two peers next to each other that do not hear each
other. One home in some hundreds is planned by the real planner instead.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from peer.planning.making import Answer, Question
from peer.planning.plan import Plan, PlanWindow, Split, check
from peer.planning.profile import ModelShape, Profile

ORDERS_MAX = 24  # of a ring that are looked at


@dataclass(frozen=True, slots=True)
class Planner:
    """What all splits of one home have in common. rounds: how often a token goes around."""

    context: int
    kv_cells: int
    slots: int
    batch_tokens: int
    rounds: int = 1
    chunk_tokens: int = 0

    def __call__(self, question: Question) -> Answer:
        """As planning.making.answer."""
        whys = {}
        for shape in question.shapes:
            found = self.make(question, shape)
            if isinstance(found, str):
                whys[shape.digest] = found
                continue
            for now in question.current:
                if now.shape == shape and now.split.windows and self.may_stay(question, now, found):
                    return Answer(question.number, now, True, whys)
            return Answer(question.number, found, False, whys, "more peers take part")
        return Answer(question.number, None, False, whys)

    def may_stay(self, question: Question, now: Plan, found: Plan) -> bool:
        """Whether the plan of now is good enough."""
        able = {p.peer_id for p in able_of(question, now.shape)}
        if not able.issuperset(now.ring) or not joined(question, now.ring):
            return False
        if any(profile.spread_all for profile in question.members.here):
            return set(now.ring) >= set(found.ring)
        return True

    def make(self, question: Question, shape: ModelShape) -> Plan | str:
        """The plan, or why there is none."""
        for profiles in choices(question, shape):
            for order in self.orders(question, profiles):
                split = self.split(order, shape)
                plan = Plan(question.plan_id, question.me, shape, split)
                assert not check(plan), check(plan)
                return plan
        barred = question.barred.get(shape.digest, {})
        return "; ".join(barred.values()) or "the peers that are here have not enough memory"

    def orders(
        self, question: Question, profiles: Sequence[Profile]
    ) -> Iterator[Sequence[Profile]]:
        """Rings of these, the one most like the last first, where all hear their neighbours."""
        last = question.current[0] if question.current else question.before
        known = {peer: at for at, peer in enumerate(last.ring)} if last else {}
        first = sorted(profiles, key=lambda p: (known.get(p.peer_id, 99), p.peer_id))
        for order in itertools.islice(itertools.permutations(first), ORDERS_MAX):
            if joined(question, [p.peer_id for p in order]):
                yield order

    def split(self, order: Sequence[Profile], shape: ModelShape) -> Split:
        """Layers in proportion to room, in as many rounds as there are layers for."""
        rounds = self.rounds if shape.layers >= self.rounds * len(order) else 1
        windows: list[PlanWindow] = []
        first = 0
        for turn in range(rounds):
            layers = shape.layers * (turn + 1) // rounds - first
            for at, (profile, count) in enumerate(zip(order, shares(order, layers), strict=True)):
                windows.append(PlanWindow(profile.peer_id, first, first + count, "fake"))
                first += count
                layers -= count
                assert layers >= len(order) - at - 1
        return Split(
            tuple(windows), self.context, self.kv_cells, self.slots, self.batch_tokens,
            why="simple", chunk_tokens=self.chunk_tokens,
        )  # fmt: skip


def shares(order: Sequence[Profile], layers: int) -> list[int]:
    """At least one layer each, the rest where there is room."""
    counts = [1] * len(order)
    for _ in range(layers - len(order)):
        free = [room(p) - count for p, count in zip(order, counts, strict=True)]
        counts[free.index(max(free))] += 1
    return counts


def room(profile: Profile) -> int:
    """Layers that a peer has memory for."""
    return profile.memory_available_bytes >> 20


def joined(question: Question, ring: Sequence[str]) -> bool:
    """Whether all hear the next one."""
    profiles = question.members.profiles
    return all(
        b not in profiles[a].unreachable and a not in profiles[b].unreachable
        for a, b in itertools.pairwise([*ring, ring[0]])
    )


def able_of(question: Question, shape: ModelShape) -> list[Profile]:
    """Those who may take part, less those that are better done without where that is possible."""
    barred = question.barred.get(shape.digest, {})
    able = [p for p in question.members.here if p.peer_id not in barred]
    steady = [p for p in able if not p.leaving and p.peer_id not in question.shaky]
    enough = sum(map(room, steady)) >= shape.layers
    return steady if enough else able


def choices(question: Question, shape: ModelShape) -> Iterator[list[Profile]]:
    """Sets of peers that hold the model, the best first."""
    able = able_of(question, shape)
    able.sort(key=lambda p: (-room(p), p.peer_id))
    able = [p for p in able if room(p)]
    if any(p.spread_all for p in able):
        sizes = range(min(len(able), shape.layers), 0, -1)
    else:
        sizes = range(1, min(len(able), shape.layers) + 1)
    for size in sizes:
        for some in itertools.islice(itertools.combinations(able, size), ORDERS_MAX):
            if sum(map(room, some)) >= shape.layers:
                yield [*some]
