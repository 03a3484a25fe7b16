"""What the transport tells of its links, and what it keeps of each connection."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from peer.protocol import Control, Hello, Refused, Welcome


@dataclass(frozen=True, slots=True)
class Linked:
    """A connection agreed with hello and welcome. dialled: the address, where we dialled."""

    peer_id: str
    key: str
    hello: Hello | Welcome
    host: str
    dialled: str


@dataclass(frozen=True, slots=True)
class Unlinked:
    """The last connection with the peer is gone."""

    peer_id: str
    why: str


@dataclass(frozen=True, slots=True)
class Narrowed:
    """A connection with the peer is gone, and others are left."""

    peer_id: str


@dataclass(frozen=True, slots=True)
class NotReached:
    """A dial came to nothing. refused: it answered, and does not want us. closed: its machine
    answered that nobody listens there."""

    peer_id: str
    why: str
    refused: bool = False
    closed: bool = False


@dataclass(frozen=True, slots=True)
class Turned:
    """A refusal, by us or by them, for people. host: where the other one is."""

    peer_id: str
    host: str
    refusal: Refused
    by_us: bool


@dataclass(frozen=True, slots=True)
class Received:
    """A message on an agreed link."""

    peer_id: str
    message: Control


@dataclass(frozen=True, slots=True)
class Beside:
    """A probe on a connection that is no link, from a peer with which there is one: it measures
    this way. It is answered there: see `Transport.send_to`."""

    routing_id: bytes
    request: int


Event = Linked | Unlinked | Narrowed | NotReached | Turned | Received | Beside


@dataclass(slots=True, eq=False)
class Path:
    """One connection with a peer."""

    peer_id: str
    key: str
    host: str
    socket: Any  # our DEALER, or the ROUTER
    dialled: str = ""  # the address; "" where the peer dialled
    routing_id: bytes = b""  # the peer's at our ROUTER, where it dialled
    fd: int = -1
    up: bool = False
    incarnation: int = -1
    task: asyncio.Task[None] | None = None
