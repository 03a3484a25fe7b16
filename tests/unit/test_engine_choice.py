"""Which engine runs which model on which peer, and who tells what of that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

import backends
from backends.base import Ability, BackendFault, Engine, Header, TensorFact, Weights
from peer.errors import NoPlan
from peer.models.imports import import_gguf
from peer.models.store import Store
from peer.planning import abilities, fits, making, measure
from peer.planning.costs import Size
from peer.planning.fits import of as fits_of
from peer.planning.plan import LeftOut, Plan, PlanId, check
from peer.planning.profile import Fit, Link
from peer.planning.split import solve, unusable
from peer.planning.wishes import Wishes
from tests import fake_models
from tests.macs import (
    EXACT,
    GIB,
    LLAMA,
    MIB,
    MLX,
    NO,
    NO_IQ,
    ROUNDED,
    A,
    B,
    C,
    linux,
    mac,
    model,
    repacked,
    speed,
)

# Which one ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "weights", "backend"),
    [
        ((), "auto", "mlx"),
        ((EXACT,), "auto", "mlx"),
        ((EXACT,), "exact", "mlx"),
        ((NO,), "auto", "llama_cpp"),
        ((repacked("approximate", why=ROUNDED),), "auto", "mlx"),
        ((repacked("approximate", why=ROUNDED),), "small", "mlx"),
        ((repacked("approximate", why=ROUNDED),), "exact", "llama_cpp"),
        ((NO, repacked("approximate", "small", ROUNDED)), "small", "mlx"),
        ((NO, repacked("approximate", "small", ROUNDED)), "auto", "llama_cpp"),
        ((EXACT, Fit("mlx", "small", "no", NO_IQ)), "small", "llama_cpp"),
        ((Fit("other", "auto", "no", "no"),), "auto", "mlx"),
    ],
)
def test_a_mac_takes_mlx_where_it_can_and_the_setting_allows_it_else_llama_cpp(
    found: tuple[Fit, ...], weights: str, backend: str
) -> None:
    of = model(*found)
    both = mac(weights=weights)
    assert both.engine_for(of) == backend
    assert both.why_not(of) == ""
    only = mac(weights=weights, engines=MLX)
    assert only.engine_for(of) == ("mlx" if backend == "mlx" else "")
    assert bool(only.why_not(of)) == (backend != "mlx")
    assert mac(engines=(*LLAMA, *MLX), weights=weights).engine_for(of) == "llama_cpp"
    assert linux().engine_for(of) == "llama_cpp"
    assert solve([both], of).windows[0].backend == backend


def test_a_peer_without_any_engine_for_a_model_is_left_out_and_told_why() -> None:
    of = model(NO)
    split = solve([mac(engines=MLX), linux()], of)
    assert {w.peer_id for w in split.windows} == {B}
    (left,) = split.left_out
    assert left.peer_id == A
    assert left.why.startswith(f"mini cannot run tiny: {NO_IQ}, and it uses no llama.cpp")
    assert "halka[llama]" in left.why
    with pytest.raises(NoPlan, match=f"no peer here can run tiny: mini cannot run tiny: {NO_IQ}"):
        solve([mac(engines=MLX)], of)
    nothing = linux(engines=())
    assert nothing.engine_for(of) == ""
    assert "install halka[llama] there" in nothing.why_not(of)


def test_exact_weights_keep_rounded_ones_off_mlx_and_say_so() -> None:
    of = model(repacked("approximate", why=ROUNDED))
    why = mac(engines=MLX, weights="exact").why_not(of)
    assert f"MLX would round weights ({ROUNDED}), and `weights` is exact there" in why
    assert f"; MLX on mini is approximate: {ROUNDED}" in solve([mac()], of).why
    assert "approximate" not in solve([mac(weights="exact")], of).why
    assert "approximate" not in solve([mac()], model(repacked())).why


def test_each_window_of_a_mixed_plan_has_the_engine_of_its_peer() -> None:
    of = model(repacked())
    peers = [mac(memory=GIB), linux(memory=GIB), mac(C, "old", memory=GIB, engines=LLAMA)]
    split = solve(peers, of, Wishes(spread_all=True))
    assert {w.peer_id: w.backend for w in split.windows} == {
        A: "mlx", B: "llama_cpp", C: "llama_cpp"
    }  # fmt: skip
    assert check(Plan(PlanId(1, 1), A, of, split)) == ""


def test_only_speeds_of_the_engine_that_would_run_a_model_count() -> None:
    can, cannot = model(EXACT), model(NO, digest="1" * 64)
    speeds = (speed("mlx", "metal", 1e-3, can), speed("mlx", "metal", 1e-3, cannot))
    measured = mac(speeds=speeds)
    assert measured.has_speed(can)
    assert not measured.has_speed(cannot)
    assert making.measured(measured, can)
    assert not making.measured(measured, cannot)
    # Nobody waits for one that will never run it.
    assert making.measured(mac(engines=MLX), cannot)
    assert not making.measured(mac(engines=MLX), can)
    size = Size(512, 512, 512)
    able = abilities.able(measured, can, size)
    assert able
    assert able.gpu
    assert able.gpu.measured
    able = abilities.able(measured, cannot, size)
    assert able
    assert able.gpu
    assert not able.gpu.measured


# What is told of a model -------------------------------------------------------------------------


class Told:
    """An engine that says what a test wants of a header. asked: the settings."""

    def __init__(self, say: Callable[[Weights], Ability]) -> None:
        self.say, self.asked = say, []

    def can_run(self, header: Header, weights: Weights = "auto") -> Ability:
        self.asked.append(weights)
        return self.say(weights)


HEADER = Header(
    {"general.architecture": "x", "x.block_count": 3}, {"t": TensorFact((1,), "F32", 4)}
)


def told(say: Callable[[Weights], Ability]) -> tuple[Fit, ...]:
    return fits_of(HEADER, lambda name: Told(say))  # type: ignore[arg-type,return-value]


def test_a_shape_tells_a_fit_for_small_weights_only_where_it_is_another_one() -> None:
    same = Ability("exact", "", (1, 2, 3), 4, 5)
    assert told(lambda weights: same) == (Fit("mlx", "auto", "exact", "", (1, 2, 3), 4, 5),)
    size = {"auto": 9, "small": 6, "exact": 0}
    usual, small = told(lambda w: Ability("approximate", ROUNDED, (size[w],) * 3, ranks=(2, 4)))
    assert (usual.weights, usual.layer_bytes, usual.ranks) == ("auto", (9, 9, 9), (2, 4))
    assert (small.weights, small.layer_bytes) == ("small", (6, 6, 6))


@pytest.mark.parametrize(
    "error",
    [BackendFault("odd"), ImportError("odd"), KeyError("odd"), ZeroDivisionError("odd"),
     ValueError("odd"), TypeError("odd"), OSError("odd"), RuntimeError("odd")],
)  # fmt: skip
def test_an_engine_that_fails_at_a_header_loses_nobody_the_model(error: Exception) -> None:
    def broken(weights: Weights) -> Ability:
        raise error

    (fit,) = told(broken)
    assert (fit.how, fit.layer_bytes) == ("no", ())
    assert fit.why.startswith("MLX fails at its header: ")
    assert "odd" in fit.why
    assert mac().engine_for(model(fit)) == "llama_cpp"


def test_bytes_of_other_layers_than_the_model_has_are_no_answer() -> None:
    (fit,) = told(lambda weights: Ability("exact", "", (1, 2)))
    assert (fit.how, fit.why) == ("no", "MLX speaks of 2 of its 3 layers")


def test_what_a_peer_tells_of_a_fit_is_believed_within_bounds_only() -> None:
    assert model(repacked()).sound
    assert model(replace(repacked(), layer_bytes=())).sound
    short = model(replace(repacked(), layer_bytes=(MIB,) * 11))
    assert not short.sound
    assert "contradicts itself" in unusable(short)
    assert check(Plan(PlanId(1, 1), A, short, solve([mac()], model()))) != ""
    huge = model(replace(repacked(), layer_bytes=(1 << 59,) * 12))
    assert "PiB" in unusable(huge)


@pytest.mark.parametrize("backend", ["llama_cpp", "mlx"])
def test_every_peer_tells_the_same_of_a_model_whatever_engine_it_runs(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    manifest = import_gguf(fake_models.write(tmp_path / "m.gguf", layers=3), store)
    folder = store.folder(manifest.digest)
    real, asked = backends.load, []

    def load(name: str) -> Engine:
        asked.append(name)
        return real(name)

    monkeypatch.setattr(measure.backends, "load", load)
    engine = real(backend)
    shape = measure._shape(folder, [engine])
    assert shape == measure._shape(folder, [real("llama_cpp")])
    assert {"llama_cpp", "mlx"} <= set(asked)
    (fit,) = shape.fits
    assert (fit.backend, fit.how) == ("mlx", "no")
    assert fits.ASKED == ("mlx",)


# In words ----------------------------------------------------------------------------------------


def test_who_is_left_out_stays_so_where_others_are_shared_with() -> None:
    of = model(NO)
    links = (Link(C, 1e-3, 1e8),)
    split = solve([mac(engines=MLX), linux(links=links), linux(C, "attic", memory=GIB)], of)
    assert [left.peer_id for left in split.left_out if NO_IQ in left.why] == [A]
    assert all(isinstance(left, LeftOut) for left in split.left_out)
