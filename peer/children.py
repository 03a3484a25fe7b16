"""How this program starts processes of its own: the same interpreter, the same package.

Never from the current folder: `python -m` would look there first, and a folder named `peer` in the
place where somebody typed `halka run` must not become part of the agent.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def command(module: str) -> tuple[str, ...]:
    """The command line of a module of ours."""
    return sys.executable, "-P", "-m", module


def environment() -> dict[str, str]:
    """Ours, and where this package was imported from."""
    source = str(Path(__file__).parents[1])
    path = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
