"""How much of a core an idle agent takes: three machines on a bridge, left alone.

python -m tests.bench.idle [--seconds N] [--peers N] [--model PATH]: as root, on Linux. Without a
model the agents only keep their cluster; with one they serve it on llama.cpp and wait for chats.
Prints a line for each agent and each stage: CPU seconds of the process over the time, in percent of
one core.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import psutil

from tests.netns.world import Machine, World, members, world

SETTLE_S = 10.0  # after the last peer joined: sightings, gossip and measuring are over
HERTZ = os.sysconf("SC_CLK_TCK")


def cpu_s(pid: int) -> float:
    """CPU seconds that a process took so far, in user and system mode."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / HERTZ


def processes(machine: Machine) -> dict[str, int]:
    """Process ids on a machine by what they are."""
    assert machine.process is not None
    agent = psutil.Process(machine.process.pid)
    found = {"agent": agent.pid}
    for child in agent.children(recursive=True):
        found[child.cmdline()[-1].removeprefix("peer.")] = child.pid
    return found


def wait_s(seconds: float) -> None:
    """Leave the machines alone."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        time.sleep(left)


def measure(made: World, seconds: float) -> list[str]:
    """A line for each process that lives all the time."""
    found = {
        (machine.name, what): pid
        for machine in made.machines.values()
        for what, pid in processes(machine).items()
    }
    before, began = {key: cpu_s(pid) for key, pid in found.items()}, time.monotonic()
    wait_s(seconds)
    took_s = time.monotonic() - began
    return [
        f"{name:<8} {what:<20} {100 * (cpu_s(pid) - before[name, what]) / took_s:5.2f} % of a core"
        for (name, what), pid in found.items()
        if psutil.pid_exists(pid)
    ]


def main() -> int:
    """Build, settle, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--peers", type=int, default=3)
    parser.add_argument("--model", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, world(Path(folder)) as made:
        names = [f"peer{i}" for i in range(given.peers)]
        for name in names:
            made.machine(name).start()
        made.until(
            lambda: all(members(m.status() or {"peers": ()}) == names
                        for m in made.machines.values()),
            60, "all have met",
        )  # fmt: skip
        if given.model:
            done = made.machines[names[0]].halka("pull", str(given.model))
            assert done.returncode == 0, done.stderr
            made.until(lambda: made.agree(names), 300, "all serve")
        wait_s(SETTLE_S)
        lines = measure(made, given.seconds)
    load = f"load {os.getloadavg()[0]:.1f}"
    print(f"{date.today()} {platform.machine()} {os.cpu_count()} cores, {load}, "  # noqa: T201, DTZ011
          f"{given.seconds:g} s, {given.model.name if given.model else 'no model'}")  # fmt: skip
    print("\n".join(lines))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
