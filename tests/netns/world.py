"""Machines that are not there: network namespaces on a bridge, each with an agent of its own.

A `World` is a bridge in a namespace of its own; a `Machine` is a namespace with one cable (veth)
to it, an own host name and an own HALKA_HOME. Nothing outside of these namespaces is reached,
nothing of the system's own network is changed, and all of it ends with the world.
"""

from __future__ import annotations

import ctypes
import http.client
import itertools
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.netns.cable import Cable, ip

TOP = Path(__file__).parents[2]
NAMESPACES = Path("/run/netns")
CLONE_NEWNET = 0x40000000
HTTP_PORT = 42552  # the default: every machine has a loopback of its own
STOP_S = 15.0  # for an agent to end by itself after SIGTERM
STAGE = "peer.ring.stage"
LOG_LINES = 25  # of each agent, shown when a condition is not met

# Gives the machine its host name, asks for a SIGTERM when the test's process ends, becomes the
# program.
BECOME = (
    "import ctypes, os, signal, socket, sys; socket.sethostname(sys.argv[1]); "
    "ctypes.CDLL(None).prctl(1, signal.SIGTERM); os.execv(sys.argv[2], sys.argv[2:])"
)

_worlds = itertools.count()
Status = dict[str, Any]


def why_not() -> str:
    """Why there can be no namespaces here, or ""."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    for command in ("ip", "bridge", "tc", "unshare"):
        if shutil.which(command) is None:
            return f"the command `{command}` is missing (iproute2, util-linux)"
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    name = f"halka-{os.getpid()}-try"
    for words in (
        ["ip", "netns", "add", name],
        ["ip", "-n", name, "link", "add", "try", "type", "bridge"],
        ["ip", "netns", "exec", name, "unshare", "--uts", "true"],
    ):
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            break
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return f"`{' '.join(words)}`: {done.stderr.strip()}" if done.returncode else ""


@contextmanager
def world(folder: Path) -> Iterator[World]:
    """A new world with no machines yet; skips the test where there can be none.

    An agent that was asked to end and leaves a process behind fails the test.
    """
    if reason := why_not():
        pytest.skip(reason)
    made = World(folder)
    try:
        made.build()
        yield made
    except BaseException:
        made.end()
        raise
    left = made.end()
    assert not left, f"left behind: {left}"


class World:
    """A bridge, and the machines on it by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tag = f"halka-{os.getpid()}-{next(_worlds)}"
        self.bridge = f"{self.tag}-bridge"
        self.machines: dict[str, Machine] = {}

    def build(self) -> None:
        """Make the bridge, and remove what a test process left that was killed."""
        for name in [path.name for path in NAMESPACES.iterdir()] if NAMESPACES.exists() else []:
            found = re.fullmatch(r"halka-(\d+)-\w+(-\w+)?", name)
            if found and not Path(f"/proc/{found[1]}").exists():
                subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        ip("netns", "add", self.bridge)
        ip("-n", self.bridge, "link", "add", "bridge", "type", "bridge")
        ip("-n", self.bridge, "link", "set", "bridge", "up")

    def machine(self, name: str) -> Machine:
        """A new machine on the bridge, without an agent yet."""
        number = len(self.machines) + 1
        machine = self.machines[name] = Machine(self, name, f"10.77.0.{number}")
        inside, port = machine.namespace, machine.port
        ip("netns", "add", inside)
        ip("-n", inside, "link", "set", "lo", "up")
        ip("-n", inside, "link", "add", "eth0", "type", "veth",
            "peer", "name", port, "netns", self.bridge)  # fmt: skip
        ip("-n", inside, "address", "add", f"{machine.address}/24", "dev", "eth0")
        ip("-n", inside, "link", "set", "eth0", "up")
        ip("-n", self.bridge, "link", "set", port, "master", "bridge", "up")
        return machine

    def until(self, condition: Callable[[], object], within_s: float, what: str) -> float:
        """Wait for a condition; returns after how many seconds it held."""
        began = time.monotonic()
        while not condition():
            if time.monotonic() > began + within_s:
                raise AssertionError(f"not within {within_s:g} s: {what}\n{self.story()}")
            time.sleep(0.05)
        return time.monotonic() - began

    def agree(self, names: Sequence[str]) -> bool:
        """These and no others are members for each of them, all follow one coordinator, and one
        plan serves, with layers on each."""
        seen = [self.machines[name].status() for name in names]
        wanted = sorted(names)
        if not all(status and members(status) == wanted for status in seen):
            return False
        told = [agreement(status) for status in seen]
        return (
            all(one == told[0] for one in told)
            and told[0]["phase"] == "serving"
            and [name for name, _ in told[0]["layers"]] == wanted
        )

    def story(self) -> str:
        """What the agents say of themselves and wrote last, for a failure's reader."""
        told = []
        for machine in self.machines.values():
            status = machine.status()
            told.append(f"--- {machine.name}: {agreement(status) if status else 'no answer'}")
            told += machine.log().splitlines()[-LOG_LINES:]
        return "\n".join(told)

    def end(self) -> list[str]:
        """End every process, then every namespace. Returns what did not end by itself."""
        machines = self.machines.values()
        for machine in machines:
            machine.terminate()
        for machine in machines:
            with suppress(subprocess.TimeoutExpired):
                machine.wait(STOP_S)
        left = [process for machine in machines for process in _kill_all(machine)]
        for machine in machines:
            machine.wait(STOP_S)
        for namespace in [*(m.namespace for m in machines), self.bridge]:
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)
        return left


