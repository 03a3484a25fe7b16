"""What is alive of a process group: a test that ends one looks whether anything is left of it."""

from __future__ import annotations

import contextlib
import os
import signal

import psutil


def alive(group: int) -> list[psutil.Process]:
    """Its processes that have not ended."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue
    return found


def end(group: int) -> None:
    """Kill what is left of it: a failed test leaves nothing behind either."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
