"""A house in which one thing goes wrong: how soon who notices what, and who coordinates then."""

from __future__ import annotations

from collections import deque
from typing import Any

from peer.cluster import membership as m
from tests.simulated.faults import Faults, Process
from tests.simulated.house import House


class Calm(House):
    """Peers that agree, on wires that lose nothing. liars: peer → what it says of all others."""

    def __init__(self, seed: int, size: int | None = None) -> None:
        super().__init__(seed, size)
        self.chaos = False
        self.faults = Faults(self.rng.choice((0.005, 0.02, 0.05)), 0.0, 0.0, {})
        self.liars: dict[str, bool] = {}
        self.began = self.now
        for process in self.peers.values():
            process.stored_term = 0
            self.at(self.rng.random(), self.start, process.me)
        self.play(3.0)
        self.settle("at the start")
        self.play(3.0 + self.rng.random())
        self.names = list(self.peers)
        self.rng.shuffle(self.names)
        self.mark()

    def mark(self) -> None:
        """What was lost and elected before does not count."""
        self.began = self.now
        self.losses.clear()
        self.changes.clear()

    def perform(self, process: Process, action: Any, inbox: deque[Any]) -> None:
        if isinstance(action, m.Answer) and process.me in self.liars:
            action = m.Answer(action.to, action.peer_id, self.liars[process.me], 0.0)
        super().perform(process, action, inbox)

    def send(self, source: Process, target: str, kind: str, number: int, body: Any = None) -> None:
        """As on any street, but no hello arrives without the handshake that goes before it."""
        if kind != "hello" or (target, source.me) not in self.blocked:
            super().send(source, target, kind, number, body)

    def cut(self, a: str, b: str) -> None:
        """The wire between two of them, in both directions."""
        self.blocked |= {(a, b), (b, a)}

    def pull(self, name: str) -> None:
        """One peer's cable."""
        for other in self.peers:
            self.cut(name, other)

    # What was noticed -----------------------------------------------------------------------------

    def took(self, by: str, other: str) -> float:
        """Seconds until `by` lost `other`. Fails where it never did."""
        for at, who, lost in self.losses:
            if (who, lost.peer_id) == (by, other):
                return at - self.began
        self.fail(f"{by} never noticed the loss of {other}")
        raise AssertionError

    def expect(self, pairs: set[tuple[str, str]]) -> None:
        """These, and no others, lost each other: (by, whom)."""
        lost = {(by, what.peer_id) for _, by, what in self.losses}
        if lost != pairs:
            self.fail(f"lost are {sorted(lost)}, not {sorted(pairs)}")

    def within(self, by: str, other: str, seconds: float) -> None:
        """Fails where the loss was noticed later."""
        most_s = seconds + 8 * self.faults.delay_max_s
        if (took_s := self.took(by, other)) > most_s:
            self.fail(f"{by} noticed the loss of {other} after {took_s:.2f} s, not {most_s:.2f} s")
