"""One measurement of one link: which probes to send when, and what their answers say.

Small probes one after another give the round trip. Then padded ones, each alone and each larger
than the one before, say roughly how fast the link is, and use up what a token bucket lets through
at once. Then a train: a few padded probes are always under way, so that the link is never idle,
and the time from the train's first answer to its last is what the bytes between them took. The
round trip drops out of that, and so does the bucket. How large the train's cars are follows from
the rough figure: what is under way together takes a slow link a moment, not seconds, because
heartbeats and answers wait behind it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

SMALL = 8  # probes for the round trip; the best of them met the fewest other programs
RAMP_BYTES = (16 << 10, 64 << 10, 128 << 10)  # together more than the buckets of most shapers
RAMP_ENOUGH_S = 0.05  # a link on which one step of the ramp takes longer needs no larger one
FLYING = 4  # cars of the train under way; fewer leave the link idle while an agent waits for a core
CAR_S = 0.011  # that one car takes; four of them delay others by 45 ms
CAR_BYTES_MAX = 128 << 10  # half of a part's chunk: the receiver deciphers one while the next comes
CAR_BYTES_MIN = 8 << 10
PADDED_BYTES_MAX = 1536 << 10  # sent in one measurement, ramp and train
PADDED_S_MAX = 0.3  # after which nothing more is sent
OVER = 1.25  # see `bytes_per_s`
MOMENT_S = 1e-6  # shorter times are this clock's noise; keeps every figure finite


@dataclass(slots=True)
class Once:
    """A measurement that goes on. peer_id: of the other end. small_only: no padded probes."""

    peer_id: str
    small_only: bool
    deadline: float  # by which all answers must have come
    rtt_s: float = 0.0  # the shortest of `small` round trips
    small: int = 0
    sent_bytes: int = 0  # of padding
    _flying: dict[int, tuple[float, int]] = field(default_factory=dict)  # sent at, padding
    _rough: float = 0.0  # bytes a second, by the last padded probe that came back
    _ramp: int = 0  # steps of it that were sent
    _padded_at: float = 0.0
    _left_at: float | None = None  # when the train did
    _train: list[tuple[float, int]] = field(default_factory=list)  # answered at, padding

    @property
    def measured_rtt(self) -> bool:
        """All small probes came back."""
        return self.small >= SMALL

    @property
    def flying(self) -> bool:
        """Answers are still to come."""
        return bool(self._flying)

    def wanted(self, now: float) -> list[int]:
        """Padding of the probes to send now, in bytes."""
        if self._left_at is None and self._flying:
            return []  # up to here one after another
        if not self.measured_rtt:
            return [0]
        if self.small_only:
            return []
        if self._ramping():
            return [RAMP_BYTES[self._ramp]]
        size = self._car_bytes()
        free = FLYING - len(self._flying)
        if self._left_at is not None:
            if now - self._padded_at > PADDED_S_MAX:
                return []
            free = min(free, (PADDED_BYTES_MAX - self.sent_bytes) // size)
        return [size] * free

    def sent(self, request: int, padding_bytes: int, now: float) -> None:
        """A wanted probe leaves under this number."""
        if padding_bytes and not self.sent_bytes:
            self._padded_at = now
        if padding_bytes and self._left_at is None:
            if self._ramping():
                self._ramp += 1
            else:
                self._left_at = now
        self.sent_bytes += padding_bytes
        self._flying[request] = (now, padding_bytes)

    def answered(self, request: int, now: float) -> bool:
        """Take an answer. False: nobody asked, or it came before."""
        if request not in self._flying:
            return False
        at, padding_bytes = self._flying.pop(request)
        took_s = max(now - at, 0.0)
        if not padding_bytes:
            self.rtt_s = min(took_s, self.rtt_s) if self.small else took_s
            self.small += 1
        elif self._left_at is None:
            self._rough = padding_bytes / max(took_s - self.rtt_s, MOMENT_S)
        else:
            self._train.append((now, padding_bytes))
            self._rough = max(self._rough, self._slope())
        return True

    @property
    def bytes_per_s(self) -> float:
        """Of the link towards the peer; 0: the train has not told enough.

        Answers that wait together, because this process was kept from reading them, look as if
        they had come at once. The whole train's time knows better, though it holds a bucket's
        burst and a slow start: so the slope counts, up to a little more than that.
        """
        slope = self._slope()
        if not slope or self._left_at is None:
            return 0.0
        total = sum(size for _, size in self._train)
        whole_s = self._train[-1][0] - self._left_at - self.rtt_s
        return min(slope, OVER * total / max(whole_s, MOMENT_S))

    def _slope(self) -> float:
        if len(self._train) < FLYING:
            return 0.0
        between = sum(size for _, size in self._train[1:])
        return between / max(self._train[-1][0] - self._train[0][0], MOMENT_S)

    def _ramping(self) -> bool:
        """Whether the rough figure needs (another) step of the ramp."""
        if self._ramp == len(RAMP_BYTES):
            return False
        return not self._ramp or RAMP_BYTES[self._ramp - 1] < self._rough * RAMP_ENOUGH_S

    def _car_bytes(self) -> int:
        return max(min(int(self._rough * CAR_S), CAR_BYTES_MAX), CAR_BYTES_MIN)
