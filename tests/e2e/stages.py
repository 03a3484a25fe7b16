"""Stages of a fake model whose faults are switched on while they run, without agents or an entry.

A file names the fault (see `backends.fake_faults`); a plain client submits to the head, and is told
all that the head says.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import zmq
import zmq.asyncio

from peer.models.imports import import_gguf
from peer.models.manifest import Manifest
from peer.models.store import Store
from peer.planning.plan import Plan, PlanId, PlanState
from peer.protocol import (
    Sampling,
    StageConnect,
    StageNews,
    Submit,
    Tokens,
    Unanswered,
    decode_answering,
    encode,
)
from peer.ring.lease import Bounds
from peer.ring.sockets import as_client
from peer.ring.supervisor import Supervisor
from tests import fake_models
from tests.conftest import Until
from tests.e2e.rings import plan_of


class Switch:
    """The file that switches a fault on, in the window that begins at the layer."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = path
        monkeypatch.setenv("HALKA_FAKE_FAULT", str(path))

    def on(self, kind: str, first: int = 4, token: int | None = None) -> None:
        words = [kind, str(first), *([] if token is None else [str(token)])]
        ready = self.path.with_suffix(".new")
        ready.write_text(" ".join(words))
        ready.replace(self.path)

    def off(self) -> None:
        self.path.unlink()


class Model:
    """A fake model in a store; `file` is the oracle."""

    def __init__(self, home: Path) -> None:
        self.file = fake_models.write(home / "fake.gguf", end_every=0)
        self.store = Store(home)
        self.manifest: Manifest = import_gguf(self.file, self.store)
        self.folder = self.store.folder(self.manifest.digest)

    def plan(self, *bounds: int) -> Plan:
        return plan_of(self.store, self.manifest, bounds, "fake", context=2048)


class Stages:
    """The stages of one plan, told of by their supervisors, and a client of its head."""

    def __init__(self, plan: Plan, bounds: Bounds | None = None) -> None:
        self.plan = plan
        self.news: dict[str, StageNews] = {}
        self.exits: dict[str, tuple[str, float]] = {}  # why, and when
        self.supervisors = {peer: self._supervisor(peer, bounds) for peer in plan.ring}
        self._public, self._secret = zmq.curve_keypair()
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._asked = 0

    def _supervisor(self, peer: str, bounds: Bounds | None) -> Supervisor:
        def told(plan: PlanId, news: StageNews) -> None:
            assert news != self.news.get(peer), "told twice"
            self.news[peer] = news

        def exited(plan: PlanId, why: str) -> None:
            assert peer not in self.exits, "told twice"
            self.exits[peer] = (why, time.monotonic())

        return Supervisor(told, exited, bounds=bounds)

    async def begin(self, peer: str, folder: Path) -> None:
        await self.supervisors[peer].start(
            PlanState(self.plan, "loading"), peer, folder, threads=1, step_s=60.0,
            bind="127.0.0.1", admitted=(self._public.decode(),),
        )  # fmt: skip

    async def start(self, folder: Path, until: Until) -> None:
        for peer in self.plan.ring:
            await self.begin(peer, folder)
        await until(self._all("ready"), 30, "all are ready")
        ring = self.plan.ring
        for i, peer in enumerate(ring):
            after, before = self.news[ring[(i + 1) % len(ring)]], self.news[ring[i - 1]]
            address = f"tcp://127.0.0.1:{after.ring_port}"
            self.supervisors[peer].send(self.plan.id, StageConnect(address, after.key, before.key))
        await until(self._all("linked"), 30, "all are linked")
        head = self.news[self.plan.head]
        as_client(self._socket, head.key.encode(), self._public, self._secret, 1 << 20)
        self._socket.connect(f"tcp://127.0.0.1:{head.submit_port}")

    def _all(self, phase: str) -> Callable[[], bool]:
        def reached() -> bool:
            assert not self.exits, self.exits
            return all(p in self.news and self.news[p].phase == phase for p in self.plan.ring)

        return reached

    def pid(self, peer: str) -> int:
        return self.supervisors[peer].pids()[self.plan.id]

    async def submit(self, ids: list[int], count: int) -> str:
        """Ask; the answer's name."""
        self._asked += 1
        name = f"answer-{self._asked}"
        data = np.array(ids, np.int32).tobytes()
        submit = Submit(name, self.plan.id, data, Sampling(temperature=0.0), count)
        await self._socket.send(encode(submit))
        return name

    async def said(self) -> Tokens | Unanswered:
        """What the head says next."""
        async with asyncio.timeout(30):
            found = decode_answering(await self._socket.recv())
        assert isinstance(found, Tokens | Unanswered)
        return found

    async def tokens(self, ids: list[int], count: int) -> list[int]:
        """A whole answer, nothing else being asked. Fails where it is refused."""
        name, found = await self.submit(ids, count), list[int]()
        while True:
            match await self.said():
                case Tokens(request=request, ids=more, finish=finish) if request == name:
                    found += more
                    if finish:
                        return found
                case other:
                    raise AssertionError(other)

    async def ended(self, peer: str, within_s: float, until: Until) -> str:
        """Wait for a stage's end; why."""
        await until(lambda: peer in self.exits, within_s, "its end is told")
        return self.exits[peer][0]

    async def close(self) -> None:
        self._socket.close(0)
        self._context.term()
        for supervisor in self.supervisors.values():
            await supervisor.close()


@asynccontextmanager
async def stages(
    model: Model, until: Until, *cuts: int, bounds: Bounds | None = None
) -> AsyncIterator[Stages]:
    found = Stages(model.plan(*cuts), bounds)
    try:
        await found.start(model.folder, until)
        yield found
    finally:
        await found.close()
