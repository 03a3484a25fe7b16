"""Faults of a fake stage, which tests switch on while it runs: HALKA_FAKE_FAULT names a file.

While the file is there, its one line says what happens and where, `KIND FIRST [TOKEN]`: in each
step of the window that begins at layer FIRST, or `any`; with TOKEN, only where a row of the step
is that token. `load-crash` happens when the window is loaded. Real engines did all of it.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def _asked(first: int) -> list[str]:
    """The kind, and the token where there is one, of the fault for this window; [] while none."""
    if not (named := os.environ.get("HALKA_FAKE_FAULT")):
        return []
    try:
        kind, where, *token = Path(named).read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return []
    return [kind, *token] if where in ("any", str(first)) else []


def at_load(first: int) -> None:
    """Crash, where that is asked for."""
    if _asked(first) == ["load-crash"]:
        ctypes.string_at(0)


def at_step(first: int, tokens: NDArray[Any]) -> NDArray[np.bool_]:
    """Do what is asked for; which rows are to have numbers that are not finite. tokens: [rows].

    sleep, spin: it never comes back, idle or computing · busy: it computes for four seconds, then
    goes on · crash: SIGSEGV · assert: as ggml ends itself · fill: all memory · infinite.
    """
    none: NDArray[np.bool_] = np.zeros(len(tokens), np.bool_)
    if not (asked := _asked(first)):
        return none
    rows: NDArray[np.bool_] = ~none
    if len(asked) > 1:
        rows = tokens.astype(np.int64) == int(asked[1])
    if not rows.any():
        return none
    match asked[0]:
        case "sleep":
            while True:
                time.sleep(3600.0)
        case "spin":
            while True:
                pass
        case "busy":
            until = time.monotonic() + 4.0
            while time.monotonic() < until:
                pass
        case "crash":
            ctypes.string_at(0)
        case "assert":
            sys.stderr.write(f"{__file__}:1: GGML_ASSERT(rows > 0) failed\n")
            sys.stderr.flush()
            os.abort()
        case "fill":
            held = []
            while True:
                held.append(np.ones(1 << 20))
        case "infinite":
            return rows
    return none
