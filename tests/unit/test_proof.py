"""Figures and verdicts: what an engine may be off by, and how a wrong one is named."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peer.planning import proof
from peer.planning.proof import LayerFigure, LogitsFigure, Subject, judge, layer_error

MLX = Subject("mlx", "cpu", "CPU", "0.33.0")
METAL = Subject("mlx", "metal", "Apple M2", "0.33.0")
LLAMA = Subject("llama_cpp", "cuda", "GPU", "0.3.36")
RIGHT = LogitsFigure(1e-5, 1e-5, 1.0, 1e-9)
OWN = LogitsFigure(0.1, 0.02, 0.9, 2e-4)


def rows(seed: int = 1, count: int = 6, width: int = 64) -> proof.Floats:
    return np.random.default_rng(seed).standard_normal((count, width), dtype=np.float32)


@given(st.floats(1e-6, 1.0), st.floats(1e-3, 1e3))
def test_a_layers_error_is_a_share_of_what_the_layer_adds(share: float, size: float) -> None:
    x, adds = rows(1) * np.float32(size), rows(2)
    truth = x.astype(np.float64) + adds
    found = truth + share * np.abs(adds)
    error = layer_error(truth.astype(np.float32), found.astype(np.float32), x)
    assert error == pytest.approx(share, rel=1e-2, abs=1e-6 * (1 + size))


def test_large_hidden_states_do_not_hide_a_wrong_layer() -> None:
    x, adds = rows(1) * np.float32(1000), rows(2)
    assert layer_error(x + adds, x + adds * np.float32(0.88), x) == pytest.approx(0.12, rel=0.01)
    assert layer_error(x + adds, x + adds * np.float32(0.88)) < 1e-3


def test_one_wrong_row_counts_unless_a_router_may_have_chosen_otherwise() -> None:
    truth = rows(1)
    found = truth.copy()
    found[3] *= -1
    assert layer_error(truth, found) == pytest.approx(2.0)
    assert layer_error(truth, found, routed=True) == 0.0


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_what_is_no_number_is_wrong_without_measure(broken: float) -> None:
    truth = rows(1)
    found = truth.copy()
    found[0, 0] = broken
    assert layer_error(truth, found) == proof.NO_NUMBERS
    assert layer_error(truth, truth[:3]) == proof.NO_NUMBERS
    figure = proof.logits_figure(truth, found)
    assert (figure.error, figure.top1) == (proof.NO_NUMBERS, 0.0)
    verdict = judge(MLX, "it", [LayerFigure(2, "Q8_0", proof.NO_NUMBERS)], RIGHT, OWN)
    assert verdict.why == "its Q8_0 weights give no numbers (layer 2 of it)"
    assert judge(MLX, "it", [], figure, None).how == "wrong"
    assert judge(MLX, "it", [], figure, OWN).how == "wrong"


def test_the_logits_figures_are_what_their_names_say() -> None:
    truth = np.log(np.array([[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]], np.float32))
    found = np.log(np.array([[0.25, 0.5, 0.25], [0.8, 0.1, 0.1]], np.float32)) + np.float32(3)
    figure = proof.logits_figure(truth, found)
    assert figure.top1 == 0.5
    assert figure.kl == pytest.approx((0.5 * np.log(2) + 0.25 * np.log(0.5)) / 2, rel=1e-5)
    assert figure.largest == pytest.approx(3 + np.log(2), rel=1e-5)
    assert proof.logits_figure(truth, truth) == LogitsFigure(0.0, 0.0, 1.0, 0.0)


def test_a_wrong_engine_is_named_with_its_type_its_layer_and_how_far_it_is_off() -> None:
    layers = [
        LayerFigure(0, "F32", 2e-6, 0.0),
        LayerFigure(1, "Q4_1", 0.12, 0.011),
        LayerFigure(2, "Q4_K", 3e-5, 0.018),
    ]
    verdict = judge(MLX, "the built-in model", layers, RIGHT, OWN)
    assert (verdict.how, verdict.worst) == ("wrong", layers[1])
    assert proof.refusal(MLX, verdict) == (
        "MLX 0.33.0 is refused: its Q4_1 weights give wrong numbers (layer 1 of the built-in "
        "model: 12 % off); update it (halka verify tries again), or set backend = llama_cpp"
    )


def test_an_engine_that_could_not_be_proven_is_refused_with_the_reason() -> None:
    verdict = proof.Verdict("the built-in model", "failed", "it was ended by signal 11")
    assert proof.refusal(MLX, verdict) == (
        "MLX 0.33.0 is refused, for it could not be proven: it was ended by signal 11; update it "
        "(halka verify tries again), or set backend = llama_cpp"
    )


@pytest.mark.parametrize(
    ("subject", "figure", "how"),
    [
        (MLX, LayerFigure(0, "Q4_1", 4e-5, 0.01), "passed"),
        (MLX, LayerFigure(0, "Q4_1", 1e-4, 0.01), "wrong"),
        (METAL, LayerFigure(0, "Q4_1", 2e-3, 0.01), "passed"),
        (METAL, LayerFigure(0, "Q4_1", 4e-3, 0.01), "wrong"),
        (MLX, LayerFigure(0, "Q6_K", 9e-4, 0.02, rounded=True), "passed"),
        (MLX, LayerFigure(0, "Q6_K", 5e-3, 0.02, rounded=True), "wrong"),
        (LLAMA, LayerFigure(0, "Q4_1", 0.03, 0.011), "passed"),
        (LLAMA, LayerFigure(0, "Q4_1", 0.12, 0.011), "wrong"),
        (LLAMA, LayerFigure(0, "F32", 4e-3, 0.0), "passed"),
        (MLX, LayerFigure(0, "IQ4_XS", 0.03, copied=False), "passed"),
        (MLX, LayerFigure(0, "IQ4_XS", 0.12, copied=False), "wrong"),
    ],
)
def test_what_an_engine_may_be_off_by(subject: Subject, figure: LayerFigure, how: str) -> None:
    assert judge(subject, "it", [figure], None, None).how == how


def test_a_models_own_layers_may_be_a_little_farther_off() -> None:
    for error, how in ((1e-3, "passed"), (4e-3, "wrong")):
        layers = [LayerFigure(0, "Q4_1", error, 0.01)]
        assert judge(MLX, "it", layers, None, None, real=True).how == how
        assert judge(MLX, "it", layers, None, None).how == "wrong"


def test_weights_that_may_be_small_may_be_farther_off() -> None:
    figure = LayerFigure(0, "Q6_K", 5e-3, 0.02, rounded=True)
    small = Subject("mlx", "cpu", weights="small")
    assert judge(small, "it", [figure], None, None).how == "passed"
    plain = LayerFigure(0, "Q4_1", 5e-3, 0.01)
    assert judge(small, "it", [plain], None, None).how == "wrong"


def test_wrong_logits_are_seen_where_every_layer_is_right() -> None:
    layers = [LayerFigure(0, "F32", 1e-6, 0.0)]
    wrong = LogitsFigure(0.5, 0.3, 0.4, 0.02)
    verdict = judge(MLX, "it", layers, wrong, OWN)
    assert verdict.how == "wrong"
    assert "30 % off" in verdict.why
    assert judge(LLAMA, "it", layers, LogitsFigure(0.1, 0.03, 0.9, 2e-4), OWN).how == "passed"
    assert judge(MLX, "it", layers, LogitsFigure(2, 0.1, 0.8, 0.05), None).how == "passed"
    assert judge(MLX, "it", layers, LogitsFigure(9, 0.9, 0.1, 0.5), None).how == "wrong"
