"""What others wrote cannot forge a line of the log, nor speak to the terminal."""

from __future__ import annotations

import io
import logging

import pytest

from peer.logs import clean, harmless


@pytest.fixture
def lines() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def log(lines: io.StringIO) -> logging.Logger:
    made = logging.Logger("halka.test")
    handler = logging.StreamHandler(lines)
    handler.setFormatter(logging.Formatter("%(name)s %(message)s"))
    harmless(handler)
    made.addHandler(handler)
    return made


@pytest.mark.parametrize(
    "name",
    [
        "x\n2026-01-01 INFO halka.agent all is well",
        "\x1b[31mred",
        "\x9b31m",
        "\u202egnihton",
        "\r",
        "\ud800",
    ],
)
def test_a_name_of_another_peer_stays_on_its_line(
    log: logging.Logger, lines: io.StringIO, name: str
) -> None:
    log.info("joined=%s name=%s", "peer", name)
    text = lines.getvalue()
    assert text.startswith("halka.test joined=peer name=")
    assert text.endswith("\n")
    assert text[:-1].isprintable()


def test_what_people_write_stays_as_it_is(log: logging.Logger, lines: io.StringIO) -> None:
    log.info("name=%s", "Jürgens Büro 東京 100 %")
    assert lines.getvalue() == "halka.test name=Jürgens Büro 東京 100 %\n"


def test_a_traceback_keeps_its_lines_and_loses_its_escapes(
    log: logging.Logger, lines: io.StringIO
) -> None:
    try:
        raise ValueError("\x1b[2J")
    except ValueError:
        log.exception("ended")
    assert "Traceback (most recent call last):\n" in lines.getvalue()
    assert "ValueError: \\x1b[2J\n" in lines.getvalue()


def test_every_other_character_is_left() -> None:
    assert clean("a b-ä\\n") == "a b-ä\\n"
    assert clean("a\tb") == "a\\tb"
