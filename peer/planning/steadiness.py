"""Which peers come and go, and how long a plan waits for one that came back. Pure.

A plan costs its answers a pause, so a link that breaks every few seconds must not make one each
time. A peer that was lost and is back takes part again once it has held for a while, the longer the
oftener it was lost. One that said that it goes is not held to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

STEADY_S = (5.0, 30.0, 120.0)  # without a loss, after the first, second, third and later ones
FORGET_S = 600.0  # a loss


@dataclass(slots=True)
class _Known:
    losses: int
    lost: float  # when, the last time
    back: float = math.inf  # since when it is here again


class Steadiness:
    """The memory of losses. Times are the caller's, in seconds."""

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}

    def lost(self, peers: Iterable[str], now: float) -> None:
        """These were lost, and had not said that they go."""
        self._known = {p: known for p, known in self._known.items() if now - known.lost < FORGET_S}
        for peer_id in peers:
            known = self._known.get(peer_id)
            self._known[peer_id] = _Known(known.losses + 1 if known else 1, now)

    def back(self, peers: Iterable[str], now: float) -> None:
        """These are here (again)."""
        for peer_id in peers:
            if (known := self._known.get(peer_id)) is not None:
                known.back = now

    def shaky(self, now: float) -> dict[str, str]:
        """Peers that have not held for long enough yet, each with the reason, in words."""
        found = {}
        for peer_id, known in sorted(self._known.items()):
            if known.back <= now < self._until(known):
                times = "once" if known.losses == 1 else f"{known.losses} times"
                wait_s = self._until(known) - known.back
                found[peer_id] = (
                    f"it was lost {times} and has just come back; it takes part again when it has "
                    f"stayed for {wait_s:.0f} s"
                )
        return found

    def deadline(self, now: float) -> float:
        """When `shaky` changes by itself, inf: not."""
        ends = (self._until(known) for known in self._known.values() if known.back <= now)
        return min((end for end in ends if end > now), default=math.inf)

    @staticmethod
    def _until(known: _Known) -> float:
        return known.back + STEADY_S[min(known.losses, len(STEADY_S)) - 1]
