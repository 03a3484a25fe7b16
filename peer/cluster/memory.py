"""Writing what must survive a restart, off the loop: the term, and peers met.

A term is claimed only after it is on disk, so its failure is an answer. Terms that come while one
is being written wait as one, the highest. Peers are hints: a write that fails is simply tried at
the next change.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from peer.cluster.identity import Identity
from peer.planning.profile import PEERS_MAX
from peer.protocol import Sighted

log = logging.getLogger("halka.cluster")

TOGETHER_S = 0.5  # several peers join at once; one write does


class Memory:
    """One agent's. `run` in a task; the other calls are from the loop's thread.

    kept: takes each term that was to be stored, and whether it, or a higher one, is on disk.
    """

    def __init__(self, identity: Identity, kept: Callable[[int, bool], None]) -> None:
        self._identity, self._kept = identity, kept
        self._terms: dict[int, None] = {}  # that wait to be stored
        self._lower = False
        self._term_due = asyncio.Event()
        self._disk = asyncio.Lock()
        self._met: dict[str, Sighted] = {}
        self._changed = asyncio.Event()
        self.problem = ""

    async def recall(self) -> tuple[Sighted, ...]:
        """Peers met before, the latest first; none where they cannot be read."""
        try:
            met = await asyncio.to_thread(self._identity.remembered)
        except OSError as error:
            log.warning("remembered_peers=unread because=%s", error)
            met = ()
        self._met = {sighted.peer_id: sighted for sighted in reversed(met)}
        return met

    def met(self, sighted: Sighted) -> None:
        """Note a member for the next start."""
        self._met.pop(sighted.peer_id, None)
        self._met[sighted.peer_id] = sighted
        while len(self._met) > PEERS_MAX:
            del self._met[next(iter(self._met))]
        self._changed.set()

    def keep_term(self, term: int, *, lower: bool = False) -> None:
        """Store the term, and tell `kept`. lower: forget higher ones, also those that wait."""
        if lower:
            self._terms.clear()
            self._lower = True
        self._terms[term] = None
        self._term_due.set()

    async def run(self) -> None:
        """Write what there is to write, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._write_terms())
            tasks.create_task(self._write_peers())

    async def _write_terms(self) -> None:
        while True:
            await self._term_due.wait()
            self._term_due.clear()
            terms, lower = tuple(self._terms), self._lower
            self._terms, self._lower = {}, False
            stored = await self._store(max(terms), lower=lower)
            for term in terms:
                self._kept(term, stored)

    async def _store(self, term: int, *, lower: bool) -> bool:
        """Whether the term is on disk now."""
        try:
            async with self._disk:
                await asyncio.to_thread(self._identity.store_term, term, lower=lower)
        except OSError as error:
            self.problem = (
                f"the term cannot be stored in {self._identity.home} ({error.strerror}), so this "
                "peer claims nothing; free disk space or make the folder writable"
            )
            log.error("store=failed because=%s", self.problem)
            return False
        self.problem = ""
        return True

    async def _write_peers(self) -> None:
        while True:
            await self._changed.wait()
            await asyncio.sleep(TOGETHER_S)
            self._changed.clear()
            latest_first = tuple(reversed(self._met.values()))
            with contextlib.suppress(OSError):  # the term's store tells of a full disk
                async with self._disk:
                    await asyncio.to_thread(self._identity.remember, latest_first)
