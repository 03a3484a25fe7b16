"""How the words find the agent of this machine, and what they say where there is none."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from peer.errors import CommandError
from peer.words.agent import Agent, start_command
from tests.agent_double import AgentDouble, a_status
from tests.terminal import unused_port


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("HALKA_HTTP", raising=False)
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def test_the_address_that_the_agent_wrote_is_asked_before_the_settings_one(home: Path) -> None:
    with AgentDouble(**{"/halka/status": a_status()}) as double:
        (home / "config.toml").write_text(f'http = "127.0.0.1:{unused_port()}"')
        (home / "http").write_text(double.http + "\n")
        agent = Agent(str(home))
        assert agent.status().me.name == "desk"
        assert agent.address == double.http


def test_after_a_crash_the_address_left_behind_does_not_hide_the_settings_one(home: Path) -> None:
    with AgentDouble(**{"/halka/status": a_status()}) as double:
        (home / "config.toml").write_text(f'http = "{double.http}"')
        for left in (
            f"127.0.0.1:{unused_port()}",
            "",
            "nonsense",
            "127.0.0.1:0",
            "\xff",
            "a:99999",
        ):
            (home / "http").write_text(left, encoding="latin-1")
            assert Agent(str(home)).status().me.name == "desk"


def test_an_address_that_was_typed_is_the_only_one_asked(home: Path) -> None:
    with AgentDouble(**{"/halka/status": a_status()}) as double:
        (home / "http").write_text(double.http)
        with pytest.raises(CommandError, match="no agent answers at") as said:
            Agent(str(home), f"127.0.0.1:{unused_port()}").status()
        assert said.value.exit_code == 3
        assert Agent(str(home), double.http).status().me.name == "desk"


def test_an_agent_that_listens_everywhere_is_asked_on_this_machine(home: Path) -> None:
    with AgentDouble(**{"/halka/status": a_status()}) as double:
        port = double.http.rpartition(":")[2]
        assert Agent(str(home), f"0.0.0.0:{port}").status().me.name == "desk"


def test_how_to_start_the_agent_follows_how_it_was_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    if sys.platform == "darwin":
        plist = tmp_path / "Library/LaunchDaemons/dev.halka.agent.plist"
        plist.parent.mkdir(parents=True)
        plist.touch()
        assert start_command(tmp_path) == "sudo launchctl kickstart system/dev.halka.agent"
        return
    assert start_command(tmp_path) == "halka run"
    unit = tmp_path / "usr/lib/systemd/user/halka.service"
    unit.parent.mkdir(parents=True)
    unit.touch()
    assert start_command(tmp_path) == "systemctl --user start halka"
    unit = tmp_path / "etc/systemd/system/halka.service"
    unit.parent.mkdir(parents=True)
    unit.touch()
    assert start_command(tmp_path) == "sudo systemctl start halka"


def test_a_home_without_an_agent_is_named(home: Path) -> None:
    with pytest.raises(CommandError, match=f"{home} has no agent"):
        Agent(str(home), "127.0.0.1:0").status()
