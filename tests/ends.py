"""Two transports on loopback, and strangers that speak CURVE and say what they like."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import zmq
import zmq.asyncio

from peer.cluster import links as t
from peer.cluster.complaints import Complaints
from peer.cluster.identity import peer_id_of
from peer.cluster.transport import Transport
from peer.protocol import Heartbeat, Hello, Refused, Welcome

BEAT = Heartbeat(3, "")


class End:
    """A transport that agrees with everybody, and what it told."""

    def __init__(self, incarnation: int = 1, pair: tuple[str, str] | None = None) -> None:
        made = zmq.curve_keypair()
        self.pair = pair or (made[0].decode(), made[1].decode())
        self.me = peer_id_of(self.pair[0])
        self.incarnation = incarnation
        self.told: list[t.Event] = []
        self.complaints = Complaints(time.monotonic)
        self.transport = Transport(
            *self.pair,
            tell=self.told.append,
            introduce=self.hello,
            judge=self.judge,
            complaints=self.complaints,
        )
        self.transport.start(["127.0.0.1"], 0)
        self.task = asyncio.create_task(self.transport.run())

    def hello(self) -> Hello:
        return Hello(1, "home", self.me, "test", self.incarnation, self.transport.addresses, "0")

    def judge(self, hello: Hello | Welcome, key: str) -> Refused | None:
        if hello.peer_id != peer_id_of(key):
            return Refused("identity", "not your key", 1)
        return None

    def dial(self, other: End) -> None:
        self.transport.dial(other.me, other.pair[0], other.transport.addresses[0])

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.told if isinstance(event, kind)]

    async def close(self) -> None:
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task


@asynccontextmanager
async def two_ends() -> AsyncIterator[list[End]]:
    """Not linked yet."""
    made = [End(), End()]
    for end in made:
        await end.transport.running.wait()
    yield made
    for end in made:
        await end.close()


@asynccontextmanager
async def dealers() -> AsyncIterator[Callable[..., Any]]:
    """Makes DEALERs that speak CURVE with any keys."""
    context = zmq.asyncio.Context()
    kept = []  # until the end, also where the test forgets them

    def dealer(to: End, *, server_key: str = "", pair: Any = None, curve: bool = True) -> Any:
        made = context.socket(zmq.DEALER)
        if curve:
            public, secret = pair or zmq.curve_keypair()
            made.curve_publickey, made.curve_secretkey = public, secret
            made.curve_serverkey = (server_key or to.pair[0]).encode()
        made.connect(to.transport.addresses[0])
        kept.append(made)
        return made

    yield dealer
    context.destroy(linger=0)


async def still_works(pair: tuple[End, End], until: Any) -> None:
    a, b = pair
    before = len(b.of(t.Received))
    assert a.transport.send(b.me, BEAT)
    await until(lambda: len(b.of(t.Received)) > before, 5, "the link still carries messages")
