"""Builds and finds the tap in C, tap.c: at install, where there is a compiler.

Two come here: whoever installs (install/tap_hook.py for pip, install/venv.sh for a checkout), to
build the library, and `tap`, to load it. It is plain Python without any other module of ours,
because pip builds in an environment that has none of what halka needs. A library that does not fit
is never used: its file's name has the checksum of the source that it was built from, the system and
the processor. (In the name and not inside: a process that has loaded a file gets the same one again
under its name, whatever lies there by now.)
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
_COMPILERS = ("cc", "gcc", "clang")
_BUILD_S = 60  # it takes a fraction of a second; a compiler that hangs must not hang an install


class NoTap(Exception):
    """There is no library to use, or none could be built; the reason, for people."""


def file_name(source: Path) -> str:
    """Of the library that this C source becomes on this system and processor."""
    checksum = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    return f"tap-{checksum}-{platform.system()}-{platform.machine()}.so".lower()


def load(folder: Path = FOLDER) -> ctypes.CDLL:
    """The library beside the source in `folder`. Raises NoTap, saying why it cannot be used."""
    path = folder / file_name(folder / "tap.c")
    if not path.exists():
        old = any(folder.glob("tap-*.so"))
        why = "it was built from another source" if old else "it was not built"
        raise NoTap(f"{why}; build it with: {_again()}")
    try:
        found = ctypes.CDLL(os.fspath(path))
        found.halka_tap_bytes.restype = ctypes.c_size_t
    except (OSError, AttributeError) as error:  # of another C library, or not ours
        raise NoTap(f"{path.name} is of no use here: {error}") from error
    return found


def _again() -> str:
    return shlex.join([sys.executable, os.fspath(FOLDER / "tap_library.py")])


def build(into: Path, source: Path = FOLDER / "tap.c") -> Path:
    """Compile the source into the folder `into`. Returns the file. Raises NoTap.

    It appears whole or not at all, and then those of other sources go: a stage that runs keeps the
    one that it has, and another may start meanwhile.
    """
    compiler = _compiler()
    target = into / file_name(source)
    kind = ["-dynamiclib", "-arch", platform.machine()] if _is_mac() else ["-shared"]
    handle, name = tempfile.mkstemp(dir=into, prefix=".tap-", suffix=".so")
    os.close(handle)
    made = Path(name)
    try:
        done = subprocess.run(
            [*compiler, "-std=c11", "-O2", "-fPIC", *kind, "-o", name, os.fspath(source)],
            stdin=subprocess.DEVNULL, capture_output=True, timeout=_BUILD_S, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            said = done.stderr.decode("utf-8", "replace").strip() or "it gave no reason"
            raise NoTap(f"{compiler[0]} could not compile it: {said}")
        made.chmod(0o755)
        made.replace(target)
        for old in set(into.glob("tap-*.so")) - {target}:
            old.unlink(missing_ok=True)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoTap(f"{compiler[0]} could not be run: {error}") from error
    finally:
        made.unlink(missing_ok=True)
    return target


def _is_mac() -> bool:
    return platform.system() == "Darwin"


def _compiler() -> list[str]:
    """The command of the C compiler: $CC where set. Raises NoTap."""
    if given := shlex.split(os.environ.get("CC", "")):
        return given
    if _is_mac():  # its /usr/bin/cc is there always, and opens a window where nothing is behind it
        there = subprocess.run(["/usr/bin/xcode-select", "-p"], capture_output=True, check=False)
        if there.returncode != 0:
            raise NoTap("there is no C compiler here; install one: xcode-select --install")
    for name in _COMPILERS:
        if found := shutil.which(name):
            return [found]
    raise NoTap("there is no C compiler here")


def main() -> None:
    """Build it beside its source unless a fitting one is there. A failure is a note, no error."""
    try:
        load()
    except NoTap:
        try:
            build(FOLDER)
            load()
        except (NoTap, OSError) as why:  # OSError: the folder cannot be written to
            sys.stderr.write(f"halka: the tap in C was not built, Python's is used: {why}\n")


if __name__ == "__main__":
    main()
