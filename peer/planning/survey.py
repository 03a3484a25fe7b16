"""What this machine can do: its profile, and the process that asks the engines. A shell.

Memory that is really available counts what the operating system could give and what the control
groups around this process allow, less a headroom, so that a stage neither swaps nor is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import platform
import shutil
import signal
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import msgspec
import psutil

from peer import children
from peer.config import Config
from peer.errors import BackendError, ModelError
from peer.planning.profile import EngineProfile, ModelShape, Profile

log = logging.getLogger("halka.planning")

MEASURE_S = 90.0  # a cold GPU driver takes tens of seconds; no engine takes longer
HEADROOM_SHARE = 0.10  # of what is free: stages' own Python, buffers, and everybody else
HEADROOM_LARGE_BYTES = 512 << 20  # at least, on a machine with
LARGE_BYTES = 4 << 30  # so much free
_LAST_LINES = 5  # of the process' own words, for the reason of its end


class Survey(msgspec.Struct, frozen=True):
    """What the engines said. shapes: by model folder. faults: by backend or folder, the reason."""

    engines: tuple[EngineProfile, ...] = ()
    shapes: dict[str, ModelShape] = {}
    faults: dict[str, str] = {}


def backends_of(config: Config) -> tuple[str, ...]:
    """Backends that this peer would run, best first. The fake one only where it is asked for."""
    if config.backend != "auto":
        return (config.backend,)
    return ("llama_cpp",) if find_spec("llama_cpp") else ()


async def measure(
    config: Config, folders: Sequence[Path] = (), *, timeout_s: float = MEASURE_S
) -> Survey:
    """Ask this peer's engines for their processors and the models' shapes.

    folders: of the store. Raises: BackendError where the process crashed or took too long.
    """
    names = await asyncio.to_thread(backends_of, config)
    if not names:
        why = "no engine is installed: pip install 'halka[llama]' in halka's environment"
        return Survey(faults={"auto": why})
    return await _ask(names, folders, timeout_s)


async def engines(config: Config) -> tuple[EngineProfile, ...]:
    """The processors that this peer's engines can use; () and a line in the log where none can."""
    try:
        survey = await measure(config)
    except BackendError as error:
        log.warning("engines=none because=%s", error)
        return ()
    for fault in survey.faults.values():
        log.warning("engines=missing because=%s", fault)
    return survey.engines


async def shape(backend: str, folder: Path) -> ModelShape:
    """What a planner must know of a model of the store. Raises ModelError, saying why not."""
    for last_try in (False, True):
        try:
            survey = await _ask((backend,), (folder,), MEASURE_S)
        except BackendError as error:
            if last_try:
                raise ModelError(f"{folder.name[:12]} cannot be measured: {error}") from error
            log.warning("measuring=again because=%s", error)
            continue
        break
    if (found := survey.shapes.get(str(folder))) is not None:
        return found
    raise ModelError("; ".join(survey.faults.values()) or "its engine gave no reason")


async def _ask(names: Sequence[str], folders: Sequence[Path], timeout_s: float) -> Survey:
    """One run of the measuring process. Raises BackendError."""
    order = msgspec.json.encode({"backends": names, "folders": [str(f) for f in folders]})
    try:
        process = await asyncio.create_subprocess_exec(
            *children.command("peer.planning.measure"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
            env=children.environment(),
        )
    except OSError as error:
        raise BackendError(f"measuring cannot be started: {error.strerror}") from None
    try:
        answer, said = await asyncio.wait_for(process.communicate(order), timeout_s)
    except TimeoutError:
        raise BackendError(
            f"{', '.join(names)} did not answer within {timeout_s:.0f} s: is the GPU driver hung? "
            "Restart the machine, or set `backend`"
        ) from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.communicate()
    if process.returncode:
        lines = said.decode("utf-8", "replace").strip().splitlines()[-_LAST_LINES:]
        code = process.returncode
        how = f"was ended by signal {-code}" if code < 0 else f"ended with {code}"
        raise BackendError(f"measuring {', '.join(names)} {how}: {' | '.join(lines) or 'no word'}")
    try:
        return msgspec.json.decode(answer, type=Survey)
    except msgspec.MsgspecError as error:
        raise BackendError(f"measuring {', '.join(names)} gave no answer: {error}") from error


def profile(config: Config, peer_id: str, measured: Sequence[EngineProfile]) -> Profile:
    """This machine, now. Blocks for milliseconds: call it from a thread where a loop must not wait.

    measured: the engines. The setting `memory` caps what they have free, too.
    """
    memory = psutil.virtual_memory()
    available = available_bytes(config.memory, int(memory.available), control_group_bytes())
    if config.memory:
        measured = [
            msgspec.structs.replace(e, memory_free_bytes=min(e.memory_free_bytes, config.memory))
            for e in measured
        ]
    return Profile(
        peer_id=peer_id,
        name=clean_name(platform.node()),
        os={"Darwin": "macos"}.get(platform.system(), platform.system().lower() or "unknown"),
        cores=cores(),
        memory_total_bytes=int(memory.total),
        memory_available_bytes=available,
        disk_free_bytes=_disk_free_bytes(config.home),
        engines=tuple(measured),
        spread_all=config.spread == "all",
        context_wanted=min(config.context, 1 << 31),
        model_wanted=config.model,
    )


def available_bytes(setting_bytes: int, free_bytes: int, group_bytes: int | None) -> int:
    """What stages may use, of what is free and what the control group leaves (None: no limit)."""
    free = free_bytes if group_bytes is None else min(free_bytes, group_bytes)
    headroom = int(free * HEADROOM_SHARE)
    if free >= LARGE_BYTES:
        headroom = max(headroom, HEADROOM_LARGE_BYTES)
    free = max(0, free - headroom)
    return min(free, setting_bytes) if setting_bytes else free


def cores() -> int:
    """Physical cores that this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    physical = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    return max(1, min(physical, allowed or physical))


def clean_name(text: str) -> str:
    """A machine's name, fit to be shown: printable, short, without its domain, never empty."""
    name = "".join(c for c in text.split(".")[0] if c.isprintable()).strip()
    return name[:64] or "unnamed"


def control_group_bytes(
    own: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """What the memory limits of the control groups around this process leave; None: no limit.

    Version 1 and 2, and both at once. Pages of files that the kernel could drop are not counted as
    used: mapped weights are such pages.
    """
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None  # not Linux
    left: list[int] = []
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers == "":
            names = ("memory.max", "memory.current", "inactive_file")
            roots = [mounted, mounted / "unified"]
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            roots = [mounted / "memory"]
        else:
            continue
        for root in roots:
            # In a container the path may be the host's; the container's own group is the root then.
            folder = root / path.strip("/")
            for group in (folder, *folder.parents):
                if group.is_relative_to(root):
                    left += _left_bytes(group, *names)
    return min(left, default=None)


def _left_bytes(group: Path, limit_file: str, usage_file: str, droppable: str) -> list[int]:
    """[bytes left] in one control group, [] where it has no limit."""
    try:
        limit = int((group / limit_file).read_text(encoding="utf-8"))
        used = int((group / usage_file).read_text(encoding="utf-8"))
        pairs = (line.split() for line in (group / "memory.stat").read_text().splitlines())
        stat = {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}
    except (OSError, ValueError):  # ValueError: "max"
        return []
    if limit >= 1 << 60:  # how version 1 says "none"
        return []
    return [max(0, limit - used + stat.get(droppable, 0))]


def _disk_free_bytes(home: Path) -> int:
    for folder in (home, *home.parents):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(folder).free
    return 0
