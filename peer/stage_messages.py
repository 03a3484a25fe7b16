"""What an agent and its own stages tell each other, over a pipe, one JSON message a line."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from peer.planning.plan import ISLAND_MAX, PlanState
from peer.planning.profile import PEERS_MAX, Count, PeerId
from peer.wire import Address, Key, Message, Timed


class StageOrder(Message, frozen=True, tag="order"):
    """First line to a new stage: what to load."""

    plan: PlanState
    peer_id: PeerId
    folder: str  # the model's folder in the store
    threads: Count
    step_s: float = 120.0  # for one step to come around the ring
    bind: str = "*"  # interface address to listen on
    admitted: tuple[Key, ...] = ()  # agents that may submit
    draft_folder: str = ""  # of the model that drafts, in the store (head, where the plan has one)
    weights: Literal["auto", "exact", "small"] = "auto"  # see `backends.base.Weights`


class Follower(msgspec.Struct, frozen=True):
    """Where a stage listens that computes each layer together with this one."""

    address: Address
    key: Key


class StageConnect(Message, frozen=True, tag="connect"):
    """All stages are ready: where the next one listens, and which keys may speak to this one.

    island: host:port where each rank of this stage's island is to be met, by rank; followers: its
    other stages. Both are told to the first one, which tells the others where.
    """

    next_address: Address
    next_key: Key
    previous_key: Key
    island: Annotated[tuple[Address, ...], msgspec.Meta(max_length=ISLAND_MAX)] = ()
    followers: Annotated[tuple[Follower, ...], msgspec.Meta(max_length=ISLAND_MAX - 1)] = ()


class StageAdmit(Message, frozen=True, tag="admit"):
    """The agents that may submit, from now on."""

    keys: Annotated[tuple[Key, ...], msgspec.Meta(max_length=PEERS_MAX)]


class StagePing(Message, frozen=True, tag="ping"):
    """Are you at it? Answered by StageNews.pong from the loop that computes."""

    number: Count


class StageStop(Message, frozen=True, tag="stop"):
    """End cleanly, now."""


class StageNews(Message, frozen=True, tag="news"):
    """A stage's own report to its agent: what changed."""

    phase: Literal["loading", "ready", "linked", "failed"]
    ring_port: int = 0
    submit_port: int = 0
    key: str = ""
    weights_bytes: int = 0
    kv_bytes: int = 0
    compute_bytes: int = 0
    active: int = 0
    steps: int = 0
    tokens: int = 0
    dropped: int = 0  # frames refused: stale, replayed, malformed
    why: str = ""
    timed: Timed | None = None
    pong: int = 0  # of the last StagePing
    blamed: str = ""  # peer whose numbers were not finite, answer after answer (head)
    island_port: int = 0  # where its island's peers are to meet it


Pipe = StageOrder | StageConnect | StageAdmit | StagePing | StageStop | StageNews
