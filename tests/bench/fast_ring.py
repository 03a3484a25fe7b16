"""Rings of pinned stages and the whole model in a pinned process, for `tests.bench.fast`.

A stage a core, one thread each; answers go straight to the head. Every ratio is of medians of runs
in turns: on a shared machine only what ran in the same minute can be compared.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
from msgspec.structs import replace

from peer.bench.orders import Ask, Open, Took, whole
from peer.bench.reference import Reference
from peer.models.manifest import Manifest
from peer.models.store import Store
from peer.planning.plan import Plan, PlanState
from peer.protocol import Sampling, StageConnect
from peer.words.bench_figures import Heard
from tests.bench.delay import relayed
from tests.bench.one_stream import pinned
from tests.e2e.rings import Ring, plan_of

CELLS, CONTEXT = 4096, 2048
GREEDY = Sampling(temperature=0.0)
VOCABULARY = 49152
COMMON = (200, 40000)  # ids of ordinary pieces of words


@dataclass(frozen=True)
class Model:
    """A stored model, the GGUF that it was, and the cores that peers are pinned to."""

    path: Path
    store: Store
    manifest: Manifest
    cores: tuple[int, ...]

    @property
    def folder(self) -> Path:
        """Where its parts are."""
        return self.store.folder(self.manifest.digest)

    def plan(self, *bounds: int, speculation: str = "off", **changes: int) -> Plan:
        """A plan of one-threaded peers, cut at the bounds."""
        values = {"context": CONTEXT, "kv_cells": CELLS, **changes}
        plan = plan_of(self.store, self.manifest, bounds, "llama_cpp", **values)
        return replace(plan, split=replace(plan.split, speculation=speculation))


def noise(seed: int, count: int) -> tuple[int, ...]:
    """Ids of a prompt that has no beginning in common with any other one."""
    drawn = np.random.default_rng(seed).integers(*COMMON, count)
    return tuple(int(token) for token in drawn)


class Pinned(Ring):
    """A ring on loopback whose stages have a core each. delay_s: added to every hop."""

    def __init__(self, plan: Plan, cores: Sequence[int], delay_s: float = 0.0) -> None:
        super().__init__(plan)
        self._cores, self._delay_s = cores, delay_s
        self._cables = ExitStack()

    async def start(self, folder: Path, threads: int = 1, draft: Path | None = None) -> None:
        """Load and link, as Ring does. No model drafts here."""
        assert draft is None
        ring = self.plan.ring
        for i, (peer, supervisor) in enumerate(self.supervisors.items()):
            with pinned(self._cores[i % len(self._cores)]):
                await supervisor.start(
                    PlanState(self.plan, "loading"), peer, folder,
                    threads=threads, step_s=60.0, bind="127.0.0.1", admitted=(self.key,),
                )  # fmt: skip
        await self.until("ready")
        ports = [self.news[peer].ring_port for peer in ring]
        if self._delay_s:
            ports = self._cables.enter_context(relayed(self._delay_s, ports))
        for i, peer in enumerate(ring):
            after, before = ring[(i + 1) % len(ring)], ring[i - 1]
            address = f"tcp://127.0.0.1:{ports[ring.index(after)]}"
            order = StageConnect(address, self.news[after].key, self.news[before].key)
            self.supervisors[peer].send(self.plan.id, order)
        await self.until("linked")
        head = self.news[self.plan.head]
        self.entry.open(self.plan.id, f"tcp://127.0.0.1:{head.submit_port}", head.key)
        self.entry.serve(self.offer)

    async def hear(
        self, ids: Sequence[int], count: int, sampling: Sampling = GREEDY
    ) -> tuple[Heard, list[int]]:
        """An answer with its times, and its ids."""
        heard, answer = Heard(time.monotonic(), prompt_tokens=len(ids)), list[int]()
        async for given in self.answer(ids, count, sampling):
            if given.ids:
                heard.at_s.append(time.monotonic())
                answer += given.ids
            heard.finish = given.finish
        heard.tokens, heard.ended_s = len(answer), time.monotonic()
        return heard, answer

    async def together(self, prompts: Sequence[Sequence[int]], count: int) -> list[Heard]:
        """Answers at once."""
        told = await asyncio.gather(*(self.hear(prompt, count) for prompt in prompts))
        return [heard for heard, _ in told]

    async def close(self) -> None:
        """End everything."""
        await super().close()
        self._cables.close()


@asynccontextmanager
async def ringed(model: Model, plan: Plan, delay_s: float = 0.0) -> AsyncIterator[Pinned]:
    """A pinned ring that is linked and warm, gone afterwards."""
    ring = Pinned(plan, model.cores, delay_s)
    try:
        await ring.start(model.folder)
        await ring.hear(noise(0, 40), 8)  # maps the weights
        yield ring
    finally:
        await ring.close()


class Alone:
    """The whole model in one process, on one core at a time."""

    def __init__(self, model: Model, reference: Reference) -> None:
        self._model, self._reference, self._turn = model, reference, 0

    async def ask(self, ask: Ask) -> Took:
        """On the next core: all of them count alike."""
        core = self._model.cores[self._turn % len(self._model.cores)]
        self._turn += 1
        for task in os.listdir(f"/proc/{self._reference.pid}/task"):  # noqa: PTH208
            with suppress(ProcessLookupError):
                os.sched_setaffinity(int(task), {core})
        return await asyncio.to_thread(self._reference.ask, ask)


@contextmanager
def alone(model: Model) -> Iterator[Alone]:
    """The whole model, loaded and warm, gone afterwards."""
    plan = model.plan()
    cells = plan.split.kv_cells
    order = whole(plan, plan.head, slots=plan.split.slots, kv_cells=cells, gpu_layers=0)
    with Reference() as reference:
        reference.open(Open(order, str(model.folder), 1))
        reference.ask(Ask((noise(0, 40),), 8, 512))
        yield Alone(model, reference)


@dataclass
class Row:
    """A line of the table. one ÷ other; wanted: at least, or at most where `most`.

    unit: of both. notes: what else was seen.
    """

    name: str
    what: str
    wanted: float
    unit: str
    most: bool = False
    one: list[float] = field(default_factory=list)
    other: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Of the medians."""
        return median(self.one) / median(self.other)

    @property
    def holds(self) -> bool:
        """Whether it is as wanted."""
        return self.ratio <= self.wanted if self.most else self.ratio >= self.wanted

    def plain(self) -> dict[str, object]:
        """For JSON."""
        return {
            "name": self.name, "what": self.what, "ratio": self.ratio, "wanted": self.wanted,
            "at": "most" if self.most else "least", "holds": self.holds, "unit": self.unit,
            "one": self.one, "other": self.other, "notes": self.notes,
        }  # fmt: skip


async def in_turns(
    row: Row, turns: int, one: Callable[[int], Awaitable[float]],
    other: Callable[[int], Awaitable[float]],
) -> Row:  # fmt: skip
    """Fill the row; who begins changes from turn to turn. Both are given the turn's number."""
    for turn in range(1, turns + 1):
        for which in (one, other) if turn % 2 else (other, one):
            (row.one if which is one else row.other).append(await which(turn))
    return row
