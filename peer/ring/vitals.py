"""What a stage's process uses, as the system counts it, and whether it was killed for memory."""

from __future__ import annotations

import contextlib
import sys
from collections import deque
from pathlib import Path
from typing import Literal

import psutil

from peer.ring.lease import Look

_MOUNTED = Path("/sys/fs/cgroup")
_PAGE_BYTES = 4096


class Vitals:
    """Of one process. Its methods read files of the system: call them in a thread.

    The kernel counts the processes that it killed for memory by control group; the group is gone
    from sight with its process, so both are noted while the process lives.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._process: psutil.Process | None = None
        # Where kills are counted, and how many; of the last looks, because one may come between the
        # kill and the end.
        self._counted: deque[tuple[Path, int]] = deque(maxlen=3)

    def look(self) -> Look | None:
        """What it has used until now; None where there is no such process any more."""
        try:
            process = self._process = self._process or psutil.Process(self._pid)
            with process.oneshot():
                state, times, read = process.status(), process.cpu_times(), _read_bytes(process)
        except psutil.Error:
            return None
        alive = state not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        if alive and (counted := _kills(self._pid)) is not None:
            self._counted.append(counted)
        return Look(times.user + times.system, read, _state_of(state))

    def killed_for_memory(self) -> bool:
        """Of a process that has just been killed: whether the kernel did it, as memory ran out."""
        return any((_count(path) or 0) > before for path, before in self._counted)


def _state_of(status: str) -> Literal["runs", "disk", "stopped"]:
    if status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP):
        return "stopped"
    return "disk" if status == psutil.STATUS_DISK_SLEEP else "runs"


def _read_bytes(process: psutil.Process) -> int:
    """What it has had read from disk; macOS counts pages that were read for it."""
    with contextlib.suppress(psutil.AccessDenied):
        if sys.platform == "darwin":
            return int(process.memory_info().pageins) * _PAGE_BYTES
        return int(process.io_counters().read_bytes)
    return 0


def _kills(pid: int) -> tuple[Path, int] | None:
    """Where the kernel counts the processes of this one's group that it killed, and how many."""
    if sys.platform != "linux":
        return None
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    groups = {controllers: path for _, controllers, path in (x.split(":", 2) for x in lines)}
    if "memory" in groups:  # version 1
        mounted, group, name = _MOUNTED / "memory", groups["memory"], "memory.oom_control"
    else:
        mounted, group, name = _MOUNTED, groups.get("", "/"), "memory.events"
    # In a container the group may be mounted under another name than it has outside; the root has
    # no count of its own, there the machine's is the best that is known.
    for path in (mounted / group.lstrip("/") / name, mounted / name, Path("/proc/vmstat")):
        if (count := _count(path)) is not None:
            return path, count
    return None


def _count(path: Path) -> int | None:
    """The number behind `oom_kill` in one of the kernel's files."""
    with contextlib.suppress(OSError):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return None
