"""Which peers failed with which model, and until when plans for it do without them. Pure."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

RETRY_S = (0.1, 5.0)  # after the first failure, which answers wait for, and the second
ILL_S = 15.0  # after any that would cost answers long once more: it hung, or computed nonsense
NONSENSE = "it computed numbers that are not finite, answer after answer"
NEEDED_S = 30.0  # at most, where nothing can be served without it
BARRED_S = 600.0  # after the third; also how long a failure is remembered


@dataclass(slots=True)
class _Failed:
    count: int
    last: float
    until: float
    why: str


@dataclass(frozen=True, slots=True)
class _Blame:
    """A failure that may turn out to be the loss of another peer of the same ring."""

    peer_id: str
    digest: str
    ring: frozenset[str]
    at: float


@dataclass(slots=True)
class Failures:
    """The memory of failed stages. doubt_s: how long a failure may still be another peer's loss."""

    doubt_s: float
    _failed: dict[tuple[str, str], _Failed] = field(default_factory=dict)
    _blames: list[_Blame] = field(default_factory=list)

    def blame(
        self,
        peer_id: str,
        digest: str,
        ring: Iterable[str],
        why: str,
        now: float,
        least_s: float = 0.0,
    ) -> None:
        """Note a failure. Plans for this model do without the peer for least_s or more."""
        old = self._failed.get((peer_id, digest))
        count = old.count + 1 if old and now - old.last < BARRED_S else 1
        wait_s = max(RETRY_S[count - 1] if count <= len(RETRY_S) else BARRED_S, least_s)
        if count > len(RETRY_S):
            when = f"{BARRED_S / 60:.0f} minutes after the last"
            needed = f"{NEEDED_S:.0f} s where nothing can be served without it"
            why += f" ({count} times; it is tried again {when}, or {needed})"
        self._failed[peer_id, digest] = _Failed(count, now, now + wait_s, why)
        self._blames = [b for b in self._blames if now - b.at <= self.doubt_s]
        self._blames.append(_Blame(peer_id, digest, frozenset(ring), now))

    def forgive(self, lost: frozenset[str], now: float) -> None:
        """These peers were lost: whatever failed just before in a ring with one of them, failed
        because of that."""
        for blame in [b for b in self._blames if b.ring & lost and now - b.at <= self.doubt_s]:
            self._blames.remove(blame)
            failed = self._failed.get((blame.peer_id, blame.digest))
            if failed is None or blame.peer_id in lost:
                continue
            failed.count, failed.until = failed.count - 1, -math.inf
            if not failed.count:
                del self._failed[blame.peer_id, blame.digest]

    def forget(self, peer_id: str) -> None:
        """The peer is another one now: it left, or what it has or can do has changed."""
        for key in [key for key in self._failed if key[0] == peer_id]:
            del self._failed[key]

    def barred(self, digest: str) -> dict[str, str]:
        """Peers that plans for this model do without for now, each with the reason."""
        return {
            peer_id: failed.why
            for (peer_id, model), failed in sorted(self._failed.items())
            if model == digest and failed.until > -math.inf
        }

    def shorten(self, now: float) -> None:
        """Nothing can be served without those who are barred: try them again soon."""
        for failed in self._failed.values():
            failed.until = min(failed.until, now + NEEDED_S)

    def count(self, digest: str) -> int:
        """How often plans for this model failed, as far as it is remembered."""
        return sum(failed.count for (_, model), failed in self._failed.items() if model == digest)

    def reasons(self, digest: str) -> list[str]:
        """Why they failed, the last time on each peer."""
        return [f.why for (_, model), f in sorted(self._failed.items()) if model == digest]

    def bars(self, digests: Collection[str]) -> list[tuple[str, str]]:
        """(peer id, digest) of all that plans for these models do without for now."""
        return sorted(
            key for key, f in self._failed.items() if key[1] in digests and f.until > -math.inf
        )

    def expire(self, now: float) -> None:
        """Let those whose time is over try again."""
        for key, failed in list(self._failed.items()):
            if failed.until <= now:
                failed.until = -math.inf
                if failed.count > len(RETRY_S) or now - failed.last >= BARRED_S:
                    del self._failed[key]

    @property
    def deadline(self) -> float:
        """When `expire` has something to do, inf: not."""
        return min(
            (f.until for f in self._failed.values() if f.until > -math.inf), default=math.inf
        )
