"""Sampling: compared with llama.cpp's own sampler chain, and keyed by (seed, position) alone."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from peer.protocol import Sampling
from peer.ring.sampling import Sampler, uniform


def logits_of(seed: int, vocabulary: int = 2000, spread: float = 3.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, spread, vocabulary).astype(np.float32)


SETTINGS = {
    "the defaults": Sampling(),
    "no filter at all": Sampling(top_k=0, top_p=1, min_p=0, temperature=1),
    "hot": Sampling(top_k=0, top_p=1, min_p=0, temperature=3.7),
    "cold": Sampling(temperature=0.05),
    "top_k alone": Sampling(top_k=7, top_p=1, min_p=0),
    "top_k of one": Sampling(top_k=1),
    "more than the vocabulary": Sampling(top_k=100_000, top_p=0.5),
    "many of top_k": Sampling(top_k=500, top_p=1, min_p=0, temperature=2),
    "top_p alone": Sampling(top_k=0, top_p=0.6, min_p=0),
    "top_p of nearly all": Sampling(top_k=0, top_p=0.995, min_p=0),
    "top_p of nothing": Sampling(top_p=0),
    "min_p alone": Sampling(top_k=0, top_p=1, min_p=0.2),
    "min_p of one": Sampling(top_k=0, top_p=1, min_p=1),
    "top_p, then min_p": Sampling(top_k=0, top_p=0.9, min_p=0.1),
    "repeat": Sampling(repeat_penalty=1.7, top_k=100, top_p=1, min_p=0),
    "repeat below one": Sampling(repeat_penalty=0.5, top_k=100, top_p=1, min_p=0),
    "repeat, all candidates": Sampling(
        repeat_penalty=1.7, top_k=0, top_p=1, min_p=0, temperature=3
    ),
    "frequency": Sampling(frequency_penalty=1.3, top_k=100, top_p=1, min_p=0),
    "presence": Sampling(presence_penalty=-2.5, top_k=100, top_p=1, min_p=0),
    "all penalties, last 10": Sampling(
        repeat_penalty=1.2, frequency_penalty=0.4, presence_penalty=0.7, repeat_last_n=10
    ),
    "penalties of nothing": Sampling(repeat_penalty=2, repeat_last_n=0),
    "penalties of everything": Sampling(
        repeat_penalty=1.4, frequency_penalty=0.1, repeat_last_n=-1
    ),
    "bias": Sampling(logit_bias=((3, 12.5), (7, -100.0), (3, 1.0), (1_000_000, 5.0))),
    "bias, then penalties": Sampling(
        logit_bias=((3, 12.5), (5, 11.0)), repeat_penalty=1.5, presence_penalty=1.0
    ),
}
HISTORY = [int(i) for i in np.random.default_rng(9).integers(0, 60, 150)] + [3, 3, 3, 1999]


def llama_candidates(
    sampling: Sampling, history: Sequence[int], logits: np.ndarray
) -> dict[int, float]:
    """Ids and probabilities that llama.cpp's chain is left with just before it draws."""
    llama: Any = pytest.importorskip("llama_cpp")
    last = len(history) if sampling.repeat_last_n < 0 else sampling.repeat_last_n
    bias = (llama.llama_logit_bias * max(1, len(sampling.logit_bias)))()
    for entry, (token, value) in zip(bias, sampling.logit_bias, strict=False):
        entry.token, entry.bias = token, value
    chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
    for sampler in (
        llama.llama_sampler_init_logit_bias(len(logits), len(sampling.logit_bias), bias),
        llama.llama_sampler_init_penalties(
            len(logits),
            last,
            sampling.repeat_penalty,
            sampling.frequency_penalty,
            sampling.presence_penalty,
        ),
        llama.llama_sampler_init_top_k(sampling.top_k),
        llama.llama_sampler_init_top_p(sampling.top_p, 1),
        llama.llama_sampler_init_min_p(sampling.min_p, 1),
        llama.llama_sampler_init_temp(sampling.temperature),
        llama.llama_sampler_init_dist(1),
    ):
        llama.llama_sampler_chain_add(chain, sampler)
    data = (llama.llama_token_data * len(logits))()
    for i, value in enumerate(logits.tolist()):
        data[i].id, data[i].logit, data[i].p = i, value, 0.0
    array = llama.llama_token_data_array(data, len(logits), -1, False)
    try:
        for token in history:
            llama.llama_sampler_accept(chain, token)
        llama.llama_sampler_apply(chain, ctypes.byref(array))
        return {array.data[i].id: array.data[i].p for i in range(array.size)}
    finally:
        llama.llama_sampler_free(chain)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("seed", range(4))
def test_candidates_and_their_probabilities_are_those_of_llama_cpp(name: str, seed: int) -> None:
    sampling, logits = SETTINGS[name], logits_of(seed, spread=1.0 + seed)
    theirs = llama_candidates(sampling, HISTORY, logits)
    ids, probabilities = Sampler(sampling, HISTORY).candidates(logits.copy())
    assert set(ids.tolist()) == set(theirs)
    assert np.abs(probabilities - [theirs[i] for i in ids.tolist()]).max() < 1e-5
    assert (np.diff(probabilities) <= 0).all()
    assert probabilities.sum() == pytest.approx(1)


