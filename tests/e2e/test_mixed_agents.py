"""Whole agents of two engines, as a home with Macs has them: one ring, asked over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.e2e.agents import House, until
from tests.e2e.answers import FIRST_S, Answer, chat
from tests.smollm2 import smollm2

pytest.importorskip("mlx.core", reason="the engine is not installed: pip install halka[mlx]")
pytest.importorskip("mlx_lm.models", reason="the engine is not installed: pip install halka[mlx]")

ENGINES = ("llama_cpp", "mlx", "llama_cpp")
SERVE_S = 180.0  # three agents measure one after another, one of them a slow engine
# Near the likeliest all along, whoever computes which layers.
QUESTION, ANSWER = "What is the capital of France, and what is it known for?", "Paris"


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    made = House(tmp_path_factory.mktemp("mixed"), len(ENGINES), HALKA_CONTEXT="1024")
    for agent, engine in zip(made.agents, ENGINES, strict=True):
        agent.environment["HALKA_BACKEND"] = engine
    try:
        done = made.agents[0].word("pull", str(smollm2()))
        assert done.returncode == 0, done.stderr
        made.start()
        with made.watched():
            made.serving(within_s=SERVE_S)
            yield made
    finally:
        made.close()


@pytest.mark.timeout(400)
def test_each_of_them_answers_a_ring_of_both_engines(house: House) -> None:
    texts = []
    for agent in house.agents:
        code, said = agent.post("/v1/chat/completions", chat(QUESTION, 40))
        assert code == 200, said
        texts.append(said["choices"][0]["message"]["content"])
    assert all(ANSWER in text for text in texts), texts
    assert len(set(texts)) == 1
    assert len(texts[0].split()) > 15


def test_status_and_plan_say_which_engine_runs_where(house: House) -> None:
    status = house.agents[0].word("status", "--json")
    peers = json.loads(status.stdout)["peers"]
    by_id = {agent.peer_id: engine for agent, engine in zip(house.agents, ENGINES, strict=True)}
    assert {peer["peer_id"]: peer["backend"] for peer in peers} == by_id
    shown = house.agents[2].word("plan").stdout
    assert "MLX" in shown
    assert "llama.cpp" in shown


@pytest.mark.timeout(300)
def test_an_engine_that_dies_takes_no_agent_down_and_no_answer(house: House) -> None:
    plan = house.serving(within_s=SERVE_S)
    agents = [agent.pid for agent in house.agents]
    answer = Answer(house.agents[2], QUESTION, 60)
    until(lambda: len(answer.texts) > 5, FIRST_S, "the answer is under way")
    house.agents[1].stage(plan).kill()
    answer.join(SERVE_S)
    assert answer.done, answer.error
    assert answer.finish in ("stop", "length")
    assert ANSWER in answer.text
    assert [agent.pid for agent in house.agents if agent.runs] == agents


@pytest.mark.timeout(200)
def test_the_home_goes_on_without_the_mac(house: House) -> None:
    """Last: it takes the second engine away."""
    house.serving(within_s=SERVE_S)
    code, _ = house.agents[1].stop()
    assert code == 0
    rest = [house.agents[0], house.agents[2]]
    until(lambda: house.serves(rest), SERVE_S, "two peers serve without the third")
    code, said = rest[1].post("/v1/chat/completions", chat(QUESTION, 40))
    assert code == 200, said
    assert ANSWER in said["choices"][0]["message"]["content"]
