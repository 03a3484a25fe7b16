"""Whole clusters on loopback: real sockets, real time, several peers in one process."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from peer.cluster.identity import Identity
from peer.config import Config
from peer.errors import ConfigError, PartError, PeerLost, ProtocolError
from peer.protocol import (
    PROTOCOL,
    ChunkHere,
    ChunkWanted,
    Control,
    ManifestHere,
    ManifestWanted,
    NotHere,
    Plans,
)
from tests.town import Peer, Town, a_town

DIGEST = "ab" * 32


@pytest.fixture
async def town(tmp_path: Path) -> AsyncIterator[Town]:
    async with a_town(tmp_path) as made:
        yield made


async def test_three_peers_of_which_one_is_known_form_a_cluster_and_elect_one(
    town: Town, until: Any
) -> None:
    a = await town.add("a")
    b, c = await town.add("b", a), await town.add("c", a)
    await until(lambda: town.agree(a, b, c), 10, "one cluster of three")
    coordinator = next(p for p in (a, b, c) if p.cluster.me == p.cluster.coordinator)
    followers = {p.cluster.me for p in (a, b, c)} - {coordinator.cluster.me}
    await until(lambda: coordinator.cluster.followers == followers, 2, "all follow it")
    for one in (a, b, c):
        for other in {a, b, c} - {one}:
            assert one.cluster.address_of(other.cluster.me) == "127.0.0.1"
            assert one.cluster.key_of(other.cluster.me) == other.identity.public
            member = one.cluster.members[other.cluster.me]
            assert member.addresses == other.cluster.addresses
            assert member.incarnation == other.identity.incarnation
    assert a.cluster.problem == ""


async def test_messages_go_both_ways_whoever_dialled(town: Town, until: Any) -> None:
    a = await town.add("a")
    b = await town.add("b", a)
    await until(lambda: town.agree(a, b), 10, "two peers")
    for one, other in ((a, b), (b, a)):
        message = Plans(term=1, states=(), why_none="nothing is pulled yet")
        assert one.cluster.send(other.cluster.me, message)
        await until(
            lambda one=one, other=other, message=message: (
                ("received", one.cluster.me, message) in other.ear.told
            ),
            2,
            "it arrives",
        )


async def test_a_message_to_oneself_is_a_mistake(town: Town) -> None:
    a = await town.add("a")
    with pytest.raises(AssertionError, match="itself"):
        a.cluster.send(a.cluster.me, Plans(term=1, states=()))


async def test_a_coordinator_that_says_goodbye_is_followed_at_once(town: Town, until: Any) -> None:
    a = await town.add("a")
    b, c = await town.add("b", a), await town.add("c", a)
    await until(lambda: town.agree(a, b, c), 10, "one cluster of three")
    leaving = next(p for p in (a, b, c) if p.cluster.me == p.cluster.coordinator)
    rest = [p for p in (a, b, c) if p is not leaving]
    term = leaving.cluster.term
    began = time.monotonic()
    await leaving.close()
    await until(lambda: town.agree(*rest), 5, "the rest agree")
    assert time.monotonic() - began < 1.0
    assert rest[0].cluster.term > term
    for peer in rest:
        assert ("lost", leaving.cluster.me, "the test is over") in peer.ear.told


async def test_a_killed_peer_is_lost_and_comes_back_under_the_same_id(
    town: Town, until: Any
) -> None:
    a = await town.add("a")
    b = await town.add("b", a)
    await until(lambda: town.agree(a, b), 10, "two peers")
    await until((town.home / "b" / "peers.json").exists, 5, "b has noted where a is")
    await b.kill()
    await until(lambda: b.cluster.me not in a.cluster.members, 3, "the loss is noticed")
    again = await town.add("b")  # no setting `peers` now: it remembers where a was
    await until(lambda: town.agree(a, again), 10, "two peers again")
    assert again.cluster.me == b.cluster.me
    assert again.identity.incarnation > b.identity.incarnation


async def test_the_address_of_a_member_whose_link_just_broke_is_the_one_it_had(
    town: Town, until: Any
) -> None:
    a = await town.add("a")
    b = await town.add("b", a)
    await until(lambda: town.agree(a, b), 10, "two peers")
    nothing = Plans(term=1, states=())
    await b.kill()
    await until(lambda: not a.cluster.send(b.cluster.me, nothing), 3, "the link is gone")
    while b.cluster.me in a.cluster.members:  # it may come back within the regret
        assert a.cluster.address_of(b.cluster.me) == "127.0.0.1"
        await asyncio.sleep(0)
    assert a.cluster.address_of(b.cluster.me) is None


async def test_a_peer_started_anew_within_the_regret_is_lost_and_joined(
    town: Town, until: Any
) -> None:
    a = await town.add("a")
    b = await town.add("b", a)
    await until(lambda: town.agree(a, b), 10, "two peers")
    a.ear.told.clear()
    await b.kill()
    again = await town.add("b", a)
    await until(lambda: town.agree(a, again), 10, "two peers again")
    kinds = [told[0] for told in a.ear.told if told[1] == b.cluster.me and told[0] != "elected"]
    assert kinds == ["lost", "joined"]


async def test_another_protocol_version_is_refused_by_name_on_both_sides(
    town: Town, until: Any
) -> None:
    old = await town.add("old")
    new = await town.add("new", old, options={"protocol": PROTOCOL + 1})
    await until(lambda: old.cluster.refused and new.cluster.refused, 5, "both say so")
    for peer, by_us in ((old, True), (new, False)):
        (turned,) = peer.cluster.refused
        assert turned.code == "protocol"
        assert turned.by_us is by_us
        assert turned.host == "127.0.0.1"
        assert f"version {PROTOCOL + 1}" in turned.why
        assert f"version {PROTOCOL}" in turned.why
        assert "update halka" in turned.why
    assert not old.cluster.members
    assert not new.cluster.members


async def test_another_cluster_is_refused_by_name(town: Town, until: Any) -> None:
    ours = await town.add("ours")
    theirs = await town.add("theirs", ours, cluster="next door")
    await until(lambda: ours.cluster.refused and theirs.cluster.refused, 5, "both say so")
    assert ours.cluster.refused[0].code == "cluster"
    assert "'next door'" in theirs.cluster.refused[0].why
    assert not ours.cluster.members


async def test_a_peer_that_is_told_its_own_address_stays_alone(town: Town, until: Any) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = await town.add("a", port=port)
    await alone.close()
    again = Peer(Config.fast_test(home=town.home / "a", port=port, peers=(f"127.0.0.1:{port}",)))
    town.peers.append(await again.start())
    await until(lambda: again.cluster.coordinator == again.cluster.me, 5, "it leads itself")
    assert not again.cluster.members
    assert not again.cluster.refused


async def test_a_pinned_port_that_is_taken_is_an_error_that_says_so(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        peer = Peer(Config.fast_test(home=tmp_path, port=port))
        with pytest.raises(ConfigError, match=f"port {port}.*setting `port`"):
            await peer.cluster.start()
    peer.identity.close()


async def test_peers_on_one_machine_find_each_other_by_mdns(tmp_path: Path, until: Any) -> None:
    name = f"test {os.getpid()} {time.monotonic_ns()}"  # other tests may shout at the same time
    peers = [
        await Peer(Config.loopback(home=tmp_path / each, cluster=name)).start() for each in "ab"
    ]
    a, b = peers
    try:
        await until(lambda: set(a.cluster.members) == {b.cluster.me}, 15, "a sees b")
        await until(lambda: set(b.cluster.members) == {a.cluster.me}, 15, "b sees a")
        assert a.cluster.discovery.problem == ""
    finally:
        for peer in peers:
            await peer.close()


async def test_a_term_that_cannot_be_stored_is_not_claimed(
    town: Town, until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Identity, term: int, *, lower: bool = False) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Identity, "store_term", full)
        a = await town.add("a")
        await until(lambda: "No space left" in a.cluster.problem, 5, "status tells")
        assert a.cluster.coordinator == ""
    await until(lambda: a.cluster.coordinator == a.cluster.me, 5, "it claims once there is space")
    assert a.cluster.problem == ""


# Questions ----------------------------------------------------------------------------------------


@pytest.fixture
async def pair(town: Town, until: Any) -> tuple[Peer, Peer]:
    a = await town.add("a")
    b = await town.add("b", a)
    await until(lambda: town.agree(a, b), 10, "two peers")
    return a, b


async def test_a_question_is_answered(pair: tuple[Peer, Peer]) -> None:
    a, b = pair

    def answer(peer_id: str, message: Control) -> None:
        match message:
            case ManifestWanted(request, digest):
                b.cluster.send(peer_id, ManifestHere(request, digest, b"manifest"))
            case ChunkWanted(request, _, _, offset, length):
                b.cluster.send(peer_id, ChunkHere(request, bytes([offset]) * length))

    b.ear.answer = answer
    manifest = ManifestWanted(0, DIGEST)
    chunks = [ChunkWanted(0, DIGEST, "embed", offset, 1000) for offset in range(8)]
    first, *rest = await asyncio.gather(
        a.cluster.ask(b.cluster.me, manifest, 2.0),
        *(a.cluster.ask(b.cluster.me, chunk, 2.0) for chunk in chunks),
    )
    assert isinstance(first, ManifestHere)
    assert first.data == b"manifest"
    assert [chunk.data for chunk in rest] == [bytes([offset]) * 1000 for offset in range(8)]


async def test_a_question_without_an_answer_ends_in_an_error(pair: tuple[Peer, Peer]) -> None:
    a, b = pair
    wanted = ChunkWanted(0, DIGEST, "embed", 0, 10)
    with pytest.raises(PeerLost, match=r"did not answer within 0\.2 s"):
        await a.cluster.ask(b.cluster.me, wanted, 0.2)
    with pytest.raises(PeerLost, match="cannot be reached"):
        await a.cluster.ask("a" * 16, wanted, 0.2)
    b.ear.answer = lambda peer_id, message: (
        b.cluster.send(
            peer_id,
            NotHere(message.request, "no such part"),  # type: ignore[union-attr]
        )
        and None
    )
    with pytest.raises(PartError, match="no such part"):
        await a.cluster.ask(b.cluster.me, wanted, 2.0)
    b.ear.answer = lambda peer_id, message: (
        b.cluster.send(
            peer_id,
            ManifestHere(message.request, DIGEST, b""),  # type: ignore[union-attr]
        )
        and None
    )
    with pytest.raises(ProtocolError, match="another question"):
        await a.cluster.ask(b.cluster.me, wanted, 2.0)


async def test_a_question_to_a_peer_that_dies_ends_with_the_peer(pair: tuple[Peer, Peer]) -> None:
    a, b = pair
    question = asyncio.create_task(
        a.cluster.ask(b.cluster.me, ChunkWanted(0, DIGEST, "embed", 0, 10), 30.0)
    )
    await asyncio.sleep(0)
    await b.kill()
    began = time.monotonic()
    with pytest.raises(PeerLost, match="is gone"):
        await question
    assert time.monotonic() - began < 3.0
