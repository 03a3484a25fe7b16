"""A cluster among peers that send anything, on a machine that runs out of things."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from peer.cluster import interfaces
from peer.cluster.identity import Identity
from peer.cluster.memory import Memory
from peer.protocol import (
    MESSAGE_BYTES_MAX,
    Gossip,
    ManifestHere,
    NotHere,
    Plans,
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
