"""sleep: logind is asked to wait, told when it need not any more, and never needed."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from peer import sleep
from peer.sleep import Sleep
from tests.conftest import Until
from tests.small_bus import SmallBus

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="logind is Linux's")


class Sleeper:
    """Somebody who takes as long as the test says."""

    def __init__(self) -> None:
        self.asked, self.awake = 0, 0
        self.is_ready = asyncio.Event()

    async def ready(self, reason: str) -> None:
        assert reason == "sleep"
        self.asked += 1
        await self.is_ready.wait()

    def stay(self, reason: str) -> None:
        assert reason == "sleep"
        self.awake += 1
        self.is_ready.clear()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sleep, "AGAIN_S", 0.02)


@pytest_asyncio.fixture
async def bus(tmp_path: Path) -> AsyncIterator[SmallBus]:
    async with SmallBus(tmp_path) as bus:
        yield bus


@pytest_asyncio.fixture
async def sleeper(bus: SmallBus) -> AsyncIterator[Sleeper]:
    """One whose machine asks this bus."""
    sleeper = Sleeper()
    task = asyncio.create_task(Sleep(sleeper, bus.address).run())
    try:
        yield sleeper
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_sleep_waits_until_the_peer_is_ready_and_again_the_next_time(
    bus: SmallBus, sleeper: Sleeper, until: Until
) -> None:
    await until(lambda: bus.delays() == 1, 5, "sleep is delayed")
    assert bus.asked == [["sleep", "halka", "hand over the model's layers", "delay"]]
    for time in (1, 2):
        await bus.prepare(True)
        await until(lambda time=time: sleeper.asked == time, 5, "the peer was asked")  # type: ignore[misc]
        assert bus.delays() == 1, "it is not ready yet"
        assert sleeper.awake == time - 1
        sleeper.is_ready.set()
        await until(lambda: bus.delays() == 0, 5, "the machine may sleep")
        await bus.prepare(False)
        await until(lambda: bus.delays() == 1, 5, "sleep is delayed again")
        assert sleeper.awake == time


async def test_only_logind_says_that_the_machine_sleeps(
    bus: SmallBus, sleeper: Sleeper, until: Until
) -> None:
    await until(lambda: bus.delays() == 1, 5, "sleep is delayed")
    await bus.prepare(True, sender=":1.66")
    await bus.prepare(True)
    await until(lambda: sleeper.asked == 1, 5, "the peer was asked")
    sleeper.is_ready.set()
    await until(lambda: bus.delays() == 0, 5, "the machine may sleep")
    assert sleeper.asked == 1


async def test_a_logind_that_began_again_is_asked_again(
    bus: SmallBus, sleeper: Sleeper, until: Until
) -> None:
    await until(lambda: bus.delays() == 1, 5, "sleep is delayed")
    await bus.prepare(True)
    await until(lambda: sleeper.asked == 1, 5, "the peer was asked")
    sleeper.is_ready.set()
    await bus.owned("")
    await until(lambda: sleeper.awake == 1, 5, "nobody can say when it wakes up")
    assert bus.delays() == 0
    await bus.owned(":1.9")
    await until(lambda: bus.delays() == 1, 5, "the new one was asked")
    await bus.prepare(True)
    await until(lambda: sleeper.asked == 2, 5, "and is listened to")


async def test_without_the_right_to_ask_there_is_one_line_and_no_second_question(
    bus: SmallBus, sleeper: Sleeper, until: Until, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "halka.sleep")
    bus.refusal = "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired"
    await until(lambda: bus.asked, 5, "it was asked")
    await until(lambda: caplog.messages, 5, "the refusal is told")
    await bus.owned(":1.9")
    await until(lambda: len(bus.asked) == 2, 5, "another logind may say something else")
    bus.refusal = ""
    await bus.owned(":1.10")
    await until(lambda: bus.delays() == 1, 5, "this one does")
    first, last = caplog.messages
    assert "not delayed because=logind: " + bus.refusal in first
    assert "delayed until" in last


async def test_a_bus_without_logind_is_waited_on(
    bus: SmallBus, sleeper: Sleeper, until: Until
) -> None:
    bus.logind = ""
    await until(lambda: bus.watched, 5, "it is there")
    await bus.owned(":1.3")
    await until(lambda: bus.delays() == 1, 5, "sleep is delayed once logind runs")


async def test_a_bus_that_was_restarted_is_found_again(
    bus: SmallBus, sleeper: Sleeper, until: Until
) -> None:
    await until(lambda: bus.delays() == 1, 5, "sleep is delayed")
    await bus.prepare(True)
    await until(lambda: sleeper.asked == 1, 5, "the peer was asked")
    sleeper.is_ready.set()
    await bus.stop()
    await until(lambda: bus.delays() == 0, 5, "nobody would say when to let it sleep")
    await until(lambda: sleeper.awake == 1, 5, "nor when it wakes up")
    await bus.start()
    await until(lambda: bus.delays() == 1, 5, "sleep is delayed again")
    assert bus.clients == 2


@pytest.mark.parametrize("address", ["unix:path=/nowhere/bus", "nonsense", "carrier-pigeon:a=b"])
async def test_without_a_bus_it_gives_up_after_one_line(
    address: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(sleep, "AGAIN_S", 0.001)
    monkeypatch.setattr(sleep, "TRIES", 4)
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", address)
    await asyncio.wait_for(Sleep(Sleeper()).run(), 10)
    (line,) = caplog.messages
    assert line.startswith("sleep=not delayed because=the system bus: ")


async def test_a_bus_that_says_nothing_is_given_up_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sleep, "ANSWER_S", 0.1)
    monkeypatch.setattr(sleep, "TRIES", 1)
    caplog.set_level(logging.INFO, "halka.sleep")
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(str(tmp_path / "bus"))
        mute.listen()
        await asyncio.wait_for(Sleep(Sleeper(), f"unix:path={tmp_path / 'bus'}").run(), 10)
    assert caplog.messages == ["sleep=not delayed because=the system bus: TimeoutError"]


async def test_where_the_library_is_missing_it_says_what_brings_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "dbus_fast.aio", None)
    caplog.set_level(logging.INFO, "halka.sleep")
    await Sleep(Sleeper()).run()
    assert "pip install dbus-fast" in caplog.text


async def test_nothing_is_asked_where_there_is_no_logind(
    bus: SmallBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    await Sleep(Sleeper(), bus.address).run()
    assert bus.clients == 0
