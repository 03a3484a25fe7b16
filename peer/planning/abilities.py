"""What a peer has for a model: how fast its processors run each layer, and its memory. Pure.

Decoding reads every active weight once for a token, so a layer's time is what was measured for its
kind, and grows with the KV cache that is read beside it. What was not measured is guessed, low.

Engines differ. llama.cpp maps the files: weights weigh what they weigh there, what does not fit is
read again, and a window's last layers can be on a GPU, the others on the processor. MLX has copies
of its own, repacked (`ModelShape.fits`): nothing is read again, and a window is all in one place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from peer.planning.kv import plain
from peer.planning.pipeline import Curve, curve
from peer.planning.profile import ModelShape, Profile, Speed

# A byte of KV cache takes a processor longer than one of weights: attention is done in float32, on
# short rows. SmolLM2 on one core: 4.4 us for each position's 23 KiB, at 14 GB/s of weights.
KV_FACTOR = 2.7
FILL_TOKENS = 256  # of the KV cache that a decode step reads: in the middle of a short answer
GPU_HEADROOM_BYTES = 512 << 20  # a driver's own, and the desktop's next window
REPACKS = ("mlx",)  # backends that keep weights of their own, and KV cells of f16, in one place
# What these have besides while they compute a layer: attention's scores, where they are written
# down (`backends.mlx.window.SCORES_BYTES`), and the layer's KV cells in float32 and float16.
SCORES_BYTES, WIDENED = 1 << 28, 3
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
    """How much is kept for answers, in tokens; batch_tokens: rows of the longest step; kv_type: of
    the KV cache that the shape tells of."""

    context: int
    kv_cells: int
    batch_tokens: int
    kv_type: str = "f16"


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
    where there is none, gpu_bytes what it may hold (unified: out of ram_bytes). held: the model
    with weights and KV cells as its engine keeps them in memory; repacks: it is not mapped."""

    profile: Profile
    backend: str
    cpu: Pace
    gpu: Pace | None
    ram_bytes: int
    gpu_bytes: int
    unified: bool
    held: ModelShape
    repacks: bool = False
    scratch_bytes: int = 0  # for all of its windows, besides what every engine needs for each

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
        return 0.0 if self.repacks else self.profile.disk_read_bytes_per_s

    @property
    def whole(self) -> bool:
        """Whether all layers of a window are on the GPU, or none may be."""
        return self.repacks and self.gpu is not None

    @property
    def head_bytes(self) -> int:
        """What the first window needs besides its layers. (An embedding that is mapped is read only
        where the rows of a step's tokens lie.)"""
        return self.held.embed_bytes if self.repacks else 0

    @property
    def tail_bytes(self) -> int:
        """What the last window needs besides its layers and logits."""
        return self.held.output_bytes + (self.held.embed_bytes if self.held.tied else 0)

    @property
    def shared_bytes(self) -> int:
        """What head_bytes and tail_bytes both count, where one window is both."""
        return self.head_bytes if self.held.tied else 0


def able(profile: Profile, shape: ModelShape, size: Size, backend: str = "") -> Able | None:
    """What a peer has for a model, None where it cannot run it. backend: that is to run it; "": the
    one that would."""
    backend = backend or profile.engine_for(shape)
    if backend not in profile.backends:
        return None
    devices = [e for e in profile.engines if e.backend == backend]
    gpus = [e for e in devices if e.kind != "cpu" and e.memory_free_bytes]
    own = [e for e in gpus if e.kind in OWN_MEMORY and not profile.unified_memory]
    chosen = own or gpus
    free = sum(max(0, e.memory_free_bytes - GPU_HEADROOM_BYTES * bool(own)) for e in chosen)
    unified = bool(chosen) and not own
    held, repacks = shape.in_memory(backend, profile.weights), backend in REPACKS
    if repacks:
        held = replace(held, layer_kv_bytes=plain(shape.layer_kv_bytes, size.kv_type))
    return Able(
        profile=profile,
        backend=backend,
        cpu=_pace(profile, shape, held, size, backend, "cpu"),
        gpu=_pace(profile, shape, held, size, backend, chosen[0].kind) if chosen else None,
        ram_bytes=profile.memory_available_bytes,
        gpu_bytes=min(free, profile.memory_available_bytes) if unified else free,
        unified=unified,
        held=held,
        repacks=repacks,
        scratch_bytes=_scratch_bytes(held, size) if repacks else 0,
    )


def _scratch_bytes(held: ModelShape, size: Size) -> int:
    return SCORES_BYTES + WIDENED * max(held.layer_kv_bytes, default=0) * size.kv_cells


def mapping(profiles: Sequence[Profile], shape: ModelShape) -> list[Profile]:
    """The same peers, without the engines that repack wherever another one can run the model."""
    out = []
    for profile in profiles:
        others = tuple(e for e in profile.engines if e.backend not in REPACKS)
        fewer = replace(profile, engines=others)
        changes = profile.engine_for(shape) in REPACKS and fewer.engine_for(shape)
        out.append(fewer if changes else profile)
    return out


def _pace(
    profile: Profile, shape: ModelShape, held: ModelShape, size: Size, backend: str, kind: str
) -> Pace:
    """As it was measured, else as is usual. held: of Able; what it reads is of that size."""
    speed = profile.speed(shape.digest, backend, kind)
    active = np.array(held.active_bytes, np.float64)
    if speed is not None and speed.decode_s and speed.prefill_s and speed.prefill_tokens:
        return _measured(speed, held, size, active)
    rate = USUAL_BYTES_PER_S.get(kind, USUAL_BYTES_PER_S["cpu"])
    operations = USUAL_OPERATIONS_PER_S.get(kind, USUAL_OPERATIONS_PER_S["cpu"])
    kv = _cache(held, kind)
    row = 2 * _WEIGHTS_PER_BYTE / operations  # of a byte of weights in the file
    by = curve(kind, _LONG_ROWS, 1 / rate / row)
    output = held.output_bytes or held.embed_bytes
    chunk = np.array(shape.active_bytes, np.float64) * row * by.took(size.batch_tokens)
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
