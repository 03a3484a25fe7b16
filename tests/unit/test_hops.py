"""Where the stages of an island meet: at addresses that all of them can reach."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from peer.hops import Hops
from peer.planning.duty_events import ConnectStage
from peer.planning.plan import PlanId, StageLink
from peer.stage_messages import StageConnect

A, B, C = ("aaaa" * 4, "bbbb" * 4, "cccc" * 4)
KEY = "0" * 40
CABLES = {B: "169.254.1.2", C: "169.254.7.3"}  # measured to be fastest
HOUSE = {B: "127.0.0.2", C: "127.0.0.3"}


def ordered(*others: str, main: dict[str, str] | None = None) -> StageConnect:
    """What the first of an island tells its stage. main: hosts by which members are linked."""
    told: list[StageConnect] = []

    async def settled(_peer_id: str, _within_s: float) -> None: ...

    ways: Any = SimpleNamespace(
        settled=settled, way_to=CABLES.get, hosts_of=lambda peer_id: (HOUSE[peer_id],), lost=None
    )
    cluster: Any = SimpleNamespace(me=A, ways=ways, address_of=(main or CABLES).get)
    supervisor: Any = SimpleNamespace(pids=dict, send=lambda _plan, order: told.append(order))
    links = [
        StageLink(peer_id, 7000 + n, KEY, island_port=7100 + n)
        for n, peer_id in enumerate((A, *others))
    ]
    hops = Hops(cluster, supervisor, lambda _plan, _why: None)
    asyncio.run(hops.connect(ConnectStage(PlanId(1, 1), links[0], KEY, tuple(links))))
    return told[0]


def test_two_meet_by_their_cable_and_three_where_all_of_them_reach_each_other() -> None:
    assert ordered(B).island[1] == "169.254.1.2:7101"
    # The cable from A to B is none that C could be met by.
    assert ordered(B, C).island == ("127.0.0.1:7100", "127.0.0.2:7101", "127.0.0.3:7102")


@pytest.mark.parametrize("nowhere", ["255.255.255.255", "fe80::1"])
def test_an_address_that_nothing_goes_to_ends_no_agent(
    monkeypatch: pytest.MonkeyPatch, nowhere: str
) -> None:
    monkeypatch.setitem(CABLES, B, nowhere)
    monkeypatch.setitem(HOUSE, B, nowhere)
    first, other = ordered(B, main={B: nowhere}).island
    assert (first[-5:], other[-5:]) == (":7100", ":7101")
