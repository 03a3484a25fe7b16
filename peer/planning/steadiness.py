"""Which peers come and go, and how long a plan waits for one that came back. Pure.

A plan costs its answers a pause, so a link that breaks every few seconds must not make one each
time. A peer that was lost and is back takes part again once it has held for a while, the longer the
oftener it was lost. One that said that it goes is not held to it.

The same for a peer that ends plans by its word alone: it says that it does not reach another one,
and that one is here; or that it goes away, and stays. Once is bad luck; more often, be it a bad
link or a lie, plans do without the one that says so for a while.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from peer.planning.making import Members

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
        self._cries: dict[str, list[tuple[str, float]]] = {}  # who was not reached, and when
        self._told: set[tuple[str, str]] = set()  # the same, of which a report is no news

    def cried(self, peer_id: str, lost: str, now: float) -> None:
        """A peer reports that it does not reach another one of its ring, which ends a plan."""
        if (peer_id, lost) in self._told:
            self._told.remove((peer_id, lost))
        else:
            self._note(peer_id, lost, now)

    def told(self, before: Members, after: Members, now: float) -> None:
        """What peers tell of themselves has changed. Who is really gone proves the others right."""
        self._proven(before.present - after.present)
        for peer_id in (before.leaving & after.present) - after.leaving:
            self._note(peer_id, peer_id, now)
        for profile in after.here:
            old = before.profiles.get(profile.peer_id)
            if old is None or old.unreachable == profile.unreachable:
                continue
            fresh = after.present.intersection(profile.unreachable).difference(old.unreachable)
            for lost in sorted(fresh):
                self._note(profile.peer_id, lost, now)
                self._told.add((profile.peer_id, lost))

    def _note(self, peer_id: str, lost: str, now: float) -> None:
        fresh = [cry for cry in self._cries.get(peer_id, ()) if now - cry[1] < FORGET_S]
        self._cries[peer_id] = [*fresh, (lost, now)][-len(STEADY_S) - 1 :]

    def lost(self, peers: Iterable[str], now: float) -> None:
        """These were lost, and had not said that they go."""
        self._known = {p: known for p, known in self._known.items() if now - known.lost < FORGET_S}
        for peer_id in peers:
            known = self._known.get(peer_id)
            self._known[peer_id] = _Known(known.losses + 1 if known else 1, now)

    def _proven(self, gone: frozenset[str]) -> None:
        self._told = {told for told in self._told if gone.isdisjoint(told)}
        for peer_id, cries in list(self._cries.items()):
            self._cries[peer_id] = [cry for cry in cries if cry[0] not in gone]
            if peer_id in gone or not self._cries[peer_id]:
                del self._cries[peer_id]

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
        for peer_id, cries in sorted(self._cries.items()):
            if now < self._quiet_until(cries):
                found[peer_id] = (
                    f"{len(cries)} times it said that it goes away, and stayed, or that it does "
                    "not reach a peer that is here; it takes part again "
                    f"{self._quiet_until(cries) - cries[-1][1]:.0f} s after the last time"
                )
        return found

    def deadline(self, now: float) -> float:
        """When `shaky` changes by itself, inf: not."""
        ends = [self._until(known) for known in self._known.values() if known.back <= now]
        ends += [self._quiet_until(cries) for cries in self._cries.values()]
        return min((end for end in ends if end > now), default=math.inf)

    @staticmethod
    def _until(known: _Known) -> float:
        return known.back + STEADY_S[min(known.losses, len(STEADY_S)) - 1]

    @staticmethod
    def _quiet_until(cries: list[tuple[str, float]]) -> float:
        """When what a peer said is forgiven; the first time always is."""
        again = len(cries) - 1
        return cries[-1][1] + STEADY_S[min(again, len(STEADY_S)) - 1] if again else -math.inf
