"""Split or whole, the answer is the same: windows against one ordinary llama.cpp context."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
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
from tests.windows import Stored, story

SETTINGS = Settings(slots=4, kv_cells=2048, batch_tokens=512, threads=1, gpu_layers=0)
TOKENS = 200
SHORT = "<|im_start|>user\nHow do bees make honey?<|im_end|>\n<|im_start|>assistant\n"
LONG = "<|im_start|>user\n" + "The bees fly out at dawn and count the flowers: {}. " * 100
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


@pytest.mark.parametrize(
    ("name", "edges", "tapped"),
    [
        ("smollm2", (), tap.TapInC),
        ("smollm2", (15,), tap.TapInC),
        ("smollm2", (3, 12, 28), tap.TapInC),
        ("gemma3", (1, 3), tap.TapInC),
        ("gpt-oss-moe", (2, 4), tap.TapInC),
        ("qwen2vl", (1, 5), tap.TapInC),
        ("gemma2-odd-scale", (3,), tap.TapInC),
        ("smollm2", (15,), tap.Tap),
        ("gemma2-odd-scale", (3,), tap.Tap),
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
        expected = story(whole, whole.trim, whole.copy, whole.words)
        words = whole.words
    with model.cut(edges, SETTINGS) as ring:
        given = story(ring, ring.backend.trim, ring.backend.copy, words)
    for ours, theirs in zip(given, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


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
        for _ in range(2):  # what was said once is not said again
            with pytest.raises(BackendFault, match="the KV cache has no room") as caught:
                ring.step([7], [256])
            assert caught.value.kind == "memory"
            assert str(caught.value).count("find a memory slot") == 1
            assert "n_ctx" not in str(caught.value)  # libllama's words of the load


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
