"""The cluster's side of an agent in the simulated home: what `cluster/driver.py` and
`cluster/transport.py` do with the real membership and election machines."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import deque
from typing import Any

from peer.cluster import election as e
from peer.cluster import membership as m
from tests.simulated.home_wires import Machine, Process, Wire


class Members(Process):
    """One run of an agent among the others."""

    make_membership: type[m.Membership] = m.Membership
    make_election: type[e.Election] = e.Election

    def __init__(self, home: Any, machine: Machine) -> None:
        super().__init__(home, machine)
        machine.processes[self] = None
        machine.runs += 1
        self.me, self.incarnation = machine.name, machine.runs
        self.membership = self.make_membership(self.me, home.timing, home.now)
        self.election = self.make_election(self.me, home.timing, home.now, term=machine.stored_term)
        self.connections: dict[Wire, str] = {}
        self.runs_of: dict[Wire, int] = {}  # of the other agent, by connection
        self.dials: dict[str, Wire | int] = {}  # a wire, or the number of an attempt
        self.inbox: deque[Any] = deque()
        self.feeding = False
        self.timer_at = math.inf
        self.disk_free_at = 0.0
        self.attempts = 0
        self.arm()

    # Machines -------------------------------------------------------------------------------------

    def feed(self, *events: Any) -> None:
        """Events in order, actions at once."""
        self.inbox.extend(events)
        if self.feeding:
            return
        self.feeding = True
        while self.inbox:
            event = self.inbox.popleft()
            machine: Any = self.election if isinstance(event, e.Event) else self.membership
            for action in machine.step(event, self.home.now):
                self.perform(action)
        self.feeding = False
        self.arm()

    def arm(self) -> None:
        at = min(self.membership.deadline, self.election.deadline)
        if at < self.timer_at:
            self.timer_at = at
            self.home.at(max(0.0, at - self.home.now), self.tick)

    def tick(self) -> None:
        self.timer_at = math.inf
        if self.alive and not self.stopped:
            self.feed(m.Tick(), e.Tick())

    def perform(self, action: Any) -> None:
        match action:
            case m.Dial(other):
                self.give_up(other)
                self.attempts += 1
                self.dials[other] = self.attempts
                self.home.at(self.home.delay(), self.knock, other, self.attempts)
            case m.GiveUp(other):
                self.give_up(other)
            case m.HangUp(other):
                self.give_up(other)
                for wire in [w for w, whom in self.connections.items() if whom == other]:
                    self.drop(wire)
            case m.Joined(other):
                self.home.tell(self.machine.short, "joined", other[0])
                self.feed(e.PeerUp(other))
                self.joined(other)
                self.broadcast(("gossip", tuple(sorted(self.membership.members))))
            case m.Lost(other, why, heard_by):
                self.home.tell(self.machine.short, "lost", other[0], why)
                self.feed(e.PeerDown(other))
                self.lost(other, why, heard_by)
            case m.Ask(other, others):
                for one in others:
                    self.send(one, ("suspect", other))
            case m.Answer(to, other, heard, ago_s):
                self.send(to, ("opinion", other, heard, ago_s))
            case m.SendBeats() | e.Publish():
                self.broadcast(self.beat())
            case e.StoreTerm(term, lower):
                delay_s = 0.001 + self.home.rng.random() * 0.05
                self.disk_free_at = max(self.disk_free_at, self.home.now + delay_s)
                wait_s = self.disk_free_at - self.home.now
                self.home.at(wait_s, self.do, self.store, term, lower)
            case e.Elected(coordinator, term):
                self.home.elected(self, coordinator, term)
                self.elected(coordinator, term)

    def store(self, term: int, lower: bool) -> None:
        stored = self.machine.stored_term
        self.machine.stored_term = term if lower else max(stored, term)
        self.feed(e.Stored(term))

    def beat(self) -> e.Beat:
        claim = self.election.claim
        return e.Beat(self.me, claim.term, claim.coordinator, claim.followed)

    # Links ----------------------------------------------------------------------------------------

    def knock(self, other: str, attempt: int) -> None:
        """The first packet of a dial at the other machine."""
        if not self.alive or self.dials.get(other) != attempt:
            return
        home, machine = self.home, self.home.machines[other]
        target = machine.agent
        if not (target and home.hears(self, target) and home.hears(target, self)):
            home.at(1.0, self.knock, other, attempt)  # TCP tries again
        elif target.stopped:
            target.backlog.append((self.knock, (other, attempt)))  # it does not shake hands
        elif not target.alive:
            home.at(home.delay(), self.do, self.refused, other, attempt)
        else:
            wire = self.dials[other] = Wire(self, target)
            home.send(wire, self, ("hello", self.incarnation))

    def refused(self, other: str, attempt: int) -> None:
        if self.dials.get(other) == attempt:
            del self.dials[other]
            self.feed(m.DialFailed(other, closed=True))

    def give_up(self, other: str) -> None:
        dial = self.dials.pop(other, None)
        if isinstance(dial, Wire):
            self.home.close(dial, self)

    def drop(self, wire: Wire) -> None:
        """Hang up one connection; nothing is told here."""
        self.connections.pop(wire, None)
        self.runs_of.pop(wire, None)
        self.home.close(wire, self)

    def link_broke(self, wire: Wire) -> None:
        """The other end, or the cable, ended it."""
        other = wire.ends[0 if wire.ends[1] is self else 1].machine.name
        if self.dials.get(other) is wire:
            del self.dials[other]
            self.feed(m.DialFailed(other))
        elif self.connections.pop(wire, None):
            self.runs_of.pop(wire, None)
            if other not in self.connections.values():
                self.feed(m.LinkDown(other, "the connection broke"))

    def up(self, wire: Wire, other: str, incarnation: int, dialled: str) -> None:
        """The connection agreed: it is (part of) the link."""
        for old in [w for w, whom in self.connections.items() if whom == other]:
            if self.runs_of[old] > incarnation:
                return self.drop(wire)
            if self.runs_of[old] < incarnation:
                self.drop(old)
        self.connections[wire], self.runs_of[wire] = other, incarnation
        self.feed(m.LinkUp(other, other, incarnation, (other,), dialled, other))
        self.send(other, self.beat())

    def hear_peer(self, wire: Wire, body: Any) -> None:
        other = wire.ends[0 if wire.ends[1] is self else 1].machine.name
        match body:
            case ("hello", incarnation):
                self.home.send(wire, self, ("welcome", self.incarnation))
                self.up(wire, other, incarnation, "")
            case ("welcome", incarnation):
                if self.dials.get(other) is wire:
                    del self.dials[other]
                    self.up(wire, other, incarnation, other)
            case _ if wire in self.connections:
                self.feed(m.Heard(other))
                if other in self.membership.members:
                    self.hear_member(other, body)

    def hear_member(self, other: str, body: Any) -> None:
        match body:
            case e.Beat():
                self.feed(body)
            case ("gossip", names):
                self.feed(*(m.Seen(n, n, (n,)) for n in names if n != self.me))
            case ("suspect", peer):
                self.feed(m.Asked(other, peer))
            case ("opinion", peer, heard, ago_s):
                self.feed(m.Opined(other, peer, heard, ago_s))
            case ("bye", why):
                self.feed(m.Left(other, why))
            case _:
                self.received(other, body)

    def send(self, other: str, body: Any) -> None:
        """Over the link, where there is one; the connection that this peer dialled first."""
        wires = [w for w, whom in self.connections.items() if whom == other]
        for wire in sorted(wires, key=lambda w: w.ends[0] is not self):
            if self.home.send(wire, self, body):
                return

    def broadcast(self, body: Any) -> None:
        for other in sorted(self.membership.members):
            self.send(other, body)

    # What the agent makes of it -------------------------------------------------------------------

    @abstractmethod
    def joined(self, peer: str) -> None:
        """A peer is a member now."""

    @abstractmethod
    def lost(self, peer: str, why: str, heard_by: str) -> None:
        """A peer is a member no longer."""

    @abstractmethod
    def elected(self, coordinator: str, term: int) -> None:
        """Somebody coordinates, or nobody."""

    @abstractmethod
    def received(self, peer: str, message: Any) -> None:
        """A message from a member."""
