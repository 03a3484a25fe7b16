"""The KV cache of windows: its types, its size, and slots that share a beginning."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.base import BackendFault, Settings
from backends.llama_cpp import ENGINE
from tests.plain_llama import PlainLlama
from tests.random_models import write
from tests.rule_models import MODELS
from tests.smollm2 import smollm2
from tests.windows import Stored, all_edges, story

SETTINGS = Settings(slots=4, kv_cells=2048, batch_tokens=512, threads=1, gpu_layers=0)
CACHES = ["llama", "gemma3", "openelm-heads", "deci-heads", "deepseek2-moe", "glm-dsa-moe"]
CACHES += ["dots3note-moe", "minimax-m3-moe"]  # layers alike, and not; one row for all heads


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    return Stored(smollm2(), tmp_path_factory.mktemp("home"))


@pytest.mark.parametrize(("kv_type", "flash"), [("q8_0", "auto"), ("q8_0", "on"), ("f16", "off")])
@pytest.mark.parametrize(
    ("name", "edges"),
    [("smollm2", (15,)), ("gemma3", (1, 3)), ("deepseek2-moe", (2,)), ("minimax-m3-moe", (3,))],
)
def test_windows_equal_the_whole_model_whatever_its_kv_cache_and_attention(
    tmp_path: Path, stored: Stored, name: str, edges: tuple[int, ...], kv_type: str, flash: str
) -> None:
    model, path = stored, smollm2()
    if name != "smollm2":
        path = write(MODELS[name], tmp_path / "model.gguf")
        model = Stored(path, tmp_path)
    kinds = {"kv_type": kv_type, "flash": flash}
    with PlainLlama(path, cells=2048, batch=512, slots=4, **kinds) as whole:
        expected = story(whole, whole.trim, whole.copy, whole.words)
        words = whole.words
    with PlainLlama(path, cells=2048, batch=512, slots=4) as usual:
        other = story(usual, usual.trim, usual.copy, words)
    with model.cut(edges, replace(SETTINGS, kv_type=kv_type, flash=flash)) as ring:
        given = story(ring, ring.backend.trim, ring.backend.copy, words)
    for ours, theirs in zip(given, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    same = all(np.array_equal(a, b) for a, b in zip(given, other, strict=True))
    assert not same, "the settings did not reach libllama"


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
@pytest.mark.parametrize("name", CACHES)
def test_a_kv_cache_takes_what_the_header_says(tmp_path: Path, name: str, kv_type: str) -> None:
    stored = Stored(write(MODELS[name], tmp_path / "model.gguf"), tmp_path)
    assert kv_type in ENGINE.kv_types(stored.header)
    settings = Settings(1, 4096, 32, 1, 0, kv_type)
    each = ENGINE.kv_bytes_per_cell(stored.header, kv_type)
    backend = ENGINE.open(settings)
    try:
        at = all_edges(stored.cuts)[0][0]
        for first, last in ((0, 6), (0, at), (at, 6)):
            used = backend.load(stored.window(first, last)).kv_bytes
            # libllama says its sizes in MiB with two digits, of at most two caches
            assert abs(used - 4096 * sum(each[first:last])) < 0.011 * (1 << 20)
    finally:
        backend.close()


def test_a_kv_cache_that_cannot_be_is_refused_and_the_setting_named(
    tmp_path: Path, stored: Stored
) -> None:
    grok = Stored(write(MODELS["grok-moe"], tmp_path / "model.gguf"), tmp_path)
    for model, settings, why in (
        (stored, replace(SETTINGS, kv_type="q8_0", flash="off"), "set kv_type to f16, or flash to"),
        (stored, replace(SETTINGS, kv_type="q4_0"), "of type q4_0: set kv_type to f16 or q8_0"),
        (stored, replace(SETTINGS, flash="maybe"), "flash is auto or on or off, not maybe"),
        (grok, replace(SETTINGS, kv_type="q8_0"), "cannot be of type q8_0: set kv_type to f16"),
    ):
        with pytest.raises(BackendFault, match=why) as caught, model.cut((), settings):
            pass
        assert caught.value.kind == "refused"


def test_where_libllama_has_no_flash_attention_eight_bits_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU that lacks it, which no header can tell: grok stands for it here."""
    monkeypatch.setattr("backends.llama_cpp.window.check_cache", lambda *_: None)
    grok = Stored(write(MODELS["grok-moe"], tmp_path / "model.gguf"), tmp_path)
    settings = replace(SETTINGS, kv_type="q8_0")
    with pytest.raises(BackendFault, match="set kv_type to f16") as caught, grok.cut((), settings):
        pass
    assert caught.value.kind == "refused"


