"""Which engine runs which model on which peer, and what it weighs there."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

import backends
from backends.base import Ability, BackendFault, Engine, Header, TensorFact, Weights
from backends.mlx import window as mlx_window
from peer.errors import NoPlan
from peer.models.imports import import_gguf
from peer.models.store import Store
from peer.planning import abilities, costs, counts, drafts, fits, making, measure
from peer.planning.correction import corrected
from peer.planning.costs import Problem, Size
from peer.planning.drafts import with_draft
from peer.planning.fits import of as fits_of
from peer.planning.plan import LeftOut, Plan, PlanId, PlanWindow, Split, check
from peer.planning.profile import EngineProfile, Fit, Link, ModelOffer, ModelShape, Profile, Speed
from peer.planning.split import solve, unusable
from peer.planning.tables import Tables
from peer.planning.wishes import Wishes
from peer.protocol import Timed
from tests import fake_models
from tests.plans import PEERS
from tests.plans import shape as any_shape

MIB, GIB = 1 << 20, 1 << 30
A, B, C = PEERS[:3]
METAL = EngineProfile("mlx", "Apple M3 Max", "metal", 24 * GIB, 27 * GIB, True)
MLX = (METAL, EngineProfile("mlx", "arm", "cpu", 30 * GIB, 36 * GIB))
LLAMA = (
    EngineProfile("llama_cpp", "Metal", "metal", 24 * GIB, 27 * GIB, True),
    EngineProfile("llama_cpp", "CPU", "cpu"),
)
PLAIN = (EngineProfile("llama_cpp", "CPU", "cpu"),)
NO_IQ = "MLX has no IQ4_XS, which 30 of its tensors are"
ROUNDED = "5 tensors of Q6_K are kept as float16"
EXACT = Fit("mlx")
NO = Fit("mlx", "auto", "no", NO_IQ)


def model(*found: Fit, layers: int = 12, **changes: object) -> ModelShape:
    """100 MiB a layer, with these fits."""
    facts: dict[str, object] = {
        "layer_bytes": (100 * MIB,) * layers, "layer_kv_bytes": (1024,) * layers,
        "embed_bytes": 60 * MIB, "output_bytes": 80 * MIB, "vocabulary": 1000, "fits": found,
    }  # fmt: skip
    return any_shape(layers, 64, **(facts | changes))


def repacked(how: str = "exact", weights: str = "auto", why: str = "", factor: float = 1.5) -> Fit:
    size = int(100 * MIB * factor)
    return Fit(
        "mlx",
        weights,
        how,
        why,
        (size,) * 12,
        int(60 * MIB * factor),
        int(80 * MIB * factor),  # type: ignore[arg-type]
    )


def mac(peer_id: str = A, name: str = "mini", memory: int = 30 * GIB, **changes: object) -> Profile:
    """With both engines, MLX first, unless told otherwise."""
    facts: dict[str, object] = {
        "peer_id": peer_id, "name": name, "os": "macos", "cores": 12,
        "memory_total_bytes": 36 * GIB, "memory_available_bytes": memory,
        "engines": (*MLX, *LLAMA), "unified_memory": True, "threads": 8,
    }  # fmt: skip
    return Profile(**(facts | changes))  # type: ignore[arg-type]


def linux(peer_id: str = B, name: str = "desk", **changes: object) -> Profile:
    facts: dict[str, object] = {"engines": PLAIN, "os": "linux", "unified_memory": False}
    return mac(peer_id, name, **(facts | changes))  # type: ignore[arg-type]


def speed(backend: str, kind: str, layer_s: float, of: ModelShape) -> Speed:
    return Speed(of.digest, backend, kind, 8, (layer_s,), (layer_s * 20,), 512, 1e-5, layer_s)


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
    assert left.why.startswith(f"mini cannot run tiny: {NO_IQ}, and it has no llama.cpp")
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


# What it weighs ----------------------------------------------------------------------------------


def problem(peer: Profile, of: ModelShape, size: Size | None = None) -> Problem:
    return costs.problem([peer], of, size or Size(512, 1024, 64))


def test_weights_weigh_what_they_do_in_memory() -> None:
    of = model(repacked(factor=1.5))
    there = problem(mac(), of)
    (able,) = there.peers
    ends = there.compute_bytes + there.logits_bytes + able.scratch_bytes
    kv = 1024 * 1024
    for windows, embed, output in (([(3, 7)], 0, 0), ([(0, 4)], 90, 0), ([(8, 12)], 0, 120)):
        found = costs.part(there, able, windows, 0)
        assert found
        wanted = (
            4 * (150 * MIB + kv) + (embed + output) * MIB + there.compute_bytes + able.scratch_bytes
        )
        wanted += there.logits_bytes if output else 0
        assert found.memory_bytes == found.gpu_bytes == wanted
        assert found.gpu_layers == 4, "all of a window is where its weights are"
    whole = costs.part(there, able, [(0, 12)], 5)
    assert whole
    assert whole.memory_bytes == 12 * (150 * MIB + kv) + 210 * MIB + ends
    split = solve([mac()], of)
    assert split.windows[0].memory_bytes == 12 * 150 * MIB + 210 * MIB + 12 * 1024 * split.kv_cells
    assert split.windows[0].gpu_layers == -1
    plain = problem(linux(), of)
    mapped = costs.part(plain, plain.peers[0], [(0, 4)], 0)
    assert mapped
    assert mapped.memory_bytes == 4 * (100 * MIB + kv) + plain.compute_bytes


def test_an_engine_that_repacks_is_given_room_to_compute_in() -> None:
    of = model(EXACT, layer_kv_bytes=(100, 4000, *(100,) * 10))
    (able,) = problem(mac(), of, Size(512, 2000, 64)).peers
    assert able.scratch_bytes == mlx_window.SCORES_BYTES + 3 * 4000 * 2000
    (able,) = problem(linux(), of).peers
    assert able.scratch_bytes == 0


def test_a_tied_embedding_is_in_memory_once() -> None:
    of = model(replace(repacked(factor=1.5), output_bytes=0), tied=True, output_bytes=0)
    there = problem(mac(), of)
    (able,) = there.peers
    alone = costs.part(there, able, [(0, 12)], 12)
    head, tail = costs.part(there, able, [(0, 6)], 6), costs.part(there, able, [(6, 12)], 6)
    assert alone
    assert head
    assert tail
    assert head.memory_bytes + tail.memory_bytes - alone.memory_bytes == (
        90 * MIB + there.compute_bytes + able.scratch_bytes
    )


def test_nothing_is_streamed_by_an_engine_that_has_copies() -> None:
    of = model(repacked(factor=1.5))
    small = mac(memory=GIB, disk_read_bytes_per_s=3e9)
    on_linux = EngineProfile("mlx", "CPU", "cpu")
    for engines in (MLX, (on_linux,)):
        with pytest.raises(NoPlan, match="are missing"):
            solve([replace(small, engines=engines)], of)
    with_llama = solve([small], of)
    assert with_llama.windows[0].backend == "llama_cpp"
    assert with_llama.windows[0].streamed_bytes > 0
    assert costs.forecast([small], of, with_llama), "by the engine of its windows"


def test_llama_cpp_is_taken_where_mlx_would_leave_too_little_memory() -> None:
    of = model(repacked(factor=1.5), context=8192, layer_kv_bytes=(8192,) * 12)
    for memory, backend in ((30 * GIB, "mlx"), (3 * GIB, "mlx"), (2 * GIB, "llama_cpp")):
        split = solve([mac(memory=memory * 9 // 8)], of)
        assert (split.windows[0].backend, split.context) == (backend, 8192), memory
        assert split.windows[0].streamed_bytes == 0


def test_kv_cells_of_mlx_are_float16_whatever_the_plan_has() -> None:
    of = model(EXACT, kv_types=("f16", "q8_0"), layer_kv_bytes=(64 * 7,) * 12)
    wishes = Wishes(kv_type="q8_0", context=1024)
    split = solve([mac()], of, wishes)
    assert split.kv_type == "q8_0"
    weights = of.window_bytes(0, 12)
    assert split.windows[0].memory_bytes == weights + 12 * split.kv_cells * 64 * 7
    split = solve([mac(engines=LLAMA)], of, wishes)
    assert split.windows[0].memory_bytes == weights + 12 * split.kv_cells * 34 * 7


def test_a_window_is_all_on_the_gpu_or_all_on_the_processor() -> None:
    of = model(EXACT)
    (slow,) = costs.problem([mac(speeds=(speed("mlx", "metal", 1, of),))], of, Size(1, 1, 8)).peers
    assert slow.whole
    there = problem(mac(), of)
    (table,) = Tables(there, 1).choices
    a, b = 2, 9
    assert table.gpu_layers.shape[0] == 1
    assert table.gpu_layers[0, a, b] == b - a
    on_linux = mac(engines=(EngineProfile("mlx", "CPU", "cpu"),), unified_memory=False)
    (able,) = problem(on_linux, of).peers
    assert able.gpu is None
    assert solve([on_linux], of).windows[0].gpu_layers == 0


@pytest.mark.parametrize("seed", range(40))
def test_tables_and_parts_agree_about_every_window_of_every_engine(seed: int) -> None:
    draw = random.Random(seed)
    tied = draw.random() < 0.5
    fit = repacked(factor=draw.uniform(1, 2.4))
    of = model(fit, tied=tied, layer_kv_bytes=tuple(64 * draw.randint(0, 9) for _ in range(12)))
    size = Size(512, draw.choice([512, 9000]), 64, draw.choice(["f16", "q8_0"]))
    rounds = draw.choice([1, 2, 3])
    peer = mac(
        memory=int(draw.uniform(0.2, 3) * GIB), disk_read_bytes_per_s=draw.choice([0.0, 1e9]),
        engines=draw.choice([MLX, LLAMA, MLX[1:], PLAIN]),
        unified_memory=draw.random() < 0.7,
    )  # fmt: skip
    there = problem(peer, of, size)
    (able,) = there.peers
    (table,) = Tables(there, rounds).choices
    for choice in range(len(table.fits)):
        for a in range(12 // rounds):
            for b in range(a + 1, 12 // rounds + 1):
                layers = int(table.gpu_layers[choice, a, b])
                found = costs.part(there, able, costs.windows(12, rounds, (a, b)), layers)
                assert (found is not None) == bool(table.fits[choice, a, b]), (choice, a, b)
                if found:
                    assert math.isclose(found.busy_s, float(table.busy_s[choice, a, b]))
                    assert math.isclose(
                        found.read_s, float(table.read_s[choice, a, b]), abs_tol=1e-12
                    )


def test_the_counting_programme_puts_no_layer_of_mlx_on_the_processor() -> None:
    of = model(repacked())
    there = costs.problem([mac(memory=1400 * MIB), linux(memory=GIB)], of, Size(512, 512, 64))
    assert set(counts.order(there, 1, frozenset())) == {0, 1}


def test_many_layers_are_shared_in_proportion_with_each_engines_bytes() -> None:
    layers = 2500
    fit = Fit("mlx", layer_bytes=(2 * MIB,) * layers)
    of = model(fit, layers=layers, layer_bytes=(MIB,) * layers, layer_kv_bytes=(0,) * layers)
    memory = 2400 * MIB  # half of the layers are too many for the one with copies
    split = solve([mac(memory=memory, engines=MLX), linux(memory=memory)], of)
    assert check(Plan(PlanId(1, 1), A, of, split)) == ""
    for window in split.windows:
        each = 2 if window.backend == "mlx" else 1
        assert window.memory_bytes < memory
        assert window.memory_bytes >= each * MIB * (window.last - window.first)


# A plan that is there ----------------------------------------------------------------------------


def planned(of: ModelShape, backend: str) -> Plan:
    window = PlanWindow(A, 0, 12, backend)
    return Plan(PlanId(1, 1), A, of, Split((window,), 512, 512, 1, 512))


def test_a_plan_is_reckoned_with_the_engines_that_it_has() -> None:
    of = model(EXACT)
    speeds = (speed("mlx", "metal", 1e-3, of), speed("llama_cpp", "metal", 5e-3, of))
    peer = mac(speeds=speeds)
    tpot = {
        backend: found.tpot_s
        for backend in ("mlx", "llama_cpp")
        if (found := costs.forecast([peer], of, planned(of, backend).split))
    }
    assert tpot["llama_cpp"] > 4 * tpot["mlx"]
    without = replace(peer, engines=LLAMA)
    assert costs.forecast([without], of, planned(of, "mlx").split) is None


def test_what_steps_took_corrects_the_engine_that_took_them() -> None:
    of = model(EXACT)
    speeds = (speed("mlx", "metal", 1e-3, of), speed("llama_cpp", "metal", 5e-3, of))
    told = corrected(mac(speeds=speeds), planned(of, "llama_cpp"), Timed(decode_s=0.2))
    assert told
    (kept,) = [s for s in told.speeds if s.backend == "mlx"]
    (changed,) = [s for s in told.speeds if s.backend == "llama_cpp"]
    assert kept.correction == 1.0
    assert changed.correction > 2


def test_a_draft_model_weighs_what_it_does_on_the_engine_that_will_run_it() -> None:
    of = model(EXACT)
    small = model(repacked(factor=2.0), digest="d" * 64, model="small")
    other = replace(small, fits=(NO,))
    split = planned(of, "mlx").split
    on_mlx, on_llama = (drafts._bytes(d, split, mac()) for d in (small, other))
    assert on_mlx - on_llama == (12 * 100 + 60 + 80) * MIB
    parts = small.window_parts(0, 12)
    offers = {A: [ModelOffer(d, 1.0, parts) for d in (of, small)]}
    wishing = mac(draft_wanted="small", memory=5 * GIB)
    assert with_draft(split, of, [wishing], offers, False).draft == small.digest


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
