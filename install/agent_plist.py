"""Writes the launchd job of this installation to standard output.

Run by install.sh. The job in launchd/ is the one for the whole machine; for one account its paths
change, it names no account, and it may also be loaded over SSH.
Arguments: system|user, the job in launchd/, the virtual environment, the data and log folders.
"""

from __future__ import annotations

import plistlib
import sys
from pathlib import Path
from typing import Any


def job(mode: str, template: Path, venv: str, state: str, logs: str) -> dict[str, Any]:
    """The job's keys, as launchd.plist(5) names them."""
    keys: dict[str, Any] = plistlib.loads(template.read_bytes())
    keys["ProgramArguments"] = [f"{venv}/bin/halka", "run"]
    keys["EnvironmentVariables"]["HALKA_HOME"] = state
    keys["WorkingDirectory"] = state
    keys["StandardOutPath"] = keys["StandardErrorPath"] = f"{logs}/agent.log"
    if mode == "user":
        del keys["UserName"], keys["GroupName"]
        keys["LimitLoadToSessionType"] = ["Aqua", "Background"]
    return keys


if __name__ == "__main__":
    mode, template, venv, state, logs = sys.argv[1:]
    sys.stdout.buffer.write(plistlib.dumps(job(mode, Path(template), venv, state, logs)))
