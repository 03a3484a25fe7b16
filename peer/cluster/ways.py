"""By which of a peer's addresses the ring's hops go to it: the one that was measured to be fastest.

Pure: `step(event, now) -> actions`, and a `deadline`. A machine with Wi-Fi and a cable has two
addresses, and which of them two agents met by is chance. So where a member has several, each of
them is measured soon, over a connection of its own; one at a time, and never while either end
computes. The best one is chosen where it is clearly better than the one that the link between the
agents goes by ("main"), its connection is kept open, and the choice ends with it: then hops go by
the main address again, and the lost one is tried again later.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from random import Random

from peer.cluster.probing import is_news
from peer.config import Timing
from peer.planning.profile import Link

WAYS_MAX = 6  # addresses of one peer that are measured
KEPT = 3  # measurements of each that count, the best of them
HOP_BYTES = 256 << 10  # ways are compared by what so much takes: between one token's and a chunk's
BETTER = 0.7  # of what the present way takes; a smaller gain is noise, or not worth a change
RARELY = 10  # times `probe_s`, between measurements of ways that were not chosen

# Events -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Here:
    """The peer is a member, linked by its address `main`, and has these. Told again when new."""

    peer_id: str
    main: str
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Gone:
    """It is a member no longer."""

    peer_id: str


@dataclass(frozen=True, slots=True)
class Found:
    """What a measurement found."""

    peer_id: str
    address: str
    rtt_s: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class PutOff:
    """The other end computes: not measured."""

    peer_id: str
    address: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The address does not answer (any more)."""

    peer_id: str
    address: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed. busy: this peer computes, or measures a link."""

    busy: bool


@dataclass(frozen=True, slots=True)
class Wanted:
    """A hop to the peer is about to be made: what was put off is due now."""

    peer_id: str


Event = Here | Gone | Found | PutOff | Failed | Tick | Wanted

# Actions ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Measure:
    """Measure this address; ends in Found, PutOff or Failed. Its connection stays open."""

    peer_id: str
    address: str


@dataclass(frozen=True, slots=True)
class Leave:
    """Close the connection with this address, if there is one."""

    peer_id: str
    address: str


@dataclass(frozen=True, slots=True)
class Chosen:
    """Hops go by this address from now on, which is as fast as that; "" and None: by the main one.

    Told again where the figures have changed.
    """

    peer_id: str
    address: str = ""
    link: Link | None = None


Action = Measure | Leave | Chosen


@dataclass(slots=True)
class _Way:
    due: float
    tried: bool = False
    failures: int = 0
    figures: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=KEPT))

    def link(self, peer_id: str) -> Link:
        """The best of what was measured lately."""
        rtts, rates = zip(*self.figures, strict=True)
        return Link(peer_id, min(rtts), max(rates))

    @property
    def hop_s(self) -> float:
        """What a hop takes by this way; infinity while that is not known."""
        if not self.figures:
            return math.inf
        link = self.link("")
        return link.rtt_s / 2 + HOP_BYTES / link.bytes_per_s if link.bytes_per_s else math.inf


@dataclass(slots=True)
class _Other:
    main: str
    ways: dict[str, _Way]
    chosen: str = ""  # another one than main
    better: str = ""  # than that; measured once more, so that its connection is open
    told: Link | None = None


class Ways:
    """One peer's ways to the others. Times are the caller's, in seconds; chance: seeded."""

    def __init__(self, timing: Timing, chance: Random) -> None:
        self._timing, self._chance = timing, chance
        self._others: dict[str, _Other] = {}
        self._measuring: tuple[str, str] | None = None

    @property
    def deadline(self) -> float:
        """When the next Tick is due; infinity where there is nothing to measure."""
        if self._measuring is not None:
            return math.inf
        return min(
            (w.due for o in self._others.values() for w in o.ways.values()), default=math.inf
        )

    def chosen(self, peer_id: str) -> str:
        """The address that hops to the peer go by, "" for the main one."""
        other = self._others.get(peer_id)
        return other.chosen if other is not None else ""

    def settled(self, peer_id: str) -> bool:
        """Whether every address of the peer was tried, and the best of them is chosen."""
        other = self._others.get(peer_id)
        if other is None:
            return True
        return not other.better and all(way.tried for way in other.ways.values())

    def step(self, event: Event, now: float) -> list[Action]:
        """Take one event, return what to do about it, in order."""
        match event:
            case Here(peer_id, main, addresses):
                return self._here(peer_id, main, addresses, now)
            case Gone(peer_id):
                other = self._others.pop(peer_id, None)
                return [Leave(peer_id, address) for address in (other.ways if other else ())]
            case Tick(busy):
                return self._tick(busy, now)
            case Wanted(peer_id):
                other = self._others.get(peer_id)
                for untried in other.ways.values() if other is not None else ():
                    untried.due = untried.due if untried.tried else now
                return []
        if self._measuring == (event.peer_id, event.address):
            self._measuring = None
        other = self._others.get(event.peer_id)
        way = other.ways.get(event.address) if other is not None else None
        if other is None or way is None:
            return [Leave(event.peer_id, event.address)]
        match event:
            case Found(_, _, rtt_s, bytes_per_s):
                way.tried, way.failures = True, 0
                way.figures.append((rtt_s, bytes_per_s))
            case PutOff():
                way.due = now + self._timing.probe_again_s
            case Failed(_, address):
                way.tried = True
                way.figures.clear()
                wait_s = self._timing.probe_again_s * 2.0 ** min(way.failures, 16)
                if address == other.chosen:
                    wait_s = math.inf  # a ring broke with it; a loose cable must not end many
                way.failures += 1
                way.due = now + min(wait_s, self._interval_s(RARELY))
        found = event.address if isinstance(event, Found) else ""
        actions = self._choose(event.peer_id, other, now, found)
        if found:
            way.due = now + self._interval_s(1 if found == other.chosen else RARELY)
        return [*actions, *self._close(event, other)]

    def _here(self, peer_id: str, main: str, addresses: Iterable[str], now: float) -> list[Action]:
        wanted = list(dict.fromkeys((main, *addresses)))[:WAYS_MAX]
        if len(wanted) < 2:
            wanted = []  # nothing to choose from
        other = self._others.setdefault(peer_id, _Other(main, {}))
        left = [address for address in other.ways if address not in wanted]
        for address in left:
            del other.ways[address]
        for address in wanted:
            if address not in other.ways:
                soon = now + self._timing.probe_soon_s * self._chance.uniform(0.5, 1.0)
                other.ways[address] = _Way(soon)
        other.main = main
        return [*self._choose(peer_id, other, now), *(Leave(peer_id, address) for address in left)]

    def _tick(self, busy: bool, now: float) -> list[Action]:
        if self._measuring is not None:
            return []
        ready = [
            (way.due, peer_id, address)
            for peer_id, other in self._others.items()
            for address, way in other.ways.items()
            if way.due <= now
        ]
        for _, peer_id, address in sorted(ready):
            if not busy:
                self._measuring = (peer_id, address)
                return [Measure(peer_id, address)]
            self._others[peer_id].ways[address].due = now + self._timing.probe_again_s
        return []

    def _interval_s(self, times: int) -> float:
        return self._timing.probe_s * times * self._chance.uniform(0.8, 1.2)

    def _choose(self, peer_id: str, other: _Other, now: float, fresh: str = "") -> list[Action]:
        """Go by another way where that is clearly better; tell of it where that is news.

        fresh: the way that was just measured, whose connection is open.
        """
        ways, before = other.ways, other.chosen
        at = before if before in ways and ways[before].figures else other.main
        other.better = ""
        if all(way.tried for way in ways.values()) and ways:
            best = min(ways, key=lambda address: ways[address].hop_s)
            present_s = ways[at].hop_s if at in ways else math.inf
            if ways[best].hop_s < BETTER * present_s and best in (fresh, other.main):
                at = best
            elif ways[best].hop_s < BETTER * present_s:
                other.better, ways[best].due = best, now
        other.chosen = "" if at == other.main else at
        if not other.chosen:
            other.told = None
            return [Leave(peer_id, before), Chosen(peer_id)] if before else []
        link = ways[other.chosen].link(peer_id)
        if other.chosen == before and other.told is not None and not is_news(link, other.told):
            return []
        other.told = link
        left = [Leave(peer_id, before)] if before not in ("", other.chosen) else []
        return [*left, Chosen(peer_id, other.chosen, link)]

    def _close(self, event: Found | PutOff | Failed, other: _Other) -> list[Action]:
        """A connection is kept with the way that is chosen, and with no other."""
        kept = event.address == other.chosen and not isinstance(event, Failed)
        return [] if kept else [Leave(event.peer_id, event.address)]
