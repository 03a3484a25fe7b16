"""What a stage's steps take: medians of the latest, cheap enough to be kept always. Pure."""

from __future__ import annotations

from collections import deque
from statistics import median

from peer.protocol import Timed

_KEPT = 64  # steps of each kind
_LEAST = 8  # steps before a median is worth telling
POSITION_MAX = 1024  # of a decode step; later ones read a KV cache that no forecast is made for
PREFILL_ROWS = 32  # in shorter steps the fixed costs count too much to tell a row's


class Paces:
    """The latest steps of this stage. `told`: of how many the last summary was made."""

    def __init__(self) -> None:
        self._decode: deque[float] = deque(maxlen=_KEPT)
        self._prefill: deque[float] = deque(maxlen=_KEPT)
        self._tokens: deque[float] = deque(maxlen=_KEPT)
        self._waits: deque[float] = deque(maxlen=_KEPT)
        self._sends: deque[float] = deque(maxlen=_KEPT)
        self._begun: float | None = None
        self.seen = self.told = 0
        self.last_s = 0.0  # the latest step of one row

    def computed(
        self, rows: int, seconds: float, position: int = 0, wait_s: float = 0.0, send_s: float = 0.0
    ) -> None:
        """All of this stage's windows took so long for a step of so many rows, after a wait for its
        frame, and handing it on took so long. position: of the last row. Long answers would make a
        processor seem slow to those who compare it with others."""
        self.seen += 1
        if rows == 1:
            self.last_s = seconds
            if position < POSITION_MAX:
                self._decode.append(seconds)
            self._waits.append(wait_s)
            self._sends.append(send_s)
        elif rows >= PREFILL_ROWS:
            self._prefill.append(seconds / rows)

    def begun(self, rows: int, alone: bool, now: float) -> None:
        """The head begins a step; alone: of the only answer there is, and no other step is on its
        way. Two of those of one row in a row are a token apart."""
        apart = rows == 1 and alone
        if apart and self._begun is not None:
            self._tokens.append(now - self._begun)
        self._begun = now if apart else None

    def rested(self) -> None:
        """The head has nothing to do: the next step does not follow on the last."""
        self._begun = None

    def summary(self) -> Timed:
        """Medians; 0 where too few steps were seen."""
        self.told = self.seen
        return Timed(
            decode_s=_middle(self._decode, _LEAST),
            prefill_s=_middle(self._prefill, 1),
            tpot_s=_middle(self._tokens, _LEAST),
            wait_s=_middle(self._waits, _LEAST),
            send_s=_middle(self._sends, _LEAST),
        )


def _middle(samples: deque[float], least: int) -> float:
    return median(samples) if len(samples) >= least else 0.0
