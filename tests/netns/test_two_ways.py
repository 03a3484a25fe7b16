"""Two machines with a slow network and a cable of their own: hops take the cable while it lasts."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from peer.models.imports import import_gguf
from peer.models.store import Store
from tests import fake_models
from tests.e2e.answers import told
from tests.netns.cable import ip
from tests.netns.stream import Stream
from tests.netns.world import STAGE, Machine, World, agreement, world

FAKE = {"backend": "fake", "spread": "all"}
NAMES = ["elm", "oak"]
MODEL = "model.gguf"
SLOW = "100mbit"
PORT = "42553"
AGREED_S = 40.0
NOTICED_S = 25.0  # a dead cable, by libzmq in 3.5 s, and a new plan that serves
LONG = 600  # tokens; some ten seconds
QUESTION = "Tell all."


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[World]:
    """Both have the whole model. eth0: the slow network; eth1: the cable between the two."""
    model = fake_models.write(tmp_path / MODEL, end_every=0, delay_s=0.01)
    with world(tmp_path) as made:
        one, other = (made.machine(name) for name in NAMES)
        ip("-n", one.namespace, "link", "add", "eth1", "type", "veth",
            "peer", "name", "eth1", "netns", other.namespace)  # fmt: skip
        for number, machine in enumerate((one, other), 1):
            ip("-n", machine.namespace, "address", "add", f"10.78.0.{number}/24", "dev", "eth1")
            ip("-n", machine.namespace, "link", "set", "eth1", "up")
            machine.shape(SLOW)
            import_gguf(model, Store(machine.home))
        # An agent looks at the interfaces when it starts, and then only now and again.
        made.until(lambda: all(map(carries, (one, other))), 10, "the cable is up at both ends")
        yield made


def carries(machine: Machine) -> bool:
    """Whether the kernel counts the machine's end of the cable as up."""
    return "LOWER_UP" in ip("-n", machine.namespace, "link", "show", "eth1")


def ways(machine: Machine) -> set[str]:
    """Beginnings of the addresses that the machine's stages have connections with."""
    stages = {str(pid) for pid in machine.processes(STAGE)}
    said = subprocess.run(
        ["ip", "netns", "exec", machine.namespace, "ss", "-Htnp", "state", "established"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    return {
        found[1]
        for line in said.splitlines()
        if stages.intersection(re.findall(r"pid=(\d+)", line))
        for found in re.finditer(r"(?:^|[\s:\[])(10\.7[78])\.0\.\d+\]?:\d+", line)
    }


def test_hops_take_the_faster_way_and_another_one_when_it_goes_down(pair: World) -> None:
    machines = [pair.machines[name] for name in NAMES]
    for machine, other in zip(machines, reversed(machines), strict=True):
        # They meet by the slow network, and learn of the cable from each other's hello.
        machine.start(**FAKE, mdns="false", port=PORT, peers=f"{other.address}:{PORT}")
    pair.until(lambda: pair.agree(NAMES), AGREED_S, "both agree")
    assert all("host=10.77.0" in machine.log() for machine in machines)
    assert all(ways(machine) >= {"10.78"} for machine in machines)
    assert all("way=tcp://10.78.0" in machine.log() for machine in machines)
    before = agreement(machines[0].status())["plan"]
    with Stream(machines[0], QUESTION, max_tokens=LONG) as stream:
        pair.until(lambda: len(stream.text) > 20, 20, "the answer is under way")
        ip("-n", machines[0].namespace, "link", "set", "eth1", "down")
        pair.until(
            lambda: pair.agree(NAMES) and all(ways(m) == {"10.77"} for m in machines),
            NOTICED_S, "hops by the slow network",
        )  # fmt: skip
        pair.until(lambda: stream.ended, 60, "the answer ends")
    assert agreement(machines[0].status())["plan"] != before
    assert stream.clean, f"{stream.error}\n{pair.story()}"
    assert stream.text == told(pair.folder / MODEL, QUESTION, LONG)
