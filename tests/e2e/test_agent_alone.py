"""One agent and its user: how it starts, what it refuses, what it says, how it ends."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import fake_models
from tests.e2e.agents import START_S, Agent, House, until
from tests.e2e.answers import chat, told


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    """One agent, not started."""
    house = House(tmp_path, 1)
    try:
        with house.watched():
            yield house
    finally:
        house.close()


def refusal(agent: Agent, **settings: str) -> str:
    """What an agent that does not start says, on one line."""
    done = agent.word("run", **settings)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("halka: ")]
    return line


def test_an_agents_life_as_its_user_sees_it(house: House) -> None:
    (agent,) = house.agents
    shown = agent.word("status")
    assert shown.returncode == 3
    assert "not running" in shown.stderr
    assert "halka run" in shown.stderr

    house.start()
    until(lambda: "no model" in str(agent.status()["problems"]), START_S, "it misses a model")
    shown = agent.word("status")
    assert shown.returncode == 4
    assert "halka is degraded" in shown.stdout
    assert "halka pull smollm2" in shown.stdout
    shown = agent.word("plan")
    assert shown.returncode == 4
    assert "no model yet" in shown.stdout
    assert agent.word("plan", "--json").stdout.strip() == "null"
    code, body = agent.post("/v1/chat/completions", chat("hi", 5))
    assert code == 503
    assert "halka pull" in body["error"]["message"]

    model = fake_models.write(house.folder / "elm.gguf", end_every=0, name="elm")
    assert agent.word("pull", str(model)).returncode == 0
    house.serving(model="elm-f32")
    assert agent.word("status").returncode == 0
    asked = agent.word("chat", "hello", "--temperature", "0", "--max-tokens", "20")
    assert asked.stdout.strip() == told(model, "hello", 20).strip()

    line = refusal(agent)  # a second one on the same folder
    assert "already" in line
    assert str(agent.home) in line
    other = house.add()
    taken = "{}:{}".format(*agent.address)
    assert f"port {agent.address[1]} is taken" in refusal(other, HALKA_HTTP=taken)
    assert agent.status()["model"]["phase"] == "serving"

    code, took_s = agent.stop()
    assert (code, took_s < 5) == (0, True), took_s
    assert not (agent.home / "http").exists()
    assert agent.processes("peer") == []
    assert agent.word("status").returncode == 3
    assert agent.word("chat", "hello").returncode == 3


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"HALKA_BACKEND": "cuda"}, "HALKA_BACKEND: `backend` is one of auto"),
        ({"HALKA_HTTP": "42552"}, "HALKA_HTTP: '42552' is not host:port"),
        ({"HALKA_HTTP": "0.0.0.0:0"}, "listens on this machine only"),
        ({"HALKA_MEMORY": "much"}, "HALKA_MEMORY: `memory` is a size such as 8GiB"),
    ],
)
def test_a_setting_that_cannot_be_ends_the_start(
    house: House, settings: dict[str, str], says: str
) -> None:
    assert says in refusal(house.agents[0], **settings)


def test_a_broken_settings_file_is_named(house: House) -> None:
    (agent,) = house.agents
    (agent.home / "config.toml").write_text("context = [")
    line = refusal(agent)
    assert str(agent.home / "config.toml") in line


# A full disk --------------------------------------------------------------------------------------

SMALL, ENOUGH = "size=1m", "size=32m"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB."""
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("mounting a small tmpfs takes root and mount")
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", SMALL, "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_named_planned_around_and_mended(small_disk: Path, house: House) -> None:
    roomy = house.agents[0]
    full = house.add(small_disk / "home")
    model = fake_models.write(
        house.folder / "big.gguf", end_every=0, layer_bytes=1 << 20, name="big"
    )
    assert roomy.word("pull", str(model)).returncode == 0
    house.start()
    house.serving(roomy)
    for agent in (roomy, full):
        until(lambda agent=agent: "no space left" in str(agent.status()), 10, "it is told")  # type: ignore[misc]
        left_out = [peer for peer in agent.status()["peers"] if not peer["layers"]]
        assert [peer["peer_id"] for peer in left_out] == [full.peer_id]
        assert str(small_disk) in left_out[0]["why"]
        code, body = agent.post("/v1/chat/completions", chat("hi", 10))
        assert code == 200, body
        assert body["choices"][0]["message"]["content"] == told(model, "hi", 10)
    assert "no space left" in full.text()
    shown = full.word("status")
    assert shown.returncode == 4
    assert "this peer could not take part" in shown.stdout
    assert roomy.word("status").returncode == 0
    subprocess.run(["mount", "-o", f"remount,{ENOUGH}", str(small_disk)], check=True)
    house.serving(within_s=60)
    code, body = full.post("/v1/chat/completions", chat("again", 10))
    assert body["choices"][0]["message"]["content"] == told(model, "again", 10)
    assert full.word("status").returncode == 0
