"""Which engine runs what, as `halka status`, `halka plan` and the agent's report say it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from peer import report
from peer.planning.plan import Plan, PlanId, PlanState, PlanWindow, Split
from peer.planning.profile import EngineProfile, Fit, ModelShape, Profile, Speed
from peer.words import paces, status, whatif
from peer.words.planning import _gpus
from peer.words.screen import Screen
from peer.words.state import Status
from tests.agent_double import a_peer, a_status
from tests.plans import PEERS, shape

GIB = 1 << 30
A, B, C = PEERS[:3]
ENGINES = (
    EngineProfile("mlx", "Apple M3 Max", "metal", 24 * GIB, 27 * GIB, True),
    EngineProfile("llama_cpp", "Metal", "metal", 24 * GIB, 27 * GIB, True),
    EngineProfile("llama_cpp", "CPU", "cpu"),
)
WHY = "5 tensors of Q6_K are kept as float16"
ROUNDED = Fit("mlx", "auto", "approximate", WHY, (2000,) * 12, 3000, 3000)
SHAPE = shape(fits=(ROUNDED,))


def mac(peer_id: str = A, name: str = "mini", **changes: Any) -> Profile:
    values: dict[str, Any] = {
        "peer_id": peer_id, "name": name, "os": "macos", "cores": 12,
        "memory_total_bytes": 36 * GIB, "memory_available_bytes": 30 * GIB,
        "engines": ENGINES, "unified_memory": True, "threads": 8,
    }  # fmt: skip
    return Profile(**(values | changes))


def planned(*backends: str, of: ModelShape = SHAPE) -> Plan:
    windows = tuple(PlanWindow(PEERS[i], 4 * i, 4 * i + 4, b) for i, b in enumerate(backends))
    return Plan(PlanId(1, 1), A, of, Split(windows, 512, 512, 1, 512))


def shown(peers: list[dict[str, Any]], **model: Any) -> str:
    told = a_status(peers=peers)
    told["model"] |= model
    return "\n".join(status.lines(msgspec.convert(told, Status), Screen(width=100)))


def engines(*names: str) -> list[dict[str, str]]:
    return [{"backend": e.backend, "device": e.device, "kind": e.kind}
            for e in ENGINES if e.backend in names]  # fmt: skip


def test_status_names_the_engine_of_each_peers_layers_and_its_gpu() -> None:
    both = engines("mlx", "llama_cpp")
    layers = {"layers": [[0, 4]], "engines": both, "phase": "serving"}
    text = shown([
        a_peer("a", "one", backend="mlx", on_gpu=True, **layers),
        a_peer("b", "two", backend="llama_cpp", on_gpu=True, **layers),
        a_peer("c", "three", backend="llama_cpp", on_gpu=False, **layers),
        a_peer("d", "four", engines=both),
    ])  # fmt: skip
    lines = {line.split()[0]: line for line in text[text.index("Peers ") :].splitlines() if line}
    assert "GiB free, MLX on Apple M3 Max, 10.0.0.1" in lines["one"]
    assert "GiB free, llama.cpp on Metal, 10.0.0.2" in lines["two"]
    assert "GiB free, llama.cpp, 10.0.0.3" in lines["three"]
    assert "GiB free, Apple M3 Max, Metal, 10.0.0.4" in lines["four"]


def test_status_says_where_weights_are_rounded_and_nothing_else_of_it() -> None:
    peers = [a_peer("a", "mini", backend="mlx", layers=[[0, 12]])]
    assert f"\n         approximate on mini by MLX: {WHY}\n" in shown(
        peers, approximate=f"approximate on mini by MLX: {WHY}"
    )
    assert "approximate" not in shown(peers)


def agent(*profiles: Profile) -> Any:
    return SimpleNamespace(profiles={profile.peer_id: profile for profile in profiles})


def test_the_report_tells_whose_engine_rounds_which_weights() -> None:
    here = agent(mac(), mac(B, "old"), mac(C, "book"))
    all_mlx, mixed = planned("mlx", "mlx", "mlx"), planned("mlx", "llama_cpp", "mlx")
    assert report._approximate(here, all_mlx) == f"approximate on mini, old, book by MLX: {WHY}"
    assert report._approximate(here, mixed) == f"approximate on mini, book by MLX: {WHY}"
    assert report._approximate(here, planned("llama_cpp")) == ""
    exact = replace(SHAPE, fits=(replace(ROUNDED, how="exact", why=""),))
    assert report._approximate(here, planned("mlx", of=exact)) == ""
    assert report._approximate(agent(), all_mlx) == ""


def test_the_report_tells_the_engine_of_this_peers_layers_else_the_one_it_would_take() -> None:
    cannot = replace(SHAPE, fits=(Fit("mlx", "auto", "no", "MLX has no IQ4_XS"),))
    state = PlanState(planned("llama_cpp"), "serving")
    assert report._backend(agent(mac()), A, state) == "llama_cpp"
    assert report._backend(agent(mac(B)), B, state) == "mlx"
    other = PlanState(planned("llama_cpp", of=cannot), "serving")
    assert report._backend(agent(mac(B)), B, other) == "llama_cpp"
    assert report._backend(agent(mac()), A, None) == "mlx"
    assert report._backend(agent(mac(engines=())), A, None) == ""


def test_a_gpu_is_that_of_the_engine_that_has_the_windows() -> None:
    split = planned("mlx", "llama_cpp").split
    assert _gpus([mac(), mac(B)], split) == {A: ("Apple M3 Max", "metal"), B: ("Metal", "metal")}


# What is thought up ------------------------------------------------------------------------------


def test_speeds_are_made_up_for_the_engine_that_would_run_the_model_in_its_bytes() -> None:
    pace = {"metal": paces.Pace(1e9, 1e12)}
    (on_mlx,) = paces.paced(mac(), SHAPE, pace).speeds
    exact = mac(weights="exact")
    (on_llama,) = paces.paced(exact, SHAPE, pace).speeds
    assert (on_mlx.backend, on_llama.backend) == ("mlx", "llama_cpp")
    assert on_mlx.decode_s == (pytest.approx(2000 / 1e9),)
    assert on_llama.decode_s == (pytest.approx(1000 / 1e9),)
    assert on_mlx.prefill_s == on_llama.prefill_s, "as many weights are multiplied"
    assert on_mlx.output_s == pytest.approx(3000 / 1e9)
    faster = paces.faster(mac(), SHAPE, 2.0)
    assert {(s.backend, s.kind) for s in faster.speeds} == {("mlx", "metal"), ("mlx", "cpu")}


def test_a_speed_of_another_model_is_carried_over_by_the_bytes_in_memory() -> None:
    other = shape(digest="1" * 64, fits=(replace(ROUNDED, layer_bytes=(4000,) * 12),))
    speed = Speed(other.digest, "mlx", "metal", 8, (4e-6,), (1e-3,), 512, 1e-5, 1e-6)
    known = {other.digest: other, SHAPE.digest: SHAPE}
    told, was = paces.carried(mac(speeds=(speed,)), SHAPE, known)
    assert was
    found = told.speed(SHAPE.digest, "mlx", "metal")
    assert found is not None
    assert found.decode_s == (pytest.approx(2e-6),)
    # Of llama.cpp, which would run it here, nothing is known.
    assert paces.carried(mac(speeds=(speed,), weights="exact"), SHAPE, known)[1] is False


def test_a_gpu_is_given_memory_for_every_engine_that_uses_it() -> None:
    edit = whatif.Edit("mini", "gpu_memory", "+", float(8 * GIB))
    found = whatif._with_gpu_memory(mac(), edit).engines
    assert [e.memory_free_bytes for e in found] == [32 * GIB, 32 * GIB, 0]
    cards = tuple(EngineProfile("llama_cpp", name, "cuda", GIB, GIB) for name in ("A", "B"))
    found = whatif._with_gpu_memory(mac(engines=cards), edit).engines
    assert [e.memory_free_bytes for e in found] == [9 * GIB, GIB], "of several cards the first"
