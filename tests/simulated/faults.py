"""What one seed does to its house, and the processes that it does it to."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Any

from peer.cluster import election as e
from peer.cluster import membership as m


@dataclass(frozen=True)
class Faults:
    """What one seed does to its house. Rates are for each second of chaos, in the whole house."""

    delay_max_s: float
    loss: float
    duplicates: float
    rates: dict[str, float]

    @classmethod
    def draw(cls, rng: random.Random) -> Faults:
        """Each kind of fault is absent in about half of the seeds, so that single ones show."""

        def some(most: float) -> float:
            return rng.random() * most if rng.random() < 0.5 else 0.0

        kinds = ("cut", "one_way", "split", "heal", "kill", "power", "start", "stop")
        rates = {kind: some(0.7) for kind in kinds}
        rates["heal"] += 0.2
        rates["start"] += 0.2
        return cls(rng.choice((0.01, 0.1, 0.3, 0.6)), some(0.3), some(0.2), rates)


@dataclass(eq=False)
class Process:
    """One agent: two machines, its connections, its disk."""

    me: str
    stored_term: int = 0
    incarnation: int = 0
    alive: bool = False
    powered: bool = True  # a machine without power does not even refuse
    stopped: bool = False
    membership: m.Membership = field(init=False)
    election: e.Election = field(init=False)
    connections: dict[int, str] = field(default_factory=dict)
    dials: dict[str, int] = field(default_factory=dict)
    joined: dict[str, int] = field(default_factory=dict)  # member → the run of it that joined
    over: set[int] = field(default_factory=set)  # connections that ended; none begins twice
    backlog: list[tuple[Any, ...]] = field(default_factory=list)
    timer_at: float = math.inf
    disk_free_at: float = 0.0
    lost_since_stop: list[str] = field(default_factory=list)
