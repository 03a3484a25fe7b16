"""What is written on a terminal: its width, its characters, sizes that people read, the ring."""

from __future__ import annotations

import io
import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peer.words import ring
from peer.words.screen import Screen, cells_of, duration, prose, size

WINDOWS = st.lists(st.integers(1, 60), min_size=1, max_size=12)


@given(st.text(), st.booleans())
def test_cleaned_text_is_one_line_that_a_terminal_only_shows(text: str, fine: bool) -> None:
    cleaned = Screen(unicode=fine).clean(text)
    assert cleaned.isprintable()
    assert "\n" not in cleaned
    assert fine or cleaned.isascii()


@given(st.text())
def test_an_answer_keeps_its_lines_and_loses_what_a_terminal_obeys(text: str) -> None:
    kept = prose(text)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", kept)
    assert kept.count("\n") == text.count("\n")


@given(st.text(st.characters(categories=["L", "N", "P", "M"])), st.integers(1, 40))
def test_fitted_text_takes_exactly_its_cells(text: str, cells: int) -> None:
    assert cells_of(Screen().fit(text, cells)) == cells


@given(st.lists(st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=60)))
def test_wrapped_text_keeps_every_word_within_the_width(words: list[str]) -> None:
    screen = Screen(width=80)
    lines = screen.wrap(" ".join(words), "  - ", "    ")
    assert all(cells_of(line) <= 80 or len(line.split()) <= 2 for line in lines)
    assert " ".join(lines).split()[1:] == screen.clean(" ".join(words)).split()


@given(WINDOWS, st.integers(60, 100), st.booleans())
def test_the_ring_shows_every_layer_once_and_stays_within_the_width(
    lengths: list[int], width: int, fine: bool
) -> None:
    bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    rows = [
        ring.Row(f"peer {i}", ((first, last),), "serving", right="100.0 MiB")
        for i, (first, last) in enumerate(pairwise(bounds))
    ]
    lines = ring.draw(Screen(width=width, unicode=fine), bounds[-1], rows)
    full, empty = ("█", "·") if fine else ("#", ".")
    bars = [re.search(f"[{full}{empty}]{{6,}}", line) for line in lines]
    drawn = [bar[0] for bar in bars if bar]
    assert len(drawn) == len(rows)
    assert all(full in bar for bar in drawn)
    assert all(any(bar[cell] == full for bar in drawn) for cell in range(len(drawn[0])))
    assert all(cells_of(line) <= width for line in lines)


@pytest.mark.parametrize(
    ("count_bytes", "shown"),
    [(0, "0 B"), (1023, "1023 B"), (1 << 20, "1.0 MiB"), ((1 << 30) - 1, "1.0 GiB"),
     (16 << 30, "16.0 GiB"), (3 << 40, "3.0 TiB")],
)  # fmt: skip
def test_sizes_are_read_at_a_glance(count_bytes: int, shown: str) -> None:
    assert size(count_bytes) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(-1, "0 s"), (59.9, "59 s"), (60, "1 min"), (3599, "59 min 59 s"), (7384, "2 h 3 min"),
     (86400, "1 d"), (400 * 86400, "400 d")],
)  # fmt: skip
def test_durations_are_read_at_a_glance(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


class Terminal(io.TextIOWrapper):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("environment", "colour", "unicode"),
    [
        ({}, True, True),
        ({"LANG": "en_GB.UTF-8"}, True, True),
        ({"LANG": "en_GB.UTF-8", "LC_ALL": "C"}, True, False),
        ({"LANG": "C", "LC_CTYPE": "de_DE.utf8"}, True, True),
        ({"NO_COLOR": "1"}, False, True),
        ({"NO_COLOR": ""}, True, True),
        ({"TERM": "dumb"}, False, True),
    ],
)
def test_a_terminal_is_taken_for_what_its_environment_says(
    environment: dict[str, str], colour: bool, unicode: bool
) -> None:
    with Terminal(io.BytesIO(), encoding="utf-8") as stream:
        screen = Screen.of(stream, environment)
    assert (screen.colour, screen.unicode) == (colour, unicode)
