"""Links on loopback, and everything that strangers may send to the port."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import zmq
import zmq.asyncio

from peer.cluster import links as t
from peer.cluster.complaints import Complaints
from peer.cluster.identity import peer_id_of
from peer.cluster.transport import Transport
from peer.errors import ProtocolError
from peer.planning.plan import PlanId
from peer.protocol import (
    MESSAGE_BYTES_MAX,
    ChunkHere,
    Heartbeat,
    Hello,
    ManifestHere,
    Refused,
    Sampling,
    Submit,
    Welcome,
    encode,
)

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


@pytest.fixture
async def ends() -> AsyncIterator[list[End]]:
    made = [End(), End()]
    for end in made:
        await end.transport.running.wait()
    yield made
    for end in made:
        await end.close()


@pytest.fixture
async def pair(ends: list[End], until: Any) -> tuple[End, End]:
    """Two linked ends; the first dialled."""
    a, b = ends
    a.dial(b)
    await until(lambda: a.of(t.Linked) and b.of(t.Linked), 5, "a link")
    return a, b


@pytest.fixture
async def raw() -> AsyncIterator[Any]:
    """Makes DEALERs that speak CURVE with any keys and say what they like."""
    context = zmq.asyncio.Context()
    kept = []

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


async def test_a_link_carries_messages_both_ways_and_names_the_sender(
    pair: tuple[End, End], until: Any
) -> None:
    a, b = pair
    for one, other in ((a, b), (b, a)):
        assert one.transport.send(other.me, BEAT)
        await until(lambda other=other: other.of(t.Received), 5, "it arrives")
        assert other.of(t.Received) == [t.Received(one.me, BEAT)]
        assert one.transport.host_of(other.me) == "127.0.0.1"
    assert a.of(t.Linked)[0].dialled == b.transport.addresses[0]
    assert b.of(t.Linked)[0].dialled == ""


async def test_two_that_dial_each_other_have_one_link(ends: list[End], until: Any) -> None:
    a, b = ends
    a.dial(b)
    b.dial(a)
    await until(lambda: len(a.of(t.Linked)) == len(b.of(t.Linked)) == 2, 5, "both connections")
    assert a.transport.send(b.me, BEAT)
    await until(lambda: b.of(t.Received), 5, "it arrives")
    await b.close()
    await until(lambda: a.of(t.Unlinked), 2, "the break is told")
    assert len(a.of(t.Unlinked)) == 1
    assert len(b.of(t.Received)) == 1


async def test_who_was_dialled_notices_the_break_as_fast(pair: tuple[End, End], until: Any) -> None:
    a, b = pair
    await a.close()
    began = time.monotonic()
    await until(lambda: b.of(t.Unlinked), 2, "the break is told")
    assert time.monotonic() - began < 1.0
    assert not b.transport.send(a.me, BEAT)


async def test_a_hung_up_link_ends_on_both_sides(pair: tuple[End, End], until: Any) -> None:
    a, b = pair
    b.transport.hang_up(a.me)  # the one that cannot close the connection itself
    await until(lambda: a.of(t.Unlinked), 2, "the dialler is told")
    assert not b.of(t.Unlinked)  # it knows
    a.dial(b)
    await until(lambda: len(b.of(t.Linked)) == 2, 5, "dialled again")
    await still_works(pair, until)


async def test_a_new_run_of_a_peer_replaces_the_old_one(pair: tuple[End, End], until: Any) -> None:
    a, b = pair
    again = End(incarnation=2, pair=a.pair)
    await again.transport.running.wait()
    again.dial(b)
    await until(lambda: len(b.of(t.Linked)) == 2, 5, "the new run is linked")
    await until(lambda: a.of(t.Unlinked), 5, "the old run's connection is ended")
    assert b.transport.send(a.me, BEAT)
    await until(lambda: again.of(t.Received), 5, "messages go to the new run")
    assert not a.of(t.Received)
    await again.close()


async def test_nobody_at_the_address_is_told(ends: list[End], until: Any) -> None:
    a, b = ends
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    a.transport.dial(b.me, b.pair[0], f"tcp://127.0.0.1:{port}")
    await until(lambda: a.of(t.NotReached), 5, "the failure is told")
    assert a.of(t.NotReached)[0] == t.NotReached(b.me, "nobody answers there", False)


async def test_a_wrong_key_is_refused(ends: list[End], until: Any) -> None:
    """Somebody announces a peer id, with its key, at another machine's address."""
    a, b = ends
    wrong = zmq.curve_keypair()[0].decode()
    a.transport.dial(peer_id_of(wrong), wrong, b.transport.addresses[0])
    await until(lambda: a.of(t.NotReached), 5, "the failure is told")
    assert "key" in a.of(t.NotReached)[0].why or "broke" in a.of(t.NotReached)[0].why
    assert not a.of(t.Linked)
    assert not b.of(t.Linked)


