"""When the coordinator looks ahead, and when it tells what it foresees. Pure.

An outlook takes up to a second of a core, so it is asked for when what it depends on has been quiet
for a while, never while one is being made, and rests much longer than it took. A new plan makes
what was foreseen before it void at once; who is to hold what goes on until it is known anew.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from peer.planning.making import pace
from peer.planning.outlook import Standing
from peer.protocol import Outlook

QUIET_S = 2.0  # without a change, before it is asked for
PATIENCE_S = 5.0  # after the first change; while spares arrive, what is held changes every second
REST_S = 5.0  # between two of them
REST_SHARE = 10.0  # and so many times as long as one took: at most a tenth of a core
AGAIN = 3  # times `publish_s` between repetitions
_NEVER = math.inf


@dataclass(frozen=True, slots=True)
class Seen:
    """What this peer knows as the coordinator; None: it is not, or nothing serves."""

    standing: Standing | None


@dataclass(frozen=True, slots=True)
class Foreseen:
    """The answer to a Foresee, and the seconds that it took."""

    number: int
    outlook: Outlook
    took_s: float


@dataclass(frozen=True, slots=True)
class Heard:
    """What another coordinator told: this peer goes on with its spares, should it become one."""

    outlook: Outlook


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed."""


Event = Seen | Foreseen | Heard | Tick


@dataclass(frozen=True, slots=True)
class Foresee:
    """Make the outlook of this."""

    number: int
    standing: Standing


@dataclass(frozen=True, slots=True)
class Publish:
    """Tell every peer, this one too."""

    outlook: Outlook


Action = Foresee | Publish


class Foresight:
    """The machine. One for a peer's lifetime; silent while it is not the coordinator's."""

    def __init__(self, publish_s: float) -> None:
        self._again_s = AGAIN * publish_s
        self._standing: Standing | None = None
        self._told: Outlook | None = None  # last, by this peer or by a coordinator before it
        self._number = 0
        self._asked: Standing | None = None  # of the question that is not answered yet
        self._first_s = self._quiet_s = self._repeat_s = _NEVER
        self._rested_s = -_NEVER

    @property
    def deadline(self) -> float | None:
        """When a Tick is wanted, None: whenever."""
        if self._standing is None:
            return None
        at = min(self._ask_s if self._asked is None else _NEVER, self._repeat_s)
        return at if at < _NEVER else None

    @property
    def _ask_s(self) -> float:
        return max(min(self._quiet_s, self._first_s + PATIENCE_S), self._rested_s)

    def step(self, event: Event, now: float) -> list[Action]:
        """Take one event in; what is to be done comes out."""
        actions: list[Action] = []
        match event:
            case Seen(standing):
                actions = self._seen(standing, now)
            case Foreseen():
                actions = self._foreseen(event, now)
            case Heard(outlook):
                if self._standing is None:
                    self._told = outlook
            case Tick():
                pass
        if self._standing is None:
            return actions
        if self._told is not None and now >= self._repeat_s:
            actions.append(self._tell(self._told, now))
        if self._asked is None and now >= self._ask_s:
            actions.append(self._ask(now))
        return actions

    def _seen(self, standing: Standing | None, now: float) -> list[Action]:
        before, self._standing = self._standing, standing
        if standing is None:
            self._first_s = self._quiet_s = self._repeat_s = _NEVER
            return []
        if before is not None and _is_same(before, standing):
            return []
        self._quiet_s = now + QUIET_S
        self._first_s = min(self._first_s, now)
        gone = before is None or not standing.members.present.issuperset(before.members.present)
        if gone or before is None or before.plan.id != standing.plan.id:
            # What was foreseen of another plan, or with another peer, does not hold any more.
            spares = self._told.spares if self._told else ()
            return [self._tell(Outlook(standing.term, (), spares), now)]
        return []

    def _ask(self, now: float) -> Foresee:
        assert self._standing is not None
        self._first_s = self._quiet_s = _NEVER
        self._number += 1
        asked = self._told.spares if self._told else ()
        self._asked = replace(self._standing, asked=asked)
        return Foresee(self._number, self._asked)

    def _foreseen(self, answer: Foreseen, now: float) -> list[Action]:
        asked = self._asked
        if answer.number != self._number or asked is None:
            return []
        self._asked = None
        self._rested_s = now + max(REST_S, REST_SHARE * answer.took_s)
        mine = self._standing
        if mine is None:
            return []
        same = (asked.term, asked.plan.id) == (mine.term, mine.plan.id)
        if not same or not mine.members.present.issuperset(asked.members.present):
            # It is about what is over; what changed since has been noted when it was seen.
            self._rested_s = now
            return []
        return [self._tell(answer.outlook, now)] if answer.outlook != self._told else []

    def _tell(self, outlook: Outlook, now: float) -> Publish:
        self._told = outlook
        self._repeat_s = now + self._again_s
        return Publish(outlook)


def _is_same(a: Standing, b: Standing) -> bool:
    """Whether one outlook holds for both."""
    if a.members is b.members and (a.plan, a.barred, a.shaky) == (b.plan, b.barred, b.shaky):
        return a.term == b.term
    return _key(a) == _key(b)


def _key(of: Standing) -> object:
    """All that an outlook depends on."""
    digest, members = of.plan.shape.digest, of.members
    held = [
        (peer_id, offer.parts)
        for peer_id in sorted(members.present)
        for offer in members.offers.get(peer_id, ())
        if offer.shape.digest == digest
    ]
    profiles = [
        (
            members.nature(p.peer_id)[0],
            pace(p, digest),
            p.memory_available_bytes,
            tuple(engine.memory_free_bytes for engine in p.engines),
            p.spare_bytes,
            p.leaving,
            p.unreachable,
        )
        for p in members.here
    ]
    return of.term, of.plan.id, members.present, held, profiles, of.barred, of.shaky
