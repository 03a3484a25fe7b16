"""What entry peers may do to the head's socket."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import zmq

from peer.protocol import Cancel, encode
from peer.ring.head import Head
from tests.plans import plan


class Flood:
    """A socket on which messages come faster than they are read."""

    def __init__(self, message: bytes) -> None:
        self.message, self.read = message, 0

    def recv_multipart(self, flags: int, copy: bool) -> list[Any]:
        assert flags == zmq.NOBLOCK
        assert not copy
        self.read += 1
        assert self.read < 1000, "the head reads on and on, and begins no step"
        return [SimpleNamespace(bytes=b"owner"), Frame(self.message)]


class Frame:
    """A part of a message, as zmq.Frame."""

    def __init__(self, data: bytes) -> None:
        self.bytes = data

    def get(self, name: str) -> str:
        assert name == "User-Id"
        return "key"


def test_a_peer_that_sends_without_end_does_not_keep_the_head_from_its_steps() -> None:
    head = Head(plan(), step_s=5.0)
    flood = Flood(encode(Cancel("nobody's", head.plan.id)))
    head.socket = cast(Any, flood)
    head.hear()
    first = flood.read
    assert first > 1
    head.hear()  # and goes on where it was
    assert flood.read == 2 * first
