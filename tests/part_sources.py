"""Peers that a test fetches parts from: honest ones, and some with tricks."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

from peer.errors import PartError, PeerLost
from peer.models.store import Store
from peer.models.transfer import answer
from peer.protocol import (
    ChunkHere,
    ChunkWanted,
    ManifestHere,
    ManifestWanted,
    NotHere,
    decode_control,
    encode,
)

Trick = Callable[[ManifestWanted | ChunkWanted, ManifestHere | ChunkHere], ManifestHere | ChunkHere]


class Net:
    """Peers that serve what `origin` has, in the real messages' bytes; some of them with tricks."""

    def __init__(self, origin: Store, *peers: str) -> None:
        self.origin = origin
        self.names = {part.name for part in origin.models()[0].manifest.parts}
        self.offers_now: dict[str, set[str]] = {peer: set(self.names) for peer in peers}
        self.tricks: dict[str, Trick] = {}
        self.gates: dict[str, asyncio.Event] = {}
        self.lost: set[str] = set()
        self.asked: Counter[str] = Counter()  # chunks by peer
        self.bytes: Counter[str] = Counter()  # by peer
        self.flying = self.flying_max = 0

    def offers(self) -> dict[str, set[str]]:
        return self.offers_now

    async def ask(
        self, peer: str, message: ManifestWanted | ChunkWanted
    ) -> ManifestHere | ChunkHere:
        if isinstance(message, ChunkWanted):
            self.asked[peer] += 1
        self.flying += 1
        self.flying_max = max(self.flying_max, self.flying)
        try:
            await asyncio.sleep(0)
            if gate := self.gates.get(peer):
                await gate.wait()
            if peer in self.lost:
                raise PeerLost(f"{peer} is silent")
            wanted = decode_control(encode(message))
            assert isinstance(wanted, ManifestWanted | ChunkWanted)
            found = decode_control(encode(await asyncio.to_thread(answer, self.origin, wanted)))
        finally:
            self.flying -= 1
        if isinstance(found, NotHere):
            raise PartError(found.why)
        assert isinstance(found, ManifestHere | ChunkHere)
        if trick := self.tricks.get(peer):
            found = trick(wanted, found)
        if isinstance(found, ChunkHere):
            self.bytes[peer] += len(found.data)
        return found
