"""`python -m tests.cabled_agent run`: an agent of a Mac that is cabled to others, pretended.

Its Thunderbolt ports are what CABLED_PORTS says, as JSON; and islands are worth it however slow: on
loopback, with MLX on processors, they never are. All else is the agent as it is.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import msgspec

from peer import cli
from peer.cluster import thunderbolt_shell
from peer.planning import making, together
from peer.planning.profile import Port


async def watch(told: Callable[[tuple[Port, ...]], None]) -> None:
    """The ports, once."""
    told(msgspec.json.decode(os.environ["CABLED_PORTS"], type=tuple[Port, ...]))


if __name__ == "__main__":
    thunderbolt_shell.watch = watch  # type: ignore[assignment]
    together.WORTH = making.WORTH = float("-inf")
    sys.exit(cli.main(sys.argv[1:]))
