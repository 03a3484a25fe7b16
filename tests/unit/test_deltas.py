"""models.deltas: any split of the tokens gives the same text, and nothing uncertain is shown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peer.errors import AnswerFailed
from peer.models.deltas import Deltas

BYTES = [bytes([i]) for i in range(256)]


def oracle(data: bytes, stops: list[str]) -> tuple[str, bool]:
    """The shown text, character by character over the whole text: slow and obvious."""
    text = data.decode("utf-8", "replace")
    for end in range(len(text) + 1):
        begins = [end - len(s) for s in stops if s and text[:end].endswith(s)]
        if begins:
            return text[: min(begins)], True
    return text, False


texts = st.text(st.sampled_from("aabcé😀\n\x00�"), max_size=24)
anything = st.one_of(texts.map(str.encode), st.binary(max_size=24))


@given(anything, st.lists(st.text(st.sampled_from("abcé😀�"), max_size=4), max_size=4), st.data())
def test_any_split_of_the_tokens_gives_the_same_text(
    data: bytes, stops: list[str], draw: st.DataObject
) -> None:
    """Bytes are cut into pieces (tokens) and pieces into feeds, at random."""
    pieces, feeds = [], []
    rest = data
    while rest:
        take = draw.draw(st.integers(1, 4))
        pieces.append(rest[:take])
        rest = rest[take:]
    ids = list(range(len(pieces)))
    while ids:
        take = draw.draw(st.integers(1, 5))
        feeds.append(ids[:take])
        ids = ids[take:]
    deltas = Deltas(pieces, stops)
    shown = [deltas.feed(feed) for feed in feeds] + [deltas.flush()]
    assert ("".join(shown), deltas.stopped) == oracle(data, stops)
    one = Deltas(pieces, stops)
    one.feed(range(len(pieces)))
    one.flush()
    assert one.tokens == deltas.tokens


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="�"), max_size=40))
def test_good_text_is_never_shown_with_a_replacement_character(text: str) -> None:
    deltas = Deltas(BYTES)
    shown = "".join(deltas.feed([byte]) for byte in text.encode())
    assert shown == text
    assert deltas.flush() == ""


def test_an_emoji_split_over_four_tokens_comes_whole_with_the_last() -> None:
    deltas = Deltas(BYTES)
    assert [deltas.feed([byte]) for byte in "😀".encode()] == ["", "", "", "😀"]


def test_a_cut_off_character_shows_as_one_replacement_only_at_the_end() -> None:
    deltas = Deltas(BYTES)
    assert deltas.feed("a😀".encode()[:-1]) == "a"
    assert deltas.flush() == "�"


def test_text_that_may_begin_a_stop_string_is_held_back_until_it_is_not() -> None:
    deltas = Deltas(BYTES, ["</end>"])
    assert deltas.feed(b"hi </e") == "hi "
    assert deltas.feed(b"m> there") == "</em> there"
    assert deltas.feed(b" <") == " "
    assert deltas.flush() == "<"


def test_a_stop_string_over_three_tokens_ends_the_text_before_it_and_the_count_at_it() -> None:
    pieces = [b"one ", b"ST", b"O", b"P two", b" three"]
    deltas = Deltas(pieces, ["STOP"])
    assert deltas.feed([0, 1]) == "one "
    assert deltas.feed([2, 3, 4]) == ""
    assert deltas.stopped
    assert deltas.tokens == 4
    assert deltas.feed([4]) == ""
    assert deltas.flush() == ""


def test_of_two_stop_strings_the_one_complete_first_counts() -> None:
    deltas = Deltas(BYTES, ["abcd", "bc"])
    assert deltas.feed(b"xabcd") == "xa"
    assert deltas.stopped


def test_control_tokens_have_no_text_and_are_counted() -> None:
    deltas = Deltas([b"a", b"", b"b"])
    assert deltas.feed([0, 1, 2]) == "ab"
    assert deltas.tokens == 3


@pytest.mark.parametrize("token", [-1, 256, 1 << 40])
def test_a_token_that_the_model_does_not_have_fails_the_answer(token: int) -> None:
    with pytest.raises(AnswerFailed, match=str(token)):
        Deltas(BYTES).feed([token])
