"""How far and how fast the others are: whom to measure when, and what is worth telling.

Pure: `step(event, now) -> actions`, and a `deadline`. One link is measured at a time, soon after
its peer joined, then about once in `Timing.probe_s`, rarer where many peers share that time. It
waits while anybody at either end computes or answers. One measurement is `probing_once`'s; here
their figures are kept, and what they say together is told where it is news: the best of the last
round trips, and the second best of the last bandwidths, because many a measurement meets other
traffic, or a core that is taken, and is too slow, and a rare one meets a burst and is too fast.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from random import Random

from peer.cluster.probing_once import Once
from peer.config import Timing
from peer.planning.profile import Link

KEPT = 5  # measurements of a link that count
EARLY = 3  # measurements after which its figures have settled; these come sooner
EARLY_SHARE = 1 / 6  # of probe_s, between early ones
LINKS_MAX = 12  # measured in probe_s; where there are more, all wait longer
QUIET_S = 0.3  # at most, after another's probe: two measurements at once slow each other
QUIET_MAX_S = 5.0  # for which others can keep a measurement waiting
NEWS = 0.15  # of change; less is not told
NEWS_RTT_S = 0.0001  # and less than this neither
NUMBER_MAX = 1 << 31

# Events -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Here:
    """The peer is a member, and is reached at this host. Told again whenever that may be new."""

    peer_id: str
    host: str


@dataclass(frozen=True, slots=True)
class Gone:
    """It is a member no longer."""

    peer_id: str


@dataclass(frozen=True, slots=True)
class Asked:
    """Another peer measures its link with this one."""


@dataclass(frozen=True, slots=True)
class Answered:
    """A probe came back. busy: either end computes."""

    peer_id: str
    request: int
    busy: bool


@dataclass(frozen=True, slots=True)
class Unsent:
    """A probe could not be sent."""

    peer_id: str
    request: int


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed. busy: this peer computes."""

    busy: bool


Event = Here | Gone | Asked | Answered | Unsent | Tick

# Actions ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Send:
    """Send a Probe with this number and padding; ends in Answered, Unsent, or nothing."""

    peer_id: str
    request: int
    padding_bytes: int


@dataclass(frozen=True, slots=True)
class Measured:
    """A link's figures are known, or have changed."""

    link: Link


Action = Send | Measured


@dataclass(slots=True)
class _Other:
    host: str
    due: float  # when it is tried next
    since: float  # when it became due; later than that it was put off
    rtts: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))
    rates: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))
    failures: int = 0
    told: Link | None = None


