"""MLX computes what llama.cpp computes: every row of its table, in windows, on float32 models.

On quantised files the two differ by more, because llama.cpp's CPU kernels quantise activations too:
there, MLX is compared with a float64 computation of the same weights.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import backends
from backends.base import BackendFault, Batch, Engine, Place, Settings
from backends.mlx import blocks
from backends.mlx.repack import Dense
from tests.float64_llama import logits_of_llama
from tests.mlx_models import DECODE, HIDDEN, MODELS, PREFILL, Chain, edges, tiny, written
from tests.plain_llama import PlainLlama
from tests.random_models import write
from tests.smollm2 import smollm2
from tests.windows import Ring, Stored, story

MLX, LLAMA = backends.load("mlx"), backends.load("llama_cpp")
EDGES = (2, 4)
SETTINGS = Settings(
    slots=4, kv_cells=512, batch_tokens=128, threads=1, gpu_layers=0, kv_type="f32", flash="off"
)
# One of each kind of attention; gemma2 computes its own.
KINDS = ["llama", "qwen3moe-moe", "gemma2", "gemma3", "phi3", "gpt-oss-moe-yarn"]


def bound(name: str) -> float:
    """What the engines may differ by: ggml looks gemma's GELU up in a table of float16."""
    return 1e-2 if name.startswith("gemma") else 1e-4


def apart(ours: Any, theirs: Any) -> float:
    """The largest difference; infinite where something is not finite."""
    difference = float(np.abs(np.asarray(ours) - np.asarray(theirs)).max())
    return difference if np.isfinite(difference) else float("inf")


def logits(run: Any, ids: Sequence[int]) -> NDArray[np.float32]:
    """Of a prefill, then token by token."""
    ends = [0, *range(PREFILL, PREFILL + DECODE + 1)]
    return np.concatenate([run.step(ids[a:b], range(a, b)) for a, b in pairwise(ends)])


def some_ids(seed: int, count: int = PREFILL + DECODE) -> list[int]:
    return np.random.default_rng(seed).integers(3, 290, count).tolist()


@contextmanager
def cut(
    name: str, folder: Path, settings: Settings = SETTINGS, at: tuple[int, ...] | None = None
) -> Iterator[Ring]:
    """A tiny model in windows of MLX."""
    path = written(name, folder / "model.gguf")
    with Stored(path, folder, MLX).cut(edges(name) if at is None else at, settings) as ring:
        yield ring


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    return Stored(smollm2(), tmp_path_factory.mktemp("home"), MLX)


@pytest.mark.parametrize("name", MODELS)
def test_three_windows_of_every_row_equal_llama_cpp_past_the_sliding_window(
    tmp_path: Path, name: str
) -> None:
    ids = some_ids(7)
    with cut(name, tmp_path) as ring:
        given = logits(ring, ids)
    path = tmp_path / "model.gguf"
    with PlainLlama(path, cells=512, batch=128, kv_type="f32", flash="off") as whole:
        expected = logits(whole, ids)
    assert expected.std() > 0.5  # logits that say something
    assert apart(given, expected) <= bound(name)


@pytest.mark.parametrize("name", KINDS)
def test_four_sequences_with_rollbacks_and_copies_equal_llama_cpp(
    tmp_path: Path, name: str
) -> None:
    path = written(name, tmp_path / "model.gguf")
    with PlainLlama(path, cells=512, batch=128, slots=4, kv_type="f32", flash="off") as whole:
        expected = story(whole, whole.trim, whole.copy, whole.words)
        words = whole.words
    with Stored(path, tmp_path, MLX).cut(EDGES, SETTINGS) as ring:
        given = story(ring, ring.backend.trim, ring.backend.copy, words)
    for ours, theirs in zip(given, expected, strict=True):
        assert apart(ours, theirs) <= bound(name)


