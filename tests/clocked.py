"""A membership on a clock made of numbers, with others that answer what it asks."""

from __future__ import annotations

from typing import Any

from peer.cluster.membership import (
    Answer,
    Ask,
    Dial,
    Heard,
    LinkUp,
    Lost,
    Membership,
    Opined,
    Tick,
)
from peer.config import Timing

TIMING = Timing()


class Clocked:
    """A membership of "a" with members, ticked whenever it asks for it.

    heard: who is heard all the time. answers: what others say of b when they are asked, or not.
    """

    def __init__(self, *members: str) -> None:
        self.machine = Membership("a", TIMING, 0.0)
        self.now = 0.0
        self.heard = set(members)
        self.answers: dict[str, tuple[bool, float]] = {}
        self.asked: list[tuple[float, str, tuple[str, ...]]] = []
        self.answered: list[Answer] = []
        self.lost: dict[str, tuple[float, Lost]] = {}
        self.dials: list[Dial] = []
        for peer_id in members:
            self.feed(LinkUp(peer_id, f"key of {peer_id}", 1, (f"tcp://10.0.0.{ord(peer_id)}:1",)))
        self.until(10.0)

    def feed(self, *events: Any) -> None:
        inbox = list(events)
        while inbox:
            for action in self.machine.step(inbox.pop(0), self.now):
                match action:
                    case Ask(peer_id, others):
                        self.asked.append((self.now, peer_id, others))
                        said = ((by, self.answers[by]) for by in others if by in self.answers)
                        inbox += [Opined(by, peer_id, *answer) for by, answer in said]
                    case Answer():
                        self.answered.append(action)
                    case Lost(peer_id):
                        self.lost[peer_id] = (self.now, action)
                    case Dial():
                        self.dials.append(action)

    def until(self, then: float) -> None:
        while self.now < then:
            self.now = min(then, self.machine.deadline, self.now + 0.1)
            self.feed(*(Heard(peer_id) for peer_id in sorted(self.heard)), Tick())

    def silence(self, *peers: str) -> float:
        self.heard -= set(peers)
        return self.now