class Probing:
    """One peer's measuring of its links. Times are the caller's, in seconds; chance: seeded."""

    def __init__(self, timing: Timing, chance: Random) -> None:
        self._timing, self._chance = timing, chance
        self._others: dict[str, _Other] = {}
        self._once: Once | None = None
        self._quiet_until = -math.inf
        self._number = 0

    @property
    def deadline(self) -> float:
        """When the next Tick is due; infinity while nobody is here."""
        if self._once is not None:
            return self._once.deadline
        return min((self._start_at(other) for other in self._others.values()), default=math.inf)

    @property
    def measures(self) -> bool:
        """Whether a measurement is under way."""
        return self._once is not None

    def step(self, event: Event, now: float) -> list[Action]:
        """Take one event, return what to do about it, in order."""
        match event:
            case Here(peer_id, host):
                self._here(peer_id, host, now)
            case Gone(peer_id):
                self._others.pop(peer_id, None)
                self._end(peer_id)
            case Asked():
                self._quiet_until = now + QUIET_S * self._chance.uniform(0.3, 1.0)
            case Answered():
                return self._answered(event, now)
            case Unsent(peer_id):
                if self._once is not None and self._once.peer_id == peer_id:
                    self._failed(now)
            case Tick(busy):
                return self._tick(busy, now)
        return []

    # Whom, when -----------------------------------------------------------------------------------

    def _here(self, peer_id: str, host: str, now: float) -> None:
        known = self._others.get(peer_id)
        if known is not None and known.host == host:
            return
        soon = now + self._timing.probe_soon_s * self._chance.uniform(0.5, 1.0)
        self._others[peer_id] = _Other(host, soon, soon, told=known.told if known else None)
        self._end(peer_id)  # its figures would be those of two ways

    def _end(self, peer_id: str) -> None:
        if self._once is not None and self._once.peer_id == peer_id:
            self._once = None

    def _start_at(self, other: _Other) -> float:
        return max(other.due, min(self._quiet_until, other.due + QUIET_MAX_S))

    def _tick(self, busy: bool, now: float) -> list[Action]:
        if self._once is not None:
            if now < self._once.deadline:
                return []
            self._failed(now)
        ready = [p for p, other in self._others.items() if self._start_at(other) <= now]
        for peer_id in sorted(ready, key=lambda p: self._others[p].due):
            other = self._others[peer_id]
            if busy and self._may_wait(other, now):
                other.due = now + self._timing.probe_again_s
            else:
                self._once = Once(peer_id, busy, now + self._timing.request_s)
                return self._go_on(now)
        return []

    def _may_wait(self, other: _Other, now: float) -> bool:
        return now < other.since + self._timing.probe_wait_max_s

    def _failed(self, now: float) -> None:
        """It did not answer, or cannot be reached: try again, ever later."""
        assert self._once is not None
        other = self._others[self._once.peer_id]
        wait_s = self._timing.probe_again_s * 2.0 ** min(other.failures, 16)
        other.failures += 1
        other.due = other.since = now + min(wait_s, self._interval_s())
        self._once = None

    def _interval_s(self) -> float:
        many = max(1.0, len(self._others) / LINKS_MAX)
        return self._timing.probe_s * many * self._chance.uniform(0.8, 1.2)

    # One measurement ------------------------------------------------------------------------------

    def _answered(self, event: Answered, now: float) -> list[Action]:
        once = self._once
        if once is None or once.peer_id != event.peer_id or not once.answered(event.request, now):
            return []
        if event.busy and not once.small_only:
            other = self._others[once.peer_id]
            if self._may_wait(other, now):
                told = self._keep(once)
                other.due = now + self._timing.probe_again_s
                self._once = None
                return told
            once.small_only = True
        return self._go_on(now)

    def _go_on(self, now: float) -> list[Action]:
        """The probes to send next, or what the measurement found."""
        once = self._once
        assert once is not None
        actions: list[Action] = []
        for padding_bytes in once.wanted(now):
            self._number = self._number % NUMBER_MAX + 1
            once.sent(self._number, padding_bytes, now)
            actions.append(Send(once.peer_id, self._number, padding_bytes))
        if once.flying:
            return actions
        told = self._keep(once)
        other = self._others[once.peer_id]
        early = len(other.rates) < EARLY and not once.small_only
        interval_s = self._interval_s() * (EARLY_SHARE if early else 1.0)
        other.due = other.since = now + interval_s
        other.failures = 0
        self._once = None
        return told

    def _keep(self, once: Once) -> list[Action]:
        """Count what was measured, all of it or some; tell what is news."""
        other = self._others[once.peer_id]
        if not once.measured_rtt:
            return []
        other.rtts.append(once.rtt_s)
        if rate := once.bytes_per_s:
            other.rates.append(rate)
        best = sorted(other.rates, reverse=True)
        rate = best[1] if len(best) >= EARLY else max(best, default=0.0)
        link = Link(once.peer_id, min(other.rtts), rate)
        if other.told is not None and not is_news(link, other.told):
            return []
        other.told = link
        return [Measured(link)]


def is_news(link: Link, told: Link) -> bool:
    """Whether figures differ enough from those that were told to be told."""
    rtt_change_s = abs(link.rtt_s - told.rtt_s)
    if rtt_change_s > max(NEWS * told.rtt_s, NEWS_RTT_S):
        return True
    return abs(link.bytes_per_s - told.bytes_per_s) > NEWS * told.bytes_per_s
