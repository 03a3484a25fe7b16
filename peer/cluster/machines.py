"""Runs the two pure machines on the clock: events in, actions out, in order, one at a time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from peer.cluster import election as e
from peer.cluster import membership as m
from peer.cluster.listener import clock
from peer.config import Timing
from peer.protocol import Control, Goodbye, Heartbeat, Opinion, Suspect

Event = m.Event | e.Event
Action = m.Action | e.Action


class Machines:
    """Membership and election of one peer. perform: does one action; may `feed` more events."""

    def __init__(
        self, me: str, timing: Timing, term: int, perform: Callable[[Action], None]
    ) -> None:
        self._me, self._timing, self._perform = me, timing, perform
        self._inbox: deque[Event] = deque()
        self._draining = False
        self._timer: asyncio.TimerHandle | None = None
        self._due = asyncio.Event()
        self.begin(term)

    def begin(self, term: int) -> None:
        """Start from nothing: who is here, and listening for a coordinator. term: the stored."""
        now = clock()
        self.membership = m.Membership(self._me, self._timing, now)
        self.election = e.Election(self._me, self._timing, now, term=term)

    def feed(self, *events: Event) -> None:
        """Hand over what happened. Actions are performed before this returns, unless it is
        called from one: then after it, in order."""
        self._inbox.extend(events)
        if self._draining:
            return
        self._draining = True
        try:
            while self._inbox:
                for action in self._step(self._inbox.popleft()):
                    self._perform(action)
        finally:
            self._draining = False
        self._arm()

    def take(self, peer_id: str, message: Control) -> bool:
        """A message from a member: whether it was one of these machines'."""
        match message:
            case Heartbeat(term, coordinator, followed):
                self.feed(e.Beat(peer_id, term, coordinator, followed))
            case Goodbye(why):
                self.feed(m.Left(peer_id, why))
            case Suspect(suspect):
                self.feed(m.Asked(peer_id, suspect))
            case Opinion(suspect, heard, ago_s):
                self.feed(m.Opined(peer_id, suspect, heard, ago_s))
            case _:
                return False
        return True

    async def run(self) -> None:
        """Tick when a machine wants it, until cancelled."""
        try:
            self.feed(m.Tick(), e.Tick())
            while True:
                await self._due.wait()
                self._due.clear()
                self.feed(m.Tick(), e.Tick())
        finally:
            if self._timer is not None:
                self._timer.cancel()

    def _step(self, event: Event) -> list[m.Action] | list[e.Action]:
        if isinstance(event, e.Event):
            return self.election.step(event, clock())
        return self.membership.step(event, clock())

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        at = min(self.membership.deadline, self.election.deadline)
        wait_s = max(0.0, at - clock())
        self._timer = asyncio.get_running_loop().call_later(wait_s, self._due.set)
