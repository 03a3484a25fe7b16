"""Peers made uneven on one machine: less processor time, a core of their own, a slower cable.

A `House` is a `World` (a bridge and a network namespace a peer) whose peers have besides a control
group with a quota of processor time, one core, and `tc tbf` on both ends of their cable. Programs
run inside of a peer, in all of this; `asking` puts the calling thread on the bridge, as a client
that nobody slows down. All of it ends with the house.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from peer import children
from tests.netns.world import CLONE_NEWNET, NAMESPACES, Machine, World, world

PERIOD_S = 0.1  # the quota's, as of docker and systemd
GROUPS = Path("/sys/fs/cgroup")
PROCESSES = "cgroup.procs"
HERTZ = os.sysconf("SC_CLK_TCK")
MTU_BYTES = 1514
BURST_S = 100e-6  # of a link's rate: what may pass at once, or a timer fires for every packet
SHARES = {1: ("cpu.shares", 262144), 2: ("cpu.weight", 10000)}  # the most: peers go first
ENDED_S = 5.0  # for the processes of a group to be gone

# Joins the control group, the network namespace and the core; asks for SIGTERM when who started it
# ends; becomes the program. Not `ip netns exec`: that hides /sys/fs/cgroup from the program.
JOIN = (
    "import ctypes, os, signal, sys; from pathlib import Path; "
    "group, inside, core = sys.argv[1:4]; libc = ctypes.CDLL(None, use_errno=True); "
    "Path(group, 'cgroup.procs').write_text(str(os.getpid())); "
    "os.sched_setaffinity(0, {int(core)}); "
    "libc.setns(os.open(inside, os.O_RDONLY), 0x40000000) == 0 or sys.exit('cannot enter'); "
    "libc.prctl(1, signal.SIGTERM); os.execv(sys.argv[4], sys.argv[4:])"
)

_houses = itertools.count()


@dataclass(frozen=True)
class Peer:
    """A machine to be made up.

    quota: of one core's time, None: all of it. link_mbit: of its cable, both ways, None: as fast
    as memory. memory_bytes: declared as available in its profile, None: what there is.
    """

    name: str
    core: int = 0
    quota: float | None = None
    link_mbit: float | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True)
class Throttled:
    """How often, and for how long altogether, a group had to wait for its next period."""

    periods: int
    seconds: float


class _Group:
    """A control group of processor time: version 1 or 2, whichever is mounted."""

    def __init__(self, name: str, quota: float | None) -> None:
        self._second = (GROUPS / "cgroup.controllers").exists()
        self.folder = (GROUPS if self._second else GROUPS / "cpu") / name
        if self._second:
            with contextlib.suppress(OSError):  # there already, or refused: then mkdir's file lacks
                (GROUPS / "cgroup.subtree_control").write_text("+cpu")
        self.folder.mkdir()
        file, most = SHARES[2 if self._second else 1]
        (self.folder / file).write_text(str(most))
        period_us = int(PERIOD_S * 1e6)
        quota_us = None if quota is None else int(quota * period_us)
        if self._second:
            words = f"{'max' if quota_us is None else quota_us} {period_us}"
            (self.folder / "cpu.max").write_text(words)
        else:
            (self.folder / "cpu.cfs_period_us").write_text(str(period_us))
            (self.folder / "cpu.cfs_quota_us").write_text(str(-1 if quota_us is None else quota_us))

    def join(self) -> Path:
        """This process moves into the group. Returns where it was."""
        before = own_group(self._second)
        (self.folder / PROCESSES).write_text(str(os.getpid()))
        return before

    def throttled(self) -> Throttled:
        """Since it was made."""
        lines = (self.folder / "cpu.stat").read_text(encoding="utf-8").splitlines()
        stat = {key: int(value) for key, _, value in (line.partition(" ") for line in lines)}
        seconds = stat.get("throttled_usec", 0) / 1e6 + stat.get("throttled_time", 0) / 1e9
        return Throttled(stat.get("nr_throttled", 0), seconds)

    def end(self) -> None:
        """Remove it, once its processes are gone."""
        deadline = time.monotonic() + ENDED_S
        while True:
            try:
                self.folder.rmdir()
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.02)


def own_group(second: bool) -> Path:
    """The folder of this process's group of processor time. second: of version 2."""
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if second and controllers == "":
            return GROUPS / path.strip("/")
        if not second and "cpu" in controllers.split(","):
            return GROUPS / "cpu" / path.strip("/")
    raise OSError("this process is in no control group of processor time")


