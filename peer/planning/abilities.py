"""What a peer has for a model: how fast its processors run each layer, and its memory. Pure.

Decoding reads every active weight once for a token, so a layer's time is what was measured for its
kind, and grows with the KV cache that is read beside it. What was not measured is guessed, low.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from peer.planning.pipeline import Curve, curve
from peer.planning.profile import ModelShape, Profile, Speed

# A byte of KV cache takes a processor longer than one of weights: attention is done in float32, on
# short rows. SmolLM2 on one core: 4.4 us for each position's 23 KiB, at 14 GB/s of weights.
KV_FACTOR = 2.7
FILL_TOKENS = 256  # of the KV cache that a decode step reads: in the middle of a short answer
GPU_HEADROOM_BYTES = 512 << 20  # a driver's own, and the desktop's next window
OWN_MEMORY = ("cuda", "rocm", "hip", "vulkan")  # kinds of GPUs that do not use the machine's

# What is usual for a processor that was not measured: bytes of weights read a second when decoding,
# and operations a second in prefill. Low on purpose: a measured peer is to be preferred.
USUAL_BYTES_PER_S = {"cpu": 8e9, "metal": 6e10, "cuda": 2e11, "rocm": 1.5e11, "vulkan": 1e11}
USUAL_OPERATIONS_PER_S = {"cpu": 4e10, "metal": 1.5e12, "cuda": 8e12, "rocm": 5e12, "vulkan": 3e12}
CACHE_BYTES_PER_S = 2e9  # at least, in bytes of weights as `_cache` tells it
_LONG_ROWS = 512  # of a chunk that is computed as fast as any
_WEIGHTS_PER_BYTE = 1.7  # of about 4.7 bits each, as most models at home

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Size:
    """How much is kept for answers, in tokens; batch_tokens: rows of the longest step."""

    context: int
    kv_cells: int
    batch_tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class Pace:
    """One processor's seconds for one model. decode_s, prefill_s: [layers], for a token (beside a
    KV cache of FILL_TOKENS) and for a chunk of batch_tokens; by: how a shorter chunk compares with
    a long one; output_s: the tail's, for a token."""

    decode_s: Floats
    prefill_s: Floats
    window_s: float
    output_s: float
    measured: bool
    by: Curve
    batch_tokens: int

    def row_s(self, prefill_s: float) -> float:
        """Seconds of a row in a long chunk, of layers whose chunk of batch_tokens takes so long."""
        return prefill_s / self.by.took(self.batch_tokens)


@dataclass(frozen=True, slots=True, eq=False)
class Able:
    """What a peer that could take part has. ram_bytes: of the machine, for its stage; gpu: None
    where there is none, gpu_bytes what it may hold (unified: out of ram_bytes)."""

    profile: Profile
    backend: str
    cpu: Pace
    gpu: Pace | None
    ram_bytes: int
    gpu_bytes: int
    unified: bool

    @property
    def peer_id(self) -> str:
        """Of the profile."""
        return self.profile.peer_id

    @property
    def memory_bytes(self) -> int:
        """Of all kinds, for its stage."""
        return self.ram_bytes + (0 if self.unified else self.gpu_bytes)

    @property
    def disk_bytes_per_s(self) -> float:
        """Of its profile; 0: it cannot stream."""
        return self.profile.disk_read_bytes_per_s


def able(profile: Profile, shape: ModelShape, size: Size) -> Able:
    """What a peer with an engine has for a model."""
    backend = profile.engines[0].backend
    devices = [e for e in profile.engines if e.backend == backend]
    gpus = [e for e in devices if e.kind != "cpu" and e.memory_free_bytes]
    own = [e for e in gpus if e.kind in OWN_MEMORY and not profile.unified_memory]
    chosen = own or gpus
    free = sum(max(0, e.memory_free_bytes - GPU_HEADROOM_BYTES * bool(own)) for e in chosen)
    unified = bool(chosen) and not own
    return Able(
        profile=profile,
        backend=backend,
        cpu=_pace(profile, shape, size, backend, "cpu"),
        gpu=_pace(profile, shape, size, backend, chosen[0].kind) if chosen else None,
        ram_bytes=profile.memory_available_bytes,
        gpu_bytes=min(free, profile.memory_available_bytes) if unified else free,
        unified=unified,
    )


def _pace(profile: Profile, shape: ModelShape, size: Size, backend: str, kind: str) -> Pace:
    """As it was measured, else as is usual."""
    speed = profile.speed(shape.digest, backend, kind)
    active = np.array(shape.active_bytes, np.float64)
    if speed is not None and speed.decode_s and speed.prefill_s and speed.prefill_tokens:
        return _measured(speed, shape, size, active)
    rate = USUAL_BYTES_PER_S.get(kind, USUAL_BYTES_PER_S["cpu"])
    operations = USUAL_OPERATIONS_PER_S.get(kind, USUAL_OPERATIONS_PER_S["cpu"])
    kv = _cache(shape, kind)
    row = 2 * _WEIGHTS_PER_BYTE / operations  # of a byte of weights
    by = curve(kind, _LONG_ROWS, 1 / rate / row)
    output = shape.output_bytes or shape.embed_bytes
    chunk = active * row * by.took(size.batch_tokens)
    return Pace((active + kv) / rate, chunk, 1e-4, output / rate, False, by, size.batch_tokens)


def _measured(speed: Speed, shape: ModelShape, size: Size, active: Floats) -> Pace:
    at = np.array(shape.kinds, np.int64)
    kinds = np.minimum(at, len(speed.decode_s) - 1)
    decode = np.array(speed.decode_s, np.float64)[kinds]
    kv = _cache(shape, speed.kind)
    # A layer so small that a step is all overhead tells nothing of how fast memory is read.
    grown = decode + np.minimum(decode * kv / np.maximum(active, 1), kv / CACHE_BYTES_PER_S)
    prefill = np.array(speed.prefill_s, np.float64)[np.minimum(at, len(speed.prefill_s) - 1)]
    factor, longest = speed.correction or 1.0, speed.prefill_tokens
    alone = longest * float(decode.sum()) / max(float(prefill.sum()), 1e-12)
    by = curve(speed.kind, longest, alone, speed.short_chunks)
    return Pace(
        grown * factor,
        prefill * (factor * by.took(size.batch_tokens) / longest),
        speed.window_s * factor,
        speed.output_s * factor,
        True,
        by,
        size.batch_tokens,
    )


def _cache(shape: ModelShape, kind: str) -> Floats:
    """[layers] the KV cache that a decode step reads, in bytes of weights that take as long."""
    factor = FILL_TOKENS * (KV_FACTOR if kind == "cpu" else 1.0)
    return np.array(shape.layer_kv_bytes, np.float64) * factor
