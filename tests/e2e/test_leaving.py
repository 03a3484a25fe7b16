"""A peer that goes away lets others take over first: no client sees more than a short pause.

By a signal, by `halka leave` and by sleep, of a member and of the coordinator, while answers run.
"""

from __future__ import annotations

import asyncio
import http.client
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from peer.leaving import REFUSED
from tests import fake_models
from tests.conftest import Until
from tests.e2e import agents
from tests.e2e.agents import CHECKOUT, Agent, House
from tests.e2e.answers import Answer, chat, told
from tests.small_bus import SmallBus

MODEL = "steady-f32"
TOKENS = 300  # some ten seconds: others have taken over long before
TAKEN_OVER_S = 15.0  # on a busy machine; with nothing else to do it is one or two


class Home(House):
    """Three agents that each have the whole model and serve it together."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, 3)
        self.model = fake_models.write(
            folder / "steady.gguf", end_every=0, delay_s=0.01, name="steady"
        )

    def pull(self) -> None:
        """Onto every peer, so that whoever stays can serve it."""
        for agent in self.agents:
            done = agent.word("pull", str(self.model))
            assert done.returncode == 0, done.stderr

    def is_right(self, answer: Answer, question: str, tokens: int = TOKENS) -> None:
        """It ended as if nothing had happened."""
        answer.ended()
        assert (answer.error, answer.broken, answer.finish) == ("", "", "length")
        assert answer.text == told(self.model, question, tokens)
        assert len(answer.texts) <= tokens


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """Shared by this file's tests; each begins with three agents that serve."""
    house = Home(tmp_path_factory.mktemp("home"))
    try:
        house.pull()
        house.start()
        yield house
    finally:
        house.close()


@pytest.fixture(autouse=True)
def whole(home: Home) -> Iterator[None]:
    """Every test begins with a whole ring; a failing one shows what its agents logged."""
    with home.whole(MODEL):
        yield


def chosen(home: House, role: str) -> Agent:
    """A peer of the ring in that role."""
    first = home.coordinator()
    return first if role == "coordinator" else home.others(first)[1]


def typed(agent: Agent, *words: str) -> subprocess.Popen[str]:
    """A word of its user's that goes on for a while."""
    return subprocess.Popen(
        [sys.executable, "-m", "peer", *words],
        env=agent.environment, cwd=CHECKOUT, stdin=subprocess.DEVNULL, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def is_leaving(agent: Agent) -> bool:
    """Whether it takes no new answers."""
    try:
        return agent.request("GET", "/health")[1]["status"] == "leaving"
    except (OSError, http.client.HTTPException):
        return False


@pytest.mark.parametrize("role", ["member", "coordinator"])
@pytest.mark.parametrize("how", ["signal", "leave"])
def test_an_answer_elsewhere_goes_on_when_a_peer_of_its_ring_goes(
    home: Home, role: str, how: str
) -> None:
    plan, goer = home.serving(), chosen(home, role)
    rest = home.others(goer)
    answers = [Answer(agent, f"q{agent.number}", TOKENS).begun() for agent in rest]
    if how == "signal":
        code, took_s = goer.stop()
        assert took_s < TAKEN_OVER_S
    else:
        done = goer.word("leave")
        assert done.returncode == 0, done.stderr
        assert "took over, and the agent has ended" in done.stdout, done
        assert "To come back: " in done.stdout
        assert goer.process is not None
        code = goer.process.wait(15)
    assert code == 0, "a service that ended well is not started again"
    assert all(not answer.ended_s for answer in answers), "they had to go over"
    assert goer.processes("peer") == []
    assert home.serving(*rest) != plan
    for agent, answer in zip(rest, answers, strict=True):
        home.is_right(answer, f"q{agent.number}")
    assert "left_behind=nothing" in goer.text()


def test_a_peer_finishes_its_own_clients_answers_and_refuses_new_ones(home: Home) -> None:
    goer = chosen(home, "member")
    answer = Answer(goer, "mine", TOKENS).begun()
    assert goer.process is not None
    goer.process.send_signal(signal.SIGTERM)
    agents.until(lambda: is_leaving(goer), 5, "it says so")
    code, body = goer.post("/v1/chat/completions", chat("too late", 5))
    assert (code, body["error"]["message"]) == (503, REFUSED)
    home.is_right(answer, "mine")
    assert goer.process.wait(15) == 0


def test_a_second_signal_does_not_wait(home: Home) -> None:
    goer = chosen(home, "member")
    answer = Answer(goer, "mine", 3000).begun()
    assert goer.process is not None
    goer.process.send_signal(signal.SIGINT)
    agents.until(lambda: is_leaving(goer), 5, "it says so")
    began = time.monotonic()
    goer.process.send_signal(signal.SIGINT)
    assert goer.process.wait(10) == 0
    assert time.monotonic() - began < 5
    answer.ended(10)
    assert not answer.looks_finished
    assert answer.error


def test_ctrl_c_takes_leave_back_and_the_peer_takes_part_again(home: Home) -> None:
    goer = chosen(home, "coordinator")
    answer = Answer(goer, "mine", 3000).begun()
    word = typed(goer, "leave")
    agents.until(lambda: len(home.ring()) == 2, TAKEN_OVER_S, "others serve")
    word.send_signal(signal.SIGINT)
    _, shown = word.communicate(timeout=30)
    assert word.returncode == 130, shown
    assert "this peer stays" in shown
    assert not is_leaving(goer)
    home.serving()
    seen = len(answer.texts)
    agents.until(lambda: len(answer.texts) > seen + 20, 30, "its own answer goes on")
    answer.leave()
    assert told(home.model, "mine", 3000).startswith(answer.text)
    assert goer.runs


async def test_before_sleep_others_take_over_and_afterwards_all_is_as_before(
    home: Home, tmp_path: Path, until: Until
) -> None:
    goer = chosen(home, "member")
    rest = home.others(goer)
    async with SmallBus(tmp_path) as bus:
        goer.environment["DBUS_SYSTEM_BUS_ADDRESS"] = bus.address
        try:
            await asyncio.to_thread(goer.stop)
            await asyncio.to_thread(home.start, goer)
            await asyncio.to_thread(home.serving)
            assert bus.delays() == 1, "sleep waits for it"
            answer = Answer(rest[0], "awake", TOKENS)
            await asyncio.to_thread(answer.begun)
            await bus.prepare(True)
            await until(lambda: bus.delays() == 0, 5, "it may sleep: logind waits no longer")
            assert await asyncio.to_thread(home.serves, rest), "others have taken over"
            await asyncio.to_thread(home.is_right, answer, "awake")
            await bus.prepare(False)
            await asyncio.to_thread(home.serving)
            assert bus.delays() == 1
            assert goer.runs
        finally:
            del goer.environment["DBUS_SYSTEM_BUS_ADDRESS"]


def test_the_last_one_goes_at_once_and_says_that_nobody_needed_it(home: Home) -> None:
    last, *others = home.agents
    for agent in others:
        agent.stop()
    home.serving(last)
    began = time.monotonic()
    done = last.word("leave")
    assert done.returncode == 0, done.stderr
    assert "Nobody needed this peer" in done.stdout
    assert last.process is not None
    assert last.process.wait(10) == 0
    assert time.monotonic() - began < 5
