"""A cluster among peers that send anything, on a machine that runs out of things."""

from __future__ import annotations

import asyncio
import errno
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from peer.cluster import interfaces
from peer.cluster.identity import Identity
from peer.cluster.memory import Memory
from peer.protocol import (
    CHUNK_BYTES_MAX,
    MESSAGE_BYTES_MAX,
    Control,
    Gossip,
    ManifestHere,
    NotHere,
    Plans,
    Probe,
    Probed,
    Sighted,
)
from tests.town import Town, a_town

DIGEST = "ab" * 32


@pytest.fixture
async def town(tmp_path: Path) -> AsyncIterator[Town]:
    async with a_town(tmp_path) as made:
        yield made


async def test_terms_that_come_while_one_is_written_wait_as_one(tmp_path: Path, until: Any) -> None:
    identity = Identity(tmp_path)
    written: list[int] = []
    go_on = threading.Event()

    def slow(term: int, *, lower: bool = False) -> None:
        go_on.wait(10)
        written.append(term)

    identity.store_term = slow  # type: ignore[method-assign]
    kept: list[tuple[int, bool]] = []
    memory = Memory(identity, lambda term, good: kept.append((term, good)))
    writing = asyncio.create_task(memory.run())
    memory.keep_term(1)
    await until(lambda: not memory._terms, 5, "the first is being written")
    for term in range(2, 1000):
        memory.keep_term(term)
    go_on.set()
    await until(lambda: len(kept) == 999, 5, "all are kept")
    assert written == [1, 999]
    assert all(good for _, good in kept)
    writing.cancel()
    await asyncio.wait([writing])
    identity.close()


async def test_a_message_that_cannot_be_sent_ends_nothing(town: Town, until: Any) -> None:
    a = await town.add("a")
    b = await town.add("b", a)
    await until(lambda: town.agree(a, b), 10, "two peers")
    for message in (
        Plans(term=1 << 70, states=()),
        ManifestHere(1, DIGEST, b"\0" * (MESSAGE_BYTES_MAX + 1)),
        NotHere(1, "\ud800"),
    ):
        assert not a.cluster.send(b.cluster.me, message)
        a.cluster.broadcast(message)
    assert a.cluster.complaints.counts["own message that cannot be sent"] == 6
    assert a.cluster.send(b.cluster.me, Plans(term=1, states=()))


async def test_gossip_of_what_is_no_key_ends_nothing(town: Town, until: Any) -> None:
    a = await town.add("a")
    b = await town.add("b", a)
    await until(lambda: town.agree(a, b), 10, "two peers")
    keys = ("#" * 40, "~" * 40, "\0" * 40, "ü" * 40)
    assert a.cluster.send(b.cluster.me, Gossip(tuple(Sighted("a" * 16, key, ()) for key in keys)))
    assert a.cluster.send(b.cluster.me, Plans(term=1, states=()))
    await until(lambda: b.ear.told[-1][0] == "received", 5, "what came behind it arrives")
    assert b.task is not None
    assert not b.task.done()


async def test_a_machine_without_descriptors_says_so_and_looks_again(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = await town.add("a")

    def none_left() -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(interfaces, "survey", none_left)
        assert not await a.cluster._hosts.look()
    assert "Too many open files" in a.cluster.problem
    assert a.cluster.hosts == ("127.0.0.1",)
    assert not await a.cluster._hosts.look()
    assert a.cluster.problem == ""


async def test_a_member_that_floods_with_probes_is_no_reason_to_lose_anybody_or_memory(
    town: Town, until: Any
) -> None:
    a = await town.add("a")
    flooding, other = await town.add("f", a), await town.add("o", a)
    await until(lambda: town.agree(a, flooding, other), 10, "three peers")
    await until(lambda: other.cluster.me in a.ear.links, 5, "the first measuring is over")
    for peer in (a, flooding, other):
        peer.ear.told.clear()
    process, padding, taken = psutil.Process(), bytes(CHUNK_BYTES_MAX), 0
    before, most = process.memory_info().rss, 0
    waits: list[float] = []
    end = time.monotonic() + 3.0  # longer than the silence that loses a member
    while time.monotonic() < end:
        began = time.monotonic()
        taken += flooding.cluster.send(a.cluster.me, Probe(taken, padding))
        await asyncio.sleep(0)
        waits.append(time.monotonic() - began)
        most = max(most, process.memory_info().rss)
    assert taken > 200
    assert most - before < 100 << 20  # the queues: 32 messages, at both ends
    assert max(waits) < 0.5  # the loop that they share went on
    assert not [told for peer in (a, flooding, other) for told in peer.ear.told if "lost" in told]
    assert a.cluster.send(other.cluster.me, Plans(term=1, states=()))
    await until(
        lambda: ("received", a.cluster.me, Plans(term=1, states=())) in other.ear.told,
        2,
        "others are served",
    )


async def test_answers_to_probes_that_nobody_sent_change_nothing(town: Town, until: Any) -> None:
    a = await town.add("a")
    b = await town.add("b", a)
    await until(lambda: town.agree(a, b), 10, "two peers")
    for request in range(2000):
        b.cluster.send(a.cluster.me, Probed(request, busy=False))
        if request % 20 == 0:
            await asyncio.sleep(0)
    await until(lambda: a.ear.links, 5, "the link is measured")
    (link,) = a.ear.links[b.cluster.me]
    assert 1e-6 < link.rtt_s < 0.05
    assert 10e6 < link.bytes_per_s < 1e11
    assert a.task is not None
    assert not a.task.done()


async def test_a_member_that_does_not_know_probes_stays_a_member(
    town: Town, until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = await town.add("a")
    old = await town.add("old")
    asked: list[Control] = []

    def deaf(peer_id: str, message: Control) -> bool:
        asked.append(message)
        return True

    monkeypatch.setattr(old.cluster._prober, "take", deaf)
    c = await town.add("c", a, old)
    await until(lambda: town.agree(a, old, c), 10, "three peers")
    await until(lambda: a.cluster.me in c.ear.links, 10, "the others measure each other")
    await until(lambda: len(asked) >= 2, 5, "it was asked")
    assert old.cluster.me not in a.ear.links
    assert old.cluster.me in a.cluster.members
