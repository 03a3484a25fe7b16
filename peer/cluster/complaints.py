"""What was dropped at the door: counted for status, and said in the log, not too often."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable

log = logging.getLogger("halka.cluster")

AGAIN_S = 10.0  # between two lines about one offender
OFFENDERS_MAX = 256


class Complaints:
    """Counts by reason. `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._said: dict[str, float] = {}
        self.counts: Counter[str] = Counter()

    def note(self, offender: str, what: str, detail: str = "") -> None:
        """Something of the offender's was dropped. `what` is one of a few fixed phrases."""
        self.counts[what] += 1
        now = self._clock()
        if now - self._said.get(offender, -AGAIN_S) < AGAIN_S:
            return
        if len(self._said) >= OFFENDERS_MAX:
            del self._said[min(self._said, key=self._said.__getitem__)]
        self._said[offender] = now
        log.warning(
            "dropped=%s from=%s count=%d%s",
            what.replace(" ", "_"),
            offender,
            self.counts[what],
            f" because={detail[:200]!r}" if detail else "",
        )
