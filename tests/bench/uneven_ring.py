"""Rings of real stage processes across uneven peers, without agents, and how fast they answer."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import zmq

from peer import children
from peer.planning.plan import Plan, PlanId, PlanState
from peer.protocol import (
    Message,
    Sampling,
    StageAdmit,
    StageConnect,
    StageNews,
    StageOrder,
    StageStop,
)
from peer.ring.entry import Entry
from peer.ring.generation import Offer, Patience
from tests.bench.pace import Pace, is_even, quick
from tests.bench.uneven import House, used

STARTED_S = 60.0  # for a stage to load and to be linked
STOPPED_S = 5.0
STEP_S = 30.0  # for a step to come around
LOOK_S = 0.5  # between looks at the pace
LINE_BYTES_MAX = 1 << 20
GREEDY = Sampling(temperature=0.0)


@dataclass(frozen=True)
class Answer:
    """One answer: its tokens and its times. others: cores that were busy for somebody else; pace:
    of the machine, to the reference's (more is slower)."""

    ids: tuple[int, ...]
    ttft_s: float
    tpot_s: float
    others: float
    pace: float = 1.0


class _Stage:
    """One stage process inside of a peer, and what it said last."""

    def __init__(self, process: asyncio.subprocess.Process, changed: asyncio.Event) -> None:
        self.process, self.news = process, StageNews("loading")
        self._changed = changed
        self._reading = asyncio.create_task(self._read())

    @property
    def pid(self) -> int:
        """Of the process."""
        return self.process.pid

    def send(self, message: Message) -> None:
        """An order."""
        assert self.process.stdin is not None
        self.process.stdin.write(msgspec.json.encode(message) + b"\n")

    async def _read(self) -> None:
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            self.news = msgspec.json.decode(line, type=StageNews)
            self._changed.set()
        code = await self.process.wait()
        if code or self.news.phase == "failed":
            self.news = msgspec.structs.replace(
                self.news, phase="failed", why=self.news.why or f"it ended with {code}"
            )
        self._changed.set()

    async def end(self) -> None:
        """Ask it to end, and end it."""
        with suppress(ConnectionError):
            self.send(StageStop())
        try:
            await asyncio.wait_for(asyncio.shield(self._reading), STOPPED_S)
        except TimeoutError:
            self.process.kill()
            await self._reading
        assert self.process.stdin is not None
        self.process.stdin.close()


@dataclass
class Ring:
    """The stages of one plan. names: peers of the house by peer id."""

    plan: Plan
    names: dict[str, str]
    stages: dict[str, _Stage] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def pids(self) -> list[int]:
        """Of all stages."""
        return [stage.pid for stage in self.stages.values()]

    async def until(self, phase: str) -> None:
        """Wait until every stage is in the phase."""
        deadline = time.monotonic() + STARTED_S
        while any(stage.news.phase != phase for stage in self.stages.values()):
            for peer, stage in self.stages.items():
                assert stage.news.phase != "failed", f"{self.names[peer]}: {stage.news.why}"
            self.changed.clear()
            await asyncio.wait_for(self.changed.wait(), max(0.1, deadline - time.monotonic()))


