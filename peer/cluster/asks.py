"""Questions to other peers: each has a number, a deadline, and exactly one answer or error."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import overload

import msgspec

from peer.errors import PartError, PeerLost, ProtocolError
from peer.protocol import ChunkHere, ChunkWanted, Control, ManifestHere, ManifestWanted, NotHere

log = logging.getLogger("halka.cluster")

Question = ManifestWanted | ChunkWanted
Reply = ManifestHere | ChunkHere | NotHere
NUMBER_MAX = 1 << 31


class Asks:
    """Questions under way. `send(peer_id, message)` is the cluster's."""

    def __init__(self, send: Callable[[str, Question], bool]) -> None:
        self._send = send
        self._number = 0
        self._waiting: dict[tuple[str, int], asyncio.Future[Reply]] = {}

    @overload
    async def ask(
        self, peer_id: str, question: ManifestWanted, timeout_s: float
    ) -> ManifestHere: ...
    @overload
    async def ask(self, peer_id: str, question: ChunkWanted, timeout_s: float) -> ChunkHere: ...
    async def ask(
        self, peer_id: str, question: Question, timeout_s: float
    ) -> ManifestHere | ChunkHere:
        """The answer. The question's number is set here.

        Raises: PeerLost (gone, silent, or its queue is full), PartError (it does not have it),
        ProtocolError (it answered something else).
        """
        self._number = self._number % NUMBER_MAX + 1
        question = msgspec.structs.replace(question, request=self._number)
        key = (peer_id, self._number)
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting[key] = future
        try:
            if not self._send(peer_id, question):
                raise PeerLost(f"the peer {peer_id} cannot be reached now")
            reply = await asyncio.wait_for(future, timeout_s)
        except TimeoutError:
            raise PeerLost(f"the peer {peer_id} did not answer within {timeout_s:g} s") from None
        finally:
            del self._waiting[key]
        if isinstance(reply, NotHere):
            raise PartError(f"the peer {peer_id} says: {reply.why}")
        if isinstance(reply, ManifestHere) != isinstance(question, ManifestWanted):
            raise ProtocolError(f"the peer {peer_id} answered another question")
        return reply

    def take(self, peer_id: str, reply: Control) -> bool:
        """A message from a member: whether it was a reply. One that nobody waits for (any more) is
        dropped."""
        if not isinstance(reply, Reply):
            return False
        future = self._waiting.get((peer_id, reply.request))
        if future is None or future.done():
            log.debug("< late answer peer=%s", peer_id)
        else:
            future.set_result(reply)
        return True

    def lost(self, peer_id: str, why: str) -> None:
        """End all questions to this peer."""
        for (asked, _), future in self._waiting.items():
            if asked == peer_id and not future.done():
                future.set_exception(PeerLost(f"the peer {peer_id} is gone: {why}"))
