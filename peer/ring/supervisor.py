"""Starts, watches and ends this peer's stages. A shell: it decides nothing about plans.

Each stage is a process of its own session, so that a key pressed in a terminal reaches only the
agent, and it ends by itself when the agent is gone, because its stdin ends then.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import psutil

from peer import children
from peer.planning.plan import PlanId, PlanState
from peer.protocol import Message, StageAdmit, StageConnect, StageNews, StageOrder, StageStop

log = logging.getLogger("halka.stage")

_LINE_BYTES_MAX = 1 << 20
_STOP_S = 3.0  # for a stage to end cleanly; then it is killed
_LAST_LINES = 12  # of a stage's log, for the reason of its end

_news: msgspec.json.Decoder[StageNews] = msgspec.json.Decoder(StageNews)


@dataclass(slots=True)
class _Stage:
    plan: PlanId
    process: asyncio.subprocess.Process
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=_LAST_LINES))
    stopping: bool = False
    said: str = ""  # its own reason, where it gave one
    tasks: list[asyncio.Task[None]] = field(default_factory=list)


class Supervisor:
    """The stages of this peer, one for each plan that it takes part in."""

    def __init__(
        self,
        told: Callable[[PlanId, StageNews], None],
        exited: Callable[[PlanId, str], None],
    ) -> None:
        self._told, self._exited = told, exited
        self._stages: dict[PlanId, _Stage] = {}
        self._ending: set[asyncio.Task[None]] = set()

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
    ) -> None:
        """Start the stage of a plan. Its news and its end come by the callbacks."""
        plan = state.plan.id
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
        stage = self._stages[plan] = _Stage(plan, process)
        stage.tasks = [
            asyncio.create_task(self._watch(stage), name=f"stage of plan {plan}"),
            asyncio.create_task(self._read_log(stage), name=f"log of plan {plan}"),
        ]
        self.send(
            plan,
            StageOrder(
                state, peer_id, str(folder), threads, step_s=step_s, bind=bind, admitted=admitted
            ),
        )

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
        task = asyncio.create_task(self._end(stage), name=f"end of plan {plan}")
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def close(self) -> None:
        """End every stage."""
        for plan in list(self._stages):
            self.stop(plan)
        await asyncio.gather(*self._ending)

    async def _end(self, stage: _Stage) -> None:
        _write(stage, StageStop())
        process = stage.process
        try:
            await asyncio.wait_for(asyncio.shield(stage.tasks[0]), _STOP_S)
        except TimeoutError:
            log.warning("stage=killed plan=%s because=did_not_stop", stage.plan)
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        await asyncio.gather(*stage.tasks)

    async def _watch(self, stage: _Stage) -> None:
        assert stage.process.stdout is not None
        while line := await _line(stage.process.stdout):
            try:
                news = _news.decode(line)
            except msgspec.MsgspecError as error:
                log.warning("dropped=news plan=%s because=%s", stage.plan, error)
                continue
            if news.phase == "failed":
                stage.said = news.why  # told with its exit, once
            elif not stage.stopping:
                self._told(stage.plan, news)
        code = await stage.process.wait()
        if stage.process.stdin is not None:
            stage.process.stdin.close()
        if stage.stopping:
            log.info("stage=stopped plan=%s", stage.plan)
            return
        self._stages.pop(stage.plan, None)
        await stage.tasks[1]  # the rest of its log
        why = stage.said or _cause(code, stage.lines)
        log.error("stage=ended plan=%s code=%d because=%s", stage.plan, code, why)
        self._exited(stage.plan, why)

    async def _read_log(self, stage: _Stage) -> None:
        assert stage.process.stderr is not None
        while line := await _line(stage.process.stderr):
            text = line.decode("utf-8", "replace").rstrip()[:500]
            if text:
                stage.lines.append(text)
                log.debug("plan=%s %s", stage.plan, text)


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


def _cause(code: int, lines: deque[str]) -> str:
    """Why a stage ended, from its exit code and its last words."""
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        why = f"its process was ended by {name}"
        if -code == signal.SIGKILL:
            why += " (killed by hand, or out of memory)"
    else:
        why = f"its process ended with code {code}"
    return why + (f"; last words: {lines[-1]}" if lines else "")


def physical_cores() -> int:
    """Cores that compute: a second thread on the same core only waits for the first one's memory.

    Never more than this process may use: a container may have been given fewer.
    """
    physical = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        physical = min(physical, len(os.sched_getaffinity(0)))
    return max(1, physical)
