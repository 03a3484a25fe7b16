"""`halka plan` against real agents: what it predicts and took, what if, saved and planned again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import fake_models
from tests.e2e.agents import START_S, Agent, House, until
from tests.e2e.answers import chat


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    """Two agents."""
    house = House(tmp_path, 2)
    try:
        with house.watched():
            yield house
    finally:
        house.close()


def planned(agent: Agent, *words: str) -> dict[str, Any]:
    done = agent.word("plan", *words, "--json")
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_a_cluster_tells_what_it_plans_with_and_what_a_token_took_and_is_asked_what_if(
    house: House,
) -> None:
    house.start()
    first, second = house.agents
    model = fake_models.write(house.folder / "elm.gguf", end_every=0, name="elm")
    assert first.word("pull", str(model)).returncode == 0
    house.serving(model="elm-f32", within_s=2 * START_S)  # speeds are measured first

    code, basis = second.request("GET", "/halka/profiles")
    assert code == 200
    peers = {first.peer_id, second.peer_id}
    assert {profile["peer_id"] for profile in basis["profiles"]} == peers
    assert basis["shape"]["model"] == "elm-f32"
    assert basis["plan"]["shape"] == basis["shape"]
    assert basis["coordinator"] in peers
    layers = basis["shape"]["layers"]
    assert {f"layer-{i:03d}" for i in range(layers)} <= set(basis["held"][first.peer_id])

    running = planned(first)
    assert running["forecast"]["tpot_s"] > 0
    assert {peer["peer_id"] for peer in running["forecast"]["peers"]} == peers
    shown = first.word("plan").stdout
    assert "TPOT  predicted" in shown

    assert first.post("/v1/chat/completions", chat("hello", 40))[0] == 200

    def told(agent: Agent) -> bool:
        """Of every stage: a peer that does not coordinate hears it with the plans."""
        timed = planned(agent)["timed"].get("peers", {})
        return {peer for peer, took in timed.items() if took.get("decode_s")} == peers

    for agent in house.agents:
        until(lambda agent=agent: told(agent), START_S, "what all stages' steps took is known")
        shown = " ".join(agent.word("plan").stdout.split())
        assert shown.count("ms measured") == 2
        assert shown.count(", used ") == 2

    alone = planned(first, "--only", second.peer_id[:6])
    assert {w["peer_id"] for w in alone["then"]["split"]["windows"]} == {second.peer_id}
    assert alone["now"]["split"] == running["split"]
    assert alone["now"]["forecast"]["tpot_s"] > 0
    saved = house.folder / "home.json"
    assert first.word("plan", "--save", str(saved)).returncode == 0
    house.close()
    offline = planned(first, "--profiles", str(saved), "--only", second.peer_id[:6])
    assert offline["then"]["split"] == alone["then"]["split"]
