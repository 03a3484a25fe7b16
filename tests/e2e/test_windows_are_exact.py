"""Split or whole, the answer is the same: windows against one ordinary llama.cpp context."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.base import BackendFault, Batch, Settings, Window
from backends.llama_cpp import ENGINE, tap
from tests.plain_llama import PlainLlama
from tests.random_models import write
from tests.rule_models import MODELS
from tests.smollm2 import smollm2
from tests.windows import Stored, all_edges

SETTINGS = Settings(slots=4, kv_cells=2048, batch_tokens=512, threads=1, gpu_layers=0)
TOKENS = 200
SHORT = "<|im_start|>user\nHow do bees make honey?<|im_end|>\n<|im_start|>assistant\n"
LONG = "<|im_start|>user\n" + "The bees fly out at dawn and count the flowers: {}. " * 100
CACHES = ["llama", "gemma3", "openelm-heads", "deci-heads", "deepseek2-moe", "glm-dsa-moe"]
CACHES += ["dots3note-moe", "minimax-m3-moe"]  # layers alike, and not; one row for all heads
EDGES = {1: (), 2: (11,), 3: (10, 20), 5: (1, 6, 17, 29)}  # windows → cuts of the 30 layers


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    return Stored(smollm2(), tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def plain() -> Iterator[PlainLlama]:
    with PlainLlama(smollm2(), cells=2048, batch=512) as whole:
        yield whole


@pytest.fixture(scope="module")
def answers(plain: PlainLlama) -> dict[str, tuple[list[int], list[int]]]:
    """Prompts and the whole model's answers to them."""
    found = {}
    texts = {"short": SHORT, "long": LONG.format(*range(100)) + SHORT}
    for name, text in texts.items():
        prompt = plain.tokenise(text)
        plain.clear()
        found[name] = (prompt, plain.greedy(prompt, TOKENS, 512))
    assert 1400 < len(found["long"][0]) < 1700
    return found


@pytest.mark.parametrize("length", ["short", "long"])
@pytest.mark.parametrize("windows", EDGES)
def test_smollm2_gives_the_same_tokens_through_any_number_of_windows(
    stored: Stored, answers: dict[str, tuple[list[int], list[int]]], windows: int, length: str
) -> None:
    prompt, expected = answers[length]
    with stored.cut(EDGES[windows], SETTINGS) as ring:
        assert ring.greedy(prompt, TOKENS, 512) == expected


def _story(run: Any, trim: Any, copy: Any, words: int) -> list[np.ndarray[Any, Any]]:
    """Four sequences in shared batches; one forgets, one becomes a copy, one starts again."""
    ids = np.random.default_rng(3).integers(3, words, 400).tolist()
    seen = []

    def step(rows: Sequence[tuple[int, int, int]]) -> None:
        """rows: (slot, first position, tokens)."""
        slots = [slot for slot, _, count in rows for _ in range(count)]
        positions = [first + i for _, first, count in rows for i in range(count)]
        said = [ids[(slot * 97 + p) % 400] for slot, p in zip(slots, positions, strict=True)]
        seen.append(run.step(said, positions, slots=slots))

    step([(0, 0, 40), (1, 0, 7), (2, 0, 25), (3, 0, 1)])
    step([(0, 40, 1), (1, 7, 1), (2, 25, 1), (3, 1, 1)])
    trim(1, 3)  # rolled back, and then on with other tokens
    copy(0, 3, 30)
    step([(0, 41, 1), (1, 3, 9), (2, 26, 1), (3, 30, 2)])
    trim(2, 0)
    copy(1, 2, 12)
    for i in range(4):
        step([(0, 42 + i, 1), (1, 12 + i, 1), (2, 12 + i, 1), (3, 32 + i, 1)])
    trim(0, 0)
    step([(0, 0, 33), (1, 16, 1), (3, 36, 1)])
    return seen


