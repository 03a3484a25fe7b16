"""backends.llama_cpp.vocabulary: a model's words from head.gguf alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.base import BackendFault, Vocabulary
from backends.llama_cpp import ENGINE
from peer.models.imports import import_gguf
from peer.models.store import Store
from tests.random_models import Model, write_head
from tests.smollm2 import smollm2


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    return ENGINE.vocabulary(write_head(Model("llama"), tmp_path_factory.mktemp("v") / "head.gguf"))


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    store = Store(tmp_path_factory.mktemp("home"))
    folder = store.folder(import_gguf(smollm2(), store).digest)
    return ENGINE.vocabulary(folder / "head.gguf")


def test_control_tokens_end_answers_and_have_no_bytes(tiny: Vocabulary) -> None:
    pieces = tiny.pieces()
    assert tiny.ends == {2}
    assert tiny.starts_with == (1,)
    assert pieces[1] == pieces[2] == b""
    assert pieces[3 + 0xC3] == b"\xc3"
    assert tiny.text_of(1) == "<s>"
    assert tiny.text_of(2) == "</s>"
    assert tiny.text_of(10**6) == tiny.text_of(-1) == ""


@given(text=st.text(max_size=40).filter(lambda t: "\0" not in t))
def test_pieces_give_the_text_back(tiny: Vocabulary, text: str) -> None:
    pieces = tiny.pieces()
    given_back = b"".join(pieces[token] for token in tiny.encode(text, special=False))
    expected = text.encode()
    assert given_back in (expected, b" " + expected)  # SentencePiece begins with a space


def test_spellings_of_control_tokens_are_only_read_where_asked(real: Vocabulary) -> None:
    ids = real.encode("<|im_start|>user", special=True)
    assert real.text_of(ids[0]) == "<|im_start|>"
    assert len(ids) == 2
    plain = real.encode("<|im_start|>user", special=False)
    assert b"".join(real.pieces()[i] for i in plain) == b"<|im_start|>user"


def test_a_real_vocabulary_has_a_piece_for_every_id(real: Vocabulary) -> None:
    pieces = real.pieces()
    assert len(pieces) == 49152
    assert real.text_of(2) == "<|im_end|>"
    assert 2 in real.ends
    assert pieces[2] == b""
    text = "Grüße, 世界! 🐝\n\tdef f(x):"
    assert b"".join(pieces[i] for i in real.encode(text, special=False)).decode() == text
    assert real.encode("", special=True) == []


def test_a_long_text_is_one_call_away(real: Vocabulary) -> None:
    assert len(real.encode("honey " * 20000, special=False)) >= 20000


def test_files_without_words_are_errors(tmp_path: Path) -> None:
    (tmp_path / "odd.gguf").write_bytes(b"GGUF" + b"\xff" * 60)
    with pytest.raises(BackendFault, match="no usable tokenizer"):
        ENGINE.vocabulary(tmp_path / "odd.gguf")
    with pytest.raises(BackendFault, match="no usable tokenizer"):
        ENGINE.vocabulary(tmp_path / "missing.gguf")
