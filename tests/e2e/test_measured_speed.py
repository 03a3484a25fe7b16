"""Speeds measured on random layers, against what the model itself takes, and of odd models."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from backends.base import Batch, Settings
from peer.config import Config
from peer.errors import BackendError
from peer.planning import survey
from peer.planning.stopwatch import timed
from peer.planning.trials import quick_s
from tests.smollm2 import smollm2
from tests.windows import Stored

pytestmark = pytest.mark.llama
THREADS = 1
TRIES = 3  # of a comparison: other tests compute at the same time


@pytest.fixture(scope="module")
def smol(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    pytest.importorskip("llama_cpp")
    return Stored(smollm2(), tmp_path_factory.mktemp("home"))


def whole_s(stored: Stored) -> float:
    """A decode step of the whole model, loaded as a stage loads it."""
    from backends.llama_cpp import ENGINE

    window = stored.window(0, stored.header.layers)
    backend = ENGINE.open(Settings(1, 512, 64, THREADS, 0))
    try:
        backend.load(window)
        samples = []
        for position in range(40):
            batch = Batch(
                np.zeros(1, np.int32), np.array([position], np.int32), np.ones(1, np.bool_)
            )
            ids = np.array([position + 100], np.int32)
            samples.append(timed(partial(backend.run, window, batch, ids)))
    finally:
        backend.close()
    return quick_s(samples)


async def test_random_layers_tell_what_the_model_takes(smol: Stored) -> None:
    config = Config.fast_test(home=smol.folder, backend="llama_cpp", threads=THREADS)
    shape = await survey.shape("llama_cpp", smol.folder)
    ratios = []
    for _ in range(TRIES):
        (speed,) = await survey.speeds(config, smol.folder, shape)
        assert speed.prefill_s[0] / speed.prefill_tokens < speed.decode_s[0] * 2
        told_s = 30 * speed.decode_s[0] + speed.window_s + speed.output_s
        ratios.append(told_s / whole_s(smol))
        if 1 / 1.5 < ratios[-1] < 1.5:
            break
    assert 1 / 1.5 < ratios[-1] < 1.5, ratios


@pytest.mark.parametrize(
    "name",
    ["llama-moe-F16", "gemma3-tied-Q4_0", "qwen3next-moe-4", "mamba2", "dots1-moe-dense", "gpt2"],
)
async def test_odd_models_are_measured_or_say_why_not(name: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    from tests.random_models import write
    from tests.rule_models import MODELS

    stored = Stored(write(MODELS[name], tmp_path / "m.gguf"), tmp_path)
    for part in stored.manifest.parts[1:]:
        (stored.folder / part.file).unlink()
    config = Config.fast_test(home=tmp_path, backend="llama_cpp", threads=THREADS)
    shape = await survey.shape("llama_cpp", stored.folder)
    (speed,) = await survey.speeds(config, stored.folder, shape)
    kinds = max(shape.kinds) + 1
    assert len(speed.decode_s) == len(speed.prefill_s) == kinds
    assert all(0 < seconds < 1 for seconds in (*speed.decode_s, *speed.prefill_s, speed.output_s))
    if kinds > 1:
        assert len(set(speed.decode_s)) > 1


async def test_a_model_that_is_too_large_to_be_tried_says_so(smol: Stored) -> None:
    config = Config.fast_test(home=smol.folder, backend="llama_cpp", memory=1 << 20)
    shape = await survey.shape("llama_cpp", smol.folder)
    with pytest.raises(BackendError, match="more than can be tried out here"):
        await survey.speeds(config, smol.folder, shape)
