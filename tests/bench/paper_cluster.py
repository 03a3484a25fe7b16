"""The six devices and seven models of the prima.cpp paper, as profiles and shapes.

The paper (arXiv:2504.08791 v2, tables 3 and 4) tells each device's processor, memory, disk and the
Wi-Fi between them; how fast a layer runs it does not tell. That is derived here from each
processor's memory bandwidth, by one set of constants for all models, each with its reason. Nothing
is fitted to a row of the paper's results.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from peer.planning import costs, families
from peer.planning.costs import Size
from peer.planning.profile import EngineProfile, Link, ModelShape, Profile, Speed

DATA: dict[str, Any] = tomllib.loads(
    (Path(__file__).parents[1] / "data" / "prima-paper.toml").read_text("utf-8")
)
RESULTS: dict[str, dict[str, Any]] = {row["model"]: row for row in DATA["result"]}
MODELS = tuple(RESULTS)
FOUR = ("D1", "D2", "D3", "D4")  # the paper's own cluster
SIX = (*FOUR, "D5", "D6")  # of its figure 8
BACKEND = "llama_cpp"
GIB = 1 << 30

# prima.cpp's README runs `-c 1024 -n 256 -p "what is edge AI?"`. Buffers for 512 rows are reserved
# there as here, but what a prompt of a few tokens never touches takes no memory: 32 rows.
PROMPT_TOKENS = 16
SIZE = Size(context=1024, kv_cells=1024, batch_tokens=32)

PREFILL_TOKENS = 512
WINDOW_S = 1e-4  # around a window's layers: a graph is built and launched
WEIGHTS_PER_BYTE = 8 / 4.5  # of Q4_K


@dataclass(frozen=True, slots=True)
class Pace:
    """Of a processor: bytes of weights read a second when decoding, operations a second in
    prefill."""

    bytes_per_s: float
    operations_per_s: float


# Processors reach 65 to 70 % of their memory's nominal bandwidth with llama.cpp, phones 25 to 30 %
# (they throttle, and their memory serves the screen as well).
PROCESSORS = {
    "D1": Pace(48e9, 4e11),  # M1, LPDDR4X: 68 nominal
    "D2": Pace(33e9, 7e11),  # laptop i9 of 8 cores, two channels of DDR4-3200: 51 nominal
    "D3": Pace(35e9, 9e11),  # desktop i9 of 16 cores, two channels of DDR4-3200 or a little more
    "D4": Pace(12e9, 1e11),  # Kirin 9000, LPDDR5: 44 nominal
    "D5": Pace(14e9, 1e11),  # Dimensity 8100, LPDDR5: 51 nominal
    "D6": Pace(20e9, 2e11),  # Mac Air i5 of 4 cores, LPDDR4X: 30 to 60 nominal, by its year
}
# GPUs: half of nominal (the paper's 8B: 4.6 GB in 15 ms with 616 GB/s). M1: llama.cpp decodes 14
# tokens of a 3.6 GB model a second with it (ggml-org/llama.cpp, discussion 4167), prefills 117.
GPUS = {
    "D1": ("metal", Pace(50e9, 1.5e12)),
    "D2": ("cuda", Pace(224e9, 2e13)),  # 3070 Laptop
    "D3": ("cuda", Pace(308e9, 2.5e13)),  # 2080 Ti
}
# "3 to 7 ms of latency": of one way. The paper counts dllama's 64 all-reduces with 3 ms each.
HOP_S = 5e-3
LINK_BYTES_PER_S = (320 + 610) / 2 * 1e6 / 8


def peer_id(name: str) -> str:
    """A peer id for D1 … D6."""
    return "abcdefgh"[int(name[1:]) - 1] * 16


def shape(model: str) -> ModelShape:
    """Of one of the paper's rows, with every matrix of its layers as Q4_K.

    The paper writes "Q4K" and 40 GB for the 70B, and has 23 layers of it in the 11 GiB of D3, 16 in
    the 8 GiB of D2. Layers of Q4_K_M have 0.478 GiB: 23 of them, and 700 MiB that prima.cpp keeps
    free, are more than 11 GiB. 45B and 60B are Llama 3 70B with fewer layers (Drobeta-Turnu-
    Severin, nyun: models cut down in depth), 14B the dimensions of Qwen2.5 (theirs is Llama 3 8B
    with layers repeated: within 10 % of the same bytes).
    """
    known = families.shape(f"{model}:q4_k_m")
    lightest = min(known.layer_bytes)
    return msgspec.structs.replace(
        known, model=f"{model}-q4_k", layer_bytes=(lightest,) * known.layers, layer_kinds=()
    )


def profiles(
    of: ModelShape, names: Sequence[str], memory_gib: Mapping[str, float] | None = None
) -> tuple[Profile, ...]:
    """The devices as peers that have measured this model. memory_gib: instead of the paper's."""
    devices = {device["name"]: device for device in DATA["device"]}
    return tuple(_profile(devices[name], of, names, memory_gib or {}) for name in names)


def _profile(
    device: dict[str, Any], of: ModelShape, names: Sequence[str], memory_gib: Mapping[str, float]
) -> Profile:
    name = device["name"]
    ram = round(memory_gib.get(name, device["memory_available_gib"]) * GIB)
    engines = [EngineProfile(BACKEND, "CPU", "cpu", ram, ram)]
    speeds = [_speed(of, "cpu", PROCESSORS[name])]
    if name in GPUS:
        kind, pace = GPUS[name]
        free = ram if kind == "metal" else round(device["gpu_memory_available_gib"] * GIB)
        # What the paper calls available is what a runner may use; the plan leaves a headroom free.
        free += costs.GPU_HEADROOM_BYTES * (kind != "metal")
        engines.append(EngineProfile(BACKEND, device["gpu"], kind, free, free))
        speeds.append(_speed(of, kind, pace))
    return Profile(
        peer_id=peer_id(name),
        name=name,
        os=device["os"],
        cores=device["cpu_cores"],
        memory_total_bytes=ram,
        memory_available_bytes=ram,
        engines=tuple(engines),
        unified_memory=name == "D1",
        threads=device["cpu_cores"],
        disk_read_bytes_per_s=device["disk_read_gb_s"] * 1e9,
        speeds=tuple(speeds),
        links=tuple(
            Link(peer_id(other), 2 * HOP_S, LINK_BYTES_PER_S) for other in names if other != name
        ),
    )


def _speed(of: ModelShape, kind: str, pace: Pace) -> Speed:
    """A layer's weights are read once for a token, and used for two operations by each."""
    layer = of.layer_bytes[0]
    operations = 2 * PREFILL_TOKENS * layer * WEIGHTS_PER_BYTE
    # A short chunk reads the weights once, and is computed as fast as a long one.
    alone = pace.operations_per_s / (2 * WEIGHTS_PER_BYTE * pace.bytes_per_s)
    short = tuple((rows, max(1.0, alone / rows)) for rows in (16, 32, 64, 128, 256))
    return Speed(
        digest=of.digest,
        backend=BACKEND,
        kind=kind,
        threads=8,
        decode_s=(layer / pace.bytes_per_s,),
        prefill_s=(operations / pace.operations_per_s,),
        prefill_tokens=PREFILL_TOKENS,
        window_s=WINDOW_S,
        output_s=(of.output_bytes or of.embed_bytes) / pace.bytes_per_s,
        short_chunks=short,
    )
