"""One peer's cluster part as a process, which writes what it measures of its links.

python -m tests.netns.measured run: each link that is told, as one line of JSON: peer_id, rtt_s,
bytes_per_s. Measures every few seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from dataclasses import replace

from peer import config
from peer.cluster.driver import Cluster
from peer.cluster.identity import Identity
from peer.planning.profile import Link
from peer.protocol import Control


class Writer:
    """A listener that writes links."""

    def joined(self, peer_id: str) -> None: ...
    def lost(self, peer_id: str, why: str, heard_by: str = "") -> None: ...
    def elected(self, coordinator: str, term: int) -> None: ...
    def received(self, peer_id: str, message: Control) -> None: ...

    def busy(self) -> bool:
        return False

    def linked(self, link: Link) -> None:
        told = {"rtt_s": link.rtt_s, "bytes_per_s": link.bytes_per_s, "peer_id": link.peer_id}
        print(json.dumps(told), flush=True)  # noqa: T201


async def main() -> None:
    with contextlib.suppress(PermissionError):
        # Real machines do not share their cores with tests and whatever else runs here.
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    settings, _ = config.load()
    settings = replace(settings, timing=replace(settings.timing, probe_s=3.0))
    await Cluster(settings, Identity(settings.home), Writer()).run()


if __name__ == "__main__":
    asyncio.run(main())
