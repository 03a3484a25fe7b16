"""What a user sees of the command itself: speed, exit codes, one line of cause and one of mend."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from peer import cli
from peer.errors import ConfigError
from peer.words import run as run_word
from tests.agent_double import AgentDouble, a_peer, a_status
from tests.plans import PEERS, plan
from tests.terminal import Terminal, halka, on_a_terminal, unused_port

HEAVY = {"aiohttp", "zmq", "zeroconf", "rich", "numpy", "jinja2", "psutil", "llama_cpp", "asyncio"}


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*os.environ]:
        if name.startswith(("HALKA_", "LC_")) or name in ("NO_COLOR", "LANG", "PYTHONUNBUFFERED"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HALKA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HALKA_HTTP", "127.0.0.1:0")


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[AgentDouble]:
    """A double whose address stands where an agent would write it."""
    with AgentDouble(**{"/halka/status": a_status(), "/halka/plan": None}) as double:
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / "http").write_text(double.http + "\n")
        yield double


def quickest(limit_s: float, *command: str) -> float:
    """Seconds of the quickest run so far, once one is below the limit: the machine may be busy."""
    best = float("inf")
    for _ in range(40):
        began = time.perf_counter()
        subprocess.run(command, stdout=subprocess.DEVNULL, timeout=60, check=True)
        best = min(best, time.perf_counter() - began)
        if best < limit_s:
            break
    return best


def test_importing_the_command_is_quick_and_loads_nothing_heavy() -> None:
    script = (
        "import sys; before = set(sys.modules); import peer.cli; print(*set(sys.modules) - before)"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert not HEAVY & {name.partition(".")[0] for name in loaded.stdout.split()}
    assert quickest(0.150, sys.executable, "-c", "import peer.cli") < 0.150


def test_status_is_drawn_within_two_hundred_milliseconds(agent: AgentDouble) -> None:
    assert quickest(0.200, sys.executable, "-m", "peer", "status") < 0.200


def test_status_answers_its_five_questions_on_one_screen(
    agent: AgentDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["status"]) == 0
    shown = capsys.readouterr().out
    assert "halka is running on desk for 2 h 3 min" in shown
    assert 'Peers    3 in cluster "home", coordinator attic, term 3' in shown
    assert "smollm2-135m-instruct-q4_1 · 30 layers · 8192 tokens of context" in shown
    assert re.search(r"╭▸ desk +█+·+ 0–11 +serving +70.0 MiB", shown)
    assert re.search(r"│  attic +·+█+·+ 12–20 +serving", shown)
    assert re.search(r"╰─ mini +·+█+ 21–29 +serving", shown)
    assert "http://127.0.0.1:42552/v1" in shown
    assert "any peer on this network that speaks halka's protocol may join" in shown
    assert len(shown.splitlines()) <= 24
    assert max(map(len, shown.splitlines())) <= 80


def test_status_with_problems_says_each_with_its_mend_and_exits_with_four(
    agent: AgentDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    problem = {"what": "the disk is full", "mend": "free 2 GiB under /nowhere/halka"}
    refused = {"address": "10.0.0.9:5", "why": "it speaks protocol 2, here 1", "ago_s": 61.0}
    agent.answers["/halka/status"] = a_status(problems=[problem], refused=[refused])
    assert cli.main(["status"]) == 4
    shown = capsys.readouterr().out
    assert "halka is degraded" in shown
    assert "✗ the disk is full\n    mend it: free 2 GiB under /nowhere/halka\n" in shown
    assert "10.0.0.9:5: it speaks protocol 2, here 1 (1 min 1 s ago)" in shown


def test_status_shows_how_far_a_peer_has_fetched_and_why_one_failed(
    agent: AgentDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    fetching = {"phase": "fetching", "done_bytes": 43, "total_bytes": 100}
    peers = [
        a_peer("a", "desk", me=True, layers=[[0, 15]], **fetching),
        a_peer("b", "attic", layers=[[15, 30]], phase="failed", why="out of memory"),
        a_peer("c", "mini", state="lost", why="silent for 4 s"),
    ]
    agent.answers["/halka/status"] = a_status(peers=peers)
    cli.main(["status"])
    shown = capsys.readouterr().out
    assert re.search(r"desk +█{6}▒{7}·{13} 0–14 +fetching 43%", shown)
    assert re.search(r"attic .* failed\n +out of memory", shown)
    assert re.search(r"mini +gone, .*\n +silent for 4 s", shown)
    assert 'Peers    2 in cluster "home", no coordinator yet' in shown


def test_status_before_there_is_a_model_says_how_to_get_one(
    agent: AgentDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    agent.answers["/halka/status"] = a_status(model={"id": "", "phase": "none"})
    assert cli.main(["status"]) == 0
    assert "none yet\n         get one: halka pull smollm2" in capsys.readouterr().out


def test_peers_of_the_same_name_are_told_apart(
    agent: AgentDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    peers = [a_peer("a", "laptop-of-ada", layers=[[0, 15]]), a_peer("b", "laptop-of-ada")]
    agent.answers["/halka/status"] = a_status(peers=peers)
    cli.main(["status"])
    shown = capsys.readouterr().out
    assert "laptop-of aaaa" in shown
    assert "laptop-of bbbb" in shown


def test_status_as_json_is_what_the_agent_said(
    agent: AgentDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    said = a_status(problems=[{"what": "x", "mend": "y"}], of_a_later_version=True)
    agent.answers["/halka/status"] = said
    assert cli.main(["status", "--json"]) == 4
    assert json.loads(capsys.readouterr().out) == said


def test_without_an_agent_every_question_exits_with_three_and_says_how_to_start_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "http").write_text(f"127.0.0.1:{unused_port()}")  # of one that was killed
    for argv in (["status"], ["status", "--json"], ["plan"], ["chat", "hello"], ["leave"]):
        assert cli.main(argv) == 3
        told = capsys.readouterr()
        assert told.out == ""
        assert re.fullmatch(
            r"halka: halka is not running: no agent answers at 127.0.0.1:\d+\n"
            r"  mend it: start it: .*(halka run|systemctl|launchctl).*\n",
            told.err,
        )


def test_another_program_on_the_port_is_not_taken_for_an_agent(
    agent: AgentDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    del agent.answers["/halka/status"]
    assert cli.main(["status"]) == 3
    assert "what answers at" in capsys.readouterr().err


@pytest.mark.parametrize("body", [b"<html>", b"{}", b'{"version": 3}', b"\xff\xfe", b"[" * 100_000])
def test_an_answer_that_is_no_status_is_one_line_and_no_traceback(
    agent: AgentDouble, capsys: pytest.CaptureFixture[str], body: bytes
) -> None:
    agent.answers["/halka/status"] = body
    assert cli.main(["status"]) == 1
    told = capsys.readouterr().err.splitlines()
    assert "does not understand" in told[0]
    assert told[1].startswith("  mend it: ")
    assert len(told) == 2


def test_names_and_reasons_from_other_peers_cannot_command_the_terminal(
    agent: AgentDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "\x1b]0;owned\x07\x9b31m\r\n\u202egnp\u2028\x00"
    status = a_status(
        peers=[
            a_peer("a", evil, os=evil, address=evil, layers=[[0, 30]], phase=evil, why=evil),
            a_peer("b", evil, why=evil, engines=[{"device": evil, "kind": "cuda"}]),
        ],
        problems=[{"what": evil, "mend": evil}],
        refused=[{"address": evil, "why": evil, "ago_s": 1.0}],
    )
    for part in ("me", "cluster", "model"):
        status[part] = {k: evil if isinstance(v, str) else v for k, v in status[part].items()}
    status["me"]["home"] = "/nowhere"
    status["version"] = evil
    of = plan(15, 30, left_out=())
    split = msgspec.structs.replace(of.split, why=evil)
    shape = msgspec.structs.replace(of.shape, model=evil)
    evil_plan = msgspec.structs.replace(of, split=split, shape=shape)
    agent.answers["/halka/status"] = status
    agent.answers["/halka/plan"] = msgspec.to_builtins(evil_plan) | {"phase": evil}
    agent.answers["/v1/models"] = {"data": [{"id": evil}]}
    for argv in (["status"], ["status", "--json"], ["plan"], ["plan", "--json"], ["models"]):
        cli.main(argv)
        told = capsys.readouterr()
        assert told.out
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\u2028]", told.out + told.err), argv


def test_plan_says_who_runs_what_and_why_others_do_not(
    agent: AgentDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    left = [{"peer_id": PEERS[2], "why": "it has 120 MiB of memory, a layer needs 300 MiB"}]
    made = json.loads(msgspec.json.encode(plan(7, 12))) | {"phase": "serving"}
    made["split"]["left_out"] = left
    agent.answers["/halka/plan"] = made
    assert cli.main(["plan"]) == 0
    shown = capsys.readouterr().out
    assert "Plan 1.1 for tiny, serving" in shown
    assert "12 layers · 2 peers · 1 round · 1024 tokens of context · 8 slots" in shown
    assert re.search(r"╭▸ desk +█+·+ 0–6 +head +8.8 KiB", shown)  # 7 layers and the embedding
    assert re.search(r"╰─ attic +·+█+ 7–11 +tail +6.8 KiB", shown)
    assert "desk: fake, planned 8.8 KiB, used 70.0 MiB (weights 70.0 MiB," in shown
    assert "Without layers\n  mini: it has 120 MiB of memory, a layer needs 300 MiB" in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert cli.main(["plan", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == made


def test_plan_in_two_rounds_shows_both_windows_of_each_peer(
    agent: AgentDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    made = plan(3, 6, 9, 12)
    windows = tuple(
        msgspec.structs.replace(window, peer_id=PEERS[i % 2])
        for i, window in enumerate(made.split.windows)
    )
    made = msgspec.structs.replace(made, split=msgspec.structs.replace(made.split, windows=windows))
    agent.answers["/halka/plan"] = msgspec.to_builtins(made)
    assert cli.main(["plan"]) == 0
    shown = capsys.readouterr().out
    assert "2 rounds" in shown
    assert re.search(r"desk +█+·+█+·+ 0–2\+6–8 ", shown)
    assert re.search(r"attic +·+█+·+█+ 3–5\+9–11", shown)


def test_without_a_plan_the_reason_is_said_and_the_exit_code_is_four(
    agent: AgentDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    agent.answers["/halka/status"] = a_status(
        model={"id": "big", "phase": "none", "why": "3.1 GiB of memory are missing"}
    )
    assert cli.main(["plan"]) == 4
    assert "There is no plan for big: 3.1 GiB of memory are missing" in capsys.readouterr().out
    assert cli.main(["plan", "--json"]) == 4
    assert json.loads(capsys.readouterr().out) is None


@pytest.mark.parametrize(
    "argv", [[], ["dance"], ["status", "--jsno"], ["chat", "--seed", "x"], ["chat", ""], ["pull"]]
)
def test_what_is_not_understood_exits_with_two(
    agent: AgentDouble, capsys: pytest.CaptureFixture[str], argv: list[str]
) -> None:
    try:
        code: Any = cli.main(argv)
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    assert capsys.readouterr().err.strip()


def test_a_setting_that_cannot_be_used_is_one_line_and_exits_with_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", "--backend", "abacus"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "--backend: `backend` is one of auto, llama_cpp, mlx, fake, not 'abacus'" in told
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "config.toml").write_text("cluster = [")
    assert cli.main(["run"]) == 2
    assert "config.toml" in capsys.readouterr().err


def test_a_mistake_of_our_own_is_one_line_and_a_traceback_only_on_demand(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stumble(args: object) -> int:
        raise KeyError("slot 3")

    monkeypatch.setattr("peer.words.status.command", stumble)
    monkeypatch.setattr(run_word, "command", stumble)
    assert cli.main(["status"]) == 1
    told = capsys.readouterr().err
    assert "KeyError: 'slot 3'" in told
    assert "Traceback" not in told
    monkeypatch.setenv("HALKA_LOG", "debug")
    assert cli.main(["status"]) == 1
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.delenv("HALKA_LOG")
    assert cli.main(["run"]) == 1  # of a service: its log is all that is left
    assert "Traceback" in capsys.readouterr().err


def test_what_failed_inside_of_the_agents_tasks_is_said_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stumble(args: object) -> int:
        error = ConfigError("127.0.0.1:42552 is taken; set HALKA_HTTP to another address")
        raise ExceptionGroup("unhandled", [ExceptionGroup("errors", [error])])

    monkeypatch.setattr(run_word, "command", stumble)
    assert cli.main(["run"]) == 2
    told = capsys.readouterr().err
    assert told == "halka: 127.0.0.1:42552 is taken; set HALKA_HTTP to another address\n"


def test_a_terminal_without_unicode_is_given_plain_characters(agent: AgentDouble) -> None:
    for change in ({"LC_ALL": "C"}, {"LC_ALL": "de_DE.ISO-8859-1"}, {"PYTHONIOENCODING": "ascii"}):
        done = halka("status", **change)
        assert done.returncode == 0
        assert done.stdout.isascii()
        assert re.search(r",> desk +#+\.+ 0-11 +serving", done.stdout)
    assert "█" in halka("status", LC_ALL="C.UTF-8").stdout


def test_colour_only_on_a_terminal_and_where_it_is_wanted(agent: AgentDouble) -> None:
    assert "\x1b" not in halka("status").stdout
    assert "\x1b[" in on_a_terminal("status")
    assert "\x1b" not in on_a_terminal("status", NO_COLOR="1")
    assert "\x1b" not in on_a_terminal("status", TERM="dumb")


def test_a_reader_that_had_enough_is_no_error(agent: AgentDouble) -> None:
    peers = [a_peer("a", "x" * 64, why="y " * 500) for _ in range(64)]
    agent.answers["/halka/status"] = a_status(peers=peers * 4)
    command = [sys.executable, "-m", "peer", "status", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(30) == 0


def test_watching_goes_on_until_ctrl_c_and_ends_without_a_traceback(agent: AgentDouble) -> None:
    with Terminal("status", "--watch") as terminal:
        terminal.wait_for("22 served")
        agent.answers["/halka/status"] = a_status(answers={"served": 23})
        terminal.wait_for("23 served")
        terminal.type("\x03")
        assert terminal.ended() == 0
    assert "Traceback" not in terminal.seen


def test_watching_survives_an_agent_that_goes_away(agent: AgentDouble, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "peer", "status", "--watch", "--json"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert json.loads(process.stdout.readline())["version"] == "0.1.0"
        (tmp_path / "home" / "http").write_text(f"127.0.0.1:{unused_port()}")
        assert "halka is not running" in process.stderr.readline()
        (tmp_path / "home" / "http").write_text(agent.http)
        assert json.loads(process.stdout.readline())["version"] == "0.1.0"
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert "Traceback" not in process.stderr.read()


def test_version_is_said() -> None:
    assert re.fullmatch(r"halka \d+\.\d+\.\d+\n", halka("--version").stdout)
