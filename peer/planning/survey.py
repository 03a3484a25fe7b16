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
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import psutil

from peer.config import SPARE_AUTO, Config
from peer.errors import BackendError, ModelError
from peer.planning import gpus, ordered, proving
from peer.planning.groups import control_group_bytes, processors, share
from peer.planning.profile import (
    PLAIN_ENGINE,
    SPEEDS_MAX,
    EngineProfile,
    ModelShape,
    Profile,
    Speed,
)

__all__ = [
    "Survey", "available_bytes", "backends_of", "clean_name", "control_group_bytes", "cores",
    "disk_free_bytes", "disk_read_bytes_per_s", "engines", "measure", "no_engine", "profile",
    "shape", "spare_bytes", "speeds", "teller", "threads", "with_engines",
]  # fmt: skip

log = logging.getLogger("halka.planning")

MEASURE_S = 90.0  # a cold GPU driver takes tens of seconds; no engine takes longer
SPEEDS_S = 180.0  # and then computes for up to 30 on each kind of processor
DISK_S = 30.0
HEADROOM_SHARE = 0.10  # of what is free: stages' own Python, buffers, and everybody else
HEADROOM_LARGE_BYTES = 512 << 20  # at least, on a machine with
LARGE_BYTES = 4 << 30  # so much free
SPARE_FREE_BYTES = 4 << 30  # of the disk, left to its owner where nothing is set
SPARE_FREE_LEAST_BYTES = 1 << 30  # and where it is: a disk without room breaks more than halka
SPARE_STEP_BYTES = 64 << 20
_LAST_LINES = 5  # of the process' own words, for the reason of its end


class Survey(msgspec.Struct, frozen=True):
    """What the engines said. shapes: by model folder.

    faults: by backend, folder or kind of processor, the reason.
    """

    engines: tuple[EngineProfile, ...] = ()
    shapes: dict[str, ModelShape] = {}
    faults: dict[str, str] = {}
    speeds: tuple[Speed, ...] = ()
    disk_read_bytes_per_s: float = 0.0


def backends_of(config: Config, system: str = sys.platform) -> tuple[str, ...]:
    """Backends that this peer would run, best first. The fake one only where it is asked for."""
    if config.backend != "auto":
        return (config.backend,)
    libraries = {"mlx": ("mlx", "mlx_lm"), "llama_cpp": ("llama_cpp",)}
    if system != "darwin":
        del libraries["mlx"]  # there it computes on the processor, for tests
    return tuple(name for name, needed in libraries.items() if all(map(find_spec, needed)))


def no_engine(system: str = sys.platform) -> str:
    """That nothing is installed, and what to install on this system."""
    return f"no engine is installed: {with_engines(system)} in halka's environment"


def with_engines(system: str = sys.platform, backend: str = "auto") -> str:
    """The command that installs halka with the engines for this system and setting `backend`."""
    mlx = backend == "mlx" or (backend == "auto" and system == "darwin")
    return f"pip install 'halka[{'llama,mlx' if mlx else 'llama'}]'"


def teller(backends: Sequence[str]) -> str:
    """Of a peer's backends that which tells what a planner must know of a model."""
    return PLAIN_ENGINE if PLAIN_ENGINE in backends else backends[0]


async def measure(
    config: Config, folders: Sequence[Path] = (), *, timeout_s: float = MEASURE_S
) -> Survey:
    """Ask this peer's engines for their processors and the models' shapes.

    folders: of the store. Raises: BackendError where the process crashed or took too long.
    """
    names = await asyncio.to_thread(backends_of, config)
    if not names:
        return Survey(faults={"auto": no_engine()})
    return await _ask(names, _folders(names, folders), timeout_s)