async def test_a_peer_that_takes_anothers_name_is_refused(
    pair: tuple[End, End], raw: Any, until: Any
) -> None:
    a, b = pair
    liar = raw(b)
    hello = Hello(1, "home", a.me, "liar", 9, (), "0")
    await liar.send(encode(hello))
    refusal = await asyncio.wait_for(liar.recv(), 5)
    assert b"not your key" in refusal
    await liar.send(encode(BEAT))
    await until(lambda: b.complaints.counts["message before hello"] == 1, 5, "it is dropped")
    assert not b.of(t.Received)
    await still_works(pair, until)


async def test_who_takes_over_anothers_connection_is_not_taken_for_it(
    pair: tuple[End, End], raw: Any, until: Any
) -> None:
    """Nobody can know the victim's routing id; this test looks it up."""
    _, b = pair
    (routing_id,) = b.transport._incoming
    thief = raw(b)
    thief.setsockopt(zmq.ROUTING_ID, routing_id)
    thief.disconnect(b.transport.addresses[0])
    thief.connect(b.transport.addresses[0])
    await thief.send(encode(BEAT))
    counts = b.complaints.counts
    await until(lambda: counts["message on another peer's link"] == 1, 5, "it is dropped")
    assert not b.of(t.Received)


async def test_a_hello_said_twice_is_one_link(pair: tuple[End, End], raw: Any, until: Any) -> None:
    _, b = pair
    keys = zmq.curve_keypair()
    eager = raw(b, pair=keys)
    me = peer_id_of(keys[0].decode())
    for _ in range(2):
        await eager.send(encode(Hello(1, "home", me, "eager", 1, (), "0")))
    await eager.send(encode(BEAT))
    await until(lambda: t.Received(me, BEAT) in b.told, 5, "its message arrives")
    assert [linked.peer_id for linked in b.of(t.Linked)].count(me) == 1


async def test_a_connection_without_curve_gets_nowhere(
    pair: tuple[End, End], raw: Any, until: Any
) -> None:
    _, b = pair
    plain = raw(b, curve=False)
    with contextlib.suppress(zmq.Again):
        await plain.send(encode(BEAT), flags=zmq.DONTWAIT)
    await until(lambda: b.complaints.counts["connection that spoke no halka"], 5, "it is counted")
    assert not b.of(t.Received)
    await still_works(pair, until)