@pytest.mark.parametrize("name", KINDS)
def test_rows_of_several_slots_in_one_step_equal_each_alone(tmp_path: Path, name: str) -> None:
    lengths = (40, 23, 9)
    ids = [some_ids(slot, length + 1) for slot, length in enumerate(lengths)]
    with cut(name, tmp_path) as ring:
        alone = []
        for said, length in zip(ids, lengths, strict=True):
            first = ring.step(said[:length], range(length))
            alone.append(np.concatenate([first, ring.step(said[length:], [length])]))
            ring.backend.trim(0, 0)
        slots = [slot for slot, length in enumerate(lengths) for _ in range(length)]
        rows = [p for length in lengths for p in range(length)]
        flat = [i for said, length in zip(ids, lengths, strict=True) for i in said[:length]]
        first = ring.step(flat, rows, slots=slots)
        # Rows of one slot are consecutive; slots may come in any order.
        then = ring.step([ids[s][-1] for s in (2, 0, 1)], [9, 40, 23], slots=[2, 0, 1])
    for slot, length in enumerate(lengths):
        begin = sum(lengths[:slot])
        assert apart(first[begin : begin + length], alone[slot][:length]) <= 2e-5
        assert apart(then[(2, 0, 1).index(slot)], alone[slot][length]) <= 2e-5


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("kv_type", ["f32", "f16"])
def test_a_slot_that_went_back_or_was_copied_equals_one_that_never_did(
    tmp_path: Path, name: str, kv_type: str
) -> None:
    ids, wrong = some_ids(1), some_ids(2)
    settings = Settings(4, 512, 128, 1, kv_type=kv_type, flash="off")
    with cut(name, tmp_path, settings) as ring:
        ring.step(ids[:40], range(40))
        expected = ring.step(ids[40:50], range(40, 50))
        ring.backend.trim(0, 36)
        ring.step(wrong[:8], range(36, 44))  # guesses, all of them refused
        ring.backend.copy(0, 1, 36)
        ring.backend.trim(0, 0)
        ring.step(wrong[:30], range(30))  # somebody else's, in the cells that it left
        ring.step(ids[36:40], range(36, 40), slots=[1] * 4)
        given = ring.step(ids[40:50], range(40, 50), slots=[1] * 10)
    assert apart(given, expected) <= 2e-5


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt-oss-moe-yarn"])
def test_a_batch_that_is_computed_in_parts_equals_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with cut(name, tmp_path) as ring:
        whole = ring.backend._windows[0, 2].compute_bytes
        expected = story(ring, ring.backend.trim, ring.backend.copy, 290)
    monkeypatch.setattr("backends.mlx.window.SCORES_BYTES", 1)
    with Stored(tmp_path / "model.gguf", tmp_path, MLX).cut(EDGES, SETTINGS) as ring:
        assert ring.backend._windows[0, 2].compute_bytes < whole / 2
        given = story(ring, ring.backend.trim, ring.backend.copy, 290)
    for ours, theirs in zip(given, expected, strict=True):
        assert apart(ours, theirs) <= 2e-5


@pytest.mark.parametrize("order", [(LLAMA, MLX, LLAMA), (MLX, LLAMA, MLX)], ids=["middle", "ends"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "gpt-oss-moe-yarn"])
def test_windows_of_both_engines_in_one_chain_equal_llama_cpp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, order: tuple[Engine, ...]
) -> None:
    # What users' settings may not ask for: the comparison is of computations, not of roundings.
    monkeypatch.setattr("backends.llama_cpp.window.check_cache", lambda *_: None)
    path, ids = written(name, tmp_path / "model.gguf"), some_ids(7)
    with PlainLlama(path, cells=512, batch=128, kv_type="f32", flash="off") as whole:
        expected = logits(whole, ids)
    opened = {engine.name: engine.open(SETTINGS) for engine in set(order)}
    try:
        chain = []
        stores = {engine.name: Stored(path, tmp_path, engine) for engine in (LLAMA, MLX)}
        for engine, (first, last) in zip(order, pairwise([0, *EDGES, 6]), strict=True):
            window = stores[engine.name].window(first, last)
            opened[engine.name].load(window)
            chain.append((opened[engine.name], window))
        assert apart(logits(Chain(chain), ids), expected) <= bound(name)
    finally:
        for backend in opened.values():
            backend.close()


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "F16", "BF16"])
@pytest.mark.parametrize("tied", [True, False])
def test_quantised_weights_compute_as_their_float32_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, tied: bool
) -> None:
    model = tiny("llama", quantised=kind, tied=tied) if tied else MODELS["qwen3moe-moe"]
    if not tied:  # experts, and a head of its own
        moe = {"expert_count": 6, "expert_used_count": 2, "expert_feed_forward_length": 96}
        model = tiny("qwen3moe", quantised=kind, **moe)
    path = write(model, tmp_path / "model.gguf", change=_plain_tensors)
    stored, ids = Stored(path, tmp_path, MLX), some_ids(7)
    with stored.cut(EDGES, SETTINGS) as ring:
        held = sum(window.footprint.weights_bytes for window in ring.backend._windows.values())
        given = ring.step(ids, range(len(ids)))

    def plain(kind: str, shape: tuple[int, ...], data: Any, _weights: str) -> Dense:
        return Dense(blocks.dequantize(kind, shape, data))

    monkeypatch.setattr("backends.mlx.weights.repack.repack", plain)
    with stored.cut(EDGES, SETTINGS) as ring:
        wide = sum(window.footprint.weights_bytes for window in ring.backend._windows.values())
        expected = ring.step(ids, range(len(ids)))
    assert held < 0.6 * wide  # it was not computed with a float32 copy the first time too
    assert apart(given, expected) <= 1e-4


