"""`python -m peer.planning.verify`: a short-lived process in which one engine runs windows.

It reads one JSON order from stdin, arrays from files, and writes arrays into files and one JSON
answer to stdout. What it computes is compared by others (`proof`): an engine that is to be proven
may be wrong, crash or hang, and takes nobody with it. It computes at a low priority.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

import backends
from backends.base import BackendFault, Batch, Engine, Header, Settings, Weights, Window
from peer.errors import HalkaError
from peer.models.manifest import Manifest, load
from peer.models.parts import hold, load_header, place

ORDER_BYTES_MAX = 1 << 20
NICE = 5  # whatever else runs here goes first
_KV_TYPE = "f32"  # so that engines agree to the last bits, and a small mistake is seen


class Step(msgspec.Struct, frozen=True):
    """Run the window [first, last): x and out are files of arrays, out is written."""

    first: int
    last: int
    x: str
    out: str


class Job(msgspec.Struct, frozen=True):
    """Steps of one model of the store (`folder`). chunks: rows of each batch, in order."""

    folder: str
    chunks: tuple[int, ...]
    steps: tuple[Step, ...]


class VerifyOrder(msgspec.Struct, frozen=True):
    """What one engine is to run, on its GPU or not. work: a folder for temporary files."""

    backend: str
    gpu: bool
    weights: Weights
    threads: int
    work: str
    jobs: tuple[Job, ...]


class Ran(msgspec.Struct, frozen=True):
    """What came of it. fault: why the step `at` of job `job` could not be run ("": all were).

    refused: the engine says of itself that it cannot run this model. approximate: that it runs it
    with rounded weights. weights_bytes: of the largest window.
    """

    fault: str = ""
    job: int = 0
    at: int = 0
    refused: bool = False
    approximate: bool = False
    weights_bytes: int = 0


def verify(order: VerifyOrder) -> Ran:
    """Run all of it, up to the first fault."""
    weights_bytes, approximate = 0, False
    try:
        engine = backends.load(order.backend)
    except (ImportError, KeyError, OSError, RuntimeError) as error:
        return Ran(f"the backend {order.backend} does not start: {error}")
    for number, job in enumerate(order.jobs):
        at = 0
        try:
            folder = Path(job.folder)
            manifest = load(folder)
            header = load_header(folder, manifest)
            ability = engine.can_run(header, order.weights)
            if ability.how == "no":
                return Ran(ability.why, number, 0, refused=True)
            approximate |= ability.how == "approximate"
            for at, step in enumerate(job.steps):  # noqa: B007 - told where it ends here
                used = _run(engine, order, manifest, header, job, step)
                weights_bytes = max(weights_bytes, used)
        except (HalkaError, BackendFault, OSError, MemoryError, ValueError) as error:
            why = str(error) or type(error).__name__
            return Ran(why, number, at, approximate=approximate)
    return Ran(approximate=approximate, weights_bytes=weights_bytes)


def _run(
    engine: Engine, order: VerifyOrder, manifest: Manifest, header: Header, job: Job, step: Step
) -> int:
    """One step; returns the bytes of the window's weights."""
    x = np.load(step.x, allow_pickle=False)
    folder = Path(job.folder)
    rows = sum(job.chunks)
    backend = engine.open(
        Settings(
            slots=1,
            kv_cells=rows,
            batch_tokens=max(job.chunks),
            threads=order.threads,
            gpu_layers=-1 if order.gpu else 0,
            kv_type=_KV_TYPE,
            flash="off",
            weights=order.weights,
        )
    )
    try:
        # Headers are read at load only: a stage of this model may rewrite them right after.
        with hold(folder), TemporaryDirectory(dir=order.work) as into:
            recipe = engine.recipe(header, step.first, step.last)
            placed = place(folder, manifest, recipe, step.first, step.last, Path(into))
            window = Window(
                step.first, step.last, header.layers, header,
                placed.files, placed.embed, placed.places,
            )  # fmt: skip
            used = backend.load(window)
        found: list[NDArray[Any]] = []
        done = 0
        for count in job.chunks:
            here = slice(done, done + count)
            batch = Batch(
                np.zeros(count, np.int32),
                np.arange(done, done + count, dtype=np.int32),
                np.ones(count, np.bool_),
            )
            found.append(backend.run(window, batch, x[here]).copy())
            done += count
    finally:
        backend.close()
    with Path(step.out).open("xb") as out:
        np.save(out, np.concatenate(found).astype(np.float32), allow_pickle=False)
    return used.weights_bytes


def main() -> int:
    """Answer the order on stdin. Exit code 2: it was none."""
    # Engines and their drivers print what they like; stdout is for the answer alone.
    answer = os.dup(1)
    os.dup2(2, 1)
    try:
        order = msgspec.json.decode(sys.stdin.buffer.read(ORDER_BYTES_MAX), type=VerifyOrder)
    except msgspec.MsgspecError as error:
        sys.stderr.write(f"not an order: {error}\n")
        return 2
    os.nice(NICE)
    with os.fdopen(answer, "wb") as out:
        out.write(msgspec.json.encode(verify(order)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
