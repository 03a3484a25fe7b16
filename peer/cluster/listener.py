"""What the cluster tells the daemon, and the values that it tells it in."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

from peer.planning.profile import Link
from peer.protocol import Control


class Measured(Protocol):
    """Who is told of links that are measured."""

    def busy(self) -> bool:
        """Whether this peer computes, or serves an answer, now: links are measured later then."""
        ...

    def linked(self, link: Link) -> None:
        """The link with a member was measured for the first time, or has changed."""
        ...


class Listener(Measured, Protocol):
    """Who is told. Called from the loop; must not block, and what it raises ends the agent."""

    def joined(self, peer_id: str) -> None:
        """The peer is a member now."""
        ...

    def lost(self, peer_id: str, why: str, heard_by: str = "") -> None:
        """The peer is a member no longer. heard_by: a member that hears it still, "": none does;
        it is out of this peer's reach only."""
        ...

    def elected(self, coordinator: str, term: int) -> None:
        """From now on this peer coordinates; "" while nobody does. Also when it claimed anew."""
        ...

    def received(self, peer_id: str, message: Control) -> None:
        """A message that is not the cluster's own business."""
        ...


@dataclass(frozen=True, slots=True)
class Member:
    """A peer in the cluster. since: by `clock`."""

    peer_id: str
    name: str
    addresses: tuple[str, ...]
    version: str
    incarnation: int
    since: float


def clock() -> float:
    """Seconds that never jump and go on while the machine sleeps."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.clock_gettime(time.CLOCK_MONOTONIC)  # on macOS this one counts sleep
