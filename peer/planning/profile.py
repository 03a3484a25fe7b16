"""What was measured: a peer's profile and a model's shape. Values only; they travel in messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec

PeerId = Annotated[str, msgspec.Meta(min_length=16, max_length=16, pattern="^[a-z2-7]{16}$")]
Digest = Annotated[str, msgspec.Meta(min_length=64, max_length=64, pattern="^[0-9a-f]{64}$")]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
Why = Annotated[str, msgspec.Meta(max_length=1000)]
Bytes = Annotated[int, msgspec.Meta(ge=0, le=1 << 60)]
Layer = Annotated[int, msgspec.Meta(ge=0, le=4096)]
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e11)]
Rate = Annotated[float, msgspec.Meta(ge=0, le=1e15)]  # bytes a second; 0: not measured
PortId = Annotated[str, msgspec.Meta(max_length=64)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]

PEERS_MAX = 64
LAYERS_MAX = 4096
KINDS_MAX = 8  # kinds of layers of one model that are told apart; the rest count as the last one
SPEEDS_MAX = 32  # models times engines; the newest are kept
PLAIN_ENGINE = "llama_cpp"  # runs every model as it is, on every system
ENGINE_NAMES = {"llama_cpp": "llama.cpp", "mlx": "MLX"}  # for people; others by their own name


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


def engine_name(backend: str) -> str:
    """For people: MLX, llama.cpp."""
    return ENGINE_NAMES.get(backend, backend)


class Value(msgspec.Struct, frozen=True, omit_defaults=True):
    """Base of all values: immutable, comparable, storable as JSON; unknown fields are skipped."""


class EngineProfile(Value, frozen=True):
    """One processor that a backend can use on this peer."""

    backend: Name  # llama_cpp | mlx | fake
    device: Name
    kind: Name  # cpu | cuda | metal | …
    memory_free_bytes: Bytes = 0
    memory_total_bytes: Bytes = 0
    integrated: bool = False  # a GPU without memory of its own


class Fit(Value, frozen=True):
    """Whether one engine can run a model that not every engine runs as it is in the file.

    weights, how, why, ranks and the bytes: see `backends.base.Ability`.
    """

    backend: Name
    weights: Literal["auto", "small"] = "auto"  # the setting for which it is told
    how: Literal["exact", "approximate", "no"] = "exact"
    why: Why = ""
    layer_bytes: Annotated[tuple[Bytes, ...], msgspec.Meta(max_length=LAYERS_MAX)] = ()
    embed_bytes: Bytes = 0
    output_bytes: Bytes = 0
    ranks: Annotated[tuple[Count, ...], msgspec.Meta(max_length=8)] = ()


class Port(Value, frozen=True):
    """A Thunderbolt port of this peer. uuid: its identity; peer_uuid: of the port at the cable's
    other end, "" where none is told. interface: its network interface (en2), "" where it has none.
    bits_per_s: of the cable, 0: not told. addresses: of the interface."""

    uuid: PortId
    peer_uuid: PortId = ""
    receptacle: Annotated[str, msgspec.Meta(max_length=16)] = ""
    interface: Annotated[str, msgspec.Meta(max_length=32)] = ""
    bits_per_s: Rate = 0.0
    addresses: Annotated[
        tuple[Annotated[str, msgspec.Meta(max_length=64)], ...], msgspec.Meta(max_length=8)
    ] = ()
    rdma: Annotated[str, msgspec.Meta(max_length=32)] = ""  # the RDMA device (rdma_en2), "": none


class Speed(Value, frozen=True):
    """How fast one engine of a peer runs one model's layers, measured on a random copy of them.

    decode_s, prefill_s: one entry for each of the shape's kinds of layers: seconds for one token,
    and for a chunk of `prefill_tokens`, with an empty KV cache and a core that nobody throttles.
    window_s: what a step costs around a window's layers. output_s: one row through the output head
    and the samplers. correction: what stages really took, as a multiple of all these.
    short_chunks: (rows, what a row takes) of chunks shorter than prefill_tokens, as a multiple of
    what it takes in one of those.
    """

    digest: Digest
    backend: Name
    kind: Name  # of the processor, as in EngineProfile
    threads: Count
    decode_s: Annotated[tuple[Seconds, ...], msgspec.Meta(max_length=KINDS_MAX)]
    prefill_s: Annotated[tuple[Seconds, ...], msgspec.Meta(max_length=KINDS_MAX)]
    prefill_tokens: Count
    window_s: Seconds = 0.0
    output_s: Seconds = 0.0
    correction: Annotated[float, msgspec.Meta(ge=0, le=1e6)] = 1.0
    short_chunks: Annotated[
        tuple[tuple[Count, Annotated[float, msgspec.Meta(ge=0, le=1e6)]], ...],
        msgspec.Meta(max_length=8),
    ] = ()


class Link(Value, frozen=True):
    """The way from this peer to another one, measured between their agents.

    rtt_s: the shortest round trip of a small message. bytes_per_s: of a large one; 0: unknown.
    """

    peer_id: PeerId
    rtt_s: Seconds
    bytes_per_s: Rate = 0.0


class Profile(Value, frozen=True):
    """What a peer can do. Sent to every peer at joining and whenever it changes.

    cpu_share: processor time that the control groups allow, of what `threads` of a stage could
    use: 0.5 where two threads may use one core's time. speeds: of the models measured so far;
    unmeasured: models of which that was tried and cannot be. leaving: it goes away as soon as
    others have taken over. unreachable: peers that others hear and this one does not.
    spare_bytes: of its disk, for spare parts besides those of its windows, held ones included.
    """

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
    objective: Literal["latency", "throughput"] = "latency"  # the setting, as the others
    unified_memory: bool = False  # its GPU uses the machine's memory
    threads: Count = 0  # of a stage; 0: not told
    cpu_share: Share = 1.0
    disk_read_bytes_per_s: Rate = 0.0  # of the disk that holds the models
    speeds: Annotated[tuple[Speed, ...], msgspec.Meta(max_length=SPEEDS_MAX)] = ()
    unmeasured: Annotated[tuple[Digest, ...], msgspec.Meta(max_length=SPEEDS_MAX)] = ()
    links: Annotated[tuple[Link, ...], msgspec.Meta(max_length=PEERS_MAX)] = ()
    leaving: bool = False
    unreachable: Annotated[tuple[PeerId, ...], msgspec.Meta(max_length=PEERS_MAX)] = ()
    spare_bytes: Bytes = 0
    draft_wanted: Annotated[str, msgspec.Meta(max_length=128)] = ""  # the setting `draft`
    kv_type: Literal["f16", "q8_0"] = "f16"  # settings of this peer; the coordinator's count
    flash: Literal["auto", "on", "off"] = "auto"
    speculation: Literal["auto", "off"] = "auto"
    weights: Literal["auto", "exact", "small"] = "auto"  # the setting, see `backends.base.Weights`
    ports: Annotated[tuple[Port, ...], msgspec.Meta(max_length=16)] = ()  # Thunderbolt
    islands: Literal["off", "auto"] = "off"  # the setting: whether it computes layers with others

    @property
    def backends(self) -> tuple[str, ...]:
        """The backends of its engines, the one that it prefers first."""
        return tuple(dict.fromkeys(engine.backend for engine in self.engines))

    def engine_for(self, shape: ModelShape) -> str:
        """The backend that would run a model here, "" where none can."""
        return shape.runner(self.backends, self.weights)

    def why_not(self, shape: ModelShape) -> str:
        """Why no engine of this peer can run a model, in words; "" where one can."""
        if self.engine_for(shape):
            return ""
        fits = (shape.fit(backend, self.weights) for backend in self.backends)
        if why := "; ".join(shape.refused(fit, self.weights) for fit in fits if fit):
            return (
                f"{self.name} cannot run {shape.model}: {why}, and it uses no llama.cpp besides. "
                "Set `backend` to auto there, and install halka[llama] where it is missing"
            )
        return f"{self.name} has no engine for this model: install halka[llama] there"

    def has_speed(self, shape: ModelShape) -> bool:
        """Whether anything was measured of a model on the backend that would run it."""
        wanted = shape.digest, self.engine_for(shape)
        return any((s.digest, s.backend) == wanted for s in self.speeds)

    def speed(self, digest: str, backend: str, kind: str) -> Speed | None:
        """What was measured of a model on an engine, None where nothing was."""
        wanted = (digest, backend, kind)
        found = (s for s in self.speeds if (s.digest, s.backend, s.kind) == wanted)
        return next(found, None)


class ModelShape(Value, frozen=True):
    """What a planner must know of a model, from its header alone.

    layer_bytes, layer_kv_bytes: one entry a layer (weights; KV cache of one token).
    layer_active_bytes: what one token reads of them (of experts only those that it uses).
    layer_kinds: which layers are alike: numbers from 0 in order of appearance, a kind for each set
    of tensor shapes and types. Both () where unknown: all active, all alike.
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
    layer_active_bytes: Annotated[tuple[Bytes, ...], msgspec.Meta(max_length=LAYERS_MAX)] = ()
    layer_kinds: Annotated[
        tuple[Annotated[int, msgspec.Meta(ge=0, lt=KINDS_MAX)], ...],
        msgspec.Meta(max_length=LAYERS_MAX),
    ] = ()
    vocabulary: Count = 0  # tokens it knows; 0: not told
    tokenizer: Annotated[str, msgspec.Meta(max_length=128)] = ""  # see models.tokenizers.mark
    kv_types: Annotated[tuple[Name, ...], msgspec.Meta(max_length=16)] = ("f16",)  # it can have
    fits: Annotated[tuple[Fit, ...], msgspec.Meta(max_length=8)] = ()  # others run it as it is

    @property
    def active_bytes(self) -> tuple[int, ...]:
        """What one token reads of each layer's weights."""
        return self.layer_active_bytes or self.layer_bytes

    @property
    def kinds(self) -> tuple[int, ...]:
        """The kind of each layer."""
        return self.layer_kinds or (0,) * self.layers

    @property
    def sound(self) -> bool:
        """Whether all that it tells of layers is told of each, and none is read more than whole."""
        told = [self.layer_bytes, self.layer_kv_bytes, self.active_bytes, self.kinds]
        told += [fit.layer_bytes for fit in self.fits if fit.layer_bytes]
        return all(len(each) == self.layers for each in told) and all(
            read <= whole for read, whole in zip(self.active_bytes, self.layer_bytes, strict=True)
        )

    def fit(self, backend: str, weights: str) -> Fit | None:
        """How a backend runs the model under a peer's setting `weights`; None: as it is."""
        told = {fit.weights: fit for fit in self.fits if fit.backend == backend}
        return (told.get("small") if weights == "small" else None) or told.get("auto")

    def refused(self, fit: Fit, weights: str) -> str:
        """Why a backend does not run the model with such a fit, in words that name it, or ""."""
        name = engine_name(fit.backend)
        if fit.how == "no":
            return fit.why if name in fit.why else f"{name} does not run it: {fit.why}"
        if fit.how == "approximate" and weights == "exact":
            return f"{name} would round weights ({fit.why}), and `weights` is exact there"
        return ""

    def runner(self, backends: Sequence[str], weights: str) -> str:
        """Of these backends the first that can run the model under this setting, "": none can."""
        fits = ((backend, self.fit(backend, weights)) for backend in backends)
        return next((b for b, fit in fits if fit is None or not self.refused(fit, weights)), "")

    def in_memory(self, backend: str, weights: str) -> ModelShape:
        """The model with its weights as this backend keeps them in memory."""
        fit = self.fit(backend, weights)
        if fit is None or not (fit.layer_bytes or fit.embed_bytes or fit.output_bytes):
            return self
        layers = fit.layer_bytes or self.layer_bytes
        active = zip(self.active_bytes, layers, self.layer_bytes, strict=True)
        return msgspec.structs.replace(
            self,
            layer_bytes=layers,
            layer_active_bytes=tuple(a * new // max(1, old) for a, new, old in active),
            embed_bytes=fit.embed_bytes or self.embed_bytes,
            output_bytes=fit.output_bytes or self.output_bytes,
        )

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