@pytest.mark.parametrize(
    "noise",
    [
        pytest.param(bytes(range(256)) * 64, id="random bytes"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: halka\r\n\r\n", id="HTTP"),
        pytest.param(
            b"\xff" + b"\0" * 8 + b"\x7f\x03\x01CURVE" + b"\0" * 47, id="a broken greeting"
        ),
        pytest.param(b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f" + b"\xff" * 4000, id="lengths"),
    ],
)
async def test_noise_on_the_port_disturbs_nobody(
    pair: tuple[End, End], noise: bytes, until: Any
) -> None:
    _, b = pair
    reader, writer = await asyncio.open_connection("127.0.0.1", b.transport.port)
    writer.write(noise)
    with contextlib.suppress(ConnectionError):
        await writer.drain()
        await asyncio.wait_for(reader.read(), 6)  # until it hangs up: 3 s at most, for a handshake
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    await until(lambda: b.complaints.counts["connection that spoke no halka"] == 1, 5, "counted")
    await still_works(pair, until)


async def test_tls_on_the_port_disturbs_nobody(pair: tuple[End, End], until: Any) -> None:
    context = ssl.create_default_context()
    with contextlib.suppress(OSError, TimeoutError):
        await asyncio.wait_for(
            asyncio.open_connection("127.0.0.1", pair[1].transport.port, ssl=context), 6
        )
    await still_works(pair, until)


async def test_an_oversized_frame_ends_its_own_connection_only(
    pair: tuple[End, End], raw: Any, until: Any
) -> None:
    _, b = pair
    other = raw(b)
    await other.send(b"\0" * (MESSAGE_BYTES_MAX + 1))
    counts = b.complaints.counts
    await until(lambda: counts["connection that spoke no halka"] == 1, 5, "it is hung up on")
    assert not counts["malformed message"]  # nobody ever held those bytes
    await still_works(pair, until)


async def test_a_message_beyond_the_limit_is_our_own_mistake(pair: tuple[End, End]) -> None:
    a, b = pair
    too_long = Submit("r", PlanId(1, 1), b"\0" * (MESSAGE_BYTES_MAX + 1), Sampling(), 1)
    with pytest.raises(ProtocolError, match="more than peers accept"):
        a.transport.send(b.me, too_long)


async def test_malformed_messages_are_dropped_counted_and_said_once(
    pair: tuple[End, End], raw: Any, until: Any, caplog: pytest.LogCaptureFixture
) -> None:
    _, b = pair
    keys = zmq.curve_keypair()
    odd = raw(b, pair=keys)
    me = peer_id_of(keys[0].decode())
    await odd.send(encode(Hello(1, "home", me, "odd", 1, (), "0")))
    await until(lambda: len(b.of(t.Linked)) == 2, 5, "it is linked")
    whole = encode(ChunkHere(1, b"x" * 50))
    broken = [
        b"", b"\xc1", b"\x81\xa1m\xa5nobody", whole[:-1], whole + b"\0", b"\x91" * 100_000,
        b"\xdf\xff\xff\xff\xff", b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff",
        b"\xc9\x7f\xff\xff\xff\x01", b"\x81\xa1m\xa4\xff\xfe\xfd\xfc",
        b"\x83\xa1m\xa4beat\xa4term\xcf" + b"\xff" * 8 + b"\xabcoordinator\xa0",
        b"\x83\xa1m\xa4beat\xa4term\xcb\x7f\xf8" + b"\0" * 6 + b"\xabcoordinator\xa0",
        encode(ManifestHere(1, "not a digest", b"")),
    ]  # fmt: skip
    for data in broken:
        await odd.send(data)
    await odd.send_multipart([encode(BEAT), b"and more"])
    await odd.send(encode(BEAT))
    await until(lambda: t.Received(me, BEAT) in b.told, 5, "the good one behind them arrives")
    assert b.complaints.counts["malformed message"] == len(broken)
    assert b.complaints.counts["message of several frames"] == 1
    assert len(b.of(t.Received)) == 1
    lines = [record for record in caplog.records if me in record.getMessage()]
    assert len(lines) == 1  # ten seconds have not passed
    assert "127.0.0.1" in lines[0].getMessage()
    await still_works(pair, until)


async def test_a_flood_of_messages_leaves_time_for_others(
    pair: tuple[End, End], raw: Any, until: Any
) -> None:
    _, b = pair
    keys = zmq.curve_keypair()
    loud = raw(b, pair=keys)
    await loud.send(encode(Hello(1, "home", peer_id_of(keys[0].decode()), "loud", 1, (), "0")))
    await loud.recv()

    async def shout() -> None:
        while True:
            for _ in range(50):
                await loud.send(b"\xc1")
            await asyncio.sleep(0)

    noise = asyncio.create_task(shout())
    try:
        await until(lambda: b.complaints.counts["malformed message"] > 1000, 20, "it is loud")
        began = time.monotonic()
        await still_works(pair, until)
        assert time.monotonic() - began < 1.0
    finally:
        noise.cancel()


async def test_half_open_connections_are_closed_in_seconds(
    pair: tuple[End, End], until: Any
) -> None:
    _, b = pair
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(socket.socket()) for _ in range(100)]
        for each in silent:
            each.connect(("127.0.0.1", b.transport.port))
        await still_works(pair, until)
        began = time.monotonic()
        counts = b.complaints.counts
        await until(lambda: counts["connection that spoke no halka"] == 100, 6, "all are closed")
        assert time.monotonic() - began < 5.0
    await still_works(pair, until)
