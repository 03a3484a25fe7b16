"""Macs with two engines, a Linux machine with one, and a model that says how MLX runs it."""

from __future__ import annotations

from peer.planning.profile import EngineProfile, Fit, ModelShape, Profile, Speed
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
