"""`python -m tests.wrong_engine FAULT MODULE`: a process of ours whose MLX has a fault.

q4_1: its weights of type Q4_1 are read as if they were Q4_0, as releases of MLX did; crash: it ends
at the third window; hang: there it stops, with a process of its own beside it; busy: it refuses.
What is asked of other engines is done as ever.
"""

from __future__ import annotations

import ctypes
import runpy
import signal
import subprocess
import sys
from dataclasses import replace
from typing import Any

import backends
from backends.base import Backend, BackendFault, Engine, Settings
from backends.mlx import repack

CHILD_S = "613.25"  # by which tests find the process that a hanging engine started


def _wrong_q4_1() -> None:
    right = repack.repack

    def wrong(type_name: str, *rest: Any) -> Any:
        found = right(type_name, *rest)
        if type_name == "Q4_1":
            assert isinstance(found, repack.Packed)
            return replace(found, biases=found.scales * -8)
        return found

    repack.repack = wrong


def _at_third_window(fault: str) -> None:
    load = backends.load

    class Faulty:
        """The engine, with the fault."""

        def __init__(self, engine: Engine) -> None:
            self._engine, self._opened = engine, 0

        def __getattr__(self, name: str) -> Any:
            return getattr(self._engine, name)

        def open(self, settings: Settings) -> Backend:
            self._opened += 1
            if self._opened < 3:
                return self._engine.open(settings)
            if fault == "crash":
                ctypes.string_at(0)
            if fault == "hang":
                subprocess.Popen(["sleep", CHILD_S])
                signal.pause()
            raise BackendFault("the GPU is busy")

    def faulty(name: str) -> Any:
        return Faulty(load(name)) if name == "mlx" else load(name)

    backends.load = faulty


if __name__ == "__main__":
    fault, module = sys.argv[1:]
    if fault == "q4_1":
        _wrong_q4_1()
    else:
        _at_third_window(fault)
    sys.argv = [module]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
