"""Profiles of made-up homes, and what an agent in one would say; for the words of `halka plan`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from peer.planning.plan import LeftOut, Plan, PlanId, PlanWindow, Split
from peer.planning.profile import EngineProfile, Link, ModelShape, Profile, Speed
from peer.planning.split import solve
from peer.planning.wishes import Wishes
from tests.plans import shape

GIB = 1 << 30
IDS = {"desk": "a" * 16, "attic": "b" * 16, "mini": "c" * 16}
MODEL = shape(
    24, 1024, model="tiny-q4_k_m", layer_bytes=(200 << 20,) * 24, layer_kv_bytes=(1024,) * 24,
    embed_bytes=64 << 20, output_bytes=64 << 20, vocabulary=32000,
)  # fmt: skip


def peer(name: str, memory_bytes: int, layer_s: float, **changes: Any) -> Profile:
    """A peer with a CPU that takes so long for a layer of MODEL."""
    values: dict[str, Any] = {
        "peer_id": IDS.get(name, (name * 16)[:16]),
        "name": name,
        "os": "linux",
        "cores": 4,
        "memory_total_bytes": memory_bytes,
        "memory_available_bytes": memory_bytes,
        "engines": (EngineProfile("llama_cpp", "CPU", "cpu"),),
        "threads": 4,
        "speeds": (speed(layer_s),),
    }
    return Profile(**(values | changes))


def speed(layer_s: float, kind: str = "cpu", of: ModelShape = MODEL) -> Speed:
    """Of every layer alike; a prefill of 512 tokens takes as long as 100 of them."""
    return Speed(of.digest, "llama_cpp", kind, 4, (layer_s,), (100 * layer_s,), 512, 1e-4, layer_s)


def link(to: str, bytes_per_s: float, rtt_s: float = 1e-3) -> Link:
    return Link(IDS[to], rtt_s, bytes_per_s)


def home() -> tuple[Profile, ...]:
    """desk has too little memory to run MODEL alone; attic is slow, mini is slow and far."""
    return (
        peer("desk", 4040 << 20, 2e-3, links=(link("attic", 1e8), link("mini", 1e7, 5e-3))),
        peer("attic", 4 * GIB, 5e-3, links=(link("desk", 1e8), link("mini", 1e7, 5e-3))),
        peer("mini", 3 * GIB, 6e-3, links=(link("desk", 1e7, 5e-3), link("attic", 1e7, 5e-3))),
    )


def running() -> Plan:
    """A plan that serves MODEL in this home: desk runs 19 layers, attic the last five."""
    windows = (
        PlanWindow(IDS["desk"], 0, 19, memory_bytes=3900 << 20, gpu_layers=0),
        PlanWindow(IDS["attic"], 19, 24, memory_bytes=1100 << 20, gpu_layers=0),
    )
    left = (LeftOut(IDS["mini"], "with mini a token would take 73 ms instead of 67 ms"),)
    return Plan(PlanId(3, 2), IDS["attic"], MODEL, Split(windows, 4096, 4096, 8, 512, left))


def made_of(profiles: Sequence[Profile], model: ModelShape = MODEL) -> Plan:
    """What the coordinator would publish."""
    return Plan(PlanId(3, 2), IDS["attic"], model, solve(profiles, model, Wishes()))


def told(profiles: Sequence[Profile], plan: Plan) -> dict[str, Any]:
    """What GET /halka/profiles says where everybody holds the parts of the running plan."""
    held = {
        window.peer_id: MODEL.window_parts(window.first, window.last)
        for window in plan.split.windows
    }
    answer = {
        "profiles": profiles,
        "shape": MODEL,
        "held": held,
        "timed": {},
        "plan": plan,
        "coordinator": IDS["attic"],
        "models": [{"shape": MODEL, "held": held}],
    }
    return msgspec.to_builtins(answer)  # type: ignore[no-any-return]