async def engines(
    config: Config, refused: dict[str, str] | None = None
) -> tuple[EngineProfile, ...]:
    """The processors that this peer's engines can use, those of the engine that it prefers first:
    all that this peer plans and measures with. () and a line in the log where none can.

    refused: becomes why engines that are here are not used, by backend: see `proving.trusted`.
    """
    try:
        survey = await measure(config)
    except BackendError as error:
        log.warning("engines=none because=%s", error)
        return ()
    for fault in survey.faults.values():
        log.warning("engines=missing because=%s", fault)
    return await proving.trusted(config, survey.engines, refused)


async def shape(backend: str, folder: Path) -> ModelShape:
    """What a planner must know of a model of the store. Raises ModelError, saying why not."""
    for last_try in (False, True):
        try:
            survey = await _ask((backend,), _folders((backend,), (folder,)), MEASURE_S)
        except BackendError as error:
            if last_try:
                raise ModelError(f"{folder.name[:12]} cannot be measured: {error}") from error
            log.warning("measuring=again because=%s", error)
            continue
        break
    if (found := survey.shapes.get(str(folder))) is not None:
        return found
    raise ModelError("; ".join(survey.faults.values()) or "its engine gave no reason")


async def speeds(
    config: Config, folder: Path, shape: ModelShape, backend: str = ""
) -> tuple[Speed, ...]:
    """How fast this peer's processors run a model, measured on random layers. Takes seconds.

    folder: of the store, with its manifest and head.gguf. backend: to measure; "": the first of
    this peer's that can run the model. Cancelling ends the process at once.
    Raises: BackendError where nothing could be measured, with the reason.
    """
    backends = await asyncio.to_thread(backends_of, config)
    if not backends:
        raise BackendError(no_engine())
    names = (backend or shape.runner(backends, config.weights) or backends[0],)
    speed = await asyncio.to_thread(_speed_order, config, folder)
    survey = await _ask(names, {"backends": names, "speed": speed}, SPEEDS_S)
    kinds = max(shape.kinds, default=0) + 1
    found = tuple(
        s
        for s in survey.speeds
        if s.digest == shape.digest and len(s.decode_s) == len(s.prefill_s) == kinds
    )
    for kind, fault in survey.faults.items():
        log.warning("measured=no model=%s on=%s because=%s", shape.model, kind, fault)
    if not found:
        why = "; ".join(survey.faults.values()) or "its engine gave no reason"
        raise BackendError(f"the speed of {shape.model} cannot be measured: {why}")
    return found


def _speed_order(config: Config, folder: Path) -> dict[str, Any]:
    free = int(psutil.virtual_memory().available)
    return {
        "folder": str(folder),
        "threads": threads(config),
        "cpu_share": share(threads(config), processors()),
        "weights": config.weights,
        "memory_bytes": available_bytes(config.memory, free, control_group_bytes()),
    }


async def disk_read_bytes_per_s(home: Path) -> float:
    """How fast the disk under `home` reads; 0.0 (and why, in the log) where it cannot be told."""
    try:
        return (await _ask((), {"home": str(home)}, DISK_S)).disk_read_bytes_per_s
    except BackendError as error:
        log.warning("disk=unmeasured because=%s", error)
        return 0.0


def _folders(names: Sequence[str], folders: Sequence[Path]) -> dict[str, Any]:
    """The order that asks for processors and shapes."""
    return {"backends": names, "folders": [str(folder) for folder in folders]}


async def _ask(names: Sequence[str], what: dict[str, Any], timeout_s: float) -> Survey:
    """One run of the measuring process. names: for errors. Raises BackendError."""
    asked = ", ".join(names) or "the disk"
    order = msgspec.json.encode(what)
    try:
        answer = await ordered.ask("peer.planning.measure", order, timeout_s, _LAST_LINES)
    except BackendError as error:
        late = "did not answer" in str(error)
        mend = ": is the GPU driver hung? Restart the machine, or set `backend`" if late else ""
        raise BackendError(f"measuring {asked} {error}{mend}") from None
    try:
        return msgspec.json.decode(answer, type=Survey)
    except msgspec.MsgspecError as error:
        raise BackendError(f"measuring {asked} gave no answer: {error}") from error


