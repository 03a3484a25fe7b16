"""`halka models` and `halka pull`: from the disk, from the agent, and into whose home."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from peer import cli
from peer.models.imports import import_gguf
from peer.models.store import Store
from peer.words import pull
from tests import fake_models
from tests.agent_double import AgentDouble, a_status
from tests.terminal import on_a_terminal


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [*os.environ]:
        if name.startswith(("HALKA_", "LC_")) or name in ("NO_COLOR", "LANG", "PYTHONUNBUFFERED"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HALKA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HALKA_HTTP", "127.0.0.1:0")
    return tmp_path / "home"


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return fake_models.write(tmp_path / "small.gguf", layers=6, name="small")


def test_without_an_agent_the_models_on_disk_are_listed(
    home: Path, gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import_gguf(gguf, Store(home))
    lacking = import_gguf(
        fake_models.write(tmp_path / "o.gguf", layers=3, seed=1, name="other"), Store(home)
    )
    (home / "models" / lacking.digest / "layer-001.gguf").unlink()
    assert cli.main(["models"]) == 0
    told = capsys.readouterr()
    assert re.search(r"small-f32 +6 +\d+\.\d KiB +complete\n", told.out)
    assert re.search(r"other-f32 +3 +\d+\.\d KiB +5 of 6\n", told.out)
    assert "no agent is running" in told.err
    assert cli.main(["models", "--json"]) == 0
    listed = {model["id"]: model for model in json.loads(capsys.readouterr().out)}
    assert listed["small-f32"]["complete"] is True
    assert listed["other-f32"]["complete"] is False
    assert listed["other-f32"]["parts_here"] == 5


def test_a_running_agent_says_what_the_cluster_has_and_serves(
    home: Path, gguf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import_gguf(gguf, Store(home))
    status = a_status()
    status["me"]["home"] = str(home)
    status["model"]["id"] = "small-f32"
    offers = {"object": "list", "data": [{"id": "small-f32"}, {"id": "elsewhere-q8_0"}]}
    with AgentDouble(**{"/halka/status": status, "/v1/models": offers}) as double:
        assert cli.main(["models", "--http", double.http]) == 0
    told = capsys.readouterr()
    assert re.search(r"small-f32 +6 .* complete +serves\n", told.out)
    assert re.search(r"elsewhere-q8_0 +nothing +has it\n", told.out)
    assert told.err == ""


def test_an_empty_machine_is_told_how_to_begin_and_stays_empty(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["models"]) == 0
    assert "Get one: halka pull smollm2" in capsys.readouterr().out
    assert not home.exists()


def test_pulling_a_file_shows_progress_and_says_what_comes_next(
    home: Path, gguf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["pull", str(gguf)]) == 0
    told = capsys.readouterr()
    assert told.err == "pulling small.gguf\n"  # a second was not over
    assert re.match(r"small-f32 is here: 6 layers, \d+\.\d KiB, in ", told.out)
    assert "start it: halka run" in told.out
    assert [model.complete for model in Store(home).models()] == [True]


def test_pulling_on_a_terminal_draws_a_bar_and_takes_it_away(home: Path, gguf: Path) -> None:
    seen = on_a_terminal("pull", str(gguf))
    assert "━" in seen
    assert "small-f32 is here" in seen


def test_progress_without_a_terminal_is_a_line_every_ten_percent_and_second(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(pull.time, "monotonic", lambda: now)
    with pull.shown("fetching") as update:
        for percent in range(101):
            now += 0.3
            update(percent << 20, 100 << 20)
    shown = capsys.readouterr().err.splitlines()
    assert shown[:3] == ["fetching", "fetching: 10 % of 100.0 MiB", "fetching: 20 % of 100.0 MiB"]
    assert len(shown) == 11


def test_a_pull_goes_to_the_agent_that_runs_here_unless_another_home_is_named(
    home: Path,
    gguf: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    service = tmp_path / "service"
    status = a_status()
    status["me"]["home"] = str(service)
    monkeypatch.delenv("HALKA_HOME")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "mine"))
    with AgentDouble(**{"/halka/status": status}) as double:
        monkeypatch.setenv("HALKA_HTTP", double.http)
        assert cli.main(["pull", str(gguf)]) == 0
        assert "the running agent sees it within seconds" in capsys.readouterr().out
        assert cli.main(["pull", str(gguf), "--home", str(home)]) == 0
        assert "no agent is running on this machine yet" in capsys.readouterr().out
    assert len(Store(service).models()) == len(Store(home).models()) == 1


def test_the_services_home_is_not_written_to_but_the_command_that_may_is_said(
    home: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "models").mkdir(parents=True)
    monkeypatch.setattr(os, "access", deny(home / "models"))
    assert cli.main(["pull", str(gguf)]) == 1
    owner = Path(home).owner()
    told = capsys.readouterr()
    assert f"{home / 'models'} belongs to {owner}" in told.err
    assert f"  mend it: sudo -u {owner} halka pull --home {home} {gguf}\n" in told.err
    assert list((home / "models").iterdir()) == []


@pytest.mark.parametrize("name", ["nothing-of-that-name", "\x1b[31m", "a\x00b", "/", "x" * 5000])
def test_what_is_no_model_is_one_line_and_exits_with_one(
    home: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert cli.main(["pull", name]) == 1
    told = capsys.readouterr().err
    assert "is neither a file nor a model that halka knows by name" in told
    assert not re.search("[\x00-\x09\x0b-\x1f]", told)


def deny(folder: Path) -> Callable[[Path, int], bool]:
    """os.access, as another user has it. (Root, which tests often are, may do everything.)"""
    real = os.access
    return lambda path, mode: Path(path) != folder and real(path, mode)
