"""Who is asked for which part: the pure half of fetching.

A part is fetched from one source at a time, several parts from several sources at once. A source
that is lost rests and may try again a few times; one that sent wrong bytes is not asked for that
part again; one that is much slower than an idle one loses the part to it, and what arrived is kept.
Time is an argument; nothing here waits, reads or sends.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

PARTS_AT_ONCE = 2  # of one source: while one part is hashed and synced, the next one flows
LOSSES_MAX = 3  # a source lost more often is not asked again in this fetch
REST_S = 0.5  # after the first loss; twice that after the second
SLOW_AFTER_S = 2.0  # a rate is believed after this long
RATE_UNKNOWN = 1 << 20  # bytes/s expected of a source that was not tried: slow Wi-Fi
UNKNOWN = ""  # who sent the bytes that were here before


@dataclass(frozen=True, slots=True)
class Start:
    """Fetch the part from the peer; fresh: forget what arrived of it before."""

    peer: str
    part: str
    fresh: bool


@dataclass(frozen=True, slots=True)
class Stop:
    """Stop fetching the part: an idle source is much faster. What arrived is kept."""

    part: str


@dataclass(slots=True)
class _Wanted:
    size: int
    done: int
    peer: str | None = None  # who is asked now
    givers: set[str] = field(default_factory=set)  # whose bytes are in what arrived
    tried: set[str] = field(default_factory=set)
    barred: dict[str, str] = field(default_factory=dict)  # peer → why
    solo: bool = False  # bytes of several sources made a wrong hash: one source must give all
    stopping: bool = False
    since_s: float = 0.0
    since_done: int = 0


@dataclass(slots=True)
class _Loss:
    times: int
    until_s: float
    why: str


class Sources:
    """The state of one fetch. parts: name → (bytes in all, bytes that are here already)."""

    def __init__(self, parts: Mapping[str, tuple[int, int]]) -> None:
        self._wanted = {
            name: _Wanted(size, done, givers={UNKNOWN} if done else set())
            for name, (size, done) in parts.items()
        }
        self._lost: dict[str, _Loss] = {}
        self._rates: dict[str, float] = {}

    @property
    def done(self) -> bool:
        """Nothing is wanted any more."""
        return not self._wanted

    def step(self, offers: Mapping[str, Collection[str]], now: float) -> list[Start | Stop]:
        """What to do next. offers: peer → parts that it has."""
        actions: list[Start | Stop] = []
        free = {p: PARTS_AT_ONCE - self._active(p) for p in offers if not self._rests(p, now)}
        waiting = [name for name, wanted in self._wanted.items() if wanted.peer is None]
        # The part that fewest can give goes first, so that nobody idles for it at the end.
        waiting.sort(key=lambda name: sum(name in parts for parts in offers.values()))
        for name in waiting:
            able = [p for p in free if free[p] > 0 and self._may(p, name, offers)]
            if not able:
                continue
            tried = self._wanted[name].tried
            peer = max(able, key=lambda p: (p not in tried, free[p], self._rates.get(p, 0.0)))
            free[peer] -= 1
            actions.append(self._start(peer, name, now))
        idle = [p for p in free if free[p] == PARTS_AT_ONCE]
        actions += [Stop(name) for p in idle for name in self._slow_for(p, offers, now)]
        return actions

    def got(self, part: str, done: int, now: float) -> None:
        """So many bytes of the part are here now."""
        wanted = self._wanted[part]
        if wanted.peer is not None and done > wanted.done:
            wanted.givers.add(wanted.peer)
            self._lost.pop(wanted.peer, None)
            if now > wanted.since_s:
                self._rates[wanted.peer] = (done - wanted.since_done) / (now - wanted.since_s)
        wanted.done = done

    def finished(self, part: str) -> None:
        """The part is present."""
        self._wanted.pop(part, None)

    def stopped(self, part: str) -> None:
        """The part is not fetched any more, and nobody is to blame."""
        self._free(part)

    def lost(self, part: str, why: str, now: float) -> None:
        """The source did not answer."""
        if (peer := self._free(part)) is None:
            return
        before = self._lost.get(peer)
        if before and now < before.until_s:
            return  # its other part has said so already
        times = before.times + 1 if before else 1
        self._lost[peer] = _Loss(times, now + REST_S * times, why)

    def refused(self, part: str, why: str) -> None:
        """The source cannot, or must not, give this part."""
        if (peer := self._free(part)) is not None:
            self._wanted[part].barred[peer] = why

    def damaged(self, part: str) -> None:
        """All bytes came, and their hash is wrong; they were thrown away."""
        wanted = self._wanted[part]
        givers = wanted.givers or {wanted.peer or UNKNOWN}
        self._free(part)
        if len(givers) == 1 and UNKNOWN not in givers:
            wanted.barred[givers.pop()] = "what it sent has the wrong hash"
        wanted.solo = True
        wanted.done = 0
        wanted.givers = set()

    def stuck(self, offers: Mapping[str, Collection[str]], now: float) -> str:
        """Why it cannot go on, or "" while something runs or may still come."""
        for name, wanted in self._wanted.items():
            if wanted.peer is not None:
                return ""
            if any(self._may(p, name, offers) and not self._given_up(p) for p in offers):
                return ""
        for name, wanted in self._wanted.items():
            whys = [f"{peer}: {why}" for peer, why in wanted.barred.items()]
            whys += [f"{peer}: {loss.why}" for peer, loss in self._lost.items()]
            reason = "; ".join(whys[:8]) or "no peer offers it"
            return f"{name} cannot be fetched from anyone: {reason}"
        return ""

    def _start(self, peer: str, name: str, now: float) -> Start:
        wanted = self._wanted[name]
        wanted.peer, wanted.stopping = peer, False
        fresh = wanted.solo and wanted.givers != {peer}
        if fresh:
            wanted.done, wanted.givers = 0, set()
        wanted.since_s, wanted.since_done = now, wanted.done
        wanted.tried.add(peer)
        return Start(peer, name, fresh)

    def _free(self, part: str) -> str | None:
        wanted = self._wanted[part]
        peer, wanted.peer, wanted.stopping = wanted.peer, None, False
        return peer

    def _active(self, peer: str) -> int:
        return sum(wanted.peer == peer for wanted in self._wanted.values())

    def _may(self, peer: str, part: str, offers: Mapping[str, Collection[str]]) -> bool:
        return part in offers[peer] and peer not in self._wanted[part].barred

    def _given_up(self, peer: str) -> bool:
        loss = self._lost.get(peer)
        return loss is not None and loss.times >= LOSSES_MAX

    def _rests(self, peer: str, now: float) -> bool:
        loss = self._lost.get(peer)
        return loss is not None and (now < loss.until_s or loss.times >= LOSSES_MAX)

    def _slow_for(self, idle: str, offers: Mapping[str, Collection[str]], now: float) -> list[str]:
        """The part that the idle peer should take over, if there is one."""
        rate = self._rates.get(idle, RATE_UNKNOWN)
        for name, wanted in self._wanted.items():
            if wanted.peer is None or wanted.stopping or wanted.solo or idle in wanted.tried:
                continue
            elapsed, left = now - wanted.since_s, wanted.size - wanted.done
            if elapsed < SLOW_AFTER_S or not self._may(idle, name, offers):
                continue
            # left / its rate > twice what the idle one would take, and some seconds
            moved = wanted.done - wanted.since_done
            if left * elapsed > moved * (2 * left / max(rate, 1.0) + SLOW_AFTER_S):
                wanted.stopping = True
                return [name]
        return []
