"""Peers that were refused, or refused us: said in the log once, kept for status."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from peer.planning.profile import PEERS_MAX

log = logging.getLogger("halka.cluster")

REFUSALS_MAX = 32
FULL = f"the cluster is full: it has {PEERS_MAX} peers"
CROWDED = (
    f"more peers are announced than a cluster may have ({PEERS_MAX}), so some wait or are refused; "
    "give some of them another name in the setting `cluster`"
)


@dataclass(frozen=True, slots=True)
class Refusal:
    """One of them. by_us: we refused it; else it refused us. at: by the cluster's clock.

    code: protocol | cluster | identity | admission. host: where it is, or its announced address.
    """

    peer_id: str
    host: str
    code: str
    why: str
    by_us: bool
    at: float


class Refusals:
    """The latest of each peer, kind and direction."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str, bool], Refusal] = {}

    def note(self, refusal: Refusal) -> None:
        """Keep it; a log line where it is news."""
        key = (refusal.peer_id, refusal.code, refusal.by_us)
        known = self._kept.pop(key, None)
        if known is None or known.why != refusal.why:
            log.warning(
                "refused=%s peer=%s host=%s code=%s because=%s",
                "by_us" if refusal.by_us else "by_them",
                refusal.peer_id,
                refusal.host,
                refusal.code,
                refusal.why,
            )
        if len(self._kept) >= REFUSALS_MAX:
            del self._kept[next(iter(self._kept))]
        self._kept[key] = refusal

    def forget(self, peer_id: str) -> None:
        """It joined: what was, was."""
        for key in [key for key in self._kept if key[0] == peer_id]:
            del self._kept[key]

    def all(self) -> tuple[Refusal, ...]:
        """The latest last."""
        return tuple(self._kept.values())