class House:
    """Uneven peers by name, on the bridge of a world."""

    def __init__(self, made: World, peers: Sequence[Peer]) -> None:
        self.world, self.peers = made, tuple(peers)
        self.tag = f"halka-{os.getpid()}-{next(_houses)}"
        self.asker = made.machine("asker")
        self._machines: dict[str, Machine] = {}
        self._groups: dict[str, _Group] = {}
        self._before: Path | None = None  # the group that this process was in

    def build(self) -> None:
        """Make cables and groups, and remove the groups that a killed process left."""
        parent = GROUPS if (GROUPS / "cgroup.controllers").exists() else GROUPS / "cpu"
        for folder in parent.glob("halka-*"):
            found = re.match(r"halka-(\d+)-", folder.name)
            if found and not Path(f"/proc/{found[1]}").exists():
                with contextlib.suppress(OSError):
                    folder.rmdir()
        for peer in self.peers:
            machine = self._machines[peer.name] = self.world.machine(peer.name)
            if peer.link_mbit is not None:
                for inside, device in ((machine.namespace, "eth0"),
                                       (self.world.bridge, machine.port)):  # fmt: skip
                    shape(inside, device, peer.link_mbit * 125_000)
            self._groups[peer.name] = _Group(f"{self.tag}-{peer.name}", peer.quota)

        # Who asks, and reads the clock, is held up as little as the peers are.
        asker = self._groups["asker"] = _Group(f"{self.tag}-asker", None)
        self._before = asker.join()

    def address(self, name: str) -> str:
        """Where the others reach this peer."""
        return self._machines[name].address

    def home(self, name: str) -> Path:
        """The peer's HALKA_HOME."""
        return self._machines[name].home

    def command(self, name: str, *program: str) -> tuple[str, ...]:
        """The command line that runs a program, given by its path, inside of a peer."""
        group, machine = self._groups[name].folder, self._machines[name]
        core = next(str(peer.core) for peer in self.peers if peer.name == name)
        inside = str(NAMESPACES / machine.namespace)
        return (sys.executable, "-c", JOIN, str(group), inside, core, *program)

    def module(self, name: str, module: str, *words: str) -> tuple[str, ...]:
        """The command line of one of our modules inside of a peer."""
        return self.command(name, sys.executable, "-P", "-m", module, *words)

    def output(self, name: str, program: str) -> str:
        """What a few lines of Python print inside of a peer."""
        words = self.command(name, sys.executable, "-P", "-c", program)
        return subprocess.run(
            words, env=children.environment(), capture_output=True, text=True, check=True
        ).stdout

    def group(self, name: str) -> Path:
        """The folder of the peer's control group."""
        return self._groups[name].folder

    def throttled(self, name: str) -> Throttled:
        """Of everything inside of a peer, so far."""
        return self._groups[name].throttled()

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """The calling thread, and what it starts, are on the bridge; then they are back."""
        with Path("/proc/thread-self/ns/net").open() as home:
            enter(NAMESPACES / self.asker.namespace)
            try:
                yield
            finally:
                _setns(home.fileno())

    def end(self) -> None:
        """Remove the groups. What ran inside has ended by now."""
        if self._before is not None:
            (self._before / PROCESSES).write_text(str(os.getpid()))
        for group in self._groups.values():
            group.end()


@contextlib.contextmanager
def house(folder: Path, peers: Sequence[Peer]) -> Iterator[House]:
    """Uneven peers, gone afterwards. Skips a test where there can be no namespaces."""
    with world(folder) as made:
        built = House(made, peers)
        try:
            built.build()
            yield built
        finally:
            built.end()


def shape(namespace: str, device: str, bytes_per_s: float) -> None:
    """Let no more leave by this device: a token bucket that holds as little as it can."""
    burst_bytes = max(MTU_BYTES, int(bytes_per_s * BURST_S))
    words = ["ip", "netns", "exec", namespace, "tc", "qdisc", "replace", "dev", device, "root",
             "tbf", "rate", f"{int(bytes_per_s * 8)}bit", "burst", str(burst_bytes),
             "limit", str(4 << 20)]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr.strip()}"


def enter(namespace: Path) -> None:
    """Put the calling thread into a network namespace. Raises OSError."""
    with namespace.open() as inside:
        _setns(inside.fileno())


def _setns(descriptor: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "cannot change the network namespace")


# What else the machine did -----------------------------------------------------------------------


@dataclass(frozen=True)
class Used:
    """Processor seconds so far: of everybody, of our own, and taken by a hypervisor."""

    at_s: float
    all_s: float
    own_s: float
    stolen_s: float

    def since(self, before: Used) -> float:
        """Cores that were busy for somebody else since then, or taken from this machine."""
        took_s = max(1e-3, self.at_s - before.at_s)
        own_s = self.own_s - before.own_s
        other_s = self.all_s - before.all_s - own_s + self.stolen_s - before.stolen_s
        return max(0.0, other_s) / took_s


def used(pids: Sequence[int]) -> Used:
    """What was used until now. pids: our own processes, besides this one and all that it has
    waited for; those that have ended are left out."""
    fields = Path("/proc/stat").read_text(encoding="utf-8").partition("\n")[0].split()[1:]
    user, nice, system, _idle, _wait, irq, soft, steal = (
        int(field) / HERTZ for field in fields[:8]
    )
    own_s = sum(os.times()[:4])
    for pid in pids:
        with contextlib.suppress(FileNotFoundError):
            words = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            own_s += (int(words[11]) + int(words[12])) / HERTZ
    return Used(time.monotonic(), user + nice + system + irq + soft, own_s, steal)
