"""A pretended machine for the installer's tests: a folder for its root, one for its home.

On its PATH there is nothing but the small tools that the installer may use, and stand-ins for the
commands that change a system (fake_commands.sh).
"""

from __future__ import annotations

import shutil
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOOLS = ("bash", "sh", "cat", "mv", "rm", "mkdir", "rmdir", "ln", "dirname", "basename", "readlink",
         "chmod", "sed", "awk", "tr", "cut", "sleep", "grep", "wc", "env")  # fmt: skip
FAKES = ("uname", "sw_vers", "id", "getent", "useradd", "userdel", "usermod", "chown", "systemctl",
         "loginctl", "launchctl", "dscl", "xcode-select", "c++", "python3.13")  # fmt: skip

Tree = dict[str, tuple[str, str]]


def tree(top: Path) -> Tree:
    """Everything below a folder: path → (mode, what it holds or points to)."""
    found: Tree = {}
    for path in sorted(top.rglob("*")):
        mode = stat.filemode(path.lstat().st_mode)
        inside = str(path.readlink()) if path.is_symlink() else ""
        if path.is_file() and not path.is_symlink():
            inside = path.read_text(errors="replace")
        found[str(path.relative_to(top))] = (mode, inside)
    return found


@dataclass
class Machine:
    """A pretended machine in a folder: its root, its home, its commands and their memory."""

    top: Path
    mode: str
    system: str

    @property
    def disk(self) -> Path:
        return self.top / "disk"

    @property
    def root(self) -> Path:
        return self.disk / "root"

    @property
    def home(self) -> Path:
        return self.disk / "home"

    @property
    def venv(self) -> Path:
        lib = self.root / "opt" if self.mode == "system" else self.home / ".local/share"
        return lib / "halka" / "venv"

    @property
    def unit(self) -> Path:
        return {
            "system-Linux": self.root / "etc/systemd/system/halka.service",
            "user-Linux": self.home / ".config/systemd/user/halka.service",
            "system-Darwin": self.root / "Library/LaunchDaemons/dev.halka.agent.plist",
            "user-Darwin": self.home / "Library/LaunchAgents/dev.halka.agent.plist",
        }[f"{self.mode}-{self.system}"]

    @property
    def state(self) -> Path:
        base = self.root if self.mode == "system" else self.home
        if self.system == "Darwin":
            return base / "Library/Application Support/halka"
        return base / ("var/lib/halka" if self.mode == "system" else ".local/state/halka")

    @property
    def link(self) -> Path:
        bin = self.root / "usr/local/bin" if self.mode == "system" else self.home / ".local/bin"
        return bin / "halka"

    def remembers(self, what: str) -> set[str]:
        """What the fakes were made to hold: accounts, linger, running."""
        file = self.top / "fakes" / what
        return set(file.read_text().split()) if file.exists() else set()

    def log(self) -> list[str]:
        """Commands that the fakes were given."""
        file = self.top / "fakes" / "log"
        return file.read_text().splitlines() if file.exists() else []

    def install(self, *options: str, **extra: str) -> subprocess.CompletedProcess[str]:
        """Run install.sh here."""
        (self.top / "fakes" / "log").unlink(missing_ok=True)
        environment = {
            "PATH": f"{self.top}/fakes/bin:{self.top}/tools",
            "HOME": str(self.home),
            "HALKA_INSTALL_ROOT": str(self.root),
            "FAKES": str(self.top / "fakes"),
            "FAKE_SYSTEM": self.system,
            "FAKE_UID": "0" if self.mode == "system" else "1000",
            "REAL_PYTHON": sys.executable,
        }
        return subprocess.run(
            [str(ROOT / "install/install.sh"), f"--{self.mode}", *options],
            env=environment | extra, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip


def make_machine(top: Path, mode: str, system: str) -> Machine:
    """A bare machine: what every one has before halka comes."""
    machine = Machine(top, mode, system)
    for folder in ("disk/root/run/systemd/system", "disk/root/etc", "disk/home", "fakes/bin"):
        (top / folder).mkdir(parents=True)
    (machine.root / "etc/os-release").write_text("ID=arch\n")
    (top / "fakes/groups").write_text("video\n")  # no render here: a container, an old machine
    (top / "tools").mkdir()
    for tool in TOOLS:
        real = shutil.which(tool)
        assert real, f"this test needs {tool}"
        (top / "tools" / tool).symlink_to(real)
    for name in FAKES:
        (top / "fakes/bin" / name).symlink_to(ROOT / "tests/tidy/fake_commands.sh")
    return machine
