"""What was measured: a peer's profile and a model's shape. Values only; they travel in messages."""

from __future__ import annotations

from typing import Annotated

import msgspec

PeerId = Annotated[str, msgspec.Meta(min_length=16, max_length=16, pattern="^[a-z2-7]{16}$")]
Digest = Annotated[str, msgspec.Meta(min_length=64, max_length=64, pattern="^[0-9a-f]{64}$")]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
Why = Annotated[str, msgspec.Meta(max_length=1000)]
Bytes = Annotated[int, msgspec.Meta(ge=0, le=1 << 60)]
Layer = Annotated[int, msgspec.Meta(ge=0, le=4096)]
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e11)]

PEERS_MAX = 64
LAYERS_MAX = 4096


_Z85 = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"
_DIGITS = {character: digit for digit, character in enumerate(_Z85)}


def is_key(text: str) -> bool:
    """Whether this is a CURVE public key in Z85 (ZeroMQ RFC 32): 40 characters, 5 for 4 bytes."""
    if len(text) != 40 or any(character not in _DIGITS for character in text):
        return False
    groups = (text[at : at + 5] for at in range(0, 40, 5))
    return all(
        sum(_DIGITS[c] * 85**power for power, c in enumerate(reversed(group))) < 1 << 32
        for group in groups
    )


class Value(msgspec.Struct, frozen=True, omit_defaults=True):
    """Base of all values: immutable, comparable, storable as JSON; unknown fields are skipped."""


class EngineProfile(Value, frozen=True):
    """One processor that a backend can use on this peer."""

    backend: Name  # llama_cpp | mlx | fake
    device: Name
    kind: Name  # cpu | cuda | metal | …
    memory_free_bytes: Bytes = 0
    memory_total_bytes: Bytes = 0


class Profile(Value, frozen=True):
    """What a peer can do. Sent to every peer at joining and whenever it changes."""

    peer_id: PeerId
    name: Name  # the host's name, for people
    os: Name  # linux | macos
    cores: Count
    memory_total_bytes: Bytes
    memory_available_bytes: Bytes  # for stages: within cgroup limits, less a headroom
    disk_free_bytes: Bytes = 0
    engines: Annotated[tuple[EngineProfile, ...], msgspec.Meta(max_length=64)] = ()
    spread_all: bool = False  # HALKA_SPREAD=all on this peer
    context_wanted: Count = 0  # HALKA_CONTEXT on this peer, 0: none
    model_wanted: Annotated[str, msgspec.Meta(max_length=128)] = ""  # the setting `model`


class ModelShape(Value, frozen=True):
    """What a planner must know of a model, from its header alone.

    layer_bytes, layer_kv_bytes: one entry a layer (weights; KV cache of one token).
    cut_starts, cut_groups, whole_why: see `backends.base.Cuts`.
    """

    model: Name  # stable, readable id: smollm2-135m-instruct-q4_1
    digest: Digest
    architecture: Name
    layers: Layer
    hidden: Count
    context: Count  # tokens the model was trained for
    layer_bytes: Annotated[tuple[Bytes, ...], msgspec.Meta(max_length=LAYERS_MAX)]
    layer_kv_bytes: Annotated[tuple[Bytes, ...], msgspec.Meta(max_length=LAYERS_MAX)]
    head_bytes: Bytes  # head.gguf, wanted by every peer
    embed_bytes: Bytes
    output_bytes: Bytes  # output.gguf; where tied, 0: the last window then needs embed.gguf
    tied: bool
    cut_starts: Annotated[tuple[Layer, ...], msgspec.Meta(max_length=LAYERS_MAX)] = (0,)
    cut_groups: Annotated[
        tuple[Annotated[tuple[Layer, ...], msgspec.Meta(max_length=LAYERS_MAX)], ...],
        msgspec.Meta(max_length=8),
    ] = ()
    whole_why: Why = ""

    def refusal(self, first: int, last: int) -> str:
        """Why the window [first, last) is forbidden, or "" when it is allowed."""
        if not 0 <= first < last <= self.layers:
            return f"layers {first} to {last} are not layers of a model of {self.layers}"
        if (first, last) == (0, self.layers):
            return ""
        if self.whole_why:
            return self.whole_why
        for edge in (first, last):
            if edge != self.layers and edge not in self.cut_starts:
                return f"{self.architecture} cannot be cut before layer {edge}"
        for group in self.cut_groups:
            if not any(first <= layer < last for layer in group):
                return f"{self.architecture} needs one of the layers {group[:8]} in each window"
        return ""

    def window_bytes(self, first: int, last: int) -> int:
        """Bytes of the weights of the window [first, last), with the ends that belong to it."""
        total = sum(self.layer_bytes[first:last])
        if first == 0 or (last == self.layers and self.tied):
            total += self.embed_bytes
        if last == self.layers:
            total += self.output_bytes
        return total

    def window_parts(self, first: int, last: int) -> tuple[str, ...]:
        """Names of the parts that the window [first, last) needs, head.gguf first."""
        parts = ["head"]
        if first == 0 or (last == self.layers and self.tied):
            parts.append("embed")
        parts += [f"layer-{i:03d}" for i in range(first, last)]
        if last == self.layers and not self.tied:
            parts.append("output")
        return tuple(parts)


class ModelOffer(Value, frozen=True):
    """A model of which a peer holds parts. `parts`: names; complete when all are there."""

    shape: ModelShape
    pulled_s: Seconds  # when it was pulled, since 1970; the newest is served by default
    parts: Annotated[
        tuple[Annotated[str, msgspec.Meta(max_length=16)], ...], msgspec.Meta(max_length=5000)
    ]
