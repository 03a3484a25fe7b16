"""Whole agents on loopback: they become one ring, and any of them answers whatever is asked."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import openai
import psutil
import pytest

from tests import fake_models
from tests.e2e.agents import STAGE, START_S, Agent, House, until
from tests.e2e.answers import Answer, chat, told

CONTEXT = 8192
STEADY, SLOW = "steady-f32", "slow-f32"
TOKENS = 24


class Ring(House):
    """Three agents, and two models that can be served: one flows, the other's steps are long."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, 3)
        self.models = {
            STEADY: fake_models.write(
                folder / "steady.gguf", context=CONTEXT, end_every=0, delay_s=0.008, name="steady"
            ),
            SLOW: fake_models.write(
                folder / "slow.gguf", context=CONTEXT, end_every=0, delay_s=0.1, seed=1, name="slow"
            ),
        }

    def use(self, model: str) -> str:
        """See to it that all three serve this model together; the plan's number."""
        if not (plan := self.serves(self.agents[:3], model)):
            self.pull(self.agents[0], model)
            plan = self.serving(*self.agents[:3], model=model)
        return plan

    def pull(self, agent: Agent, model: str) -> None:
        """`halka pull` on one of them."""
        done = agent.word("pull", str(self.models[model]))
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ring]:
    """Shared by this file's tests, each of which leaves three agents that serve."""
    house = Ring(tmp_path_factory.mktemp("ring"))
    try:
        house.pull(house.agents[0], STEADY)
        house.start()
        yield house
    finally:
        house.close()


@pytest.fixture(autouse=True)
def logs(ring: Ring) -> Iterator[None]:
    """A failing test shows what its agents logged."""
    with ring.watched():
        yield


def test_three_agents_become_one_ring(ring: Ring) -> None:
    plan = ring.use(STEADY)
    seen = [agent.status() for agent in ring.agents]
    assert len({status["cluster"]["coordinator"] for status in seen}) == 1
    assert {status["model"]["plan"] for status in seen} == {plan}
    for agent, status in zip(ring.agents, seen, strict=True):
        assert [p["peer_id"] for p in status["peers"] if p["me"]] == [agent.peer_id]
        assert sum(p["coordinator"] for p in status["peers"]) == 1
        layers = sorted(tuple(window) for p in status["peers"] for window in p["layers"])
        assert layers[0][0] == 0
        assert layers[-1][1] == 12
        assert all(a[1] == b[0] for a, b in pairwise(layers))
        assert status["problems"] == []
        assert agent.request("GET", "/health") == (200, {"status": "ok"})
        # Those of earlier plans, made before all three were there, end as soon as they are drained.
        until(lambda agent=agent: len(agent.processes(STAGE)) == 1, START_S, "one stage a peer")


def test_every_peer_gives_the_one_right_answer(ring: Ring) -> None:
    ring.use(STEADY)
    truth = told(ring.models[STEADY], "What is a ring?", TOKENS)
    for agent in ring.agents:
        with openai.OpenAI(base_url=agent.url, api_key="none", max_retries=0) as client:
            assert [model.id for model in client.models.list() if model.id == STEADY] == [STEADY]
            ask = chat("What is a ring?", TOKENS, model=STEADY)
            whole = client.chat.completions.create(**ask)
            assert whole.choices[0].message.content == truth
            assert whole.usage
            assert whole.usage.completion_tokens == TOKENS
            text = ""
            for chunk in client.chat.completions.create(**ask, stream=True):
                text += chunk.choices[0].delta.content or ""
            assert text == truth


def test_status_is_one_screen_and_an_exit_code(ring: Ring) -> None:
    plan = ring.use(STEADY)
    shown = ring.agents[1].word("status", COLUMNS="100")
    assert shown.returncode == 0, shown.stdout
    assert len(shown.stdout.splitlines()) <= 24
    for words in (
        "halka is running", STEADY, f"serving as plan {plan}", "Peers    3 in cluster",
        ring.agents[1].url, "coordinator", "any peer on this network",
    ):  # fmt: skip
        assert words in shown.stdout
    as_json = ring.agents[2].word("status", "--json")
    assert json.loads(as_json.stdout)["me"]["peer_id"] == ring.agents[2].peer_id
    assert ring.agents[2].word("plan", "--json").returncode == 0


def test_thirty_clients_at_once_all_get_right_answers(ring: Ring) -> None:
    ring.use(STEADY)
    questions = [f"question {i}" for i in range(30)]

    def ask(i: int) -> str:
        agent = ring.agents[i % 3]
        code, body = agent.post("/v1/chat/completions", chat(questions[i], 10 + i))
        assert code == 200, body
        return str(body["choices"][0]["message"]["content"])

    with ThreadPoolExecutor(30) as clients:
        texts = list(clients.map(ask, range(30)))
    model = ring.models[STEADY]
    assert texts == [told(model, question, 10 + i) for i, question in enumerate(questions)]
    assert all(agent.running() == 0 for agent in ring.agents)


