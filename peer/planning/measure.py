"""`python -m peer.planning.measure`: a short-lived process that asks the engines what they can do.

It reads one JSON order from stdin and writes one JSON answer to stdout. Loading an engine may load
a GPU driver, take a second or crash: here it takes neither the agent nor a stage with it. Measuring
speeds computes for seconds, at a low priority; who ends this process loses nothing but its answer.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import msgspec

import backends
from backends.base import BackendFault, Device, Engine
from peer.errors import HalkaError
from peer.models import disk as files
from peer.models.kinds import layer_families
from peer.models.manifest import load
from peer.models.parts import load_header, shape_of
from peer.planning import disk, fits
from peer.planning.abilities import REPACKS
from peer.planning.profile import PLAIN_ENGINE, EngineProfile, ModelShape, Speed
from peer.planning.random_layers import RandomLayers
from peer.planning.stopwatch import Stopwatch, Terms

ORDER_BYTES_MAX = 1 << 20
SPEED_S = 30.0  # for one model on one kind of processor
NICE = 5  # whatever else runs here goes first
ALONE_S = 60.0  # to wait for other peers of this machine that measure


class SpeedOrder(msgspec.Struct, frozen=True):
    """Measure how fast the model in `folder` runs. The rest: see `stopwatch.Terms`."""

    folder: str
    threads: int
    cpu_share: float
    memory_bytes: int
    weights: Literal["auto", "exact", "small"] = "auto"  # see `backends.base.Weights`


class MeasureOrder(msgspec.Struct, frozen=True):
    """Ask these backends; `folders` hold models of the store (manifest and head.gguf).

    home: whose disk's speed is wanted ("": none's).
    """

    backends: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    speed: SpeedOrder | None = None
    home: str = ""


class Measured(msgspec.Struct, frozen=True):
    """What was found. shapes: by folder.

    faults: by backend, folder or kind of processor, why it has no answer.
    """

    engines: tuple[EngineProfile, ...] = ()
    shapes: dict[str, ModelShape] = {}
    faults: dict[str, str] = {}
    speeds: tuple[Speed, ...] = ()
    disk_read_bytes_per_s: float = 0.0


def measure(order: MeasureOrder) -> Measured:
    """Ask every backend for its processors, and the first one that opens for speeds."""
    faults: dict[str, str] = {}
    opened: list[tuple[Engine, list[Device]]] = []
    for name in order.backends:
        try:
            engine = backends.load(name)
            opened.append((engine, engine.devices()))
        except KeyError:
            faults[name] = f"there is no backend {name} yet: set `backend` to auto"
        except (ImportError, OSError, RuntimeError, BackendFault) as error:
            faults[name] = f"the backend {name} does not start: {error}"
    shapes: dict[str, ModelShape] = {}
    for folder in order.folders if opened else ():
        try:
            shapes[folder] = _shape(Path(folder), [engine for engine, _ in opened])
        except (HalkaError, BackendFault, OSError) as error:
            faults[folder] = str(error)
    return Measured(
        tuple(_engine(engine.name, device) for engine, devices in opened for device in devices),
        shapes,
        faults,
        _speeds(*opened[0], order.speed, faults) if opened and order.speed else (),
        disk.read_bytes_per_s(Path(order.home)) if order.home else 0.0,
    )


def _shape(folder: Path, engines: Sequence[Engine]) -> ModelShape:
    """What a planner must know of a model: of every peer, so that all of them tell the same.
    llama.cpp's rules speak of cuts and KV sizes wherever real engines run; no library is needed for
    that. Raises HalkaError, BackendFault, OSError."""
    names = [engine.name for engine in engines]
    rules = backends.load(PLAIN_ENGINE) if {PLAIN_ENGINE, *fits.ASKED} & {*names} else engines[0]
    told = rules.cuts, rules.kv_bytes_per_cell, rules.kv_types
    return shape_of(folder, *told, lambda header: fits.of(header, backends.load))


def _engine(backend: str, device: Device) -> EngineProfile:
    return EngineProfile(
        backend=backend,
        device=device.name[:128] or "CPU",
        kind=device.kind[:128] or "cpu",
        memory_free_bytes=max(0, device.memory_free_bytes),
        memory_total_bytes=max(0, device.memory_total_bytes),
        integrated=device.integrated,
    )


def _speeds(
    engine: Engine, devices: list[Device], order: SpeedOrder, faults: dict[str, str]
) -> tuple[Speed, ...]:
    """The model's speed on each kind of processor. Adds to `faults`, by kind."""
    folder = Path(order.folder)
    found: list[Speed] = []
    try:
        manifest = load(folder)
        header = load_header(folder, manifest)
        shape = _shape(folder, [engine]).in_memory(engine.name, order.weights)
        families = layer_families(manifest)
    except (HalkaError, BackendFault, OSError) as error:
        faults[order.folder] = str(error)
        return ()
    kinds = {device.kind: device for device in reversed(devices)}
    if engine.name in REPACKS and len(kinds) > 1:
        kinds.pop("cpu", None)  # its windows are all on the GPU
    for device in kinds.values():
        try:
            with _alone(), RandomLayers(folder, manifest) as layers:
                until_s = time.monotonic() + SPEED_S
                terms = Terms(
                    order.threads, order.cpu_share, order.memory_bytes, until_s, order.weights
                )
                watch = Stopwatch(engine, device, header, shape, layers, terms)
                found.append(watch.speed(engine.name, families))
        except (HalkaError, BackendFault, OSError, FloatingPointError, MemoryError) as error:
            faults[device.kind] = str(error) or type(error).__name__
    return tuple(found)


@contextmanager
def _alone() -> Iterator[None]:
    """No two peers on one machine measure at once, or each would measure the other one, too. What
    they have in common, and what need not be made nor removed, is this file."""
    descriptor = os.open(__file__, os.O_RDONLY | os.O_CLOEXEC)
    try:
        until_s = time.monotonic() + ALONE_S
        while not files.try_lock(descriptor) and time.monotonic() < until_s:
            time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)


def main() -> int:
    """Answer the order on stdin. Exit code 2: it was none."""
    # Engines and their drivers print what they like; stdout is for the answer alone.
    answer = os.dup(1)
    os.dup2(2, 1)
    try:
        order = msgspec.json.decode(sys.stdin.buffer.read(ORDER_BYTES_MAX), type=MeasureOrder)
    except msgspec.MsgspecError as error:
        sys.stderr.write(f"not an order: {error}\n")
        return 2
    if order.speed or order.home:
        os.nice(NICE)
    with os.fdopen(answer, "wb") as out:
        out.write(msgspec.json.encode(measure(order)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