def _plain_tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    odd = ("scale", ".bias", "rope_freqs.weight")
    return {name: shape for name, shape in shapes.items() if not name.endswith(odd)}


def test_smollm2_q4_1_is_nearer_to_float64_than_rounding_shows_in_one_window_and_in_three(
    stored: Stored,
) -> None:
    ids = [1, 4093, 198, 1073, 536]
    expected = logits_of_llama(smollm2(), ids)
    settings = Settings(2, 256, 64, 1, kv_type="f32")
    given = []
    for at in ((), (11, 20)):
        with stored.cut(at, settings) as ring:
            given.append(np.concatenate([ring.step(ids[:3], range(3)),
                                         ring.step(ids[3:], range(3, 5))]))  # fmt: skip
    assert apart(given[0], given[1]) <= 1e-5
    assert apart(given[0], expected) <= 1e-3
    assert (given[0].argmax(axis=1) == expected.argmax(axis=1)).all()


def test_outputs_are_owed_only_for_the_rows_that_ask_for_them(tmp_path: Path) -> None:
    ids = some_ids(3, 8)
    with cut("llama", tmp_path) as ring:
        every = ring.step(ids[:4], range(4))
        ring.backend.trim(0, 0)
        some = ring.step(ids[:4], range(4), outputs=[False, True, False, True])
        nothing = ring.step(ids[4:], range(4, 8), outputs=[False] * 4)
    assert apart(some, every[[1, 3]]) <= 1e-6
    assert nothing.shape == (0, every.shape[1])


def test_a_full_kv_cache_is_an_error_that_changes_nothing(tmp_path: Path) -> None:
    small = Settings(2, 40, 64, 1, kv_type="f32")
    ids = some_ids(3, 41)
    with cut("gemma3", tmp_path, small) as ring:
        ring.step(ids[:30], range(30))
        for _ in range(2):
            with pytest.raises(BackendFault, match="11 tokens, and 10 of 40 cells") as caught:
                ring.step(ids[30:41], range(30, 41))
            assert caught.value.kind == "memory"
        full = ring.step(ids[30:40], range(30, 40))
        ring.backend.copy(0, 1, 40)  # takes no cells
        ring.backend.trim(0, 0)
        with pytest.raises(BackendFault, match="0 of 40 cells are free"):
            ring.step([5], [0])
        ring.backend.trim(1, 30)
        assert apart(ring.step(ids[30:40], range(30, 40), slots=[1] * 10), full) <= 2e-5


def test_a_step_that_fails_leaves_no_cell_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = some_ids(3, 40)
    with cut("llama", tmp_path, Settings(1, 40, 64, 1, kv_type="f32"), ()) as ring:
        ring.step(ids[:10], range(10))
        expected = ring.step(ids[10:40], range(10, 40))
        ring.backend.trim(0, 10)
        with monkeypatch.context() as patch:
            patch.setattr("backends.mlx.rope.Rope._turned", _failing)
            for _ in range(2):
                with pytest.raises(BackendFault, match="could not compute the step: no GPU") as it:
                    ring.step(ids[10:40], range(10, 40))
                assert it.value.kind == "failed"
        assert apart(ring.step(ids[10:40], range(10, 40)), expected) <= 2e-5


def _failing(*_: object) -> None:
    raise RuntimeError("no GPU\nno hope")


def test_odd_batches_are_refused_by_name(tmp_path: Path) -> None:
    with cut("llama", tmp_path) as ring:
        with pytest.raises(BackendFault, match="129 tokens in a batch of at most 128"):
            ring.step([7] * 129, range(129))
        with pytest.raises(BackendFault, match="not among the model's 294"):
            ring.step([294], [0])
        with pytest.raises(BackendFault, match="not among the model's 294"):
            ring.step([-1], [0])
        with pytest.raises(BackendFault, match="there is no slot 4 of 4"):
            ring.step([7], [0], slots=[4])
        with pytest.raises(BackendFault, match="there is no slot 4 of 4"):
            ring.backend.trim(4, 0)
        with pytest.raises(BackendFault, match="it holds 0"):
            ring.backend.copy(0, 1, 5)
        ring.step([7, 8], [0, 1])
        with pytest.raises(BackendFault, match="at position 3, and the slot's next one is 2"):
            ring.step([7], [3])
        batch = Batch(np.zeros(1, np.int32), np.full(1, 2, np.int32), np.ones(1, np.bool_))
        wrong = np.zeros((1, HIDDEN + 1), np.float32)
        with pytest.raises(BackendFault, match=r"input has shape \(1, 129\), not \(1, 128\)"):
            ring.backend.run(ring.windows[1], batch, wrong)
        assert ring.step([9], [2]).shape == (1, 294)  # nothing of all that stayed


