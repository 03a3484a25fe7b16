"""A ring that is left alone while others come and go: what the test and the benchmark share.

Two machines run a model that is too large for one; two more may use too little memory for a single
layer, so no plan counts on them. One of these coordinates, because it was there first. The fake
engine rests a while in each step instead of computing, so that the time between tokens is not that
of cores that processes share.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from peer.models.imports import import_gguf
from peer.models.store import Store
from tests import fake_models
from tests.netns.stream import Reader
from tests.netns.world import STAGE, Machine, World, members, world

RING, FIRST, LATE = ("oak", "elm"), "ash", "fir"
QUESTION = "Where does the river go?"
LAYER_BYTES = 4 << 20
SERVES_S = 60.0
SEEN_S = 30.0


@dataclass(frozen=True)
class Still:
    """What must stay as it is: the plan, and the processes of its stages."""

    plan: str
    stages: tuple[tuple[str, int], ...]


class Quiet:
    """The four machines."""

    def __init__(self, made: World, model: Path) -> None:
        self.world, self.model = made, model

    def machine(self, name: str) -> Machine:
        """One of them."""
        return self.world.machines[name]

    def start(self, name: str) -> None:
        """The agent of one."""
        memory = str(9 * LAYER_BYTES if name in RING else LAYER_BYTES // 4)
        self.machine(name).start(backend="fake", memory=memory, spare="off")

    def still(self) -> Still:
        """As it is now."""
        stages = [(name, pid) for name in RING for pid in self.machine(name).stages().values()]
        return Still(str(self.machine(RING[0]).status()["model"]["plan"]), tuple(sorted(stages)))

    def serves(self) -> bool:
        """Whether the two run the model, and only they."""
        statuses = [self.machine(name).status() for name in RING]
        if not all(status and status["model"]["phase"] == "serving" for status in statuses):
            return False
        rings = [sorted(p["name"] for p in s["peers"] if p["layers"]) for s in statuses]
        return rings == [sorted(RING)] * 2 and all(
            len(self.machine(name).processes(STAGE)) == 1 for name in RING
        )

    def here(self, *names: str) -> None:
        """Wait until the ring sees exactly these."""
        self.world.until(
            lambda: all(
                members(self.machine(name).status() or {"peers": ()}) == sorted(names)
                for name in RING
            ),
            SEEN_S, f"{', '.join(names)} and nobody else are members",
        )  # fmt: skip

    def ask(self, tokens: int) -> Reader:
        """A long answer at the ring's first peer."""
        entry = self.machine(RING[0])
        return Reader(entry, str(entry.status()["model"]["id"]), QUESTION, max_tokens=tokens)

    # What may happen beside the ring --------------------------------------------------------------

    def joins(self) -> None:
        """A peer that no plan needs."""
        self.start(LATE)
        self.here(*RING, FIRST, LATE)

    def leaves(self) -> None:
        """The same, politely."""
        assert self.machine(LATE).stop() == 0
        self.here(*RING, FIRST)

    def dies(self) -> None:
        """The same, without a word."""
        self.machine(LATE).kill()
        self.here(*RING, FIRST)

    def coordinator_dies(self) -> None:
        """The peer that made the plan; another one takes over."""
        self.machine(FIRST).kill()
        self.here(*RING)
        self.world.until(
            lambda: any(p["coordinator"] for p in self.machine(RING[0]).status()["peers"]),
            SEEN_S, "another one coordinates",
        )  # fmt: skip

    def happenings(self) -> dict[str, Callable[[], None]]:
        """All of them, in an order in which each can follow."""
        return {
            "a peer joins": self.joins,
            "it leaves politely": self.leaves,
            "it joins again": self.joins,
            "it is killed": self.dies,
            "the coordinator is killed": self.coordinator_dies,
        }

    def continued(self) -> list[str]:
        """What any log says of answers that went on, or plans that ended."""
        return [
            line
            for machine in self.world.machines.values()
            for line in machine.log().splitlines()
            if re.search("answer=continued|serving\\) is over", line)
        ]


@contextmanager
def quiet(folder: Path) -> Iterator[Quiet]:
    """The two serve, the coordinator is there, the late one is not."""
    model = fake_models.write(
        folder / "quiet.gguf", end_every=0, delay_s=0.01, layer_bytes=LAYER_BYTES, name="quiet"
    )
    with world(folder) as made:
        home = Quiet(made, model)
        for name in (FIRST, *RING, LATE):
            made.machine(name)
        import_gguf(model, Store(made.machines[RING[0]].home))
        shutil.copytree(
            made.machines[RING[0]].home, made.machines[RING[1]].home, dirs_exist_ok=True
        )
        home.start(FIRST)
        made.until(
            lambda: made.machines[FIRST].status().get("cluster", {}).get("coordinator"),
            SEEN_S, "the first one coordinates",
        )  # fmt: skip
        for name in RING:
            home.start(name)
        made.until(home.serves, SERVES_S, "the two serve")
        yield home
