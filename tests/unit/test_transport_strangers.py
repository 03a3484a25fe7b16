"""Everything that strangers, and members, may send to the port."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import ssl
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import zmq
import zmq.asyncio

from peer.cluster import links as t
from peer.cluster import sockets
from peer.cluster.complaints import Complaints
from peer.cluster.identity import peer_id_of
from peer.cluster.intake import Intake, now
from peer.errors import ProtocolError
from peer.planning.plan import PlanId
from peer.protocol import (
    CHUNK_BYTES_MAX,
    MESSAGE_BYTES_MAX,
    ChunkHere,
    Goodbye,
    Gossip,
    Heartbeat,
    Hello,
    ManifestHere,
    Sampling,
    Sighted,
    Submit,
    encode,
)
from tests.ends import BEAT, End, dealers, still_works, two_ends

SIGHTED = Sighted("a" * 16, "k" * 40, tuple(f"tcp://10.0.0.{n}:1" for n in range(32)))


@pytest.fixture
async def ends() -> AsyncIterator[list[End]]:
    async with two_ends() as made:
        yield made


@pytest.fixture
async def pair(ends: list[End], until: Any) -> tuple[End, End]:
    """Two linked ends; the first dialled."""
    a, b = ends
    a.dial(b)
    await until(lambda: a.of(t.Linked) and b.of(t.Linked), 5, "a link")
    return a, b


@pytest.fixture
async def raw() -> AsyncIterator[Any]:
    async with dealers() as dealer:
        yield dealer


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


async def test_a_large_message_before_hello_is_not_even_read(
    pair: tuple[End, End], raw: Any, until: Any
) -> None:
    _, b = pair
    for data in (encode(Gossip((SIGHTED,) * 60)), b"\xc1" * (MESSAGE_BYTES_MAX - 1000)):
        await raw(b).send(data)
    await until(lambda: b.complaints.counts["large message before hello"] == 2, 5, "dropped")
    assert b.complaints.counts.total() == 2
    await still_works(pair, until)


async def test_readers_leave_others_half_of_the_time() -> None:
    """Also where each message takes longer than a turn of the loop."""
    intake = Intake(Complaints(time.monotonic))
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    async def reader() -> None:
        for _ in range(5):
            began = now()
            while now() - began < 0.02:
                pass
            await intake.rest(began)

    living = asyncio.create_task(others())
    began = now()
    await asyncio.gather(reader(), reader())
    assert now() - began >= 0.36  # of which 0.2 are work
    assert turns > 500
    living.cancel()


async def test_what_a_peer_does_not_read_is_not_stored_without_end(
    pair: tuple[End, End], raw: Any, until: Any
) -> None:
    _, b = pair
    keys = zmq.curve_keypair()
    me = peer_id_of(keys[0].decode())
    deaf = raw(b, pair=keys)
    deaf.disconnect(b.transport.addresses[0])
    deaf.rcvhwm, deaf.rcvbuf = 1, 4096
    deaf.connect(b.transport.addresses[0])
    await deaf.send(encode(Hello(1, "home", me, "deaf", 1, (), "0")))
    await until(lambda: len(b.of(t.Linked)) == 2, 5, "it is linked")
    chunk = ChunkHere(1, b"x" * CHUNK_BYTES_MAX)
    taken = 0
    for _ in range(300):
        taken += b.transport.send(me, chunk)
        await asyncio.sleep(0)
    assert taken * CHUNK_BYTES_MAX < 32 << 20  # half of it may be in the system's hands


async def test_a_dial_without_descriptors_is_told_and_tried_again(
    ends: list[End], until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = ends

    def none_left(*_: Any) -> Any:
        raise zmq.ZMQError(errno.EMFILE)

    with monkeypatch.context() as patch:
        patch.setattr(sockets, "_socket", none_left)
        a.dial(b)
    assert [event.peer_id for event in a.of(t.NotReached)] == [b.me]
    assert "LimitNOFILE" in a.transport.problem
    a.dial(b)
    await until(lambda: a.of(t.Linked), 5, "a link")
    assert a.transport.problem == ""


@pytest.mark.parametrize("message", [Heartbeat(1 << 64, ""), Goodbye("\ud800")])
async def test_what_has_no_bytes_is_a_protocol_error(message: Any) -> None:
    with pytest.raises(ProtocolError, match="cannot be encoded"):
        encode(message)


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