@pytest.mark.parametrize("name", ["llama", "gemma3", "falcon-h1", "mamba2", "qwen35"])
def test_what_can_be_rewound_is_told_by_the_header(tmp_path: Path, name: str) -> None:
    stored = Stored(write(MODELS[name], tmp_path / "model.gguf"), tmp_path)
    with stored.cut((), SETTINGS) as ring:
        ring.step([5, 6, 7, 8], range(4))
        try:
            ring.backend.trim(0, 2)
        except BackendFault:
            assert not ENGINE.rewinds(stored.header)
        else:
            assert ENGINE.rewinds(stored.header)


@pytest.mark.parametrize(("name", "close"), [("smollm2", None), ("llama", 0.02)])
def test_a_copied_beginning_goes_on_as_if_each_sequence_had_been_alone(
    tmp_path: Path, stored: Stored, name: str, close: float | None
) -> None:
    """A slot that goes on decoding lends its first positions; then either is trimmed.

    To the bit as long as every sequence's cells lie in the order of its positions. A cell that a
    trim sets free is the next that anyone takes; then attention adds up in another order, which is
    rounding (close: the most that it makes of a model in float32; a wrong cell makes 1 and more).
    """
    model, words = stored, 49000
    if name != "smollm2":
        model, words = Stored(write(MODELS[name], tmp_path / "model.gguf"), tmp_path), 290
    ids = np.random.default_rng(11).integers(3, words, 140).tolist()
    said = [ids[:90], ids[:40] + ids[90:]]  # 40 in common

    def fed(ring: Any, slot: int, first: int, last: int) -> np.ndarray[Any, Any]:
        """Rows one by one, so that their shape is the same whatever was there before."""
        rows = [ring.step([said[slot][p]], [p], slots=[slot])[0] for p in range(first, last)]
        return np.array(rows)

    with model.cut((model.header.layers // 2,), SETTINGS) as ring:
        alone = []
        for slot in (0, 1):
            alone.append(fed(ring, slot, 0, 90))
            ring.backend.trim(slot, 0)

    with model.cut((model.header.layers // 2,), SETTINGS) as ring:

        def exactly(slot: int, first: int, last: int) -> None:
            np.testing.assert_array_equal(fed(ring, slot, first, last), alone[slot][first:last])

        def nearly(slot: int, first: int, last: int) -> None:
            apart = np.abs(fed(ring, slot, first, last) - alone[slot][first:last]).max()
            assert close is None or apart < close

        exactly(0, 0, 50)
        ring.backend.copy(0, 1, 40)
        for p in range(10):  # by turns, their cells mixed
            exactly(0, 50 + p, 51 + p)
            exactly(1, 40 + p, 41 + p)
        exactly(1, 50, 60)
        ring.backend.trim(1, 55)  # the last cells of all: still in order
        exactly(1, 55, 60)
        ring.backend.trim(1, 30)  # into what is shared: the lender keeps it
        nearly(0, 60, 65)
        nearly(1, 30, 50)
        ring.backend.trim(0, 20)  # the lender forgets: the other keeps what it was given
        nearly(1, 50, 55)
        nearly(0, 20, 65)
        ring.backend.trim(0, 0)
        nearly(1, 55, 90)
        ring.backend.trim(1, 0)
        exactly(0, 0, 90)  # an empty cache is as good as new
