"""What a peer says of itself, run inside of it: `python -m tests.bench.inside FOLDER`.

FOLDER: a model of a store. Prints one line of JSON: the peer's profile, with its speeds for this
model, and the model's shape. Settings are HALKA_*, as for an agent; the peer id is left to whoever
asks.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import msgspec

from peer import config
from peer.planning import survey
from peer.planning.profile import ModelShape, Profile


class Said(msgspec.Struct, frozen=True):
    """The answer."""

    profile: Profile
    shape: ModelShape


async def main(folder: Path) -> None:
    """Measure and print."""
    settings, _ = config.load()
    found = await survey.measure(settings, (folder,))
    shape = found.shapes[str(folder)]
    measured = await survey.speeds(settings, folder, shape)
    speeds = measured if isinstance(measured, tuple) else measured.speeds
    own = survey.profile(settings, "a" * 16, found.engines)
    said = Said(msgspec.structs.replace(own, speeds=speeds), shape)
    sys.stdout.buffer.write(msgspec.json.encode(said) + b"\n")


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
