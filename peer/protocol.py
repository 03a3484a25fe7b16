"""Every message on the wire, and the one place where bytes become messages.

Append only: tags are never reused and new fields have defaults, so that an older peer skips what
it does not know (golden bytes in tests/data/wire prove it). Bytes are msgpack; msgspec decodes
them straight into the typed Struct, so that nothing is built from fields that do not fit.
Every size is bounded before it is allocated: by MESSAGE_BYTES_MAX at the socket, then by type.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

import msgspec

from peer.errors import ProtocolError
from peer.planning.plan import PlanId, PlanState, StagePhase
from peer.planning.profile import (
    PEERS_MAX,
    Bytes,
    Count,
    Digest,
    ModelOffer,
    Name,
    PeerId,
    Profile,
    Seconds,
    Why,
)
from peer.stage_messages import Follower as Follower
from peer.stage_messages import Pipe as Pipe
from peer.stage_messages import StageAdmit as StageAdmit
from peer.stage_messages import StageConnect as StageConnect
from peer.stage_messages import StageNews as StageNews
from peer.stage_messages import StageOrder as StageOrder
from peer.stage_messages import StagePing as StagePing
from peer.stage_messages import StageStop as StageStop
from peer.wire import CHUNK_BYTES_MAX as CHUNK_BYTES_MAX
from peer.wire import IDS_BYTES_MAX as IDS_BYTES_MAX
from peer.wire import MANIFEST_BYTES_MAX as MANIFEST_BYTES_MAX
from peer.wire import MESSAGE_BYTES_MAX as MESSAGE_BYTES_MAX
from peer.wire import PROTOCOL as PROTOCOL
from peer.wire import Address as Address
from peer.wire import Addresses as Addresses
from peer.wire import Finite as Finite
from peer.wire import Key as Key
from peer.wire import Message as Message
from peer.wire import Part as Part
from peer.wire import RequestId as RequestId
from peer.wire import Term as Term
from peer.wire import Timed as Timed
from peer.wire import Token as Token
from peer.wire import TokenIds as TokenIds

# Control plane: agent ⇄ agent -----------------------------------------------------------------


class Hello(Message, frozen=True, tag="hello"):
    """First message on a link, by whoever dialled. `peer_id` must be the link key's own."""

    protocol: int
    cluster: Annotated[str, msgspec.Meta(max_length=64)]
    peer_id: PeerId
    name: Name
    incarnation: int  # drawn at start: tells a restart from a reconnect
    addresses: Addresses  # where this peer can be dialled
    version: Name
    term: Term = 0


class Welcome(Message, frozen=True, tag="welcome"):
    """The answer of a peer that agrees; its own introduction."""

    protocol: int
    cluster: Annotated[str, msgspec.Meta(max_length=64)]
    peer_id: PeerId
    name: Name
    incarnation: int
    addresses: Addresses
    version: Name
    term: Term = 0


class Refused(Message, frozen=True, tag="refused"):
    """The answer of a peer that does not agree. The link ends."""

    code: Literal["protocol", "cluster", "identity", "admission"]
    why: Why
    protocol: int


class Goodbye(Message, frozen=True, tag="bye"):
    """This peer goes away on purpose."""

    why: Why = ""


class Heartbeat(Message, frozen=True, tag="beat"):
    """I am alive, and this is the claim that I follow (my own where coordinator is me)."""

    term: Term
    coordinator: Annotated[str, msgspec.Meta(max_length=16)]  # "" while there is none
    followed: bool = False  # my own claim has had followers


class Gossip(Message, frozen=True, tag="gossip"):
    """Members that I know, so that one sighting is enough to find all."""

    peers: Annotated[tuple[Sighted, ...], msgspec.Meta(max_length=PEERS_MAX)]


