"""`halka bench` against agents that run: its figures, its exit codes, and nothing left behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from peer.words.bench_runs import AT_ONCE, QUICK
from tests import fake_models
from tests.e2e.agents import START_S, Agent, House, until

WHOLE = "peer.bench.whole"


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """Two agents that serve a model whose answers end early. Only the first has all of it."""
    folder = tmp_path_factory.mktemp("bench")
    model = fake_models.write(folder / "model.gguf", end_every=5, delay_s=0.001)
    made = House(folder, 2, HALKA_SPARE="0")
    try:
        done = made.agents[0].word("pull", str(model))
        assert done.returncode == 0, done.stderr
        made.start()
        made.serving()
        yield made
    finally:
        made.close()


@contextmanager
def begun(agent: Agent, *words: str) -> Iterator[subprocess.Popen[str]]:
    """`halka bench` as a process that can be interrupted; gone afterwards."""
    process = subprocess.Popen(
        [sys.executable, "-m", "peer", "bench", *words],
        env=agent.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture(autouse=True)
def logs(house: House) -> Iterator[None]:
    """A failing test shows what the agents logged."""
    with house.watched():
        yield


def test_every_figure_is_there_beside_the_whole_model_in_one_process(house: House) -> None:
    first = house.agents[0]
    done = first.word("bench", "--quick", "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    setup = found["setup"]
    assert setup["plan"] == first.status()["model"]["plan"]
    assert [len(machine["layers"]) for machine in setup["machines"]] == [1, 1]
    assert found["alone"] == found["alone"] | {"measured": True, "threads": 1, "why": ""}
    for name in ("decode", "prefill"):
        of = found[name]
        assert of["ratio"] == pytest.approx(of["ring"] / of["whole"]), name
    assert QUICK.tokens[0] <= found["decode"]["tokens"] <= QUICK.tokens[1]
    assert found["prefill"]["tokens"] >= QUICK.prompt[0] * 0.8
    assert [many["answers"] for many in found["many"]] == list(AT_ONCE)
    for many in found["many"]:
        assert 1 <= many["together"] <= min(many["answers"], setup["slots"])
        assert (many["failed"], many["why"]) == (0, "")
        assert many["tokens_per_s"] > 0
        assert many["whole"] > 0
        # The model would have ended each of them after about 5.
        if not many["cut"]:
            assert many["tokens"] >= many["answers"] * QUICK.tokens[0]
    assert found["many"][3]["together"] > 1
    assert found["reuse"]["second_ttft_s"] > 0
    assert [stage["decode_s"] > 0 for stage in found["stages"]] == [True, True]
    assert f"[1/{6 + len(AT_ONCE)}]" in done.stderr, "what it is at is told"
    assert not first.processes(WHOLE)
    until(lambda: first.running() == 0, START_S, "no answer of it runs any more")


def test_a_peer_without_the_whole_model_says_so_and_measures_the_ring(house: House) -> None:
    second = house.agents[1]
    with begun(second, "--quick") as bench:
        until(lambda: second.running() > 0, START_S, "it goes on and asks the ring")
        bench.send_signal(signal.SIGINT)
        said = " ".join(bench.communicate(timeout=START_S)[1].split())
    assert "of the model's parts mend it: halka pull" in said
    assert not second.processes(WHOLE)


def test_ctrl_c_ends_the_answers_and_the_process(house: House) -> None:
    first = house.agents[0]
    with begun(first) as bench:
        until(lambda: first.processes(WHOLE), START_S, "the whole model's process runs")
        until(lambda: first.running() > 0, START_S, "an answer runs")
        bench.send_signal(signal.SIGINT)
        out, said = bench.communicate(timeout=START_S)
    assert bench.returncode == 130, said
    assert out == ""
    assert "Traceback" not in said
    assert not first.processes(WHOLE)
    until(lambda: first.running() == 0, START_S, "its answers have ended")


def test_a_ring_that_answers_others_is_said_to_be_busy(house: House) -> None:
    first = house.agents[0]
    body = {"prompt": "go on", "max_tokens": 3000, "ignore_eos": True, "stream": True}
    asking = subprocess.Popen(
        [sys.executable, "-c", ASK, *map(str, first.address), json.dumps(body)],
        stdout=subprocess.DEVNULL,
    )
    try:
        until(lambda: first.running() > 0, START_S, "an answer runs")
        with begun(first, "--quick") as bench:
            assert bench.stderr is not None
            line = bench.stderr.readline()
            bench.send_signal(signal.SIGINT)
            bench.communicate(timeout=START_S)
        assert "busy with 1 other answer" in line
    finally:
        asking.kill()
        asking.wait()


# A client that reads a stream until it is ended.
ASK = """
import http.client, sys
connection = http.client.HTTPConnection(sys.argv[1], int(sys.argv[2]))
headers = {"Content-Type": "application/json"}
connection.request("POST", "/v1/completions", sys.argv[3], headers)
response = connection.getresponse()
while response.readline():
    pass
"""
