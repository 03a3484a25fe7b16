"""Links on loopback: who is linked, what they carry, how they end."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import zmq
import zmq.asyncio

from peer.cluster import links as t
from peer.cluster import sockets
from peer.cluster.identity import peer_id_of
from peer.protocol import (
    Hello,
    encode,
)
from tests.ends import BEAT, End, dealers, still_works, two_ends


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


async def test_a_link_carries_messages_both_ways_and_names_the_sender(
    pair: tuple[End, End], until: Any
) -> None:
    a, b = pair
    for one, other in ((a, b), (b, a)):
        assert one.transport.send(other.me, BEAT)
        await until(lambda other=other: other.of(t.Received), 5, "it arrives")
        assert other.of(t.Received) == [t.Received(one.me, BEAT)]
        assert set(one.transport.hosts_of(other.me)) == {"127.0.0.1"}
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
    await until(lambda: len(a.of(t.Linked)) == len(b.of(t.Linked)) == 2, 5, "dialled again")
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
    assert a.of(t.NotReached)[0] == t.NotReached(b.me, "nobody answers there", closed=True)


async def test_only_where_nobody_listens_is_a_port_closed() -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        place = f"tcp://127.0.0.1:{listening.getsockname()[1]}"
        assert await sockets.closed(place)
        listening.listen()
        assert not await sockets.closed(place)  # whoever accepts, or does not


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