class Sighted(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where a peer was seen. A hint, never a proof."""

    peer_id: PeerId
    key: Key
    addresses: Addresses


class Announce(Message, frozen=True, tag="announce"):
    """What I am and which models I hold parts of."""

    profile: Profile
    models: Annotated[tuple[ModelOffer, ...], msgspec.Meta(max_length=64)] = ()


class Plans(Message, frozen=True, tag="plans"):
    """The coordinator's whole state: plans that load, serve or drain. Sent on change and again."""

    term: Term
    states: Annotated[tuple[PlanState, ...], msgspec.Meta(max_length=8)]
    why_none: Why = ""  # what is missing, while the model that is wanted cannot be served
    measure: Annotated[
        tuple[Digest, ...], msgspec.Meta(max_length=8)
    ] = ()  # whose speeds are wanted
    reports: Annotated[tuple[PeerReport, ...], msgspec.Meta(max_length=8 * PEERS_MAX)] = ()


class PeerReport(msgspec.Struct, frozen=True):
    """What a peer last reported to the coordinator: any other peer can show it, too."""

    peer_id: PeerId
    report: Report


class Report(Message, frozen=True, tag="report"):
    """How far I am with my part of a plan, to the coordinator. Sent on change and again."""

    plan: PlanId
    phase: StagePhase
    done_bytes: Bytes = 0  # fetched
    total_bytes: Bytes = 0
    ring_port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0
    submit_port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0
    key: Annotated[str, msgspec.Meta(max_length=40)] = ""
    weights_bytes: Bytes = 0
    kv_bytes: Bytes = 0
    compute_bytes: Bytes = 0
    active: Count = 0  # answers running or waiting (head)
    why: Why = ""
    timed: Timed | None = None
    # Where it failed by no fault of this peer's stage: who was out of reach, or whose numbers were
    # not finite.
    lost: Annotated[str, msgspec.Meta(max_length=16)] = ""
    blamed: Annotated[str, msgspec.Meta(max_length=16)] = ""
    island_port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0


# Links: any peer asks any peer, when neither computes --------------------------------------------


class Probe(Message, frozen=True, tag="probe"):
    """Please answer at once. padding: bytes that only take time on the way."""

    request: Count
    padding: Annotated[bytes, msgspec.Meta(max_length=CHUNK_BYTES_MAX)] = b""


class Probed(Message, frozen=True, tag="probed"):
    """The answer to a Probe. busy: this peer computes now, and wants to be asked later."""

    request: Count
    busy: bool = False


# Loss: a peer that falls silent is asked about before it is declared gone ------------------------


class Suspect(Message, frozen=True, tag="suspect"):
    """I do not hear this peer any more. Do you?"""

    peer_id: PeerId


class Opinion(Message, frozen=True, tag="opinion"):
    """The answer to a Suspect. heard: the peer is a member here, and was heard `ago_s` ago."""

    peer_id: PeerId
    heard: bool = False
    ago_s: Seconds = 0.0


class Outlook(Message, frozen=True, tag="outlook"):
    """What the coordinator foresees for each peer's loss, and who is to hold which parts besides
    those of its windows, so that it is survived. Sent on change and again."""

    term: Term
    losses: Annotated[tuple[Loss, ...], msgspec.Meta(max_length=PEERS_MAX)] = ()
    spares: Annotated[tuple[Spare, ...], msgspec.Meta(max_length=PEERS_MAX)] = ()


class Loss(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the loss of this peer would mean for the model that is served.

    outcome: fine (others hold all that they would need) · fetch (it goes on once `fetch_bytes` went
    from peer to peer) · none (it could not be served; why).
    """

    peer_id: PeerId
    outcome: Literal["fine", "fetch", "none"]
    fetch_bytes: Bytes = 0
    why: Why = ""


class Spare(msgspec.Struct, frozen=True, omit_defaults=True):
    """Parts of a model that a peer is to hold besides those of its windows."""

    peer_id: PeerId
    digest: Digest
    parts: Annotated[tuple[Part, ...], msgspec.Meta(max_length=5000)] = ()


# Models: any peer asks any peer ----------------------------------------------------------------


class ManifestWanted(Message, frozen=True, tag="manifest?"):
    """Please send the manifest of this model."""

    request: Count
    digest: Digest


class ManifestHere(Message, frozen=True, tag="manifest"):
    """The manifest; its SHA-256 must be the digest that was asked for."""

    request: Count
    digest: Digest
    data: Annotated[bytes, msgspec.Meta(max_length=MANIFEST_BYTES_MAX)]


class ChunkWanted(Message, frozen=True, tag="chunk?"):
    """Please send bytes of a part's data region."""

    request: Count
    digest: Digest
    part: Part
    offset: Bytes
    length: Annotated[int, msgspec.Meta(ge=1, le=CHUNK_BYTES_MAX)]


class ChunkHere(Message, frozen=True, tag="chunk"):
    """The bytes that `request` asked for, exactly as many."""

    request: Count
    data: Annotated[bytes, msgspec.Meta(max_length=CHUNK_BYTES_MAX)]


class NotHere(Message, frozen=True, tag="not-here"):
    """The answer to a ManifestWanted or ChunkWanted that cannot be met."""

    request: Count
    why: Why


# Answers: entry agent ⇄ head stage --------------------------------------------------------------


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the tail chooses a token. Names and meaning as in llama.cpp's sampler chain."""

    temperature: Annotated[float, msgspec.Meta(ge=0, le=100)] = 0.8  # 0: greedy
    top_k: Annotated[int, msgspec.Meta(ge=0, le=1 << 20)] = 40  # 0: all
    top_p: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.95
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.05
    repeat_penalty: Annotated[float, msgspec.Meta(gt=0, le=100)] = 1.0
    repeat_last_n: Annotated[int, msgspec.Meta(ge=-1, le=1 << 20)] = 64  # -1: the whole context
    frequency_penalty: Annotated[float, msgspec.Meta(ge=-100, le=100)] = 0.0
    presence_penalty: Annotated[float, msgspec.Meta(ge=-100, le=100)] = 0.0
    logit_bias: Annotated[tuple[tuple[Token, Finite], ...], msgspec.Meta(max_length=1024)] = ()
    seed: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)] = 0


