"""The two machines on a clock that goes on while the process does not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from peer.cluster import election as e
from peer.cluster import listener, machines
from peer.cluster import membership as m
from peer.cluster.machines import Action, Machines
from peer.config import Timing
from peer.protocol import Goodbye, Heartbeat, Opinion, Plans, Suspect

TIMING = Timing(beat_s=0.1, silence_s=1.0, regret_s=0.2, doubt_s=0.5, dial_s=0.4)


class Bench:
    """Machines of "a" with members b and c, and what they ask for."""

    def __init__(self) -> None:
        self.done: list[Action] = []
        self.machines = Machines("a", TIMING, 0, self.done.append)
        for peer_id in "bc":
            self.machines.feed(m.LinkUp(peer_id, "key", 1))

    def of(self, kind: type[Any]) -> list[Any]:
        return [action for action in self.done if isinstance(action, kind)]


@pytest.fixture
async def asleep_s(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the machine has slept so far; the loop's own clock does not see them."""
    slept = [0.0]
    monkeypatch.setattr(machines, "clock", lambda: listener.clock() + slept[0])
    return slept


@pytest.fixture
async def bench(asleep_s: list[float]) -> AsyncIterator[Bench]:
    made = Bench()
    task = asyncio.create_task(made.machines.run())
    yield made
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_the_clock_counts_the_sleep_of_the_machine() -> None:
    assert hasattr(time, "CLOCK_BOOTTIME") or hasattr(time, "CLOCK_MONOTONIC")
    if hasattr(time, "CLOCK_BOOTTIME"):
        assert abs(listener.clock() - time.clock_gettime(time.CLOCK_BOOTTIME)) < 1.0


async def test_after_an_hour_of_sleep_nobody_is_accused_and_no_opinion_is_given(
    bench: Bench, asleep_s: list[float], until: Any
) -> None:
    beats = len(bench.of(m.SendBeats))
    await until(lambda: len(bench.of(m.SendBeats)) > beats, 5, "a beat")
    asleep_s[0] = 3600.0  # as CLOCK_BOOTTIME jumps; no timer of the loop is due
    beats = len(bench.of(m.SendBeats))
    assert bench.machines.take("c", Suspect("b"))  # it waited in the socket
    assert not bench.of(m.Answer)
    await until(lambda: len(bench.of(m.SendBeats)) > beats, 5, "the first beat after it")
    assert not bench.of(m.Lost)
    assert not bench.of(m.Ask)
    assert bench.machines.membership.members == {"b", "c"}


async def test_messages_of_the_machines_are_taken_and_no_others(bench: Bench) -> None:
    take = bench.machines.take
    bench.machines.feed(e.PeerUp("b"))
    assert take("b", Heartbeat(7, "b", False))
    assert bench.machines.election.coordinator == "b"
    assert take("c", Suspect("b"))
    assert [(a.to, a.peer_id, a.heard) for a in bench.of(m.Answer)] == [("c", "b", True)]
    assert take("c", Opinion("b", False, 0.0))
    assert not take("c", Plans(term=1, states=()))
    assert take("b", Goodbye("it was stopped"))
    assert [lost.why for lost in bench.of(m.Lost)] == ["it was stopped"]
