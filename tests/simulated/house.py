"""A whole house in one heap: real membership and election machines, virtual time, one seed.

Each seed draws its own house and its own faults: delays from 1 ms to 0.6 s (which reorder), loss,
duplicates, partitions (symmetric, one-way, partial), crashes with and without a last packet,
restarts with the stored term, stopped processes. What must always hold is checked at every action;
what must hold once faults stop, at the end. A failure names the seed and tells the last events.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict

from peer.cluster import election as e
from peer.cluster import membership as m
from tests.simulated.faults import Faults, Process
from tests.simulated.street import Broken as Broken
from tests.simulated.street import Street

CHAOS_S = 12.0
SETTLE_S = 22.0  # > dial_again_max_s, then a loss and an election; most houses need far less
AFTERMATH_S = 4.5  # > silence_s: what happened last is noticed by then
LONGER_S = 1.0
FAR = e.TERM_FREE_MAX + 10**7  # a term that nobody believes who is not near it
QUIET_S = 2.0  # nothing may change any more


class House(Street):
    """Peers that have a bad time, and then a quiet one. `run` plays the whole story of the seed."""

    def __init__(self, seed: int, size: int | None = None) -> None:
        super().__init__(seed)
        size = size or self.rng.choice((2, 2, 3, 3, 3, 3, 4, 4, 5, 7))
        self.peers = {name: Process(name) for name in self.rng.sample("abcdefghij", size)}
        if self.rng.random() < 0.2:  # some were lied to before, and nobody else believes them
            for process in self.peers.values():
                process.stored_term = self.rng.choice((0, 0, 3, 10**6, FAR, FAR + 10, 2 * FAR))
        self.faults = Faults.draw(self.rng)
        self.chaos = True
        self.claims: defaultdict[str, set[int]] = defaultdict(set)  # all that each peer ever made
        self.lowest: dict[tuple[str, int], int] = {}  # term that each run of a peer followed
        self.followed: defaultdict[str, tuple[int, str]] = defaultdict(lambda: (-1, ""))
        self.changes: list[tuple[str, str]] = []  # (peer, coordinator) since last cleared
        self.losses: list[tuple[float, str, m.Lost]] = []  # (when, by whom, what)

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

    # What always holds ----------------------------------------------------------------------------

    def lost(self, process: Process, other: str, why: str, heard_by: str) -> None:
        self.tell(process.me, "lost", other, why, heard_by and f"({heard_by} hears it)")
        self.losses.append((self.now, process.me, m.Lost(other, why, heard_by)))
        theirs = self.peers[other]
        same_run = theirs.incarnation == process.joined.get(other)
        if why == m.ENDED and theirs.alive and same_run:
            self.fail(f"{process.me} takes {other} for ended, which lives")
        if heard_by and heard_by not in process.membership.members - {other}:
            self.fail(f"{process.me} believes {heard_by} about {other}, which is no member")

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