class Submit(Message, frozen=True, tag="submit"):
    """Answer this. ids: prompt and tokens delivered so far; delivered: how many of the latter."""

    request: RequestId
    plan: PlanId
    ids: TokenIds
    sampling: Sampling
    tokens_max: Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]  # still to come
    ends: Annotated[tuple[Token, ...], msgspec.Meta(max_length=64)] = ()  # ids that end an answer
    delivered: Count = 0


class Cancel(Message, frozen=True, tag="cancel"):
    """Nobody waits for this answer any more."""

    request: RequestId
    plan: PlanId


class Tokens(Message, frozen=True, tag="tokens"):
    """Sampled ids; `position` is the first one's place in the whole sequence.

    finish: "" goes on · "stop" an end token (not among ids) · "length" tokens_max or the context.
    """

    request: RequestId
    plan: PlanId
    position: Count
    ids: Annotated[tuple[Token, ...], msgspec.Meta(max_length=4096)] = ()
    finish: Literal["", "stop", "length"] = ""


class Unanswered(Message, frozen=True, tag="unanswered"):
    """This answer is not going on. code: busy | stale | invalid | failed."""

    request: RequestId
    plan: PlanId
    code: Literal["busy", "stale", "invalid", "failed"]
    why: Why


Control = (
    Hello | Welcome | Refused | Goodbye | Heartbeat | Gossip | Announce | Plans | Report
    | ManifestWanted | ManifestHere | ChunkWanted | ChunkHere | NotHere | Probe | Probed
    | Suspect | Opinion | Outlook
)  # fmt: skip
Answering = Submit | Cancel | Tokens | Unanswered

T = TypeVar("T")
_encoder = msgspec.msgpack.Encoder()
_control: msgspec.msgpack.Decoder[Control] = msgspec.msgpack.Decoder(Control)
_answering: msgspec.msgpack.Decoder[Answering] = msgspec.msgpack.Decoder(Answering)


def encode(message: Message) -> bytes:
    """A message's bytes. Raises ProtocolError where a value has none, such as an int of 65 bits."""
    try:
        return _encoder.encode(message)
    except (msgspec.MsgspecError, OverflowError, RecursionError, TypeError, ValueError) as error:
        raise ProtocolError(f"a {type(message).__name__} cannot be encoded: {error}") from error


def decode_control(data: bytes) -> Control:
    """A message between agents. Raises ProtocolError, naming what does not fit."""
    return _decode(_control, data)


def decode_answering(data: bytes) -> Answering:
    """A message between entry and head. Raises ProtocolError, naming what does not fit."""
    return _decode(_answering, data)


def _decode(decoder: msgspec.msgpack.Decoder[T], data: bytes) -> T:
    if len(data) > MESSAGE_BYTES_MAX:
        raise ProtocolError(f"a message of {len(data)} bytes, more than {MESSAGE_BYTES_MAX}")
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, ValueError) as error:
        raise ProtocolError(f"not a message: {error}") from error
