"""words.leave: what is waited for is shown once, Ctrl-C takes it back, and the way back is told."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from peer import cli
from peer.words import leave
from peer.words.leave import progress
from peer.words.state import Going
from tests.agent_double import AgentDouble, Broken, Write
from tests.terminal import Terminal

LOADING = {"phase": "loading", "model": "smollm2", "peers": ["attic", "mini"]}


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AgentDouble]:
    """A double whose address stands where an agent would write it."""
    monkeypatch.setenv("HALKA_HOME", str(tmp_path))
    monkeypatch.delenv("HALKA_HTTP", raising=False)
    monkeypatch.setattr(leave, "start_command", lambda: "sudo systemctl start halka")
    with AgentDouble() as double:
        (tmp_path / "http").write_text(double.http + "\n")
        yield double


def tells(agent: AgentDouble, steps: Sequence[dict[str, Any]], end: bytes = b"[DONE]") -> None:
    """The agent's progress."""

    def stream(write: Write) -> None:
        for step in steps:
            write(b"data: " + json.dumps(step).encode() + b"\n\n")
        if not end:
            raise Broken
        write(b"data: " + end + b"\n\n")

    agent.stream = stream


def test_it_shows_each_step_once_and_how_to_come_back(
    agent: AgentDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    fetching = [{**LOADING, "done_bytes": d, "total_bytes": 1000} for d in (10, 11, 460, 469, 990)]
    steps = [
        {"phase": "asking"},
        {"phase": "asking"},
        *fetching,
        {**LOADING, "phase": "draining", "of_a_later_version": 1},
        {"phase": "answers", "running": 1},
        {"phase": "gone"},
    ]
    tells(agent, steps)
    assert cli.main(["leave"]) == 0
    shown = capsys.readouterr()
    assert shown.err.splitlines() == [
        "asking the others to take over",
        "attic and mini: fetching smollm2, 0 % of 1000 B",
        "attic and mini: fetching smollm2, 40 % of 1000 B",
        "attic and mini: fetching smollm2, 90 % of 1000 B",
        "attic and mini took over; the answers go over to the new ring",
        "finishing 1 answer of this peer's own clients",
    ]
    assert shown.out.splitlines() == [
        "attic and mini took over, and the agent has ended.",
        "To come back: sudo systemctl start halka",
    ]


@pytest.mark.parametrize(
    ("why", "line"),
    [
        ("", "Nobody needed this peer, and the agent has ended."),
        (
            "nobody can take over: 2 GiB are missing",
            "The agent has ended, but not everything was handed over: "
            "nobody can take over: 2 GiB are missing.",
        ),
    ],
)
def test_it_says_what_was_left_behind(
    agent: AgentDouble, capsys: pytest.CaptureFixture[str], why: str, line: str
) -> None:
    tells(agent, [{"phase": "gone", "why": why}])
    assert cli.main(["leave"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == line


def test_ctrl_c_takes_it_back(agent: AgentDouble) -> None:
    def stream(write: Write) -> None:
        write(b"data: " + json.dumps(LOADING).encode() + b"\n\n")
        deadline_s = time.monotonic() + 20
        while "/halka/stay" not in agent.posted and time.monotonic() < deadline_s:
            agent.gone.wait(0.01)

    agent.stream, agent.answers["/halka/stay"] = stream, {"leaving": ""}
    with Terminal("leave") as terminal:
        terminal.wait_for("attic and mini: loading smollm2")
        terminal.type("\x03")
        terminal.wait_for("this peer stays")
        assert terminal.ended() == cli.INTERRUPTED
    assert agent.posted == ["/halka/leave", "/halka/stay"]


@pytest.mark.parametrize(
    ("steps", "end", "why"),
    [
        ([{"phase": "stays"}], b"[DONE]", "somebody else has taken it back"),
        ([LOADING], b"", "ended before it said that others have taken over"),
        ([LOADING], b"[DONE]", "ended before it said that others have taken over"),
        ([{"phase": 7}], b"[DONE]", "does not understand"),
    ],
)
def test_what_did_not_end_well_is_no_success(
    agent: AgentDouble,
    capsys: pytest.CaptureFixture[str],
    steps: list[dict[str, Any]],
    end: bytes,
    why: str,
) -> None:
    tells(agent, steps, end)
    assert cli.main(["leave"]) == 1
    assert why in capsys.readouterr().err


def test_without_an_agent_nothing_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HALKA_HOME", str(tmp_path))
    monkeypatch.setenv("HALKA_HTTP", "127.0.0.1:0")
    assert cli.main(["leave"]) == 3
    assert "halka is not running" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("going", "line"),
    [
        (Going("alone", running=2), "nobody can take over; finishing 2 answers"),
        (
            Going("alone", running=1, why="2 GiB are missing"),
            "nobody can take over: 2 GiB are missing; finishing 1 answer",
        ),
        (Going("loading", "m", ("a",)), "a: loading m"),
        (Going("draining", "m", ("a", "b", "c")), "a, b and c took over; "),
    ],
)
def test_what_a_step_is_called(going: Going, line: str) -> None:
    assert progress(going).startswith(line)


def test_a_name_cannot_move_the_cursor(
    agent: AgentDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    tells(agent, [{**LOADING, "peers": ["at\x1b[2Jtic"]}, {"phase": "gone"}])
    assert cli.main(["leave"]) == 0
    shown = capsys.readouterr()
    assert "\x1b" not in shown.err + shown.out
    assert "at?[2Jtic" in shown.out
