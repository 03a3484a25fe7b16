"""`python -m peer.planning.measure`: a short-lived process that asks the engines what they can do.

It reads one JSON order from stdin and writes one JSON answer to stdout. Loading an engine may load
a GPU driver, take a second or crash: here it takes neither the agent nor a stage with it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import msgspec

import backends
from backends.base import BackendFault, Engine
from peer.errors import HalkaError
from peer.models.parts import shape_of
from peer.planning.profile import EngineProfile, ModelShape

ORDER_BYTES_MAX = 1 << 20


class MeasureOrder(msgspec.Struct, frozen=True):
    """Ask these backends; `folders` hold models of the store (manifest and head.gguf)."""

    backends: tuple[str, ...]
    folders: tuple[str, ...] = ()


class Measured(msgspec.Struct, frozen=True):
    """What was found. shapes: by folder. faults: by backend or folder, why it has no answer."""

    engines: tuple[EngineProfile, ...] = ()
    shapes: dict[str, ModelShape] = {}
    faults: dict[str, str] = {}


def measure(order: MeasureOrder) -> Measured:
    """Ask every backend for its processors, and the first one that opens for the models' shapes."""
    engines: list[EngineProfile] = []
    faults: dict[str, str] = {}
    opened: list[Engine] = []
    for name in order.backends:
        try:
            engine = backends.load(name)
            engines += [
                EngineProfile(
                    backend=name,
                    device=device.name[:128] or "CPU",
                    kind=device.kind[:128] or "cpu",
                    memory_free_bytes=max(0, device.memory_free_bytes),
                    memory_total_bytes=max(0, device.memory_total_bytes),
                )
                for device in engine.devices()
            ]
        except KeyError:
            faults[name] = f"there is no backend {name} yet: set `backend` to auto"
        except (ImportError, OSError, RuntimeError, BackendFault) as error:
            faults[name] = f"the backend {name} does not start: {error}"
        else:
            opened.append(engine)
    shapes: dict[str, ModelShape] = {}
    for folder in order.folders if opened else ():
        try:
            shapes[folder] = shape_of(Path(folder), opened[0].cuts, opened[0].kv_bytes_per_cell)
        except (HalkaError, BackendFault, OSError) as error:
            faults[folder] = str(error)
    return Measured(tuple(engines), shapes, faults)


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
    with os.fdopen(answer, "wb") as out:
        out.write(msgspec.json.encode(measure(order)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
