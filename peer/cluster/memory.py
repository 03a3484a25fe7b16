"""Writing what must survive a restart, off the loop: the term, and peers met.

A term is claimed only after it is on disk, so its failure is an answer. Peers are hints: a write
that fails is simply tried at the next change.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from peer.cluster.identity import Identity
from peer.planning.profile import PEERS_MAX
from peer.protocol import Sighted

log = logging.getLogger("halka.cluster")

TOGETHER_S = 0.5  # several peers join at once; one write does


class Memory:
    """One agent's. `run` in a task; the other calls are from the loop's thread."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._disk = asyncio.Lock()
        self._met: dict[str, Sighted] = {}
        self._changed = asyncio.Event()
        self.problem = ""

    async def recall(self) -> tuple[Sighted, ...]:
        """Peers met before, the latest first."""
        met = await asyncio.to_thread(self._identity.remembered)
        self._met = {sighted.peer_id: sighted for sighted in reversed(met)}
        return met

    def met(self, sighted: Sighted) -> None:
        """Note a member for the next start."""
        self._met.pop(sighted.peer_id, None)
        self._met[sighted.peer_id] = sighted
        while len(self._met) > PEERS_MAX:
            del self._met[next(iter(self._met))]
        self._changed.set()

    async def store_term(self, term: int) -> bool:
        """Whether the term is on disk now."""
        try:
            async with self._disk:
                await asyncio.to_thread(self._identity.store_term, term)
        except OSError as error:
            self.problem = (
                f"the term cannot be stored in {self._identity.home} ({error.strerror}), so this "
                "peer claims nothing; free disk space or make the folder writable"
            )
            log.error("store=failed because=%s", self.problem)
            return False
        self.problem = ""
        return True

    async def run(self) -> None:
        """Write peers met, until cancelled."""
        while True:
            await self._changed.wait()
            await asyncio.sleep(TOGETHER_S)
            self._changed.clear()
            latest_first = tuple(reversed(self._met.values()))
            with contextlib.suppress(OSError):  # the term's store tells of a full disk
                async with self._disk:
                    await asyncio.to_thread(self._identity.remember, latest_first)
