"""A ring of real stage processes on loopback, without agents: plan, stages, links, entry."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import zmq

from peer.meeting import connecting
from peer.models.manifest import Manifest
from peer.models.parts import shape_of
from peer.models.store import Store
from peer.planning.duty_events import ConnectStage
from peer.planning.plan import Plan, PlanId, PlanState, PlanWindow, Split, StageLink
from peer.protocol import Sampling, StageNews
from peer.ring.entry import Entry
from peer.ring.generation import Give, Offer, Patience
from peer.ring.lease import Bounds
from peer.ring.supervisor import Supervisor
from tests.plans import PEERS


def plan_of(
    store: Store, manifest: Manifest, bounds: Sequence[int], backend: str, **changes: int
) -> Plan:
    """A plan for a stored model, cut at the bounds; round after round over as many peers."""
    import backends

    engine = backends.load(backend)
    shape = shape_of(store.folder(manifest.digest), engine.cuts, engine.kv_bytes_per_cell)
    peers = changes.pop("peers", len(bounds) + 1)
    edges = (0, *bounds, shape.layers)
    windows = tuple(
        PlanWindow(PEERS[i % peers], edges[i], edges[i + 1], backend, gpu_layers=0)
        for i in range(len(edges) - 1)
    )
    values = {"context": 2048, "kv_cells": 4096, "slots": 8, "batch_tokens": 512} | changes
    return Plan(PlanId(1, 1), PEERS[0], shape, Split(windows, **values))  # type: ignore[arg-type]


class Ring:
    """The stages of one plan, each told of by its own supervisor, and an entry to its head.

    No other plan ever comes: an answer that waits for one soon ends with the reason.
    """

    def __init__(self, plan: Plan, bounds: Bounds | None = None) -> None:
        self.plan, self._bounds = plan, bounds
        self.news: dict[str, StageNews] = {}
        self.exits: dict[str, str] = {}
        self.changed = asyncio.Event()
        self.supervisors = {peer: self._supervisor(peer) for peer in plan.peers}
        public, secret = zmq.curve_keypair()
        self.key = public.decode()
        self.entry = Entry(public, secret, Patience(silence_s=20.0, plan_s=1.0))

    def _supervisor(self, peer: str) -> Supervisor:
        def told(plan: PlanId, news: StageNews) -> None:
            self.news[peer] = news
            self.changed.set()

        def exited(plan: PlanId, why: str) -> None:
            self.exits[peer] = why
            self.entry.end(plan, why)
            self.changed.set()

        return Supervisor(told, exited, bounds=self._bounds)

    async def until(self, *phases: str) -> None:
        """Wait until every stage is in one of the phases."""
        while not all(self.news.get(p) and self.news[p].phase in phases for p in self.plan.peers):
            assert not self.exits, self.exits
            self.changed.clear()
            await asyncio.wait_for(self.changed.wait(), 60)

    async def idle(self) -> None:
        """Wait until the head says that no answer runs."""
        while self.news[self.plan.head].active:
            self.changed.clear()
            await asyncio.wait_for(self.changed.wait(), 20)

    async def start(self, folder: Path, threads: int = 1, draft: Path | None = None) -> None:
        """Load and link. draft: the folder of a model that drafts, at the head."""
        for peer, supervisor in self.supervisors.items():
            mine = folder
            if peer not in self.plan.ring:  # it loads while others do, each from its own store
                mine = folder.parent.parent / peer / folder.name
                await asyncio.to_thread(shutil.copytree, folder, mine, dirs_exist_ok=True)
            await supervisor.start(
                PlanState(self.plan, "loading"), peer, mine,
                threads=threads, step_s=20.0, bind="127.0.0.1", admitted=(self.key,), draft=draft,
            )  # fmt: skip
        await self.until("ready")
        plan = self.plan
        for peer in plan.peers:
            following, before = self.link(plan.after(peer)), self.link(plan.before(peer))
            island = tuple(self.link(other) for other in plan.island_of(peer))
            action = ConnectStage(plan.id, following, before.key, island)
            order = connecting(action, peer, lambda _: "127.0.0.1", lambda _: "127.0.0.1")
            self.supervisors[peer].send(plan.id, order)
        await self.until("linked")
        head = self.news[self.plan.head]
        self.entry.open(self.plan.id, f"tcp://127.0.0.1:{head.submit_port}", head.key)
        self.entry.serve(self.offer)

    @property
    def offer(self) -> Offer:
        """The plan, as answers want it."""
        return Offer(self.plan.id, self.plan.shape.digest, self.plan.split.context)

    def link(self, peer: str) -> StageLink:
        """Where a stage listens."""
        news = self.news[peer]
        return StageLink(peer, news.ring_port, news.key, news.submit_port, news.island_port)

    def answer(
        self, ids: Sequence[int], count: int, sampling: Sampling | None = None
    ) -> AsyncGenerator[Give, None]:
        """The answer as it comes; greedy unless told otherwise."""
        chosen = sampling or Sampling(temperature=0.0)
        return self.entry.answer(tuple(ids), chosen, count, (), self.plan.shape.digest)

    async def tokens(
        self,
        ids: Sequence[int],
        count: int,
        sampling: Sampling | None = None,
        ends: tuple[int, ...] = (),
    ) -> list[int]:
        """The whole answer; greedy unless told otherwise."""
        chosen = sampling or Sampling(temperature=0.0)
        found: list[int] = []
        digest = self.plan.shape.digest
        async for given in self.entry.answer(tuple(ids), chosen, count, ends, digest):
            found += given.ids
        return found

    async def close(self) -> None:
        """End everything."""
        await self.entry.close()
        for supervisor in self.supervisors.values():
            await supervisor.close()


@asynccontextmanager
async def running(
    plan: Plan, folder: Path, threads: int = 1, bounds: Bounds | None = None
) -> AsyncIterator[Ring]:
    """A ring that is linked, and gone afterwards."""
    ring = Ring(plan, bounds)
    try:
        await ring.start(folder, threads)
        yield ring
    finally:
        await ring.close()
