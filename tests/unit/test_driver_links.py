"""Clusters on loopback that measure their links."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from peer.cluster.driver import Cluster
from peer.protocol import CHUNK_BYTES_MAX, Control, Message, Probe, Probed
from tests.town import Peer, Town, a_town


@pytest.fixture
async def town(tmp_path: Path) -> AsyncIterator[Town]:
    async with a_town(tmp_path) as made:
        yield made


@pytest.fixture
async def pair(town: Town, until: Any) -> tuple[Peer, Peer]:
    a = await town.add("a")
    b = await town.add("b", a)
    await until(lambda: town.agree(a, b), 10, "two peers")
    return a, b


async def test_both_peers_measure_their_link_soon_after_they_met(
    pair: tuple[Peer, Peer], until: Any
) -> None:
    for one, other in (pair, pair[::-1]):
        links = one.ear.links
        await until(lambda links=links: links, 3, "it is measured")
        (link,) = links[other.cluster.me]
        assert 0 < link.rtt_s < 0.05
        assert link.bytes_per_s > 10e6
        assert not [told for told in one.ear.told if isinstance(told[-1], Probe | Probed)]


async def test_while_one_peer_is_busy_neither_sends_more_than_small_probes(
    town: Town, until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    paddings: list[int] = []
    send = Cluster.send

    def noted(self: Cluster, peer_id: str, message: Message) -> bool:
        if isinstance(message, Probe):
            paddings.append(len(message.padding))
        return send(self, peer_id, message)

    monkeypatch.setattr(Cluster, "send", noted)
    a = await town.add("a")
    a.ear.computes = True
    b = await town.add("b", a)
    await until(lambda: len(paddings) >= 3, 10, "b asks whether a is busy still")
    assert set(paddings) == {0}
    assert not a.ear.links
    assert not b.ear.links
    a.ear.computes = False
    await until(lambda: a.ear.links and b.ear.links, 5, "both measure")
    assert max(paddings) > 0


async def test_a_probe_is_answered_at_once_and_says_whether_this_peer_is_busy(
    pair: tuple[Peer, Peer], until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = pair
    await until(lambda: a.ear.links and b.ear.links, 5, "both have measured")
    answers: list[Control] = []

    def noted(peer_id: str, message: Control) -> bool:
        answers.append(message)
        return True

    monkeypatch.setattr(a.cluster._prober, "take", noted)
    assert a.cluster.send(b.cluster.me, Probe(5, bytes(CHUNK_BYTES_MAX)))
    await until(lambda: answers, 2, "an answer")
    b.ear.computes = True
    assert a.cluster.send(b.cluster.me, Probe(6))
    await until(lambda: len(answers) == 2, 2, "another answer")
    assert answers == [Probed(5, busy=False), Probed(6, busy=True)]


async def test_a_peer_that_is_gone_is_measured_no_more_and_anew_when_it_is_back(
    town: Town, until: Any
) -> None:
    a = await town.add("a")
    b = await town.add("b", a)
    await until(lambda: a.ear.links, 10, "the link is measured")
    await b.kill()
    await until(lambda: not a.cluster.members, 5, "the loss is noticed")
    assert a.cluster._prober._probing.deadline == math.inf
    a.ear.links.clear()
    again = await town.add("b", a)
    await until(lambda: again.cluster.me in a.ear.links, 10, "it is measured anew")
