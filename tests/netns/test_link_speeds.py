"""Links of known speed between machines, measured by the agents' own cluster parts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netns.world import Machine, World, world

PROGRAM = ("-m", "tests.netns.measured")
SOON_S = 60.0  # to find each other, and to measure until other programs leave the cores alone twice


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[World]:
    with world(tmp_path) as made:
        made.machine("oak")
        made.machine("elm")
        yield made


def told(machine: Machine) -> list[dict[str, float]]:
    """The figures that a machine told of its link, the latest last."""
    return [json.loads(line) for line in machine.log().splitlines() if line.startswith("{")]


def rates(pair: World) -> list[float]:
    """What each machine says of its link now, in bytes a second."""
    return [figures[-1]["bytes_per_s"] for m in pair.machines.values() if (figures := told(m))]


@pytest.mark.parametrize(
    ("rate", "bytes_per_s"), [("100mbit", 12.5e6), ("1gbit", 125e6)], ids=lambda value: str(value)
)
def test_the_bandwidth_of_a_shaped_link_is_what_the_shaper_lets_through(
    pair: World, rate: str, bytes_per_s: float
) -> None:
    for machine in pair.machines.values():
        machine.shape(rate)
        machine.start(program=PROGRAM)

    def right() -> bool:
        found = rates(pair)
        return len(found) == 2 and all(abs(r / bytes_per_s - 1) < 0.3 for r in found)

    pair.until(right, SOON_S, f"both measure {rate}")
    for machine in pair.machines.values():  # also while they do not
        assert all(figures["bytes_per_s"] < 1.3 * bytes_per_s for figures in told(machine))


def test_a_bare_link_has_a_short_round_trip_and_a_slower_one_is_told(pair: World) -> None:
    for machine in pair.machines.values():
        machine.start(program=PROGRAM)
    pair.until(lambda: len(rates(pair)) == 2, SOON_S, "both measure")
    for machine in pair.machines.values():
        assert 0 < told(machine)[0]["rtt_s"] < 0.005
    assert min(rates(pair)) > 40e6
    oak, elm = pair.machines.values()
    oak.shape("100mbit")
    pair.until(
        lambda: abs(told(oak)[-1]["bytes_per_s"] / 12.5e6 - 1) < 0.3, SOON_S, "the change is seen"
    )
    assert told(elm)[-1]["bytes_per_s"] > 40e6  # its own way is as it was
