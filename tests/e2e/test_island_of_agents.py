"""Two pretended Macs on one cable: their agents make an island of them, and part again."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest

from peer.models.imports import import_gguf
from peer.models.store import Store
from peer.planning.profile import Port
from tests.e2e.agents import Agent, House, until

pytest.importorskip("mlx.core", reason="the engine is not installed: pip install halka[mlx]")
pytest.importorskip("llama_cpp", reason="the engine is not installed: pip install halka[llama]")

from tests.mlx_models import written

SERVE_S = 120.0
CABLE = (Port("AAAAAAAA", "BBBBBBBB", "1", "en1"), Port("BBBBBBBB", "AAAAAAAA", "1", "en1"))
PROMPT = [5, 9, 2, 44, 17, 8, 30, 21]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("island")
    path = written("llama", folder / "model.gguf")
    made = House(folder, 2, HALKA_ISLANDS="auto", HALKA_BACKEND="mlx", HALKA_SPREAD="auto")
    for agent, port in zip(made.agents, CABLE, strict=True):
        agent.environment["CABLED_PORTS"] = msgspec.json.encode([port]).decode()
        agent.module = "tests.cabled_agent"
    import_gguf(path, Store(made.agents[0].home))
    try:
        with made.watched():
            yield made
    finally:
        made.close()


def answered(agent: Agent) -> str:
    """The greedy answer to PROMPT."""
    body = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0, "model": ""}
    code, said = agent.post("/v1/completions", body)
    assert code == 200, said
    assert said["usage"]["completion_tokens"] == 24
    return str(said["choices"][0]["text"])


@pytest.mark.timeout(300)
def test_two_macs_become_an_island_answer_alike_and_go_on_alone(house: House) -> None:
    first, second = house.agents
    house.start(first)
    house.serving(first, within_s=SERVE_S)
    alone = answered(first)
    assert alone

    house.start(second)
    house.serving(first, second, within_s=SERVE_S)
    shown = {tuple(map(tuple, peer["layers"])) for peer in second.status()["peers"]}
    assert len(shown) == 1, "both have all layers"
    assert [answered(agent) for agent in house.agents] == [alone, alone]

    second.kill()
    until(lambda: house.serves([first]), SERVE_S, "the first one serves alone again")
    assert answered(first) == alone
