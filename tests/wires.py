"""Links that are computed, and one peer's machine that measures them, in time that is too."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from peer.cluster import probing as p
from peer.config import Timing
from peer.planning.profile import Link

TIMING = Timing()
HEADER_BYTES = 100  # of a small probe on the wire


@dataclass
class Wire:
    """A way to a peer: a token bucket in front of a delay. loses: a probe that never arrives."""

    bytes_per_s: float = 125e6
    rtt_s: float = 0.001
    burst_bytes: int = 32 << 10
    busy: Callable[[float], bool] = lambda now: False
    loses: Callable[[p.Send], bool] = lambda send: False
    free_at: float = 0.0  # when the wire has sent all that it took
    tokens: float = 0.0
    tokens_at: float = -1e9

    def answered_at(self, send: p.Send, now: float) -> float:
        """When the answer to a probe that leaves now is back."""
        start = max(now, self.free_at)
        grown = self.tokens + (start - self.tokens_at) * self.bytes_per_s
        self.tokens = min(grown, self.burst_bytes)
        size = send.padding_bytes + HEADER_BYTES
        self.free_at = start + max(size - self.tokens, 0) / self.bytes_per_s
        self.tokens, self.tokens_at = max(self.tokens - size, 0.0), self.free_at
        return self.free_at + self.rtt_s


@dataclass
class World:
    """One peer's machine, its wires, and the clock."""

    timing: Timing = TIMING
    seed: str = "me"
    now: float = 1000.0
    busy: Callable[[float], bool] = lambda now: False
    wires: dict[str, Wire] = field(default_factory=dict)
    sent: list[tuple[float, p.Send]] = field(default_factory=list)
    told: list[tuple[float, Link]] = field(default_factory=list)
    flying_most: int = 0

    def __post_init__(self) -> None:
        self.machine = p.Probing(self.timing, Random(self.seed))
        self._later: list[tuple[float, int, p.Send]] = []
        self._order = itertools.count()

    def add(self, peer_id: str, wire: Wire, host: str = "10.0.0.2") -> Wire:
        self.wires[peer_id] = wire
        self.feed(p.Here(peer_id, host))
        return wire

    def feed(self, event: p.Event) -> None:
        for action in self.machine.step(event, self.now):
            if isinstance(action, p.Measured):
                self.told.append((self.now, action.link))
                continue
            self.sent.append((self.now, action))
            wire = self.wires[action.peer_id]
            if not wire.loses(action):
                at = wire.answered_at(action, self.now)
                heapq.heappush(self._later, (at, next(self._order), action))
        self.flying_most = max(self.flying_most, len(self._later))

    def run(self, for_s: float) -> None:
        """Let this much time pass."""
        end = self.now + for_s
        while True:
            answer_at = self._later[0][0] if self._later else math.inf
            at = max(self.now, min(answer_at, self.machine.deadline))
            if at > end:
                self.now = end
                return
            self.now = at
            if answer_at <= at:
                _, _, send = heapq.heappop(self._later)
                busy = self.busy(at) or self.wires[send.peer_id].busy(at)
                self.feed(p.Answered(send.peer_id, send.request, busy))
            else:
                self.feed(p.Tick(self.busy(at)))

    @property
    def link(self) -> Link:
        """What was told last."""
        return self.told[-1][1]

    def starts(self, gap_s: float = 0.4) -> list[float]:
        """When measurements began: probes after a pause."""
        times = [-math.inf, *(at for at, _ in self.sent)]
        return [b for a, b in itertools.pairwise(times) if b - a > gap_s]


def padded(world: World) -> int:
    """Bytes of padding sent."""
    return sum(send.padding_bytes for _, send in world.sent)
