"""Starts, watches and ends this peer's stages. A shell: it decides nothing about plans.

Each stage is a process of its own session, so that a key pressed in a terminal reaches only the
agent, and it ends by itself when the agent is gone, because its stdin ends then. Once it is ready
it is asked whether it is at work, again and again; one that hangs is ended, and said to have hung.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec
import psutil

from peer import children
from peer.planning.plan import Plan, PlanId, PlanState
from peer.protocol import (
    Message,
    StageAdmit,
    StageConnect,
    StageNews,
    StageOrder,
    StagePing,
    StageStop,
)
from peer.ring.endings import why_ended
from peer.ring.lease import ASK_S, Bounds, Hung, Lease, Ping, Pong
from peer.ring.vitals import Vitals

log = logging.getLogger("halka.stage")

Weights = Literal["auto", "exact", "small"]

_LINE_BYTES_MAX = 1 << 20
_STOP_S = 3.0  # for a stage to end cleanly; then it is killed; then it is left to the kernel
_TOLD = ("draft=none", "draft=dropped")  # lines of a stage's log that go into the agent's
_LAST_LINES = 80  # of a stage's log, for the reason of its end: a crash leaves a stack

_news: msgspec.json.Decoder[StageNews] = msgspec.json.Decoder(StageNews)


@dataclass(slots=True)
class _Stage:
    plan: Plan
    process: asyncio.subprocess.Process
    vitals: Vitals
    step_s: float
    on_gpu: bool
    computes: tuple[str, ...]  # phases in which it answers at once; an island loads when linking
    draft: str = ""  # folder of the model that drafts in it
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=_LAST_LINES))
    news: StageNews | None = None  # as the agent knows them
    lease: Lease | None = None  # from when it is ready
    loaded: asyncio.Event = field(default_factory=asyncio.Event)  # it is ready
    stopping: bool = False
    said: str = ""  # its own reason, where it gave one; or that it hung
    hung: bool = False
    tasks: list[asyncio.Task[None]] = field(default_factory=list)  # its news, its log, its lease


class Supervisor:
    """The stages of this peer, one for each plan that it takes part in."""

    def __init__(
        self,
        told: Callable[[PlanId, StageNews], None],
        exited: Callable[[PlanId, str], None],
        *,
        bounds: Bounds | None = None,
    ) -> None:
        """told: what a stage says, when it says something new. exited: its end, and why, once."""
        self._told, self._exited = told, exited
        self._bounds = bounds or Bounds()
        self._stages: dict[PlanId, _Stage] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._draft_fell: set[str] = set()  # folders of models whose stage crashed or hung
        self._closed = False

    async def start(
        self,
        state: PlanState,
        peer_id: str,
        folder: Path,
        *,
        threads: int,
        step_s: float,
        bind: str,
        admitted: tuple[str, ...],
        draft: Path | None = None,
        weights: Weights = "auto",
    ) -> None:
        """Start the stage of a plan. Its news and its end come by the callbacks. weights: the
        setting.

        draft: the folder of the model that drafts for it. One whose stage crashed or hung does not
        again while this agent runs: it may be the reason, and a draft must not end a plan.
        """
        plan = state.plan.id
        draft_folder = str(draft or "")
        if draft_folder in self._draft_fell:
            log.warning("draft=none plan=%s because=a stage crashed with it", plan)
            draft_folder = ""
        process = await asyncio.create_subprocess_exec(
            *children.command("peer.ring.stage"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=_LINE_BYTES_MAX,
            start_new_session=True,
            env=children.environment(),
        )
        log.info("stage=started plan=%s pid=%d", plan, process.pid)
        self.stop(plan)  # one that was begun while this one waited to begin
        on_gpu = _on_gpu(state.plan, peer_id)
        computes = ("linked",) if state.plan.island_of(peer_id) else ("ready", "linked")
        vitals = Vitals(process.pid)
        stage = _Stage(state.plan, process, vitals, step_s, on_gpu, computes, draft_folder)
        self._stages[plan] = stage
        stage.tasks = [
            asyncio.create_task(self._watch(stage), name=f"stage of plan {plan}"),
            asyncio.create_task(self._read_log(stage), name=f"log of plan {plan}"),
            asyncio.create_task(self._mind(stage), name=f"lease of plan {plan}"),
        ]
        self.send(
            plan,
            StageOrder(
                state, peer_id, str(folder), threads, step_s, bind, admitted, draft_folder, weights
            ),
        )
        if self._closed:  # while its process began
            self.stop(plan)
            await self.cleared()

    def send(self, plan: PlanId, message: StageOrder | StageConnect | StageAdmit) -> None:
        """Give the plan's stage an order; nothing happens where it has none."""
        if stage := self._stages.get(plan):
            _write(stage, message)

    def admit(self, keys: tuple[str, ...]) -> None:
        """Tell every stage which agents may submit from now on."""
        for plan in self._stages:
            self.send(plan, StageAdmit(keys))

    def pids(self) -> dict[PlanId, int]:
        """Process ids by plan."""
        return {plan: stage.process.pid for plan, stage in self._stages.items()}

    @property
    def holds(self) -> bool:
        """Whether any stage, one that is ending among them, has memory of this machine."""
        return bool(self._stages or self._ending)

    def stop(self, plan: PlanId) -> None:
        """Begin to end the plan's stage; `close` waits for it."""
        stage = self._stages.pop(plan, None)
        if stage is None:
            return
        stage.stopping = True
        self._soon(self._end(stage), f"end of plan {plan}")

    def _soon(self, work: Coroutine[None, None, None], name: str) -> None:
        """Do this beside everything else; `close` waits for it."""
        task = asyncio.create_task(work, name=name)
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def cleared(self) -> None:
        """Until stages that are ending have left this machine's memory: the next one needs it. They
        are killed where they do not end by themselves, so this takes some seconds at most."""
        if self._ending:
            await asyncio.wait(self._ending)

    async def close(self) -> None:
        """End every stage, also those that are still to begin."""
        self._closed = True
        for plan in list(self._stages):
            self.stop(plan)
        await asyncio.gather(*self._ending)

    async def _end(self, stage: _Stage) -> None:
        _write(stage, StageStop())
        if not await self._is_over(stage):
            log.warning("stage=killed plan=%s because=did_not_stop", stage.plan.id)
            await self._kill(stage)

    async def _is_over(self, stage: _Stage) -> bool:
        """Wait for its end, for a while."""
        done, _ = await asyncio.wait(stage.tasks[:1], timeout=_STOP_S)
        return bool(done)

    async def _kill(self, stage: _Stage) -> None:
        """End it, and what it started, at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(stage.process.pid, signal.SIGKILL)
        if not await self._is_over(stage):
            # In the middle of something that the kernel does not interrupt, as with a dead disk;
            # what watches it goes on, and is no reason to wait.
            log.error("stage=left plan=%s pid=%d", stage.plan.id, stage.process.pid)

    async def _watch(self, stage: _Stage) -> None:
        """Read its news until it ends; tell that."""
        process = stage.process
        assert process.stdout is not None
        while line := await _line(process.stdout):
            try:
                self._heard(stage, _news.decode(line))
            except msgspec.MsgspecError as error:
                log.warning("dropped=news plan=%s because=%s", stage.plan.id, error)
        code = await process.wait()
        if process.stdin is not None:
            process.stdin.close()
        await stage.tasks[1]  # the rest of its log
        stage.tasks[2].cancel()
        if stage.stopping:
            log.info("stage=stopped plan=%s", stage.plan.id)
            return
        killed = code == -signal.SIGKILL and not stage.said
        ran_out = killed and await asyncio.to_thread(stage.vitals.killed_for_memory)
        if stage.draft and (not stage.said or stage.hung):
            self._draft_fell.add(stage.draft)
        loading = stage.lease is None
        lines = list(stage.lines)
        why = stage.said or why_ended(code, lines, loading=loading, memory_ran_out=ran_out)
        log.error("stage=ended plan=%s code=%d because=%s", stage.plan.id, code, why)
        self._over(stage, why)

    def _over(self, stage: _Stage, why: str) -> None:
        """Tell its end, once; nobody asks after one that is being stopped."""
        if self._stages.get(stage.plan.id) is stage:
            del self._stages[stage.plan.id]
            self._exited(stage.plan.id, why)

    def _heard(self, stage: _Stage, news: StageNews) -> None:
        now = time.monotonic()
        if news.phase == "failed":
            stage.said = stage.said or news.why  # told with its exit, once
            return
        if stage.lease is None and news.phase in stage.computes:
            rows_max = stage.plan.split.batch_tokens
            stage.lease = Lease(now, rows_max, stage.step_s, stage.on_gpu, self._bounds)
            stage.loaded.set()
        if stage.lease is not None:
            timed = news.timed
            # One row of a batch takes no longer than a row that is alone.
            row_s = (timed.prefill_s or timed.decode_s) if timed else 0.0
            stage.lease.step(Pong(news.pong, row_s), now)
        news = msgspec.structs.replace(news, pong=0)
        if news != stage.news and not stage.stopping:
            stage.news = news
            self._told(stage.plan.id, news)

    async def _mind(self, stage: _Stage) -> None:
        """Look at it and ask it, until it ends or has to be ended."""
        while True:
            look = await asyncio.to_thread(stage.vitals.look)
            if stage.process.returncode is not None:  # and yet something has its pipes
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(stage.process.pid, signal.SIGKILL)
            elif look is not None and stage.lease is not None and not stage.stopping:
                for action in stage.lease.step(look, time.monotonic()):
                    match action:
                        case Ping(number):
                            _write(stage, StagePing(number))
                        case Hung(why):
                            return self._hung(stage, why)
            if stage.lease is None:  # what it had before it computes is to be known
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stage.loaded.wait(), ASK_S)
            else:
                await asyncio.sleep(max(0.01, stage.lease.deadline - time.monotonic()))

    def _hung(self, stage: _Stage, why: str) -> None:
        log.error("stage=hung plan=%s pid=%d because=%s", stage.plan.id, stage.process.pid, why)
        stage.said, stage.hung = why, True

        async def end() -> None:
            await self._kill(stage)
            self._over(stage, why)  # also where it could not be killed: the others go on

        self._soon(end(), f"end of plan {stage.plan.id}")

    async def _read_log(self, stage: _Stage) -> None:
        assert stage.process.stderr is not None
        while line := await _line(stage.process.stderr):
            text = line.decode("utf-8", "replace").rstrip()[:500]
            if text:
                stage.lines.append(text)
                # Nothing else says why a model that was wished for does not draft.
                level = logging.WARNING if text.startswith(_TOLD) else logging.DEBUG
                log.log(level, "plan=%s %s", stage.plan.id, text)


def _on_gpu(plan: Plan, peer_id: str) -> bool:
    """Whether the peer's windows are for a GPU, or for another process of an island: a stage may
    await both without computing."""
    windows = [plan.split.windows[index] for index in plan.windows_of(peer_id)]
    return any(
        window.island or (window.gpu_layers != 0 and window.backend != "fake") for window in windows
    )


async def _line(stream: asyncio.StreamReader) -> bytes:
    """One line; of a line that is too long, what is left after its beginning was thrown away."""
    while True:
        try:
            return await stream.readline()
        except ValueError:
            continue


def _write(stage: _Stage, message: Message) -> None:
    stdin = stage.process.stdin
    if stdin is not None and not stdin.is_closing():
        stdin.write(msgspec.json.encode(message) + b"\n")


def physical_cores() -> int:
    """Cores that compute: a second thread on the same core only waits for the first one's memory.

    Never more than this process may use: a container may have been given fewer.
    """
    physical = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        physical = min(physical, len(os.sched_getaffinity(0)))
    return max(1, physical)