def test_numbers_that_are_not_finite_do_not_outlive_their_answer(tmp_path: Path) -> None:
    with cut("llama", tmp_path) as ring:
        window = ring.windows[-1]
        x = np.random.default_rng(0).standard_normal((8, HIDDEN)).astype(np.float32)

        def run(slot: int, given: NDArray[np.float32]) -> NDArray[np.float32]:
            rows = np.arange(len(given), dtype=np.int32)
            batch = Batch(np.full_like(rows, slot), rows, np.ones(len(given), np.bool_))
            result = ring.backend.run(window, batch, given).copy()
            ring.backend.trim(slot, 0)
            return result

        clean = run(0, x[:2])  # fewer rows: the other cells are looked at, and not written anew
        broken = x.copy()
        broken[3] = np.nan
        assert not np.isfinite(run(1, broken)).all()
        for slot in range(SETTINGS.slots):
            assert apart(run(slot, x[:2]), clean) <= 1e-6


def test_a_loaded_window_tells_what_it_uses(tmp_path: Path) -> None:
    mx = importlib.import_module("mlx.core")
    stored = Stored(written("llama", tmp_path / "model.gguf"), tmp_path, MLX)
    backend = MLX.open(Settings(1, 1024, 128, 1))
    before = mx.get_active_memory()
    try:
        window = stored.window(2, 6)
        used = backend.load(window)
        held = mx.get_active_memory() - before
        assert used.weights_bytes == pytest.approx(held, rel=0.02)
        assert used.kv_bytes == 1024 * sum(MLX.kv_bytes_per_cell(stored.header)[2:])
        rows = np.random.default_rng(0).standard_normal((128, HIDDEN)).astype(np.float32)
        mx.reset_peak_memory()
        for at in range(0, 1024, 128):
            positions = np.arange(at, at + 128, dtype=np.int32)
            batch = Batch(np.zeros(128, np.int32), positions, np.ones(128, np.bool_))
            backend.run(window, batch, rows)
            if at == 0:  # what is not needed yet is not taken
                assert mx.get_active_memory() - before - held < used.kv_bytes / 3
        assert mx.get_active_memory() - before - held == pytest.approx(used.kv_bytes, rel=0.02)
        peak = mx.get_peak_memory() - before
        assert 0.4 * used.total_bytes < peak < 1.1 * used.total_bytes
    finally:
        backend.close()
    assert mx.get_active_memory() - before < held / 20


def test_a_window_that_was_loaded_on_one_thread_runs_on_another(tmp_path: Path) -> None:
    ids = some_ids(3, 8)
    with cut("gemma3", tmp_path) as ring, ThreadPoolExecutor(1) as thread:
        there = thread.submit(ring.step, ids, range(8)).result(timeout=60)
        thread.submit(ring.backend.trim, 0, 0).result(timeout=60)
        assert apart(ring.step(ids, range(8)), there) <= 2e-5


def test_the_processor_is_a_device_with_its_memory() -> None:
    (device,) = [device for device in MLX.devices() if device.kind == "cpu"]
    assert device.name
    assert 1 << 28 < device.memory_free_bytes <= device.memory_total_bytes


def test_tensors_that_are_missing_or_of_another_shape_are_named(tmp_path: Path) -> None:
    stored = Stored(written("llama", tmp_path / "model.gguf"), tmp_path, MLX)
    window = stored.window(2, 4)
    lost = {k: v for k, v in window.places.items() if k != "blk.3.ffn_up.weight"}
    shorter = dict(window.places) | {"blk.2.attn_q.weight": Place(window.files[0], 1 << 40)}
    facts = dict(stored.header.tensors)
    facts["blk.2.ffn_up.weight"], facts["blk.2.ffn_down.weight"] = (
        facts["blk.2.ffn_down.weight"],
        facts["blk.2.ffn_up.weight"],
    )
    swapped = type(stored.header)(stored.header.metadata, facts)
    for change, why in (
        ({"places": lost}, "without the model's tensor blk.3.ffn_up.weight"),
        ({"places": shorter}, "a tensor in it should lie at bytes"),
        ({"header": swapped}, r"ffn_up.weight is of shape \[128, 192\], .* asks for \[192, 128\]"),
    ):
        backend = MLX.open(SETTINGS)
        values = {name: getattr(window, name) for name in window.__slots__} | change
        with pytest.raises(BackendFault, match=why) as caught:
            backend.load(type(window)(**values))
        assert caught.value.kind == "refused"
        backend.close()
