"""An island: Macs on each other's cables that compute every layer together, as one stage.

Each of them is a rank with its share of the attention heads, of the feed-forward width and of the
KV cache. MLX's collectives hang where a rank is lost, so a rank computes in a child process that is
killed then, and the island is over: with any one of its ranks, all of the KV cache is lost. What
the ranks send to each other is not encrypted, which is why islands are off unless they are asked
for.
"""

from __future__ import annotations

from backends.base import Settings
from backends.mlx import meeting
from backends.mlx.process import LOAD_S, ChildBackend

MEET_SHARE = 0.8  # of a load's time: who did not come by then is named before the deadline
ADVICE = (
    "Another peer of the island or its cable may be gone; where it happens again, set `islands` to "
    "off in config.toml"
)


class IslandBackend(ChildBackend):
    """One rank of an island, in a child process. See `backends.base.Backend`."""

    def __init__(self, settings: Settings, *, load_s: float = LOAD_S) -> None:
        """Start the process; it meets the others at the first load. Raises BackendFault."""
        island = settings.island
        assert island
        meeting.check(island)
        load_s = max(load_s, island.step_s)
        super().__init__(
            "mlx",
            settings,
            title=f"rank {island.rank} of the island {', '.join(island.addresses)}",
            advice=ADVICE,
            lasting=False,
            load_s=load_s,
            step_s=island.step_s,
            meet_s=load_s * MEET_SHARE,
            without=meeting.VARIABLES,
        )
