"""Processes, the wires between them and a clock: what a simulated house is made of.

Links are modelled as the transport makes them: a hello and a welcome, several connections to one
peer are one link, what arrives on a forgotten connection is answered with a reset, and a hello that
comes where nobody listens is refused. A connection's own packets may overtake each other here,
which TCP would not allow; the machines must not mind.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable
from typing import Any

from peer.cluster import election as e
from peer.cluster import membership as m
from peer.config import Timing
from tests.simulated.faults import Faults, Process

STORY_LINES = 80


class Broken(AssertionError):
    """Something that must hold does not. The text begins with the seed."""


class Street:
    """What all peers share. A house decides what happens to them, and judges what they do."""

    timing = Timing()
    make_membership: Callable[..., m.Membership] = m.Membership
    make_election: Callable[..., e.Election] = e.Election
    disk_works = True

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.now = 1000.0
        self.heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.order = itertools.count()
        self.numbers = itertools.count(1)
        self.peers: dict[str, Process] = {}
        self.faults = Faults(0.01, 0.0, 0.0, {})
        self.blocked: set[tuple[str, str]] = set()  # (from, to): what is sent there is lost
        self.held: set[tuple[str, str]] = set()  # what is sent there waits, as TCP sends it again
        self.waiting: list[tuple[Any, ...]] = []
        self.chaos = False
        self.story: deque[tuple[Any, ...]] = deque(maxlen=STORY_LINES)

    def lost(self, process: Process, other: str, why: str, heard_by: str) -> None:
        """A peer declared another one lost."""

    def elected(self, process: Process, coordinator: str, term: int) -> None:
        """A peer follows somebody, or nobody, from now on."""

    def fail(self, why: str) -> None:
        lines = "\n".join(" ".join(str(word) for word in line) for line in self.story)
        raise Broken(f"seed {self.seed}: {why}\nlast events:\n{lines}")

    def tell(self, *words: Any) -> None:
        self.story.append((f"{self.now - 1000:8.3f}", *words))

    # Time -----------------------------------------------------------------------------------------

    def at(self, wait_s: float, call: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self.heap, (self.now + wait_s, next(self.order), call, arguments))

    def play(self, seconds: float) -> None:
        until = self.now + seconds
        while self.heap and self.heap[0][0] <= until:
            self.now, _, call, arguments = heapq.heappop(self.heap)
            call(*arguments)
        self.now = until

    # Wires ----------------------------------------------------------------------------------------

    def send(self, source: Process, target: str, kind: str, number: int, body: Any = None) -> None:
        """One packet. It may be lost, delayed past others, or arrive twice."""
        if (source.me, target) in self.blocked:
            return
        if (source.me, target) in self.held:
            self.waiting.append((source, target, kind, number, body))
            return
        random_ = self.rng.random
        copies = 1
        if self.chaos:
            if random_() < self.faults.loss:
                return
            copies += random_() < self.faults.duplicates
        process = self.peers[target]
        for _ in range(copies):
            delay_s = 0.001 + random_() * self.faults.delay_max_s
            packet = (source.me, number, body, source.incarnation)
            self.at(delay_s, self.arrive, process, kind, packet)

    def release(self) -> None:
        """All that waits goes on its way."""
        self.held.clear()
        waiting, self.waiting = self.waiting, []
        for packet in waiting:
            self.send(*packet)

    def arrive(self, process: Process, kind: str, packet: tuple[Any, ...]) -> None:
        if process.alive:
            self.deliver(process, process.incarnation, kind, packet)
        elif process.powered and kind not in ("reset", "closed"):  # nobody listens
            self.send(process, packet[0], "closed" if kind == "hello" else "reset", packet[1])

    def deliver(self, process: Process, incarnation: int, kind: str, packet: Any) -> None:
        if not process.alive or process.incarnation != incarnation:
            return
        if process.stopped:
            process.backlog.append((process, incarnation, kind, packet))
            return
        if kind == "seen":
            self.feed(process, packet)
            return
        other, number, body, theirs = packet
        known = number in process.connections
        pending = process.dials.get(other) == number
        match kind:
            case "hello":
                if theirs < process.joined.get(other, 0):
                    self.send(process, other, "reset", number)
                elif not known and number not in process.over:
                    process.connections[number] = other
                    self.send(process, other, "welcome", number)
                    self.linked(process, other, theirs, "")
            case "welcome" if pending:
                del process.dials[other]
                process.connections[number] = other
                self.linked(process, other, theirs, other)
            case "reset" | "closed":
                self.reset(process, other, number, closed=kind == "closed")
            case "beat" | "gossip" | "suspect" | "opinion" if known:
                self.feed(process, m.Heard(other))
                if other in process.membership.members:
                    self.hear(process, other, kind, body)
            case _ if not known and not pending:
                self.send(process, other, "reset", number)

    def linked(self, process: Process, other: str, incarnation: int, dialled: str) -> None:
        self.feed(process, m.LinkUp(other, other, incarnation, (other,), dialled, other))
        self.beat(process, other)

    def reset(self, process: Process, other: str, number: int, *, closed: bool) -> None:
        process.over.add(number)
        if process.dials.get(other) == number:
            del process.dials[other]
            self.feed(process, m.DialFailed(other, closed=closed))
        elif process.connections.pop(number, None) and other not in process.connections.values():
            self.feed(process, m.LinkDown(other, "reset"))

    def hear(self, process: Process, other: str, kind: str, body: Any) -> None:
        match kind:
            case "beat":
                self.feed(process, e.Beat(other, body.term, body.coordinator, body.followed))
            case "suspect":
                self.feed(process, m.Asked(other, body))
            case "opinion":
                self.feed(process, m.Opined(other, *body))
            case "gossip":
                for name in body:
                    if name != process.me:
                        self.feed(process, m.Seen(name, name, (name,)))

    def over_link(self, process: Process, other: str, kind: str, body: Any) -> None:
        for number, whom in process.connections.items():
            if whom == other:
                self.send(process, other, kind, number, body)
                return

    def beat(self, process: Process, other: str) -> None:
        if other in process.membership.members:
            self.over_link(process, other, "beat", process.election.claim)

    # Machines -------------------------------------------------------------------------------------

    def feed(self, process: Process, *events: Any) -> None:
        """As the driver does: events in order, actions at once."""
        inbox = deque(events)
        while inbox:
            event = inbox.popleft()
            machine = process.election if isinstance(event, e.Event) else process.membership
            for action in machine.step(event, self.now):
                self.perform(process, action, inbox)
        self.arm(process)

    def arm(self, process: Process) -> None:
        at = min(process.membership.deadline, process.election.deadline)
        if at < process.timer_at:
            process.timer_at = at
            self.at(max(0.0, at - self.now), self.tick, process, process.incarnation)

    def tick(self, process: Process, incarnation: int) -> None:
        if not process.alive or process.incarnation != incarnation:
            return
        process.timer_at = math.inf
        if not process.stopped:
            self.feed(process, m.Tick(), e.Tick())

    def perform(self, process: Process, action: Any, inbox: deque[Any]) -> None:
        match action:
            case m.Dial(other):
                number = process.dials[other] = next(self.numbers)
                self.send(process, other, "hello", number)
            case m.GiveUp(other):
                self.send(process, other, "reset", process.dials.pop(other, 0))
            case m.HangUp(other):
                self.hang_up(process, other)
            case m.Joined(other):
                self.tell(process.me, "joined", other)
                process.joined[other] = process.membership.incarnation_of(other)
                inbox.append(e.PeerUp(other))
                known = tuple(process.membership.members)
                for member in known:
                    self.over_link(process, member, "gossip", known)
            case m.Lost(other, why, heard_by):
                self.lost(process, other, why, heard_by)
                process.lost_since_stop.append(other)
                process.joined.pop(other, None)
                inbox.append(e.PeerDown(other))
            case m.Ask(other, others):
                for one in others:
                    self.over_link(process, one, "suspect", other)
            case m.Answer(to, other, heard, ago_s):
                self.over_link(process, to, "opinion", (other, heard, ago_s))
            case m.SendBeats() | e.Publish():
                for member in process.membership.members:
                    self.beat(process, member)
            case e.StoreTerm(term, lower):
                delay_s = 0.001 + self.rng.random() * 0.05
                # One write at a time, in order, as the driver does.
                process.disk_free_at = max(process.disk_free_at, self.now + delay_s)
                wait_s = process.disk_free_at - self.now
                self.at(wait_s, self.store, process, term, lower, process.incarnation)
            case e.Elected(coordinator, term):
                self.elected(process, coordinator, term)

    def hang_up(self, process: Process, other: str) -> None:
        numbers = [n for n, whom in process.connections.items() if whom == other]
        for number in numbers:
            del process.connections[number]
            process.over.add(number)
        if other in process.dials:
            numbers.append(process.dials.pop(other))
        for number in numbers:
            self.send(process, other, "reset", number)

    def store(self, process: Process, term: int, lower: bool, incarnation: int) -> None:
        if not process.alive or process.incarnation != incarnation:
            return
        if self.disk_works:
            process.stored_term = term if lower else max(process.stored_term, term)
        if process.stopped:
            self.at(0.1, self.store, process, term, False, incarnation)
        else:
            self.feed(process, e.Stored(term))
