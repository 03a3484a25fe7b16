"""Spare parts in whole agents: the only peer that had a model dies, and the others serve it on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests import fake_models
from tests.e2e.agents import Agent, House, until
from tests.e2e.answers import chat, told

MODEL = "fake-f32"
TOKENS = 16
SPARED_S = 40.0  # an outlook may come 5 s after the plan, and parts a second each after it


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Some 2.5 MiB in 14 parts."""
    return fake_models.write(tmp_path / "fake.gguf", end_every=0, layer_bytes=200 << 10)


@pytest.fixture
def house(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[House]:
    """Three agents that are not started; settings from the test's parameter."""
    house = House(tmp_path, 3, **getattr(request, "param", {}))
    try:
        with house.watched():
            yield house
    finally:
        house.close()


def begin(house: House, model: Path) -> Agent:
    """All serve the model, which only the first has in full."""
    first = house.agents[0]
    done = first.word("pull", str(model))
    assert done.returncode == 0, done.stderr
    house.start()
    house.serving(*house.agents, model=MODEL)
    return first


def parts(agent: Agent) -> set[str]:
    """Names of the parts that are on its disk."""
    return {path.name for path in (agent.home / "models").glob("*/[!.]*.gguf")}


def outcomes(agent: Agent) -> dict[str, str]:
    """By peer id, what it says of each loss."""
    return {loss["peer_id"]: loss["outcome"] for loss in agent.status().get("losses", ())}


def asks(agent: Agent) -> str:
    """The answer to one question."""
    with openai.OpenAI(base_url=agent.url, api_key="none", max_retries=0) as client:
        whole: Any = client.chat.completions.create(**chat("What is a ring?", TOKENS, model=MODEL))
        return str(whole.choices[0].message.content)


def test_the_death_of_the_only_peer_that_had_the_model_is_survived(
    house: House, model: Path
) -> None:
    first = begin(house, model)
    others = house.others(first)
    everything = parts(first)
    assert len(everything) == 15
    fine = {agent.peer_id: "fine" for agent in house.agents}
    for agent in house.agents:
        until(lambda a=agent: outcomes(a) == fine, SPARED_S, "every loss is survived")  # type: ignore[misc]
    for part in everything:
        assert sum(part in parts(agent) for agent in house.agents) >= 2, part
    shown = others[0].word("status")
    assert shown.returncode == 0
    assert "Survives the loss of any one of its 3 peers\n" in shown.stdout
    assert any("spares=held" in agent.text() for agent in others)
    assert asks(others[0]) == told(model, "What is a ring?", TOKENS)

    had = {agent.number: parts(agent) for agent in others}
    assert had[2] | had[3] == everything
    first.kill()
    house.serving(*others, model=MODEL)
    for agent in others:
        assert asks(agent) == told(model, "What is a ring?", TOKENS)
    # Nothing went from peer to peer for it: what each runs was there before.
    ring = house.ring()
    assert {agent.number for agent in ring} == {2, 3}
    for agent in others:
        windows = next(p["layers"] for p in agent.status()["peers"] if p["me"])
        for layer in range(*windows[0]):
            assert f"layer-{layer:03d}.gguf" in had[agent.number]
    # And again: of the two that are left each may go.
    fine = {agent.peer_id: "fine" for agent in others}
    until(lambda: outcomes(others[0]) == fine, SPARED_S, "every loss is survived again")
    assert parts(others[0]) == parts(others[1]) == everything


@pytest.mark.parametrize("house", [{"HALKA_SPARE": "off"}], indirect=True)
def test_without_spare_parts_status_says_whose_loss_would_end_answers_and_what_to_set(
    house: House, model: Path
) -> None:
    first = begin(house, model)
    until(lambda: outcomes(first), SPARED_S, "losses are foreseen")
    found = outcomes(house.agents[2])
    assert found[first.peer_id] == "none"
    for agent in house.others(first):  # the first can give whatever those who stay would need
        assert found[agent.peer_id] in ("fine", "fetch")
    shown = house.agents[1].word("status").stdout
    assert "Survives the loss of 2 of its 3 peers\n" in shown
    flat = re.sub(r"\s+", " ", shown)
    assert "answers end: " in flat
    assert re.search(r"\d parts? of fake-f32 .*(is|are) nowhere else", flat), flat
    assert "set `spare` there" in flat
    assert all("spares=wanted" not in agent.text() for agent in house.agents)