def profile(
    config: Config,
    peer_id: str,
    measured: Sequence[EngineProfile],
    *,
    disk_read_bytes_per_s: float = 0.0,
    speeds: Sequence[Speed] = (),
) -> Profile:
    """This machine, now. Blocks for milliseconds: call it from a thread where a loop must not wait.

    measured: the engines; what NVIDIA cards among them have free is asked anew. The setting
    `memory` caps what they have free, too.
    """
    memory = psutil.virtual_memory()
    if any(engine.kind == "cuda" for engine in measured):
        measured = gpus.refreshed(measured, gpus.cards()[0])
    available = available_bytes(config.memory, int(memory.available), control_group_bytes())
    free_bytes = disk_free_bytes(config.home)
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
        disk_free_bytes=free_bytes,
        spare_bytes=spare_bytes(config.spare, free_bytes),
        engines=tuple(measured),
        spread_all=config.spread == "all",
        context_wanted=min(config.context, 1 << 31),
        model_wanted=config.model,
        draft_wanted=config.draft,
        objective=config.objective,
        kv_type=config.kv_type,
        flash=config.flash,
        speculation=config.speculation,
        weights=config.weights,
        islands=config.islands,
        unified_memory=_unified(measured, sys.platform, platform.machine()),
        threads=threads(config),
        cpu_share=share(threads(config), processors()),
        disk_read_bytes_per_s=disk_read_bytes_per_s,
        speeds=tuple(speeds)[-SPEEDS_MAX:],
    )


def threads(config: Config) -> int:
    """Of a stage, and of measuring: as set, or one for each physical core."""
    return config.threads or cores()


def _unified(engines: Sequence[EngineProfile], system: str, machine: str) -> bool:
    """Whether what a GPU holds is taken from the machine's own memory."""
    if (system, machine) == ("darwin", "arm64"):
        return True
    cards = [engine for engine in engines if engine.kind != "cpu"]
    return bool(cards) and all(engine.integrated for engine in cards)


def available_bytes(setting_bytes: int, free_bytes: int, group_bytes: int | None) -> int:
    """What stages may use, of what is free and what the control group leaves (None: no limit)."""
    free = free_bytes if group_bytes is None else min(free_bytes, group_bytes)
    headroom = int(free * HEADROOM_SHARE)
    if free >= LARGE_BYTES:
        headroom = max(headroom, HEADROOM_LARGE_BYTES)
    free = max(0, free - headroom)
    return min(free, setting_bytes) if setting_bytes else free


def spare_bytes(setting_bytes: int, free_bytes: int, held_bytes: int = 0) -> int:
    """What of the disk may be used for spare parts, as `Profile.spare_bytes` tells it.

    held_bytes: of spare parts that are there already. They are counted in, so that the offer stays
    the same while they arrive: half of what would be free without them, or what is set; in both
    cases only as far as something stays free. In whole steps, for small files come and go.
    """
    without = free_bytes + held_bytes
    if setting_bytes == SPARE_AUTO:
        offered = min(without // 2, without - SPARE_FREE_BYTES)
    else:
        offered = min(setting_bytes, without - SPARE_FREE_LEAST_BYTES)
    if offered < setting_bytes or setting_bytes == SPARE_AUTO:
        offered -= offered % SPARE_STEP_BYTES
    return max(0, offered)


def cores() -> int:
    """Physical cores that this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    physical = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    return max(1, min(physical, allowed or physical))


def clean_name(text: str) -> str:
    """A machine's name, fit to be shown: printable, short, without its domain, never empty."""
    name = "".join(c for c in text.split(".")[0] if c.isprintable()).strip()
    return name[:64] or "unnamed"


def disk_free_bytes(home: Path) -> int:
    """What is free on the disk under `home`, which need not be there yet; 0: that is unknown."""
    for folder in (home, *home.parents):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(folder).free
    return 0