def test_bad_questions_are_refused_and_good_ones_go_on(ring: Ring) -> None:
    ring.use(STEADY)
    agent, url = ring.agents[2], "/v1/chat/completions"
    going = Answer(ring.agents[0], "long", 150).begun()
    long = "x" * (CONTEXT + 1)
    for body, code, name in (
        (chat(long, 5), 400, "context_length_exceeded"),
        (chat("hi", 5, model="gpt-7"), 404, "model_not_found"),
        (chat("hi", 5, temperature="warm"), 400, "temperature"),
        (chat("hi", 5, top_p=-3), 400, "top_p"),
        (chat("hi", -1), 400, "max_tokens"),
        ({"model": "", "messages": [{"role": 7}]}, 400, "messages"),
        (b'{"messages": [', 400, "invalid_json"),
        (b'{"messages": "\xff\xfe"}', 400, "invalid_json"),
        (b"[1, 2, 3]", 400, "invalid_json"),
    ):
        got, problem = agent.post(url, body)
        assert got == code, problem
        error = problem["error"]
        assert error["type"]
        assert name in f"{error['code']} {error['param']} {error['message']}", error
        if code == 404:
            assert STEADY in error["message"]
    code, body = agent.post(url, chat("good", TOKENS))
    assert code == 200
    assert body["choices"][0]["message"]["content"] == told(ring.models[STEADY], "good", TOKENS)
    assert going.ended().text == told(ring.models[STEADY], "long", 150)


def test_a_peer_joins_and_leaves_without_harm_to_an_answer(ring: Ring) -> None:
    before = ring.use(STEADY)
    old_stages = [agent.stage(before) for agent in ring.agents]
    newcomer = ring.add()
    try:
        going = Answer(ring.agents[0], "long", 400).begun()
        ring.start(newcomer)
        after = ring.serving()
        assert after != before
        answered = Answer(newcomer, "new", TOKENS).ended()
        assert answered.text == told(ring.models[STEADY], "new", TOKENS)
        assert not going.ended_s, "it should have outlasted the change of plan; make it longer"
        assert all(stage.is_running() for stage in old_stages)
        assert going.ended().text == told(ring.models[STEADY], "long", 400)
        assert (going.finish, going.error) == ("length", "")
        _, alive = psutil.wait_procs(old_stages, 15)
        assert not alive, "stages of the old plan are left"
        assert [len(agent.processes(STAGE)) for agent in ring.agents] == [1, 1, 1, 1]
    finally:
        code, took_s = newcomer.stop()
        ring.agents.remove(newcomer)
    assert code == 0
    assert took_s < 5
    assert newcomer.processes("peer") == []
    assert not (newcomer.home / "http").exists()
    ring.serving()
    last = Answer(ring.agents[1], "new", TOKENS).ended()
    assert last.text == told(ring.models[STEADY], "new", TOKENS)


def test_the_model_pulled_last_is_served_next(ring: Ring) -> None:
    before = ring.use(STEADY)
    going = Answer(ring.agents[1], "long", 300).begun()
    ring.pull(ring.agents[2], SLOW)
    after = ring.serving(model=SLOW)
    assert after != before
    for agent in ring.agents:
        code, body = agent.post("/v1/chat/completions", chat("new", 5))
        assert code == 200, body
        assert body["model"] == SLOW
        assert body["choices"][0]["message"]["content"] == told(ring.models[SLOW], "new", 5)
    assert not going.ended_s, "it should have outlasted the change of plan; make it longer"
    assert going.ended().text == told(ring.models[STEADY], "long", 300)
    code, body = ring.agents[0].post("/v1/chat/completions", chat("new", 5, model=STEADY))
    assert code == 503
    assert "another model" in body["error"]["message"]


# Clients that go away -----------------------------------------------------------------------------


def woken(stages: list[psutil.Process]) -> list[int]:
    """How often each stage's loop woke up so far. An idle one sleeps in one place."""
    return [stage.num_ctx_switches().voluntary for stage in stages]


def at_rest(stages: list[psutil.Process]) -> Callable[[], bool]:
    """Whether no stage computed for a second. One that rests is woken by its agent's question
    whether it is at work, and now and then to tell numbers; one that computes the slow model, more
    than twice for each of three or more steps."""
    last = [(time.monotonic(), woken(stages))]

    def look() -> bool:
        at, before = last[0]
        if time.monotonic() - at < 1.0:
            return False
        last[0] = (time.monotonic(), woken(stages))
        return all(now - then <= 3 for then, now in zip(before, last[0][1], strict=True))

    return look


def test_computation_stops_when_the_client_is_gone(ring: Ring) -> None:
    plan = ring.use(SLOW)
    stages = [agent.stage(plan) for agent in ring.agents]
    answer = Answer(ring.agents[1], "gone", 3000).begun()
    before = woken(stages)
    until(lambda: all(map(int.__lt__, before, woken(stages))), 2, "every stage computes")
    answer.leave()
    until(lambda: ring.agents[1].running() == 0, 1, "the entry ended the answer")
    until(at_rest(stages), 4, "every stage rests")


def test_a_long_prompt_is_read_no_further_when_its_client_is_gone(ring: Ring) -> None:
    plan = ring.use(SLOW)
    stages = [agent.stage(plan) for agent in ring.agents]
    answer = Answer(ring.agents[0], "y" * (CONTEXT - 100), 10)
    until(lambda: ring.agents[0].running() == 1, 10, "the prompt is being read")
    assert not answer.texts
    answer.leave()
    # 16 chunks of 0.3 s: what is not stopped goes on for five seconds.
    until(lambda: ring.agents[0].running() == 0, 1, "the entry ended the answer")
    until(at_rest(stages), 4, "every stage rests")


def test_slots_of_clients_that_left_are_free_at_once(ring: Ring) -> None:
    ring.use(SLOW)
    full = [Answer(ring.agents[i % 3], f"q{i}", 3000).begun(1) for i in range(8)]
    ninth = Answer(ring.agents[2], "ninth", 4)
    until(lambda: ring.agents[2].running() == 3, 5, "the ninth waits")
    assert not ninth.texts
    for answer in full:
        answer.leave()
    assert ninth.ended(5).text == told(ring.models[SLOW], "ninth", 4)
