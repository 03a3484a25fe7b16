"""A second opinion, as pure code: a member that this peer does not hear is asked about.

Suspected is not dead: it may be this peer's own link that broke. The other members are asked, once
a second; while one of them hears the peer it is given more time. Who says that it hears a dead peer
can delay its loss, by `doubt_s` at most; nobody's word makes a loss that would not be one without.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

ANSWER_S = 0.5  # for opinions: a busy agent's turn and a bad Wi-Fi's round trip; 3.8 + it < 4.5
AGAIN_S = 1.0  # between questions
FRESH_BEATS = 1.5  # whoever was heard within so many is heard; one beat may be a little late


@dataclass(slots=True)
class Doubt:
    """About one member. until: when it ends at the latest. Times are the caller's, in seconds."""

    until: float
    asked_at: float = 0.0
    asked: frozenset[str] = frozenset()  # in the last question
    excused: bool = False  # this process was late once
    deaf: set[str] = field(default_factory=set)  # of those, who do not hear it either
    hearing: dict[str, tuple[float, float]] = field(default_factory=dict)  # → (last heard, told at)

    def ask(self, others: Iterable[str], now: float) -> None:
        """Note a question. Who heard the peer at the last one counts until the next: one answer may
        be lost, or late."""
        self.hearing = {by: at for by, at in self.hearing.items() if at[1] >= self.asked_at}
        self.asked, self.asked_at = frozenset(others), now
        self.deaf.clear()

    def take(self, by: str, heard: bool, ago_s: float, now: float) -> None:
        """Note an opinion. heard: it was heard freshly."""
        if by not in self.asked and by not in self.hearing:
            return
        self.hearing.pop(by, None)
        self.deaf.discard(by)
        if heard:
            self.hearing[by] = (now - ago_s, now)
        else:
            self.deaf.add(by)

    def forget(self, peer_id: str) -> None:
        """Who is no member any more has no opinion."""
        self.asked -= {peer_id}
        self.hearing.pop(peer_id, None)
        self.deaf.discard(peer_id)

    def shift(self, late_s: float, now: float) -> None:
        """Move the clocks by a time in which this process did not run.

        Once in a doubt also so that answers which wait unread are read; not more often, or a
        process that always starves would never lose anybody.
        """
        self.until += late_s
        self.asked_at += late_s
        if not self.excused:
            self.excused = True
            self.until, self.asked_at = max(self.until, now + ANSWER_S), now

    @property
    def due(self) -> float:
        """When there is something to do without another word: ask again, or decide."""
        if self.hearing:
            return min(self.until, self.asked_at + AGAIN_S)
        return self.asked_at + (0.0 if self.deaf >= self.asked else ANSWER_S)

    def decided(self, now: float) -> bool:
        """Whether it is enough: time is up, or all that may still come is not worth waiting for."""
        return now >= (self.until if self.hearing else self.due)

    @property
    def heard_by(self) -> str:
        """Who heard it last, of those who hear it; "" where nobody does."""
        return max(self.hearing, key=lambda by: (self.hearing[by][0], by), default="")

    def why(self, why: str) -> str:
        """Why the peer is lost, told with what the others said. why: what this peer saw."""
        if self.hearing:
            return f"{why}, though {_peers(len(self.hearing))} still {_hear(len(self.hearing))} it"
        if self.deaf:
            return f"{why}, and {_peers(len(self.deaf))} {_do(len(self.deaf))} not hear it either"
        return f"{why}, and no other peer answered whether it hears it" if self.asked else why


def _peers(count: int) -> str:
    return "another peer" if count == 1 else f"{count} other peers"


def _hear(count: int) -> str:
    return "hears" if count == 1 else "hear"


def _do(count: int) -> str:
    return "does" if count == 1 else "do"
