"""For how long a decision waits: for quiet after changes, and for peers that still measure. Pure.

Both waits end, whatever goes on changing: where many peers measure their links, or come one after
another, something is always new.
"""

from __future__ import annotations

from collections.abc import Iterable

from peer.config import Timing

SETTLE_TIMES = 8  # of settle_s, after which changes are waited for no longer


class Patience:
    """Since when a coordinator waits for what. Times are the caller's, in seconds."""

    def __init__(self, timing: Timing) -> None:
        self._timing = timing
        self._measuring: dict[tuple[str, str], float] = {}  # peer, model: waited for since
        self.begin()

    def begin(self) -> None:
        """Nothing is waited for: all is decided, or as it was decided on."""
        self._changed: float | None = None  # first, since then
        self._late: float | None = None  # peers that measure were first waited for

    def quiet_at(self, now: float) -> float:
        """When a change of now may be decided on."""
        if self._changed is None:
            self._changed = now
        settle_s = self._timing.settle_s
        return max(now, min(now + settle_s, self._changed + SETTLE_TIMES * settle_s))

    def measured_at(self, late: Iterable[str], digest: str, now: float) -> float:
        """Until when to wait for these peers, which have not measured the model; `now`: no longer.
        Each is waited for once."""
        known = self._measuring
        self._measuring = {(peer, digest): known.get((peer, digest), now) for peer in late}
        if not self._measuring:
            return now
        if self._late is None:
            self._late = now
        return min(self._late, max(self._measuring.values())) + self._timing.measure_s
