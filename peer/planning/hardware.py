"""What a measured speed holds for: this machine's processors, their software, a stage's threads."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path

import msgspec
import psutil

from peer.planning import gpus
from peer.planning.profile import EngineProfile

_PACKAGES = {"llama_cpp": ("llama-cpp-python",), "mlx": ("mlx", "mlx-lm")}  # else our own
_ASK_S = 5.0


class Machine(msgspec.Struct, frozen=True):
    """Everything but the model that determines a speed.

    version: of the backend. engines: (kind, device) of its processors. hardware: processor, memory,
    operating system, cards and their driver.
    """

    backend: str
    version: str
    engines: tuple[tuple[str, str], ...]
    threads: int
    hardware: tuple[str, ...]


def machine(engines: Sequence[EngineProfile], threads: int) -> Machine:
    """This one, now. engines: of one backend or more; the first one's counts. Blocks for ms."""
    backend = engines[0].backend if engines else ""
    mine = tuple((e.kind, e.device) for e in engines if e.backend == backend)
    cards = any(kind == "cuda" for kind, _ in mine)
    return Machine(
        backend, version(backend), mine, threads, (*_fixed(), *(_cards() if cards else ()))
    )


def version(backend: str) -> str:
    """The releases of a backend's libraries, "" where one is not installed."""
    try:
        return " ".join(map(metadata.version, _PACKAGES.get(backend, ("halka",))))
    except metadata.PackageNotFoundError:
        return ""


@cache
def _fixed() -> tuple[str, ...]:
    """What changes only while this process does not run."""
    mac = platform.mac_ver()[0]
    return (
        processor(),
        str(psutil.cpu_count(logical=False) or 0),
        str(psutil.virtual_memory().total >> 20),  # kernels keep a few KiB more or less
        f"{platform.system()} {(mac or platform.release()).split('.')[0]}",
    )


def _cards() -> tuple[str, ...]:
    found, driver = gpus.cards()
    return (*(card.name for card in found), driver)


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's model, as its maker names it."""
    if sys.platform == "darwin":
        try:
            done = subprocess.run(
                ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"],
                capture_output=True,
                timeout=_ASK_S,
                check=True,
            )
        except (OSError, subprocess.SubprocessError):
            return platform.machine()
        return done.stdout.decode("utf-8", "replace").strip()
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    facts = dict(
        (key.strip(), value.strip())
        for key, separator, value in (line.partition(":") for line in text.splitlines())
        if separator
    )
    # On ARM there is no name, but the numbers of its maker and its design.
    names = ("model name", "Model", "CPU implementer", "CPU part", "CPU variant")
    found = [facts[name] for name in names if name in facts]
    return " ".join([platform.machine(), *found])
