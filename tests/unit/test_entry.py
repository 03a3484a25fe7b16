"""An entry peer's link to a head that is slow to let it in, or that works on what nobody wants."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
import zmq
import zmq.asyncio

from peer.planning.plan import PlanId
from peer.protocol import Cancel, Message, Sampling, Submit, Tokens, decode_answering, encode
from peer.ring import sockets
from peer.ring.entry import Entry
from peer.ring.generation import Give, Offer, Patience

PLAN = PlanId(1, 1)
MODEL = "d" * 64
HANDSHAKE_MS = 100


class Head:
    """Plays a head: lets the entry in when told to, and hears what comes."""

    def __init__(self) -> None:
        self.public, self.secret = zmq.curve_keypair()
        self.context = zmq.asyncio.Context()
        self.door = sockets.Doorkeeper(zmq.Context(self.context))
        self.router = self.context.socket(zmq.ROUTER)
        sockets.as_server(self.router, self.public, self.secret, "submit", 1 << 20)
        self.port = self.router.bind_to_random_port("tcp://127.0.0.1")
        self.owner = b""
        self.key = ""  # of the entry

    async def hear(self) -> Message:
        async with asyncio.timeout(10):
            while True:
                self.door.answer()
                if await self.router.poll(20):
                    self.owner, data = await self.router.recv_multipart()
                    return decode_answering(data)

    async def hears_no_more(self, seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.hear()
                return False
        return True

    async def say(self, message: Message) -> None:
        await self.router.send_multipart([self.owner, encode(message)])


@pytest.fixture
async def head(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Head]:
    monkeypatch.setattr(sockets, "HANDSHAKE_MS", HANDSHAKE_MS)
    head = Head()
    yield head
    head.door.close()
    head.context.destroy(0)


@pytest.fixture
async def entry(head: Head) -> AsyncIterator[Entry]:
    public, secret = zmq.curve_keypair()
    entry = Entry(public, secret, Patience(silence_s=30.0, plan_s=30.0))
    entry.open(PLAN, f"tcp://127.0.0.1:{head.port}", head.public.decode())
    entry.serve(Offer(PLAN, MODEL, 100))
    head.key = public.decode()
    yield entry
    await entry.close()


async def ask(entry: Entry) -> list[Give]:
    return [given async for given in entry.answer((1, 2), Sampling(), 5, (), MODEL)]


async def test_a_head_that_lets_in_late_is_asked_once(head: Head, entry: Entry) -> None:
    """Its loop computes for seconds, or has not heard of this peer yet; meanwhile the handshake is
    tried again and again. Each copy of the question would be an answer that nobody reads."""
    asked = asyncio.create_task(ask(entry))
    done, _ = await asyncio.wait({asked}, timeout=15 * HANDSHAKE_MS / 1000)
    assert not done
    head.door.admit("submit", [head.key])
    submit = await head.hear()
    assert isinstance(submit, Submit)
    assert await head.hears_no_more(0.3)
    await head.say(Tokens(submit.request, PLAN, 2, (7,), "length"))
    assert await asyncio.wait_for(asked, 10) == [Give((7,), "length")]


async def test_a_head_that_works_on_what_nobody_reads_is_told_so(head: Head, entry: Entry) -> None:
    head.door.admit("submit", [head.key])
    asked = asyncio.create_task(ask(entry))
    submit = await head.hear()
    assert isinstance(submit, Submit)
    for request in ("0123456789.1", submit.request + "7"):
        await head.say(Tokens(request, PLAN, 2, (7,)))
        assert await head.hear() == Cancel(request, PLAN)
    await head.say(Tokens("0123456789.1", PLAN, 3, (), "stop"))
    await head.say(Tokens(submit.request, PLAN, 2, (7,)))
    assert await head.hears_no_more(0.2)
    await head.say(Tokens(submit.request, PLAN, 3, (8,), "length"))
    assert await asyncio.wait_for(asked, 10) == [Give((7,), ""), Give((8,), "length")]
