"""Who runs which windows, numbered within a term. Pure: values and their check."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from peer.planning.profile import (
    PEERS_MAX,
    Bytes,
    Count,
    Layer,
    ModelShape,
    Name,
    PeerId,
    Seconds,
    Value,
    Why,
    is_key,
)

WINDOWS_MAX = 512
TERM_MAX = 1 << 40
ISLAND_MAX = 8  # peers that compute one window together
KV_CELLS_MAX = 1 << 26  # engines keep tables of them, before any memory for keys is asked for
STAGES_MAX = 4  # at once on a peer: one that serves, one that is to come, two that drain


class PlanId(Value, frozen=True, order=True):
    """A plan's number within its coordinator's term. Later plans compare greater."""

    term: Annotated[int, msgspec.Meta(ge=0, le=TERM_MAX)]
    number: Annotated[int, msgspec.Meta(ge=0, le=TERM_MAX)]

    def __str__(self) -> str:
        return f"{self.term}.{self.number}"


RdmaDevice = Annotated[str, msgspec.Meta(max_length=32)]


class PlanWindow(Value, frozen=True):
    """Layers [first, last) on one peer, by one backend.

    ahead_bytes: of a window that streams, what is read before its turn, into room that others make
    for it by giving up as much; -1: as much as there can be. island: the peers that compute it
    together with this one, tensor by tensor, in the order of their ranks, from 1 on; devices: by
    which they meet, see `backends.base.Island`.
    """

    peer_id: PeerId
    first: Layer
    last: Layer
    backend: Name = "llama_cpp"
    memory_bytes: Bytes = 0  # predicted: weights and KV
    gpu_layers: int = -1
    streamed_bytes: Bytes = 0  # its share of the weights that are too many for the peer's memory
    ahead_bytes: Annotated[int, msgspec.Meta(ge=-1, le=1 << 60)] = -1
    island: Annotated[tuple[PeerId, ...], msgspec.Meta(max_length=ISLAND_MAX - 1)] = ()
    devices: Annotated[
        tuple[Annotated[tuple[RdmaDevice, ...], msgspec.Meta(max_length=ISLAND_MAX)], ...],
        msgspec.Meta(max_length=ISLAND_MAX),
    ] = ()


class LeftOut(Value, frozen=True):
    """A peer without a window, and why."""

    peer_id: PeerId
    why: Why


KvType = Literal["f16", "q8_0"]
Flash = Literal["auto", "on", "off"]
Speculation = Literal["auto", "off"]
DraftDigest = Annotated[str, msgspec.Meta(pattern="^([0-9a-f]{64})?$")]


class Split(Value, frozen=True):
    """What the planner chose: windows in ring order, and its reasons. Not yet numbered."""

    windows: Annotated[tuple[PlanWindow, ...], msgspec.Meta(max_length=WINDOWS_MAX)]
    context: Count  # tokens of one request at most
    kv_cells: Count  # tokens of KV cache in every stage, shared by all slots
    slots: Count
    batch_tokens: Count  # rows of the longest step
    left_out: Annotated[tuple[LeftOut, ...], msgspec.Meta(max_length=PEERS_MAX)] = ()
    why: Why = ""
    chunk_tokens: Count = 0  # of a prompt in one step, while nothing else runs; 0: batch_tokens
    kv_type: KvType = "f16"
    flash: Flash = "auto"
    speculation: Speculation = "auto"
    draft: DraftDigest = ""  # digest of the model that drafts, held whole by the head; "": none


class PeerForecast(Value, frozen=True):
    """What a peer's part in a split is expected to take.

    decode_s: computing, for each token. prefill_s: computing, for a chunk of the forecast's.
    disk_s: waiting for the disk, for each token, beyond what is hidden behind the others' work.
    memory_bytes: of the machine; gpu_bytes: of its GPU (where unified, part of the former).
    measured: from a measured speed; otherwise from what is usual for its kind of processor.
    """

    peer_id: PeerId
    decode_s: Seconds
    prefill_s: Seconds
    disk_s: Seconds
    memory_bytes: Bytes
    gpu_bytes: Bytes
    streamed_bytes: Bytes  # read from disk again for each token
    measured: bool


class Forecast(Value, frozen=True):
    """What a split is expected to do. ttft_s: for a prompt of `prompt_tokens`, read in chunks of
    `chunk_tokens` (0: not told).

    stage_s: of the slowest stage or link for each token where groups of answers are in flight in
    all stages at once: the time between tokens of all of them together. load_s: the same with each
    token's share of reading prompts, which is what is to be small for many answers; 0: not told.
    """

    tpot_s: Seconds
    ttft_s: Seconds
    prompt_tokens: Count
    hops_s: Seconds  # of tpot_s, what the links take
    stage_s: Seconds
    peers: Annotated[tuple[PeerForecast, ...], msgspec.Meta(max_length=PEERS_MAX)]
    chunk_tokens: Count = 0
    load_s: Seconds = 0.0

    def cost_s(self, objective: str) -> float:
        """What a plan for this objective (latency | throughput) is to keep small."""
        return (self.load_s or self.stage_s) if objective == "throughput" else self.tpot_s


class Plan(Value, frozen=True):
    """A split with its number and the model it is for. What peers load and serve."""

    id: PlanId
    coordinator: PeerId
    shape: ModelShape
    split: Split

    @property
    def head(self) -> str:
        """The peer that embeds and schedules."""
        return self.split.windows[0].peer_id

    @property
    def tail(self) -> str:
        """The peer that samples."""
        return self.split.windows[-1].peer_id

    @property
    def ring(self) -> tuple[str, ...]:
        """Peers in ring order, each once; of an island only the first."""
        return tuple(dict.fromkeys(window.peer_id for window in self.split.windows))

    @property
    def peers(self) -> tuple[str, ...]:
        """All that take part: the ring, then the other peers of its islands."""
        others = (peer_id for window in self.split.windows for peer_id in window.island)
        return tuple(dict.fromkeys((*self.ring, *others)))

    def windows_of(self, peer_id: str) -> tuple[int, ...]:
        """Indices of the windows that this peer runs, alone or with others."""
        windows = enumerate(self.split.windows)
        return tuple(i for i, w in windows if peer_id == w.peer_id or peer_id in w.island)

    def island_of(self, peer_id: str) -> tuple[str, ...]:
        """The peers of its island by rank, itself among them; () where it computes alone."""
        for window in self.split.windows:
            if window.island and peer_id in (window.peer_id, *window.island):
                return (window.peer_id, *window.island)
        return ()

    def after(self, peer_id: str) -> str:
        """The next peer in the ring (itself where it is alone), or the first of its island."""
        ring = self.ring
        if peer_id not in ring and (island := self.island_of(peer_id)):
            return island[0]
        return ring[(ring.index(peer_id) + 1) % len(ring)]

    def before(self, peer_id: str) -> str:
        """The peer before it in the ring (itself where it is alone), or the first of its island."""
        ring = self.ring
        if peer_id not in ring and (island := self.island_of(peer_id)):
            return island[0]
        return ring[ring.index(peer_id) - 1]


def check(plan: Plan) -> str:
    """What is wrong with a plan, or "". Every receiver asks before it acts on one.

    Windows cover all layers once and in order, every one allowed by the architecture; rounds visit
    the peers in the same order.
    """
    split, shape = plan.split, plan.shape
    if not split.windows:
        return "it has no windows"
    if not shape.sound:
        return "its model's shape contradicts itself"
    reached = 0
    for window in split.windows:
        if window.first != reached:
            return f"layer {reached} is not where a window begins"
        if refusal := shape.refusal(window.first, window.last):
            return refusal
        reached = window.last
    if reached != shape.layers:
        return f"layers {reached} to {shape.layers} belong to nobody"
    ring = plan.ring
    order = [window.peer_id for window in split.windows]
    if order != [ring[i % len(ring)] for i in range(len(order))] or len(order) % len(ring):
        return "its rounds do not visit the peers in one order"
    others = [peer_id for window in split.windows for peer_id in window.island]
    if others and (len(set(others)) < len(others) or set(others) & set(ring)):
        return "a peer of an island has another place in the ring"
    if others and len(order) > len(ring):
        return "there are islands in a ring of several rounds"
    if not 1 <= split.slots <= 256 or not 1 <= split.batch_tokens <= 8192:
        return "its slots or batch are out of range"
    if not 1 <= split.context <= split.kv_cells:
        return "its KV cache cannot hold one context"
    if split.kv_cells > KV_CELLS_MAX:
        return f"a KV cache of {split.kv_cells} tokens is more than any machine has room for"
    return ""


Phase = Literal["loading", "linking", "serving", "draining"]
StagePhase = Literal["fetching", "loading", "ready", "linked", "failed"]


class StageLink(Value, frozen=True):
    """Where a stage listens and by which key it is known. Ports on the peer's own address."""

    peer_id: PeerId
    ring_port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    key: Annotated[str, msgspec.Meta(min_length=40, max_length=40)]  # CURVE public key, Z85
    submit_port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0  # head only
    island_port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0  # where its island's peers meet

    def __post_init__(self) -> None:
        if not is_key(self.key):
            raise ValueError("the stage's key is no CURVE key")


class PlanState(Value, frozen=True):
    """A plan and how far it has come. The coordinator's soft state; sent whole, again and again.

    hurry: while it drains, its answers go over to the plan that serves instead of ending here:
    somebody in its ring wants to go away.
    """

    plan: Plan
    phase: Phase
    links: Annotated[tuple[StageLink, ...], msgspec.Meta(max_length=PEERS_MAX)] = ()
    why: Why = ""  # why this plan came to be
    hurry: bool = False