def _kill_all(machine: Machine) -> list[str]:
    """End what still runs on the machine after its agent should have ended; returns what it was."""
    found = []
    for pid in machine.processes():
        with suppress(OSError):
            program = _program(pid)
            os.kill(pid, signal.SIGKILL)
            found.append(f"{machine.name}: {program}")
    return found


def _program(pid: int) -> str:
    """The command line of a process, "" where it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def members(status: Status) -> list[str]:
    """Names of the members, this peer among them."""
    return sorted(peer["name"] for peer in status["peers"] if peer["state"] == "member")


def agreement(status: Status) -> dict[str, Any]:
    """What peers must say alike: coordinator, term, plan, its phase and windows."""
    return {
        "coordinator": status["cluster"]["coordinator"],
        "term": status["cluster"]["term"],
        "plan": status["model"]["plan"],
        "phase": status["model"]["phase"],
        "layers": sorted((p["name"], p["layers"]) for p in status["peers"] if p["layers"]),
    }


class _Connection(http.client.HTTPConnection):
    """HTTP over a socket that belongs to a namespace."""

    def __init__(self, namespace: str, timeout_s: float) -> None:
        super().__init__("127.0.0.1", HTTP_PORT, timeout=timeout_s)
        self._namespace, self._timeout_s = namespace, timeout_s

    def connect(self) -> None:
        """A socket belongs to the namespace in which its thread was when it made it."""
        made: list[socket.socket] = []

        def make() -> None:
            with (NAMESPACES / self._namespace).open() as inside:
                if ctypes.CDLL(None, use_errno=True).setns(inside.fileno(), CLONE_NEWNET) == 0:
                    made.append(socket.socket(socket.AF_INET, socket.SOCK_STREAM))

        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        if not made:
            raise OSError(f"cannot enter {self._namespace}")
        self.sock = made[0]
        self.sock.settimeout(self._timeout_s)
        self.sock.connect((self.host, self.port))
        if self.sock.getsockname() == self.sock.getpeername():
            # Nobody listens yet, and TCP connected it with itself. It must not hold the port for a
            # minute after its end, which it would without a reset: the agent could not have it.
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.sock.close()
            raise ConnectionRefusedError("nobody listens")


class Machine(Cable):
    """A namespace with an agent. name: its host name, and so its peer's."""

    def __init__(self, world: World, name: str, address: str) -> None:
        super().__init__(f"{world.tag}-{name}", world.bridge, f"port-{name}")
        self.world, self.name, self.address = world, name, address
        self.home = world.folder / name
        self.home.mkdir(parents=True)
        self.process: subprocess.Popen[bytes] | None = None
        self._ending = False
        self._log = world.folder / f"{name}.log"

    # Its agent ------------------------------------------------------------------------------------

    def start(self, *flags: str, program: Sequence[str] = ("-m", "peer"), **settings: str) -> None:
        """Start the agent; settings become HALKA_*, without any it is given its home only."""
        assert self.process is None, f"{self.name} has an agent"
        self._ending = False
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                self._words(sys.executable, *program, "run", *flags),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=self._environment(settings), cwd=TOP, start_new_session=True,
            )  # fmt: skip

    def stop(self) -> int:
        """End the agent politely; its exit code."""
        self.terminate()
        code = self.wait(STOP_S)
        self.process = None
        return code

    def terminate(self) -> None:
        """Begin to end the agent politely; asked again, it goes on as it does."""
        if self.process is not None and not self._ending:
            self._ending = True
            self.process.terminate()

    def kill(self) -> None:
        """kill -9 of the agent alone: its stages are left to notice."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(STOP_S)
        self.process = None

    def processes(self, module: str = "") -> list[int]:
        """Ids of what runs on the machine, also where its agent is gone. module: only these."""
        words = ["ip", "netns", "pids", self.namespace]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        return [int(pid) for pid in done.stdout.split() if module in _program(int(pid))]

    def stages(self) -> dict[str, int]:
        """Process ids of its stages that run, by plan."""
        started = re.findall(r"stage=started plan=(\S+) pid=(\d+)", self.log())
        running = self.processes(STAGE)
        return {plan: int(pid) for plan, pid in started if int(pid) in running}

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to everything that runs on the machine at once."""
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def wait(self, within_s: float) -> int:
        """The agent's exit code. Raises subprocess.TimeoutExpired."""
        return self.process.wait(within_s) if self.process is not None else 0

    def log(self) -> str:
        """All that its agents wrote."""
        return self._log.read_text(encoding="utf-8", errors="replace") if self._log.exists() else ""

    # Commands and questions inside ----------------------------------------------------------------

    def run(self, *words: str, within_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        """A command inside, to its end."""
        return subprocess.run(
            self._words(*words), env=self._environment({}), cwd=TOP, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=within_s, check=False,
        )  # fmt: skip

    def open(self, *words: str) -> subprocess.Popen[str]:
        """A command inside whose output is read as it comes; whoever opens it ends it."""
        return subprocess.Popen(
            self._words(*words), env=self._environment({}), cwd=TOP, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def halka(self, *words: str) -> subprocess.CompletedProcess[str]:
        """`halka` with these words, inside."""
        return self.run(sys.executable, "-m", "peer", *words)

    def connection(self, timeout_s: float = 60.0) -> http.client.HTTPConnection:
        """To its agent's API, over its own loopback."""
        return _Connection(self.namespace, timeout_s)

    def get(self, path: str) -> Any:
        """The JSON of a page of its agent. Raises OSError, ValueError."""
        connection = self.connection(10.0)
        try:
            connection.request("GET", path)
            with connection.getresponse() as response:
                return json.loads(response.read())
        finally:
            connection.close()

    def status(self) -> Status:
        """What `halka status --json` shows; {} while nobody answers."""
        try:
            found = self.get("/halka/status")
        except (OSError, ValueError, http.client.HTTPException):
            return {}
        return dict(found)

    def _words(self, *words: str) -> list[str]:
        inside = ["ip", "netns", "exec", self.namespace, "unshare", "--uts"]
        return [*inside, sys.executable, "-c", BECOME, self.name, *words]

    def _environment(self, settings: dict[str, str]) -> dict[str, str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith("HALKA_")}
        given = {f"HALKA_{key.upper()}": value for key, value in settings.items()}
        # These machines share cores, where real ones do not: a compute thread that waits must not
        # spin on a core that another machine's stage needs (measured: 20 times slower answers).
        return {**clean, "OMP_WAIT_POLICY": "passive", "HALKA_HOME": str(self.home), **given}
