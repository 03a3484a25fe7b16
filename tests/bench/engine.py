"""What cutting a model costs the engine: windows in one process beside the whole model.

python -m tests.bench.engine [--edges 15] [--turns N] [--rows N] [--model GGUF]: one thread, pinned
to one core. In turns, each way makes the same decode steps: llama_decode of the whole model alone;
the windows with the tap in C; the windows with the tap in Python. No hop, no scheduler and no
sampling: what is more than the whole is the price of the cut. "Around it" is what a window's step
takes outside of llama_decode, with caches as a step leaves them; "reused" in how many of its steps
libllama built no graph anew.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import llama_cpp.llama_cpp as llama
import numpy as np

from backends.base import Batch, Settings
from backends.llama_cpp.tap import Tap, TapInC
from backends.llama_cpp.window import LoadedWindow
from tests.bench.pause import say
from tests.bench.streaming import commit, processor
from tests.plain_llama import PlainLlama
from tests.smollm2 import smollm2
from tests.windows import Ring, Stored

CELLS, BATCH = 4096, 512
FIRST = 8  # steps of each turn that are not timed: they build graphs
STEPS = 40


class Whole(PlainLlama):
    """The whole model, with nothing in its loop that is not needed."""

    def turn(self, rows: int) -> list[float]:
        """Seconds of each step of `rows` sequences, a token each."""
        self.clear()
        batch = self._batch
        batch.n_tokens = rows
        times = []
        for position in range(FIRST + STEPS):
            for row in range(rows):
                batch.token[row], batch.pos[row] = 1000 + 7 * position + row, position
                batch.n_seq_id[row], batch.seq_id[row][0], batch.logits[row] = 1, row, True
            began_s = time.perf_counter()
            assert llama.llama_decode(self._context, batch) == 0
            times.append(time.perf_counter() - began_s)
        return times[FIRST:]


class Watched:
    """One cut, and what its windows spend inside of llama_decode."""

    def __init__(self, ring: Ring) -> None:
        self.ring = ring
        backend: Any = ring.backend
        self.loaded: list[LoadedWindow] = list(backend._windows.values())
        self.inside_s = [0.0] * len(self.loaded)
        self.around_s: list[list[float]] = [[] for _ in self.loaded]
        self.compute_s: list[list[float]] = [[] for _ in self.loaded]
        for at, window in enumerate(self.loaded):
            window._decode = self._timed(at, window._decode)

    def _timed(self, at: int, decode: Callable[[Any, Any], int]) -> Callable[[Any, Any], int]:
        def timed(context: Any, batch: Any) -> int:
            began_s = time.perf_counter()
            code = decode(context, batch)
            self.inside_s[at] = time.perf_counter() - began_s
            return code

        return timed

    def turn(self, rows: int) -> list[float]:
        """As Whole.turn."""
        for slot in range(rows):
            self.ring.backend.trim(slot, 0)
        slots, outputs = np.arange(rows, dtype=np.int32), np.ones(rows, np.bool_)
        times = []
        for position in range(FIRST + STEPS):
            batch = Batch(slots, np.full(rows, position, np.int32), outputs)
            x: Any = np.arange(rows, dtype=np.int32) + (1000 + 7 * position)
            step_s = 0.0
            for at, window in enumerate(self.ring.windows):
                began_s = time.perf_counter()
                x = self.ring.backend.run(window, batch, x)
                took_s = time.perf_counter() - began_s
                step_s += took_s
                if position >= FIRST:
                    self.around_s[at].append(took_s - self.inside_s[at])
                    self.compute_s[at].append(self.inside_s[at])
            times.append(step_s)
        return times[FIRST:]

    def explain(self) -> Iterator[str]:
        """A line for each window."""
        for at, window in enumerate(self.ring.windows):
            reused = llama.llama_perf_context(self.loaded[at]._context).n_reused
            yield (
                f"    layers {window.first:>2} to {window.last:>2}: "
                f"llama_decode {1e3 * median(self.compute_s[at]):.3f} ms, "
                f"around it {1e6 * median(self.around_s[at]):.0f} µs, graphs reused {reused}"
            )


@contextmanager
def tapped(kind: type[Tap]) -> Iterator[None]:
    """Windows that are loaded meanwhile have this tap."""
    with mock.patch("backends.llama_cpp.window.best", return_value=kind):
        yield


def measure(path: Path, edges: Sequence[int], turns: int, rows: int) -> None:
    """Take turns and say what came of them."""
    settings = Settings(max(4, rows), CELLS, BATCH, threads=1, gpu_layers=0)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        stored = Stored(path, Path(folder))
        whole = stack.enter_context(Whole(path, cells=CELLS, batch=BATCH, slots=settings.slots))
        cut: dict[str, Watched] = {}
        for name, kind in (("tap in C", TapInC), ("tap in Python", Tap)):
            with tapped(kind):
                cut[name] = Watched(stack.enter_context(stored.cut(edges, settings)))
        ways: dict[str, Callable[[int], list[float]]] = {"whole": whole.turn}
        ways |= {name: watched.turn for name, watched in cut.items()}
        times: dict[str, list[list[float]]] = {name: [] for name in ways}
        for _ in range(turns):
            for name, turn in ways.items():
                times[name].append(turn(rows))
        report(times, cut)


def report(times: dict[str, list[list[float]]], cut: dict[str, Watched]) -> None:
    """Medians over all steps; differences and ratios turn by turn, and of those the median."""
    for name, turns in times.items():
        each = [median(turn) for turn in turns]
        alone = [median(turn) for turn in times["whole"]]
        more_s = median(a - b for a, b in zip(each, alone, strict=True))
        ratio = median(b / a for a, b in zip(each, alone, strict=True))
        steps = [step for turn in turns for step in turn]
        say(
            f"{name:>14}: {1e3 * median(steps):.3f} ms a step (least {1e3 * min(steps):.3f}); "
            f"{1e3 * more_s:+.3f} ms more than the whole, {ratio:.3f} of its speed"
        )
        for line in cut[name].explain() if name in cut else ():
            say(line)


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--edges", default="15", help="where it is cut, with commas")
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--rows", type=int, default=1, help="sequences in each step")
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)))
    parser.add_argument("--model", type=Path)
    given = parser.parse_args()
    os.sched_setaffinity(0, {given.core})
    path = given.model or smollm2()
    say(f"{path.name}, commit {commit()}, {processor()}, core {given.core}, one thread")
    edges = [int(edge) for edge in given.edges.split(",") if edge]
    measure(path, edges, given.turns, given.rows)


if __name__ == "__main__":
    main()
