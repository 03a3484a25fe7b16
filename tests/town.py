"""Several peers' clusters on loopback in one process, and the listener that remembers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from peer.cluster.driver import Cluster
from peer.cluster.identity import Identity
from peer.config import Config
from peer.planning.profile import Link
from peer.protocol import Control


class Ear:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.links: dict[str, list[Link]] = {}
        self.computes = False
        self.answer: Callable[[str, Control], None] = lambda peer_id, message: None

    def joined(self, peer_id: str) -> None:
        self.told.append(("joined", peer_id))

    def lost(self, peer_id: str, why: str, heard_by: str = "") -> None:
        self.told.append(("lost", peer_id, why, *([heard_by] if heard_by else [])))

    def elected(self, coordinator: str, term: int) -> None:
        self.told.append(("elected", coordinator, term))

    def received(self, peer_id: str, message: Control) -> None:
        self.told.append(("received", peer_id, message))
        self.answer(peer_id, message)

    def busy(self) -> bool:
        return self.computes

    def linked(self, link: Link) -> None:
        self.links.setdefault(link.peer_id, []).append(link)


class Peer:
    """A cluster, its listener and its task."""

    def __init__(self, config: Config, **options: Any) -> None:
        self.config, self.ear = config, Ear()
        self.identity = Identity(config.home)
        self.cluster = Cluster(config, self.identity, self.ear, **options)
        self.task: asyncio.Task[None] | None = None

    async def start(self) -> Peer:
        await self.cluster.start()
        self.task = asyncio.create_task(self.cluster.run())
        return self

    async def kill(self) -> None:
        """End without a goodbye, as kill -9 does: the system closes the sockets."""
        assert self.task is not None
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task
        self.identity.close()

    async def close(self) -> None:
        await self.cluster.close("the test is over")
        assert self.task is not None
        await self.task
        self.identity.close()


class Town:
    """Makes peers, and ends them all."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.peers: list[Peer] = []

    async def add(self, name: str, *known: Peer, options: Any = None, **settings: Any) -> Peer:
        places = tuple(f"127.0.0.1:{peer.cluster.port}" for peer in known)
        config = Config.fast_test(home=self.home / name, peers=places, **settings)
        peer = Peer(config, **(options or {}))
        self.peers.append(peer)
        return await peer.start()

    def agree(self, *peers: Peer) -> bool:
        """All of them know each other and follow one of them, in one term."""
        ids = {peer.cluster.me for peer in peers}
        follows = {(peer.cluster.coordinator, peer.cluster.term) for peer in peers}
        complete = all(set(p.cluster.members) == ids - {p.cluster.me} for p in peers)
        return complete and len(follows) == 1 and follows.pop()[0] in ids


@asynccontextmanager
async def a_town(home: Path) -> AsyncIterator[Town]:
    town = Town(home)
    try:
        yield town
    finally:
        for peer in town.peers:
            if peer.task is not None and not peer.task.done():
                await peer.close()