def test_greedy_takes_what_llama_cpp_takes_after_bias_and_penalties() -> None:
    for seed in range(20):
        sampling = Sampling(
            temperature=0, repeat_penalty=1.3, presence_penalty=0.5, logit_bias=((seed, 4.0),)
        )
        logits = logits_of(seed)
        theirs = llama_candidates(sampling, HISTORY, logits)
        assert theirs[Sampler(sampling, HISTORY).sample(logits, 0)] == pytest.approx(1)


def test_greedy_takes_the_lowest_id_of_equals() -> None:
    logits = np.zeros(100, np.float32)
    logits[[40, 17, 90]] = 2.0
    assert Sampler(Sampling(temperature=0), []).sample(logits, 5) == 17


def test_equal_logits_are_candidates_in_the_order_of_their_ids() -> None:
    logits = np.zeros(100, np.float32)
    logits[[40, 17, 90]] = 2.0
    ids, _ = Sampler(Sampling(top_k=2, top_p=1, min_p=0), []).candidates(logits)
    assert ids.tolist() == [17, 40]


def test_accepted_tokens_count_like_history_and_the_oldest_are_forgotten() -> None:
    sampling = Sampling(repeat_penalty=1.5, frequency_penalty=0.6, repeat_last_n=8, temperature=1)
    accepted = Sampler(sampling, HISTORY[:100])
    for token in HISTORY[100:]:
        accepted.accept(token)
    given = Sampler(sampling, HISTORY)
    for (a, b), (c, d) in [
        (accepted.candidates(logits_of(s, 60)), given.candidates(logits_of(s, 60)))
        for s in range(5)
    ]:
        assert a.tolist() == c.tolist()
        assert b.tolist() == d.tolist()


def test_the_draw_depends_on_seed_and_position_alone() -> None:
    sampling = Sampling(seed=77, temperature=1.5)
    fresh = [Sampler(sampling, []).sample(logits_of(p), p) for p in range(50)]
    used = Sampler(sampling, [1, 2, 3])
    backwards = [used.sample(logits_of(p), p) for p in reversed(range(50))]
    assert fresh == backwards[::-1]
    other = Sampling(seed=78, temperature=1.5)
    assert fresh != [Sampler(other, []).sample(logits_of(p), p) for p in range(50)]
    same = [Sampler(sampling, []).sample(logits_of(0), p) for p in range(50)]
    assert len(set(same)) > 5


def test_tokens_are_drawn_as_often_as_their_probabilities_say() -> None:
    sampling, draws = Sampling(seed=5, temperature=1, top_k=8, top_p=1, min_p=0), 20_000
    logits = logits_of(3, 50, 1.0)
    ids, probabilities = Sampler(sampling, []).candidates(logits.copy())
    sampler = Sampler(sampling, [])
    drawn = [sampler.sample(logits, position) for position in range(draws)]
    counts = np.array([drawn.count(i) for i in ids.tolist()])
    assert counts.sum() == draws
    chi_square = ((counts - draws * probabilities) ** 2 / (draws * probabilities)).sum()
    assert chi_square < 24.3  # p = 0.001 at 7 degrees of freedom; the seed is fixed


def test_uniform_numbers_of_neighbouring_seeds_and_positions_are_not_related() -> None:
    by_position = np.array([uniform(0, p) for p in range(5000)])
    by_seed = np.array([uniform(s, 0) for s in range(5000)])
    for numbers in (by_position, by_seed):
        assert 0 <= numbers.min() < 0.01
        assert 0.99 < numbers.max() < 1
        assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 0.05
    assert abs(np.corrcoef(by_position, by_seed)[0, 1]) < 0.05
    uniform((1 << 63) - 1, 1 << 40)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_logits_that_are_not_finite_are_refused(bad: float, temperature: float) -> None:
    logits = logits_of(1)
    logits[1234] = bad
    with pytest.raises(FloatingPointError):
        Sampler(Sampling(temperature=temperature), []).sample(logits, 0)


@pytest.mark.parametrize("temperature", [1e-30, 1e-310, 100.0])
def test_absurd_temperatures_still_give_a_token(temperature: float) -> None:
    logits = logits_of(2)
    token = Sampler(Sampling(temperature=temperature, top_k=0, top_p=1, min_p=0), []).sample(
        logits, 3
    )
    assert 0 <= token < len(logits)
    if temperature < 1:
        assert token == logits.argmax()


def test_ids_beyond_the_vocabulary_in_the_history_do_no_harm() -> None:
    sampling = Sampling(repeat_penalty=1.5, logit_bias=((500, 3.0),))
    assert 0 <= Sampler(sampling, [-1, 7, 10_000]).sample(logits_of(1, 100), 0) < 100
