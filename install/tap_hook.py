"""Builds the tap in C while pip makes halka's package: hatchling calls this (pyproject.toml).

The library goes into the wheel, which then is one of this system; where it cannot be built, the
package is pure Python and works, and pip's log says why. In a checkout that is installed as it
lies (pip install -e) the library is put beside its source, where Python will look for it.
"""

from __future__ import annotations

import runpy
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_PACKAGE = "backends/llama_cpp"


class TapHook(BuildHookInterface):  # type: ignore[misc]  # hatchling is in pip's environment only
    """One for each wheel that is made."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """version: "standard" or "editable"."""
        package = Path(self.root) / _PACKAGE
        tap = runpy.run_path(str(package / "tap_library.py"))
        self._folder = tempfile.TemporaryDirectory()
        try:
            if version == "editable":
                tap["build"](package)
                return
            library = tap["build"](Path(self._folder.name), package / "tap.c")
        except (tap["NoTap"], OSError) as why:
            sys.stderr.write(f"halka: the tap in C was not built, Python's is used: {why}\n")
            return
        build_data["force_include"][str(library)] = f"{_PACKAGE}/{library.name}"
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"

    def finalize(self, _version: str, _build_data: dict[str, Any], _artifact_path: str) -> None:
        """The wheel is made: what it was made of may go."""
        self._folder.cleanup()
