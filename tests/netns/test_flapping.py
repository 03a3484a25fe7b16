"""A cable that is in for a second and out for a second: few plans, whole answers."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from peer.models.imports import import_gguf
from peer.models.store import Store
from tests import fake_models
from tests.e2e.answers import told
from tests.netns.stream import Stream
from tests.netns.world import Machine, World, world

pytestmark = pytest.mark.timeout(300)

NAMES = ["ash", "elm", "oak"]
FLAPS_S = 30.0
SERVES_S = 60.0
QUESTION = "Where does the river go?"
TOKENS = 1200
PLANS_MAX = 3


@pytest.fixture
def three(tmp_path: Path) -> Iterator[World]:
    """Three machines that each have the model and share it."""
    model = fake_models.write(tmp_path / "model.gguf", end_every=0, delay_s=0.008)
    with world(tmp_path) as made:
        for name in NAMES:
            machine = made.machine(name)
            import_gguf(model, Store(machine.home))
            machine.start(backend="fake", spread="all")
        made.until(lambda: made.agree(NAMES), SERVES_S, "three peers agree")
        yield made


def plans(machines: list[Machine]) -> set[str]:
    """Numbers of all plans that any of them made as the coordinator."""
    found = re.findall(r"plan (\S+) for ", "\n".join(machine.log() for machine in machines))
    return set(found)


def test_a_link_that_flaps_costs_a_few_plans_and_no_answer(three: World, tmp_path: Path) -> None:
    machines = [three.machines[name] for name in NAMES]
    coordinator = machines[0].status()["cluster"]["coordinator"]
    steady = next(m for m in machines if m.status()["me"]["peer_id"] == coordinator)
    flapping = next(m for m in machines if m is not steady)
    rest = [m for m in machines if m is not flapping]
    made = plans(rest)
    with Stream(steady, QUESTION, max_tokens=TOKENS) as stream:
        three.until(lambda: len(stream.text) > 20, 30, "the answer flows")
        until_s = time.monotonic() + FLAPS_S
        while time.monotonic() < until_s:
            flapping.unplug()
            time.sleep(1.0)
            flapping.plug()
            time.sleep(1.0)
        new = plans(rest) - made
        print(f"{len(new)} new plans in {FLAPS_S:.0f} s")  # noqa: T201
        three.until(lambda: stream.ended, 60, "the answer is over")
    assert not stream.error, three.story()
    assert stream.clean
    assert stream.text == told(tmp_path / "model.gguf", QUESTION, TOKENS), three.story()
    assert len(new) <= PLANS_MAX, f"{sorted(new)}\n{three.story()}"
    assert steady.status()["cluster"]["coordinator"] == coordinator
    # When it has been steady for a while it is made use of again.
    three.until(lambda: three.agree(NAMES), 90, "all three serve again")
