"""llama.cpp and MLX in one ring, from the same parts of one GGUF.

On the F32 copy of the model both engines compute the same numbers but for rounding, so a ring of
both gives the tokens of llama.cpp's own. On quantised weights they do not: llama.cpp rounds
activations to 8 bits there, MLX does not. What can be asked then is that a mixed ring is no further
from the truth, float64 over the same weights, than llama.cpp is by itself.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from numpy.typing import NDArray

import backends
from backends.base import Backend, Batch, Settings, Window
from peer.models.imports import import_gguf
from peer.models.store import Store
from peer.planning.plan import Plan
from tests.e2e.rings import plan_of, running
from tests.e2e.test_teacher_forced import TEXTS
from tests.float64_llama import logits_of_llama
from tests.plain_llama import PlainLlama
from tests.smollm2 import F32, requantised, smollm2
from tests.windows import Stored

pytest.importorskip("mlx.core")

# The likeliest of each of its answer's 64 tokens is so by 0.046 at least. A KV cache in float16
# moves logits by up to 0.02, so that another question's near ties (0.0016) may go either way.
QUESTION = "<|im_start|>user\nHow do I boil an egg?<|im_end|>\n<|im_start|>assistant\n"
EDGES = [10, 20]
MIXES = {
    "MLX first": ("mlx", "llama_cpp", "llama_cpp"),
    "MLX between": ("llama_cpp", "mlx", "llama_cpp"),
    "MLX last": ("llama_cpp", "llama_cpp", "mlx"),
}
CELLS = 1024
TOKENS = 512  # that are teacher-forced
CHUNK = 48  # rows of a step: below 64 llama.cpp computes each row alike, see test_teacher_forced
NO_FURTHER = 1.25  # times llama.cpp's own mean KL divergence from the truth
AGREEMENT = 0.02  # of likeliest tokens, fewer than llama.cpp's agree with the truth


@pytest.fixture(scope="module")
def question() -> list[int]:
    with PlainLlama(smollm2(), cells=512, batch=512) as whole:
        return whole.tokenise(QUESTION)


def mixed(plan: Plan, engines: tuple[str, ...]) -> Plan:
    """The plan with these engines for its windows."""
    windows = tuple(
        replace(window, backend=engine)
        for window, engine in zip(plan.split.windows, engines, strict=True)
    )
    # Without guesses: rows that verify them are other batches, and so are their last bits.
    return replace(plan, split=replace(plan.split, windows=windows, speculation="off"))


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with the F32 copy of the model."""
    home = tmp_path_factory.mktemp("f32")
    store = Store(home)
    path = requantised(home / "f32.gguf", F32)
    import_gguf(path, store)
    path.unlink()
    return store


@pytest.mark.timeout(400)
async def test_on_float32_weights_a_mixed_ring_gives_the_tokens_of_llama_cpps_own(
    exact: Store, question: list[int]
) -> None:
    (stored,) = exact.models()
    plan = plan_of(exact, stored.manifest, EDGES, "llama_cpp", kv_cells=2048)
    answers = {}
    for name, engines in {"llama.cpp alone": ("llama_cpp",) * 3, **MIXES}.items():
        async with running(mixed(plan, engines), exact.folder(stored.digest)) as ring:
            answers[name] = await ring.tokens(question, 64)
    expected = answers["llama.cpp alone"]
    assert len(expected) == 64
    assert answers == dict.fromkeys(answers, expected)


@contextmanager
def chained(stored: Stored, engines: tuple[str, ...]) -> Iterator[list[tuple[Backend, Window]]]:
    """The model's windows on these engines, in this process."""
    settings = Settings(1, CELLS, CHUNK, threads=1, gpu_layers=0)
    with ExitStack() as stack:
        opened = {name: backends.load(name).open(settings) for name in set(engines)}
        for backend in opened.values():
            stack.callback(backend.close)
        chain = []
        edges = pairwise([0, *EDGES, stored.header.layers])
        for name, (first, last) in zip(engines, edges, strict=True):
            stored.engine = backends.load(name)
            window = stored.window(first, last)
            opened[name].load(window)
            chain.append((opened[name], window))
        yield chain


def logits(chain: list[tuple[Backend, Window]], ids: list[int]) -> NDArray[np.float64]:
    """[ids, vocabulary] after each of the ids, read in chunks."""
    found = []
    for backend, _ in chain:
        backend.trim(0, 0)
    for at in range(0, len(ids), CHUNK):
        rows = len(ids[at : at + CHUNK])
        positions = np.arange(at, at + rows, dtype=np.int32)
        batch = Batch(np.zeros(rows, np.int32), positions, np.ones(rows, np.bool_))
        x: NDArray[np.int32] | NDArray[np.float32] = np.array(ids[at : at + rows], np.int32)
        for backend, window in chain:
            x = backend.run(window, batch, x).copy()
        found.append(x.astype(np.float64))
    return np.concatenate(found)


def divergence(truth: NDArray[np.float64], given: NDArray[np.float64]) -> float:
    """Mean KL divergence, in nats, of what was given from the truth; rows of logits."""
    p, q = (x - np.logaddexp.reduce(x, axis=1, keepdims=True) for x in (truth, given))
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


@pytest.mark.timeout(400)
def test_on_quantised_weights_a_mixed_ring_is_no_further_from_the_truth_than_llama_cpp(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = Stored(smollm2(), tmp_path)
    with PlainLlama(smollm2(), cells=512, batch=512) as whole:
        ids = whole.tokenise(" ".join(TEXTS))[:TOKENS]
    assert len(ids) == TOKENS
    truth = logits_of_llama(smollm2(), ids)

    def told(engines: tuple[str, ...]) -> tuple[float, float]:
        """Mean KL divergence from the truth, and the share of likeliest tokens that are the same"""
        with chained(stored, engines) as chain:
            given = logits(chain, ids)
        return divergence(truth, given), float((truth.argmax(1) == given.argmax(1)).mean())

    own_kl, own_share = told(("llama_cpp",) * 3)
    kl, share = told(MIXES["MLX between"])
    with capsys.disabled():
        sys.stdout.write(
            f"\n  {len(ids)} tokens against float64: llama.cpp alone KL {own_kl:.2e}, top-1 "
            f"{own_share:.3f}; with MLX between KL {kl:.2e}, top-1 {share:.3f}\n"
        )
    assert kl <= NO_FURTHER * own_kl
    assert share >= own_share - AGREEMENT
