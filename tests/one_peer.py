"""One peer's cluster part as a process of its own, for tests that kill and stop processes.

python -m tests.one_peer HOME [HOST:PORT]: prints its peer id and its control port, then runs.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from peer.cluster.driver import Cluster
from peer.cluster.identity import Identity
from peer.config import Config
from peer.planning.profile import Link
from peer.protocol import Control


class Deaf:
    """A listener that needs nothing."""

    def joined(self, peer_id: str) -> None: ...
    def lost(self, peer_id: str, why: str, heard_by: str = "") -> None: ...
    def elected(self, coordinator: str, term: int) -> None: ...
    def received(self, peer_id: str, message: Control) -> None: ...
    def linked(self, link: Link) -> None: ...

    def busy(self) -> bool:
        return False


async def main(home: Path, peers: tuple[str, ...]) -> None:
    config = Config.loopback(home=home, peers=peers, mdns=False)
    cluster = Cluster(config, Identity(home), Deaf())
    await cluster.start()
    print(cluster.me, cluster.port, flush=True)  # noqa: T201
    await cluster.run()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), tuple(sys.argv[2:])))