@pytest.mark.parametrize("tapped", [tap.TapInC, tap.Tap], ids=["c", "python"])
@pytest.mark.parametrize(
    ("name", "edges"),
    [
        ("smollm2", ()),
        ("smollm2", (15,)),
        ("smollm2", (3, 12, 28)),
        ("gemma3", (1, 3)),
        ("gpt-oss-moe", (2, 4)),
        ("qwen2vl", (1, 5)),
        ("gemma2-odd-scale", (3,)),
    ],
)
def test_four_sequences_with_rollbacks_and_copies_equal_the_whole_model(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stored: Stored,
    name: str,
    edges: tuple[int, ...],
    tapped: type[tap.Tap],
) -> None:
    monkeypatch.setattr("backends.llama_cpp.window.best", lambda: tapped)
    model, path = stored, smollm2()
    if name != "smollm2":
        path = write(MODELS[name], tmp_path / "model.gguf")
        model = Stored(path, tmp_path)
    with PlainLlama(path, cells=2048, batch=512, slots=4) as whole:
        expected = _story(whole, whole.trim, whole.copy, whole.words)
        words = whole.words
    with model.cut(edges, SETTINGS) as ring:
        given = _story(ring, ring.backend.trim, ring.backend.copy, words)
    for ours, theirs in zip(given, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


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
        expected = _story(whole, whole.trim, whole.copy, whole.words)
        words = whole.words
    with PlainLlama(path, cells=2048, batch=512, slots=4) as usual:
        other = _story(usual, usual.trim, usual.copy, words)
    with model.cut(edges, replace(SETTINGS, kv_type=kv_type, flash=flash)) as ring:
        given = _story(ring, ring.backend.trim, ring.backend.copy, words)
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


def test_outputs_are_owed_only_for_the_rows_that_ask_for_them(
    stored: Stored, plain: PlainLlama
) -> None:
    ids, positions, outputs = [5000, 6000, 7000, 8000], range(4), [False, True, False, True]
    plain.clear()
    expected = plain.step(ids, positions, outputs=outputs)
    with stored.cut((13,), SETTINGS) as ring:
        np.testing.assert_array_equal(ring.step(ids, positions, outputs=outputs), expected)
        nothing = ring.step(ids, range(4, 8), outputs=[False] * 4)
    assert nothing.shape == (0, 49152)


def test_a_loaded_window_tells_what_it_uses(stored: Stored) -> None:
    backend = ENGINE.open(SETTINGS)
    try:
        used = backend.load(stored.window(10, 20))
        assert 20 << 20 < used.weights_bytes < 25 << 20
        cells = sum(ENGINE.kv_bytes_per_cell(stored.header)[10:20])
        assert used.kv_bytes == SETTINGS.kv_cells * cells
        assert 1 << 20 < used.compute_bytes < 64 << 20
    finally:
        backend.close()


def test_a_full_kv_cache_is_an_error_that_says_so(stored: Stored) -> None:
    small = Settings(slots=1, kv_cells=256, batch_tokens=128, threads=1, gpu_layers=0)
    with stored.cut((15,), small) as ring:
        for first in (0, 128):
            ring.step([7] * 128, range(first, first + 128), outputs=[False] * 128)
        with pytest.raises(BackendFault, match="the KV cache has no room") as caught:
            ring.step([7], [256])
    assert caught.value.kind == "memory"


def test_odd_batches_are_refused_by_name(stored: Stored) -> None:
    with stored.cut((15,), SETTINGS) as ring:
        with pytest.raises(BackendFault, match="513 tokens in a batch of at most 512"):
            ring.step([7] * 513, range(513))
        with pytest.raises(BackendFault, match="not among the model's 49152"):
            ring.step([49152], [0])
        with pytest.raises(BackendFault, match="there is no slot 4 of 4"):
            ring.backend.trim(4, 0)
        with pytest.raises(BackendFault, match="it holds 0"):
            ring.backend.copy(0, 1, 5)


def _answers(names: Sequence[str], errors: Path) -> dict[str, dict[str, Any]]:
    """What one child process says of these models, as far as it comes."""
    found: dict[str, dict[str, Any]] = {}
    with (
        errors.open("w") as stderr,
        subprocess.Popen(
            [sys.executable, "-m", "tests.windows", *names],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        lines = (line for line in process.stdout if line.startswith("{"))
        for name, line in zip(names, lines, strict=False):
            found[name] = json.loads(line)
    if len(found) < len(names):  # libllama aborted it
        why = f"the process ended with {process.returncode}: {errors.read_text()[-2000:]}"
        found[names[len(found)]] = {"failed": why}
    return found


@pytest.fixture(scope="module")
def compared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """Every random model that this run asks for; one that ends its process fails alone."""
    wanted = "test_windows_of_every_row"
    left = [
        item.callspec.params["name"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.name.startswith(wanted)
    ]
    found: dict[str, dict[str, Any]] = {}
    while left:
        found |= _answers(left, tmp_path_factory.mktemp("models") / "errors")
        left = [name for name in left if name not in found]
    return found


@pytest.mark.timeout(900)  # the first of them waits for all
@pytest.mark.parametrize("name", MODELS)
def test_windows_of_every_row_equal_the_whole_model_at_every_allowed_cut(
    compared: dict[str, dict[str, Any]], name: str
) -> None:
    found = compared[name]
    assert "failed" not in found, found["failed"]
    assert not found["why"]
    assert len(found["cuts"]) > 1  # the whole, and at least one cut
    assert found["spread"] > 0.1  # logits that say something
    assert found["cuts"] == dict.fromkeys(found["cuts"], 0.0)


FORBIDDEN = [
    ("gpt-oss-moe", 1, 2, "must hold at least one of the layers 0, 2, 4"),
    ("qwen35", 0, 1, "must hold at least one of the layers 1, 3, 5"),
    ("qwen35", 1, 2, "must hold at least one of the layers 0, 2, 4"),
    ("smollm3", 0, 3, "cannot be cut before layer 3"),
    ("llama", 2, 2, "layers 2 to 2 are not layers of a model of 6"),
    ("llama", 3, 7, "layers 3 to 7 are not layers of a model of 6"),
]


@pytest.mark.parametrize(("name", "first", "last", "why"), FORBIDDEN)
def test_forbidden_windows_are_refused_before_anything_is_loaded(
    tmp_path: Path, name: str, first: int, last: int, why: str
) -> None:
    stored = Stored(write(MODELS[name], tmp_path / "model.gguf"), tmp_path)
    with pytest.raises(BackendFault, match=why) as caught:
        ENGINE.recipe(stored.header, first, last)
    assert caught.value.kind == "refused"
    backend = ENGINE.open(SETTINGS)
    nowhere = (tmp_path / "nowhere.gguf",)  # that no file is looked for shows in the reason
    with pytest.raises(BackendFault, match=why) as caught:
        backend.load(Window(first, last, 6, stored.header, nowhere))
    assert caught.value.kind == "refused"


def test_a_rollback_by_more_than_the_sliding_window_finds_what_was_there(tmp_path: Path) -> None:
    stored = Stored(write(MODELS["gemma3"], tmp_path / "model.gguf"), tmp_path)
    narrow = Settings(slots=1, kv_cells=2048, batch_tokens=32, threads=1, gpu_layers=0)
    ids = np.random.default_rng(5).integers(3, 290, 1024).tolist()

    def feed(ring: Any, first: int, last: int) -> Any:
        for a in range(first, last, 32):
            logits = ring.step(ids[a : a + 32], range(a, a + 32))
        return logits

    with stored.cut((2, 4), narrow) as ring:
        feed(ring, 0, 96)
        expected = feed(ring, 96, 128)
        feed(ring, 128, 1024)  # sliding layers have long lost sight of position 64
        ring.backend.trim(0, 96)
        np.testing.assert_array_equal(feed(ring, 96, 128), expected)


def test_recurrent_state_is_not_rolled_back_but_refused(tmp_path: Path) -> None:
    stored = Stored(write(MODELS["qwen35"], tmp_path / "model.gguf"), tmp_path)
    with stored.cut((2,), SETTINGS) as ring:
        whole = ring.step([5, 6, 7], range(3))
        with pytest.raises(BackendFault, match="cannot go back to position 2"):
            ring.backend.trim(0, 2)
        ring.backend.copy(0, 1, 3)
        with pytest.raises(BackendFault, match="recurrent layers know only all of them"):
            ring.backend.copy(0, 2, 2)
        both = ring.step([8, 8], [3, 3], slots=[0, 1])
        np.testing.assert_array_equal(both[0], both[1])
        ring.backend.trim(0, 0)
        np.testing.assert_array_equal(ring.step([5, 6, 7], range(3)), whole)


@pytest.mark.parametrize("name", ["qwen35", "falcon-h1"])
def test_numbers_that_are_not_finite_do_not_outlive_their_answer(tmp_path: Path, name: str) -> None:
    stored = Stored(write(MODELS[name], tmp_path / "model.gguf"), tmp_path)
    with stored.cut((2,), SETTINGS) as ring:
        window = ring.windows[-1]
        hidden = int(stored.header.metadata[f"{stored.header.architecture}.embedding_length"])
        x = np.random.default_rng(0).standard_normal((8, hidden)).astype(np.float32)

        def run(slot: int, given: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            rows = np.arange(8, dtype=np.int32)
            batch = Batch(np.full(8, slot, np.int32), rows, np.ones(8, np.bool_))
            result = ring.backend.run(window, batch, given).copy()
            ring.backend.trim(slot, 0)
            return result

        clean = run(0, x)
        assert not np.isfinite(run(1, np.full_like(x, np.nan))).all()
        for slot in range(SETTINGS.slots):
            np.testing.assert_array_equal(run(slot, x), clean)
