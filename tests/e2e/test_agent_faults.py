"""What dies, hangs or fills up takes nothing else with it, is noticed, and is made up for.

Each test kills one kind of process while answers are in flight: the others stay up, answers go on
to their right end as if nothing had been, and the next question is answered rightly.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import openai
import psutil
import pytest

from tests import fake_models
from tests.e2e.agents import MEASURE, STAGE, TEXT, Agent, House, until
from tests.e2e.answers import Answer, chat, flowing, told

KILLED_S = 3.0  # a killed peer is noticed within
SILENT_S = 5.0  # one that is silent
MODEL = "steady-f32"
TOKENS = 12
LONG = 400  # tokens; some ten seconds


class Ring(House):
    """Three agents that serve one model, whose answers flow for minutes."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, 3)
        self.model = fake_models.write(
            folder / "steady.gguf", end_every=0, delay_s=0.008, name="steady"
        )
        self.asked = 0

    def pull(self) -> None:
        """Everybody has the whole model, so that whoever is left can serve it; it is the newest."""
        for agent in self.agents:
            done = agent.word("pull", str(self.model))
            assert done.returncode == 0, done.stderr

    def answers_rightly(self, *agents: Agent) -> None:
        """A new question to each of these gets the right answer."""
        for agent in agents:
            self.asked += 1
            question = f"question {self.asked}"
            code, body = agent.post("/v1/chat/completions", chat(question, TOKENS))
            assert code == 200, body
            text = body["choices"][0]["message"]["content"]
            assert text == told(self.model, question, TOKENS)


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ring]:
    """Shared by this file's tests; each begins and ends with three agents that serve."""
    house = Ring(tmp_path_factory.mktemp("ring"))
    try:
        house.pull()
        house.start()
        yield house
    finally:
        house.close()


@pytest.fixture(autouse=True)
def whole(ring: Ring) -> Iterator[None]:
    """Every test begins with a whole ring; a failing one shows what its agents logged."""
    with ring.whole(MODEL):
        yield


def pids(agents: Sequence[Agent]) -> list[int]:
    """Of the agents, all of which run."""
    assert all(agent.runs for agent in agents)
    return [agent.pid for agent in agents]


def went_on(ring: Ring, answers: Sequence[Answer]) -> None:
    """Each is whole, right, and ended as any other."""
    for answer in answers:
        answer.ended()
        assert not answer.error, answer.error
        assert not answer.broken, answer.broken
        assert (answer.finish, answer.done) == ("length", True)
        assert answer.text == told(ring.model, "q0", LONG)


def gone(processes: Sequence[psutil.Process], within_s: float) -> None:
    """All of these end by themselves."""
    _, alive = psutil.wait_procs(list(processes), within_s)
    assert not alive, [process.cmdline() for process in alive]


@pytest.mark.parametrize("place", ["head", "middle", "tail"])
def test_a_killed_stage_is_made_up_for(ring: Ring, place: str) -> None:
    plan = ring.serving()
    before = pids(ring.agents)
    owner = ring.ring()[["head", "middle", "tail"].index(place)]
    answers = flowing(ring.agents, tokens=LONG)
    owner.stage(plan).kill()
    until(lambda: ring.serves(ring.agents) not in ("", plan), 30, "all three serve another plan")
    went_on(ring, answers)
    assert pids(ring.agents) == before
    ring.answers_rightly(*ring.agents)


def test_a_killed_text_process_costs_no_answer(ring: Ring) -> None:
    ring.answers_rightly(*ring.agents)
    going = Answer(ring.agents[1], "long", 80).begun()
    for agent in ring.agents:
        (process,) = agent.processes(TEXT)
        process.kill()
    ring.answers_rightly(*ring.agents)
    assert going.ended().text == told(ring.model, "long", 80)
    assert all(len(agent.processes(TEXT)) == 1 for agent in ring.agents)


def test_a_killed_measurement_is_made_again(ring: Ring, tmp_path: Path) -> None:
    plan = ring.serving()
    going = Answer(ring.agents[1], "long", 120).begun()
    other = fake_models.write(tmp_path / "other.gguf", seed=3, name="other")
    assert ring.agents[2].word("pull", str(other)).returncode == 0
    measuring = until(lambda: ring.agents[2].processes(MEASURE), 10, "the new model is measured")
    measuring[0].kill()
    ring.serving(model="other-f32")
    assert "measuring=again" in ring.agents[2].text()
    assert going.ended().text == told(ring.model, "long", 120)
    ring.pull()
    assert ring.serving(model=MODEL) != plan
    ring.answers_rightly(*ring.agents)


def loses(ring: Ring, victim: Agent, within_s: float, at: float) -> list[Agent]:
    """The others notice in time, plan without it and serve; returns them."""
    rest = ring.others(victim)
    for agent in rest:
        until(
            lambda agent=agent: victim.peer_id not in agent.members(),  # type: ignore[misc]
            at + within_s - time.monotonic(),
            "the peer's loss is noticed",
        )
    lost = {p["peer_id"]: p for p in rest[0].status()["peers"] if p["state"] == "lost"}
    assert lost[victim.peer_id]["why"]
    ring.serving(*rest)
    return rest


@pytest.mark.parametrize("role", ["member", "coordinator"])
def test_a_killed_agent_is_noticed_and_planned_without(ring: Ring, role: str) -> None:
    first = ring.coordinator()
    others = ring.others(first)
    victim = first if role == "coordinator" else others[0]
    rest = ring.others(victim)
    before = pids(rest)
    answers = flowing(rest, tokens=LONG)
    with openai.OpenAI(base_url=victim.url, api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(**chat("of the dead", 3000), stream=True)
        chunks = iter(stream)
        assert next(chunks).choices
        children = [*victim.processes(STAGE), *victim.processes(TEXT)]
        assert len(children) == 2
        at = victim.kill()
        gone(children, KILLED_S)
        with pytest.raises(openai.APIError):
            assert [chunk.choices[0].finish_reason for chunk in chunks] == ["never"]
    assert loses(ring, victim, KILLED_S, at) == rest
    went_on(ring, answers)
    assert pids(rest) == before
    ring.answers_rightly(*rest)
    assert all(agent.running() == 0 for agent in rest)
    shown = victim.word("status")  # its file `http` still names an address
    assert (victim.home / "http").exists()
    assert shown.returncode == 3
    assert "not running" in shown.stderr
    peer_id = victim.peer_id
    ring.start(victim)
    assert victim.peer_id == peer_id
    ring.serving()
    ring.answers_rightly(*ring.agents)


@pytest.mark.parametrize("role", ["member", "coordinator"])
def test_a_silent_peer_is_noticed_and_comes_back(ring: Ring, role: str) -> None:
    first = ring.coordinator()
    victim = first if role == "coordinator" else ring.others(first)[1]
    rest = ring.others(victim)
    answers = flowing(rest, tokens=LONG)
    stopped = [victim.pid, *(stage.pid for stage in victim.processes(STAGE))]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        loses(ring, victim, SILENT_S, time.monotonic())
        went_on(ring, answers)
        ring.answers_rightly(*rest)
    finally:
        for pid in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    ring.serving()
    ring.answers_rightly(*ring.agents)
    until(ring.one_stage_each, 15, "older plans are over")