class Rings:
    """Rings on the peers of a house, several at once, and the client that asks them in turn.

    Use it inside of `House.asking`: its sockets are made where the calling thread is.
    """

    def __init__(self, house: House, folder: Path, pace: Pace | None, patience_s: float) -> None:
        self._house, self._folder = house, folder
        self._pace, self._patience_s = pace, patience_s
        public, secret = zmq.curve_keypair()
        self._key = public.decode()
        self._entry = Entry(public, secret, Patience(silence_s=STEP_S))
        self._rings: list[Ring] = []

    async def start(self, plan: Plan, names: dict[str, str], threads: int = 1) -> Ring:
        """Load and link. Every plan needs a number of its own."""
        ring = Ring(plan, names)
        self._rings.append(ring)
        for peer in plan.ring:
            process = await asyncio.create_subprocess_exec(
                *self._house.module(names[peer], "peer.ring.stage"),
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL, limit=LINE_BYTES_MAX,
                env=children.environment(),
            )  # fmt: skip
            stage = ring.stages[peer] = _Stage(process, ring.changed)
            stage.send(
                StageOrder(
                    PlanState(plan, "loading"), peer, str(self._folder), threads,
                    step_s=STEP_S, admitted=(self._key,),
                )
            )  # fmt: skip
        await ring.until("ready")
        order = plan.ring
        for i, peer in enumerate(order):
            after = order[(i + 1) % len(order)]
            ring.stages[peer].send(
                StageConnect(
                    self._address(ring, after, ring.stages[after].news.ring_port),
                    ring.stages[after].news.key,
                    ring.stages[order[i - 1]].news.key,
                )
            )
        await ring.until("linked")
        head = ring.stages[plan.head]
        head.send(StageAdmit((self._key,)))
        self._entry.open(
            plan.id, self._address(ring, plan.head, head.news.submit_port), head.news.key
        )
        return ring

    def _address(self, ring: Ring, peer: str, port: int) -> str:
        return f"tcp://{self._house.address(ring.names[peer])}:{port}"

    async def ask(self, ring: Ring, prompt: Sequence[int], tokens: int) -> Answer:
        """One greedy answer at the reference's pace, before and after: waited for and tried again
        while there is patience, then as it comes."""
        while True:
            await self._even()
            answer = await self.once(ring, prompt, tokens)
            if self._pace is None:
                return answer
            answer = replace(answer, pace=self._pace.ratio())
            if is_even(answer.pace) or self._patience_s <= 0:
                return answer
            self._patience_s -= answer.ttft_s + answer.tpot_s * tokens

    async def _even(self) -> None:
        """Wait until the machine has the reference's pace."""
        while self._pace and self._patience_s > 0 and not is_even(self._pace.ratio()):
            await asyncio.sleep(LOOK_S)
            self._patience_s -= LOOK_S

    def _pids(self) -> list[int]:
        return [pid for ring in self._rings for pid in ring.pids]

    async def once(self, ring: Ring, prompt: Sequence[int], tokens: int) -> Answer:
        """One greedy answer, whatever others do."""
        pids = self._pids()
        plan, digest = ring.plan, ring.plan.shape.digest
        self._entry.serve(Offer(plan.id, digest, plan.split.context))
        ids: list[int] = []
        times: list[float] = []
        before, began = used(pids), time.perf_counter()
        async for given in self._entry.answer(tuple(prompt), GREEDY, tokens, (), digest):
            if given.ids:
                ids += given.ids
                times.append(time.perf_counter())
        others = used(pids).since(before)
        gaps = max(1, len(ids) - 1)
        return Answer(tuple(ids), times[0] - began, (times[-1] - times[0]) / gaps, others)

    def ring(self, plan: PlanId) -> Ring:
        """The one that runs this plan."""
        return next(ring for ring in self._rings if ring.plan.id == plan)

    async def end(self, ring: Ring) -> None:
        """End a ring."""
        self._rings.remove(ring)
        self._entry.end(ring.plan.id, "it was measured")
        await asyncio.gather(*(stage.end() for stage in ring.stages.values()))

    async def close(self) -> None:
        """End everything."""
        for ring in list(self._rings):
            await self.end(ring)
        await self._entry.close()


@asynccontextmanager
async def rings(
    house: House, folder: Path, pace: Pace | None = None, patience_s: float = 0.0
) -> AsyncIterator[Rings]:
    """Rings on a house, gone afterwards. folder: the model's, in a store. patience_s: how long to
    wait for the reference's pace, all answers together."""
    made = Rings(house, folder, pace, patience_s)
    try:
        yield made
    finally:
        await made.close()


@dataclass(frozen=True)
class Measured:
    """Answers together. tpot_s: the median of the faster half: what else runs on this machine only
    makes them slower. spread: (largest - smallest) / median. others, pace: medians."""

    tpot_s: float
    median_s: float
    spread: float
    others: float
    pace: float
    answers: int


def summed(answers: Sequence[Answer]) -> Measured:
    """What answers of one ring say together."""
    times = [answer.tpot_s for answer in answers]
    median = statistics.median(times)
    others = statistics.median(answer.others for answer in answers)
    pace = statistics.median(answer.pace for answer in answers)
    spread = (max(times) - min(times)) / median
    return Measured(quick(times), median, spread, others, pace, len(times))
