"""Speeds for a model that nobody measured: from bandwidths that a person wrote down, and from what
the same engine took for another model. Pure arithmetic over values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from peer.planning import abilities
from peer.planning.profile import ModelShape, Profile, Speed

PREFILL_TOKENS = 512
WINDOW_S = 1e-4  # around a window's layers: a call into the engine
_BITS = {  # of one weight, by the end of a model's name
    "f32": 32.0, "f16": 16.0, "bf16": 16.0, "q8_0": 8.5, "q6_k": 6.56, "q5_1": 6.0, "q5_0": 5.5,
    "q5_k_m": 5.7, "q5_k_s": 5.54, "q4_1": 5.0, "q4_0": 4.5, "q4_k_m": 4.85, "q4_k_s": 4.58,
    "iq4_xs": 4.25, "iq4_nl": 4.5, "mxfp4": 4.25, "q3_k_m": 3.91, "q3_k_s": 3.5, "q2_k": 3.35,
}  # fmt: skip
_BITS_USUAL = 4.7


@dataclass(frozen=True, slots=True)
class Pace:
    """Of a processor: bytes of weights read, and operations done, a second. 0: as is usual."""

    bytes_per_s: float = 0.0
    operations_per_s: float = 0.0


def weights_per_byte(shape: ModelShape) -> float:
    """How many weights a byte of the model holds, by the type that its name ends with."""
    found = re.search(r"-([a-z0-9_]+)$", shape.model)
    return 8 / _BITS.get(found[1] if found else "", _BITS_USUAL)


def made(
    shape: ModelShape, held: ModelShape, backend: str, kind: str, pace: Pace, threads: int
) -> Speed:
    """What an engine of this pace takes for the model's layers: each token reads all active
    weights once, as the engine holds them, and each token of a prefill multiplies and adds once for
    each of them."""
    rate = pace.bytes_per_s or abilities.USUAL_BYTES_PER_S.get(
        kind, abilities.USUAL_BYTES_PER_S["cpu"]
    )
    operations = pace.operations_per_s or abilities.USUAL_OPERATIONS_PER_S.get(
        kind, abilities.USUAL_OPERATIONS_PER_S["cpu"]
    )
    each, active = weights_per_byte(shape), _active(shape)
    return Speed(
        digest=shape.digest,
        backend=backend,
        kind=kind,
        threads=threads,
        decode_s=tuple(weight / rate for weight in _active(held)),
        prefill_s=tuple(2 * each * weight * PREFILL_TOKENS / operations for weight in active),
        prefill_tokens=PREFILL_TOKENS,
        window_s=WINDOW_S,
        output_s=(held.output_bytes or held.embed_bytes) / rate,
    )


def _active(shape: ModelShape) -> list[int]:
    """Bytes that a token reads of a layer, one entry a kind."""
    kinds, active = shape.kinds, shape.active_bytes
    return [active[kinds.index(kind)] for kind in range(max(kinds) + 1)]


def paced(profile: Profile, shape: ModelShape, paces: Mapping[str, Pace]) -> Profile:
    """The profile with speeds for this model, by kind of processor, where it has none yet."""
    backend = profile.engine_for(shape)
    held = shape.in_memory(backend, profile.weights)
    new = tuple(
        made(shape, held, backend, kind, pace, profile.threads)
        for kind, pace in paces.items()
        if profile.speed(shape.digest, backend, kind) is None
    )
    return replace(profile, speeds=(*new, *profile.speeds)[:32])


def carried(
    profile: Profile, shape: ModelShape, known: Mapping[str, ModelShape]
) -> tuple[Profile, bool]:
    """The profile with speeds for this model, reckoned from another model's where only that was
    measured; and whether that was so. known: shapes by digest."""
    paces, backend = {}, profile.engine_for(shape)
    for engine in (each for each in profile.engines if each.backend == backend):
        if profile.speed(shape.digest, engine.backend, engine.kind) is None:
            pace = _seen(profile, engine.backend, engine.kind, known)
            if pace is not None:
                paces[engine.kind] = pace
    return paced(profile, shape, paces), bool(paces)


def _seen(
    profile: Profile, backend: str, kind: str, known: Mapping[str, ModelShape]
) -> Pace | None:
    """How fast an engine is by the first model that was measured on it."""
    for speed in profile.speeds:
        other = known.get(speed.digest)
        if other is None or (speed.backend, speed.kind) != (backend, kind):
            continue
        active, held = _active(other), _active(other.in_memory(backend, profile.weights))
        decode_s, prefill_s = _sum(speed.decode_s, len(active)), _sum(speed.prefill_s, len(active))
        if decode_s > 0 and prefill_s > 0 and speed.prefill_tokens:
            factor = speed.correction or 1.0
            operations = 2 * weights_per_byte(other) * sum(active) * speed.prefill_tokens
            return Pace(sum(held) / (decode_s * factor), operations / (prefill_s * factor))
    return None


def _sum(times_s: Sequence[float], kinds: int) -> float:
    """Of one layer of each kind; kinds beyond the last count as it."""
    return sum(times_s[min(kind, len(times_s) - 1)] for kind in range(kinds)) if times_s else 0.0


def faster(profile: Profile, shape: ModelShape, factor: float) -> Profile:
    """All speeds times `factor`; those of this model from what is usual where none is measured."""
    backend = profile.engine_for(shape)
    kinds = {engine.kind for engine in profile.engines if engine.backend == backend} | {"cpu"}
    profile = paced(profile, shape, dict.fromkeys(sorted(kinds), Pace()))
    return replace(profile, speeds=tuple(_times(speed, 1 / factor) for speed in profile.speeds))


def _times(speed: Speed, factor: float) -> Speed:
    return replace(
        speed,
        decode_s=tuple(s * factor for s in speed.decode_s),
        prefill_s=tuple(s * factor for s in speed.prefill_s),
        window_s=speed.window_s * factor,
        output_s=speed.output_s * factor,
    )
