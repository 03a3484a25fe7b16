"""A whole house in one heap: real membership and election machines, virtual time, one seed.

Each seed draws its own house and its own faults: delays from 1 ms to 0.6 s (which reorder), loss,
duplicates, partitions (symmetric, one-way, partial), crashes with and without a last packet,
restarts with the stored term, stopped processes. What must always hold is checked at every action;
what must hold once faults stop, at the end. A failure names the seed and tells the last events.

Links are modelled as the transport makes them: a hello and a welcome, several connections to one
peer are one link, what arrives on a forgotten connection is answered with a reset. A connection's
own packets may overtake each other here, which TCP would not allow; the machines must not mind.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

from peer.cluster import election as e
from peer.cluster import membership as m
from peer.config import Timing
from tests.simulated.faults import Faults, Process

CHAOS_S = 12.0
SETTLE_S = 22.0  # > dial_again_max_s, then a loss and an election; most houses need far less
AFTERMATH_S = 4.5  # > silence_s: what happened last is noticed by then
LONGER_S = 1.0
FAR = e.TERM_FREE_MAX + 10**7  # a term that nobody believes who is not near it
QUIET_S = 2.0  # nothing may change any more
STORY_LINES = 80


class Broken(AssertionError):
    """Something that must hold does not. The text begins with the seed."""


class House:
    """Peers, wires and a clock. `run` plays the whole story of the seed."""

    timing = Timing()
    make_membership: Callable[..., m.Membership] = m.Membership
    make_election: Callable[..., e.Election] = e.Election
    disk_works = True

    def __init__(self, seed: int, size: int | None = None) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.now = 1000.0
        self.heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.order = itertools.count()
        self.numbers = itertools.count(1)
        size = size or self.rng.choice((2, 2, 3, 3, 3, 3, 4, 4, 5, 7))
        self.peers = {name: Process(name) for name in self.rng.sample("abcdefghij", size)}
        if self.rng.random() < 0.2:  # some were lied to before, and nobody else believes them
            for process in self.peers.values():
                process.stored_term = self.rng.choice((0, 0, 3, 10**6, FAR, FAR + 10, 2 * FAR))
        self.faults = Faults.draw(self.rng)
        self.blocked: set[tuple[str, str]] = set()
        self.chaos = True
        self.story: deque[tuple[Any, ...]] = deque(maxlen=STORY_LINES)
        self.claims: defaultdict[str, set[int]] = defaultdict(set)  # all that each peer ever made
        self.lowest: dict[tuple[str, int], int] = {}  # term that each run of a peer followed
        self.followed: defaultdict[str, tuple[int, str]] = defaultdict(lambda: (-1, ""))
        self.changes: list[tuple[str, str]] = []  # (peer, coordinator) since last cleared

    # The story ------------------------------------------------------------------------------------

    def run(self) -> None:
        """Chaos, then quiet, then a newcomer, then a stopped process."""
        for name in self.peers:
            self.at(self.rng.random() * 2.0, self.start, name)
        self.at(self.rng.random(), self.misfortune)
        self.play(CHAOS_S)
        self.end_chaos()
        self.play(AFTERMATH_S)
        self.settle("after the faults stopped")
        self.changes.clear()
        self.play(QUIET_S)
        if self.changes:
            self.fail(f"roles still change in a quiet house: {self.changes}")
        self.newcomer()
        if self.seed % 4 == 0:
            self.long_sleep()

    def newcomer(self) -> None:
        """Somebody joins, maybe with a term from elsewhere. Who coordinates stays who it was."""
        some = self.any_alive()
        before = some.election.coordinator
        was_followed = self.peers[before].election.followed
        # Whom nobody else would believe gives way also to a newcomer: nothing else ends that.
        was_followed &= some.election.term <= e.TERM_FREE_MAX
        joiner = self.peers["n"] = Process("n", stored_term=some.election.term)
        joiner.stored_term += self.rng.choice((-joiner.stored_term, 0, 1, 40, 10**6, FAR, 2 * FAR))
        others = [name for name in self.peers if name != "n"]
        self.start("n")
        self.settle("after a newcomer joined")
        for name, coordinator in self.changes:
            if was_followed and name in others and coordinator != before:
                self.fail(f"the newcomer deposed {before}: {name} follows {coordinator!r}")

    def long_sleep(self) -> None:
        """A process is stopped for long; it must not accuse the others when it goes on."""
        sleeper = self.rng.choice([p for p in self.peers.values() if p.alive])
        self.stop(sleeper.me, 9.0)
        self.play(8.9)
        sleeper.lost_since_stop.clear()
        self.settle("after a long sleep")
        if sleeper.lost_since_stop:
            self.fail(f"{sleeper.me} slept, and accuses {sleeper.lost_since_stop}")

    def end_chaos(self) -> None:
        self.chaos = False
        self.blocked.clear()
        for name, process in self.peers.items():
            if not process.alive and (process.powered or self.rng.random() < 0.5):
                self.start(name)
            if process.stopped:
                self.go_on(name)
        if not any(p.alive for p in self.peers.values()):
            self.start(next(iter(self.peers)))

    def settle(self, when: str) -> None:
        """Play until all agree, and a little longer, when they still must."""
        until = self.now + SETTLE_S
        while self.disagreement() and self.now < until:
            self.play(0.5)
        self.play(LONGER_S)
        if disagreement := self.disagreement():
            self.fail(f"{when}: {disagreement}")

    def disagreement(self) -> str:
        """What is missing to one coordinator that is alive and one view of who is here."""
        here = {p.me for p in self.peers.values() if p.alive}
        views = {p.me: p.election.coordinator for p in self.peers.values() if p.alive}
        terms = {p.election.term for p in self.peers.values() if p.alive}
        for process in (self.peers[name] for name in sorted(here)):
            if process.membership.members != here - {process.me}:
                members = sorted(process.membership.members)
                return f"{process.me} sees {members}, here are {sorted(here)}"
            for other, run in process.joined.items():
                if self.peers[other].incarnation != run:
                    return f"{process.me} never noticed that {other} was started anew"
        if len(set(views.values())) != 1 or not set(views.values()) <= here or len(terms) != 1:
            return f"no agreement: {views}, terms {sorted(terms)}"
        return ""

    def any_alive(self) -> Process:
        return next(p for p in self.peers.values() if p.alive)

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

    # Misfortune -----------------------------------------------------------------------------------

    def misfortune(self) -> None:
        """The next fault, after a time that the rates give."""
        if not self.chaos:
            return
        kinds, rates = zip(*self.faults.rates.items(), strict=True)
        kind = self.rng.choices(kinds, rates)[0]
        a, b = self.rng.sample(list(self.peers), 2)
        match kind:
            case "cut":
                self.blocked |= {(a, b), (b, a)}
            case "one_way":
                self.blocked.add((a, b))
            case "split":
                side = {name for name in self.peers if self.rng.random() < 0.5}
                pairs = itertools.permutations(self.peers, 2)
                self.blocked |= {(x, y) for x, y in pairs if (x in side) != (y in side)}
            case "heal":
                self.blocked.clear()
            case "kill":
                self.crash(a, powered=True)
            case "power":
                self.crash(a, powered=False)
            case "start":
                self.start(a)
            case "stop":
                self.stop(a, self.rng.choice((0.3, 1.0, 3.0, 8.0)))
        self.tell("fault", kind, a, b)
        self.at(self.rng.expovariate(sum(rates)), self.misfortune)

    def start(self, name: str) -> None:
        process = self.peers[name]
        if process.alive:
            return
        process.alive, process.powered, process.stopped = True, True, False
        process.incarnation += 1
        process.connections, process.dials, process.backlog = {}, {}, []
        process.joined, process.over = {}, set()
        self.followed[name] = (-1, "")
        process.membership = self.make_membership(name, self.timing, self.now)
        process.election = self.make_election(name, self.timing, self.now, term=process.stored_term)
        process.timer_at = math.inf
        self.tell(name, "starts with term", process.stored_term)
        self.arm(process)
        self.sight(name, process.incarnation)

    def sight(self, name: str, incarnation: int) -> None:
        """What mDNS does, now and then."""
        process = self.peers[name]
        if process.incarnation != incarnation or not process.alive:
            return
        for other in self.peers:
            if other != name and (not self.chaos or self.rng.random() < 0.8):
                seen = m.Seen(other, other, (other,))
                self.at(self.rng.random() * 0.5, self.deliver, process, incarnation, "seen", seen)
        self.at(8.0, self.sight, name, incarnation)

    def crash(self, name: str, *, powered: bool) -> None:
        process = self.peers[name]
        if not process.alive:
            return
        process.alive, process.powered = False, powered
        if powered:  # the system closes its connections
            for number, other in list(process.connections.items()):
                self.send(process, other, "reset", number)

    def stop(self, name: str, seconds: float) -> None:
        process = self.peers[name]
        if process.alive and not process.stopped:
            self.tell(name, "is stopped for", seconds)
            process.stopped = True
            incarnation = process.incarnation
            self.at(seconds, lambda: self.go_on(name, incarnation))

    def go_on(self, name: str, incarnation: int | None = None) -> None:
        process = self.peers[name]
        if not process.stopped or incarnation not in (None, process.incarnation):
            return
        self.tell(name, "goes on")
        process.stopped = False
        backlog, process.backlog = process.backlog, []
        if self.rng.random() < 0.5:  # whether the timer or the sockets are served first
            self.feed(process, m.Tick(), e.Tick())
        for arguments in backlog:
            self.deliver(*arguments)
        self.arm(process)

    # Wires ----------------------------------------------------------------------------------------

    def send(self, source: Process, target: str, kind: str, number: int, body: Any = None) -> None:
        """One packet. It may be lost, delayed past others, or arrive twice."""
        if (source.me, target) in self.blocked:
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

    def arrive(self, process: Process, kind: str, packet: tuple[Any, ...]) -> None:
        if process.alive:
            self.deliver(process, process.incarnation, kind, packet)
        elif process.powered and kind != "reset":  # nobody listens: connection refused
            self.send(process, packet[0], "reset", packet[1])

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
            case "reset":
                self.reset(process, other, number)
            case "beat" | "gossip" if known:
                self.feed(process, m.Heard(other))
                if other in process.membership.members:
                    self.hear(process, other, kind, body)
            case "welcome" | "beat" | "gossip" if not known and not pending:
                self.send(process, other, "reset", number)

    def linked(self, process: Process, other: str, incarnation: int, dialled: str) -> None:
        self.feed(process, m.LinkUp(other, other, incarnation, (other,), dialled))
        self.beat(process, other)

    def reset(self, process: Process, other: str, number: int) -> None:
        process.over.add(number)
        if process.dials.get(other) == number:
            del process.dials[other]
            self.feed(process, m.DialFailed(other))
        elif process.connections.pop(number, None) and other not in process.connections.values():
            self.feed(process, m.LinkDown(other, "reset"))

    def hear(self, process: Process, other: str, kind: str, body: Any) -> None:
        if kind == "beat":
            self.feed(process, e.Beat(other, body.term, body.coordinator, body.followed))
            return
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
            case m.Lost(other, why):
                self.tell(process.me, "lost", other, why)
                process.lost_since_stop.append(other)
                process.joined.pop(other, None)
                inbox.append(e.PeerDown(other))
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

    # What always holds ----------------------------------------------------------------------------

    def elected(self, process: Process, coordinator: str, term: int) -> None:
        name = process.me
        self.tell(name, "follows", coordinator or "nobody", "in term", term)
        self.changes.append((name, coordinator))
        last_term, last = self.followed[name]
        lowest = self.lowest.get((name, process.incarnation), term + 1)
        if coordinator and term < last_term and (term >= lowest or last_term <= FAR - 10**7):
            self.fail(f"{name} went back from term {last_term} to {term}")
        if coordinator:
            if term == last_term and last not in ("", coordinator):
                self.fail(f"{name} follows {last} and {coordinator} in one term, {term}")
            self.followed[name] = (term, coordinator)
            self.lowest[name, process.incarnation] = min(lowest, term)
        if coordinator == name:
            if term in self.claims[name] and (last_term, last) != (term, name):
                self.fail(f"{name} claims term {term} twice")
            self.claims[name].add(term)
