"""`halka chat`: streamed, stopped, broken, measured; a cut answer never passes for a whole one."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from peer import cli
from tests.agent_double import (
    DONE,
    AgentDouble,
    Broken,
    Write,
    a_status,
    event,
    piece,
    usage,
)
from tests.terminal import Terminal, halka


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*os.environ]:
        if name.startswith(("HALKA_", "LC_")) or name in ("NO_COLOR", "LANG", "PYTHONUNBUFFERED"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HALKA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HALKA_HTTP", "127.0.0.1:0")


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[AgentDouble]:
    with AgentDouble(**{"/halka/status": a_status()}) as double:
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / "http").write_text(double.http)
        double.stream = blue
        yield double


def blue(write: Write) -> None:
    """A short good answer."""
    write(b'data: {"choices":[{"delta":{"role":"assistant"},"finish_reason":null}]}\n\n')
    write(b": still here\n\n")
    for text in ("Because ", "of ", "Rayleigh."):
        write(piece(text))
    write(piece(finish="stop") + usage(12, 7) + DONE)


def test_an_answer_is_streamed_and_only_what_was_typed_is_asked_for(
    agent: AgentDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["chat", "Why is the sky blue?"]) == 0
    assert capsys.readouterr().out == "Because of Rayleigh.\n"
    assert cli.main(["chat", "Q", "--temperature", "0", "--max-tokens", "5", "--seed", "9"]) == 0
    assert cli.main(["chat", "Q", "--model", "other"]) == 0
    common = {"stream": True, "stream_options": {"include_usage": True}}
    served = {"model": "smollm2-135m-instruct-q4_1"}
    sky = [{"role": "user", "content": "Why is the sky blue?"}]
    other = [{"role": "user", "content": "Q"}]
    assert agent.asked == [
        common | served | {"messages": sky},
        common | served | {"messages": other, "temperature": 0.0, "max_tokens": 5, "seed": 9},
        common | {"model": "other", "messages": other},
    ]


def test_each_piece_is_shown_before_the_next_one_exists(agent: AgentDouble) -> None:
    seen = threading.Event()

    def stream(write: Write) -> None:
        write(piece("first"))
        assert seen.wait(30)
        write(piece(" second", "stop") + DONE)

    agent.stream = stream
    command = [sys.executable, "-m", "peer", "chat", "Q"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(5) == b"first"
        seen.set()
        assert process.stdout.read() == b" second\n"
        assert process.wait(30) == 0


def test_stats_are_measured_here_and_kept_out_of_the_answer(
    agent: AgentDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["chat", "Q", "--stats"]) == 0
    told = capsys.readouterr()
    assert told.out == "Because of Rayleigh.\n"
    assert re.fullmatch(
        r"TTFT \d+ ms, TPOT \d+\.\d ms \(\d+\.\d tokens/s\), 7 tokens, prompt 12 tokens\n", told.err
    )


def test_an_answer_that_met_its_limit_says_so(
    agent: AgentDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    agent.stream = lambda write: write(piece("Because", "length") + DONE)
    assert cli.main(["chat", "Q"]) == 0
    assert capsys.readouterr().err == "(cut at the token limit)\n"


def test_an_error_in_the_stream_is_said_in_words_and_exits_with_one(
    agent: AgentDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    error = {"error": {"message": "the peer mini is gone", "type": "server_error", "code": None}}
    agent.stream = lambda write: write(piece("Because") + event(error) + DONE)
    assert cli.main(["chat", "Q"]) == 1
    told = capsys.readouterr()
    assert told.out == "Because\n"
    assert told.err == "halka: the peer mini is gone\n"


@pytest.mark.parametrize("end", [b"", DONE, event(b"{"), event(b"[1]")])
def test_an_answer_that_just_ends_is_not_taken_for_complete(
    agent: AgentDouble, capsys: pytest.CaptureFixture[str], end: bytes
) -> None:
    agent.stream = lambda write: write(piece("Because") + end)
    assert cli.main(["chat", "Q"]) == 1
    told = capsys.readouterr()
    assert told.out == "Because\n"
    assert "cut off" in told.err


def test_a_broken_connection_is_one_line_and_exits_with_one(
    agent: AgentDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    def stream(write: Write) -> None:
        write(piece("Because"))
        raise Broken

    agent.stream = stream
    assert cli.main(["chat", "Q"]) == 1
    told = capsys.readouterr()
    assert told.out == "Because\n"
    assert re.match(
        r"halka: the agent at 127.0.0.1:\d+ stopped answering|halka: .*cut off", told.err
    )
    assert "Traceback" not in told.err


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (404, {"error": {"message": "there is no model x; there are: y"}}, "there are: y"),
        (503, {"error": {"message": "no plan: 3 GiB are missing"}}, "3 GiB are missing"),
        (500, b"<html>", "HTTP 500"),
        (400, b"[" * 100_000, "HTTP 400"),
    ],
)
def test_a_refusal_is_said_in_the_agents_own_words(
    agent: AgentDouble, capsys: pytest.CaptureFixture[str], status: int, body: object, said: str
) -> None:
    agent.refusal = (status, body)
    assert cli.main(["chat", "Q"]) == 1
    assert said in capsys.readouterr().err


def test_without_a_model_the_mending_command_is_said(
    agent: AgentDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    agent.answers["/halka/status"] = a_status(model={"id": ""})
    assert cli.main(["chat", "Q"]) == 4
    assert "mend it: get one: halka pull smollm2" in capsys.readouterr().err


def test_a_model_cannot_command_the_terminal(
    agent: AgentDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    agent.stream = lambda write: write(piece("a\x1b[2Jb\x9bc\r\td\n\ud800é👩‍🚀", "stop") + DONE)
    assert cli.main(["chat", "Q"]) == 0
    assert capsys.readouterr().out == "a[2Jbc\td\né👩‍🚀\n"


def test_a_terminal_without_unicode_still_gets_the_answer(agent: AgentDouble) -> None:
    agent.stream = lambda write: write(piece("café", "stop") + DONE)
    assert halka("chat", "Q", PYTHONIOENCODING="ascii").stdout == "caf?\n"


def test_a_question_may_come_from_a_pipe(agent: AgentDouble) -> None:
    command = [sys.executable, "-m", "peer", "chat"]
    done = subprocess.run(command, input="Why?\nWhy?", capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "Because of Rayleigh.\n")
    assert agent.asked[0]["messages"] == [{"role": "user", "content": "Why?\nWhy?"}]


def test_ctrl_c_ends_one_answer_quietly_and_the_agent_notices(agent: AgentDouble) -> None:
    agent.stream = endless(agent)
    command = [sys.executable, "-m", "peer", "chat", "Q"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(10)
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.wait(30) == 130
        assert process.stderr.read() == b""
    assert agent.gone.wait(30)


def test_a_conversation_remembers_forgets_on_new_and_ends_with_ctrl_d(agent: AgentDouble) -> None:
    with Terminal("chat") as terminal:
        terminal.wait_for("Ctrl-D ends")
        terminal.wait_for("› ")
        terminal.type("one\n")
        terminal.wait_for("Because of Rayleigh.")
        terminal.wait_for("› ")
        terminal.type("two\n")
        terminal.wait_for("Because of Rayleigh.")
        terminal.wait_for("› ")
        terminal.type("/new\n")
        terminal.wait_for("a new chat")
        terminal.wait_for("› ")
        terminal.type("three\n")
        terminal.wait_for("Because of Rayleigh.")
        terminal.wait_for("› ")
        terminal.type("\x04")
        assert terminal.ended() == 0
    answer = {"role": "assistant", "content": "Because of Rayleigh."}
    one, two, three = ({"role": "user", "content": text} for text in ("one", "two", "three"))
    assert [asked["messages"] for asked in agent.asked] == [[one], [one, answer, two], [three]]


def test_in_a_conversation_ctrl_c_stops_the_answer_and_not_the_program(agent: AgentDouble) -> None:
    agent.stream = endless(agent)
    with Terminal("chat") as terminal:
        terminal.wait_for("› ")
        terminal.type("one\n")
        terminal.wait_for("more more")
        terminal.type("\x03")
        terminal.wait_for("(stopped)")
        assert agent.gone.wait(30)
        terminal.wait_for("› ")
        terminal.type("\x03")
        terminal.wait_for("Ctrl-D ends")
        agent.stream = blue
        terminal.type("two\n")
        terminal.wait_for("Because of Rayleigh.")
        terminal.wait_for("› ")
        terminal.type("\x04")
        assert terminal.ended() == 0
    assert "Traceback" not in terminal.seen
    assert agent.asked[1]["messages"] == [{"role": "user", "content": "two"}]


def test_in_a_conversation_an_error_is_said_and_the_next_question_may_be_asked(
    agent: AgentDouble,
) -> None:
    agent.refusal = (400, {"error": {"message": "the prompt has 9000 tokens, 8192 fit"}})
    with Terminal("chat") as terminal:
        terminal.wait_for("› ")
        terminal.type("one\n")
        terminal.wait_for("halka: the prompt has 9000 tokens, 8192 fit")
        agent.refusal = None
        terminal.wait_for("› ")
        terminal.type("two\n")
        terminal.wait_for("Because of Rayleigh.")
        terminal.wait_for("› ")
        terminal.type("\x04")
        assert terminal.ended() == 0


def endless(agent: AgentDouble) -> Callable[[Write], None]:
    """An answer that goes on until nobody listens."""

    def stream(write: Write) -> None:
        for _ in range(100_000):
            write(piece("more "))
            if agent.gone.wait(0.002):
                return

    return stream
