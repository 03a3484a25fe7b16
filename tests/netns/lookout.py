"""One peer's cluster part as a process, which writes whom it meets and whom it loses.

python -m tests.netns.lookout run: one line of JSON for each: what ("me", "joined", "lost",
"elected"), peer_id, at (seconds by the clock that all processes of a machine share), and of a loss
why and heard_by.
"""

from __future__ import annotations

import asyncio
import json
import logging

from peer import config
from peer.cluster.driver import Cluster
from peer.cluster.identity import Identity
from peer.cluster.listener import clock
from peer.planning.profile import Link
from peer.protocol import Control


class Writer:
    """A listener that writes who comes and goes."""

    def write(self, what: str, peer_id: str, **more: str) -> None:
        told = {"what": what, "peer_id": peer_id, "at": clock(), **more}
        print(json.dumps(told), flush=True)  # noqa: T201

    def joined(self, peer_id: str) -> None:
        self.write("joined", peer_id)

    def lost(self, peer_id: str, why: str, heard_by: str = "") -> None:
        self.write("lost", peer_id, why=why, heard_by=heard_by)

    def elected(self, coordinator: str, term: int) -> None:
        self.write("elected", coordinator)

    def received(self, peer_id: str, message: Control) -> None: ...
    def linked(self, link: Link) -> None: ...

    def busy(self) -> bool:
        return True  # so that no link is measured: that is another test's


async def main() -> None:
    logging.basicConfig(level=logging.DEBUG, format="%(created).3f %(message)s")
    settings, _ = config.load()
    cluster, writer = Cluster(settings, Identity(settings.home), Writer()), Writer()
    await cluster.start()
    writer.write("me", cluster.me)
    await cluster.run()


if __name__ == "__main__":
    asyncio.run(main())
