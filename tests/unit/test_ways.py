"""By which address hops go: the one measured to be clearly best, while it lasts."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from random import Random

import pytest
import zmq.asyncio

from peer.cluster import interfaces
from peer.cluster import ways as w
from peer.cluster.aside import Aside, Busy
from peer.cluster.complaints import Complaints
from peer.cluster.identity import Identity
from peer.cluster.interfaces import Interface
from peer.cluster.links import Beside, Event, Linked
from peer.cluster.transport import Transport
from peer.config import Config, Timing
from peer.errors import ProtocolError
from peer.planning.profile import Link
from peer.protocol import Hello, Probed
from tests.conftest import Until

A, B = "a" * 16, "b" * 16
WIFI, CABLE, SPARE = (f"tcp://10.0.{n}.2:4000" for n in range(3))
RATES = {WIFI: 20e6, CABLE: 800e6, SPARE: 100e6}
TIMING = Timing()


class House:
    """A machine, the clock, and addresses that are as fast as RATES says; `dead` ones fail."""

    def __init__(self) -> None:
        self.ways, self.now = w.Ways(TIMING, Random(7)), 1000.0
        self.rates, self.dead, self.busy, self.far_busy = dict(RATES), set[str](), False, False
        self.open: set[tuple[str, str]] = set()
        self.told: list[w.Chosen] = []
        self.measured: list[tuple[str, str]] = []

    def feed(self, event: w.Event) -> None:
        for action in self.ways.step(event, self.now):
            match action:
                case w.Measure(peer_id, address):
                    self.open.add((peer_id, address))
                    self.measured.append((peer_id, address))
                    self.feed(self.answer(peer_id, address))
                case w.Leave(peer_id, address):
                    self.open.discard((peer_id, address))
                case w.Chosen():
                    self.told.append(action)

    def answer(self, peer_id: str, address: str) -> w.Event:
        if self.far_busy:
            return w.PutOff(peer_id, address)
        if address in self.dead:
            return w.Failed(peer_id, address)
        return w.Found(peer_id, address, 0.001, self.rates[address])

    def run(self, for_s: float) -> None:
        end = self.now + for_s
        while self.ways.deadline <= end:
            self.now = max(self.now, self.ways.deadline)
            self.feed(w.Tick(self.busy))
        self.now = end


def met(*addresses: str, main: str = WIFI) -> House:
    house = House()
    house.feed(w.Here(A, main, addresses))
    return house


def test_a_peer_with_one_address_is_never_measured() -> None:
    house = met(WIFI)
    assert house.ways.settled(A)
    assert house.ways.deadline == math.inf
    assert (house.told, house.ways.chosen(A)) == ([], "")


def test_the_fastest_way_is_chosen_soon_and_its_connection_alone_stays_open() -> None:
    house = met(CABLE, SPARE)
    assert not house.ways.settled(A)
    house.run(TIMING.probe_soon_s)
    assert house.ways.settled(A)
    assert house.told == [w.Chosen(A, CABLE, Link(A, 0.001, 800e6))]
    assert house.open == {(A, CABLE)}


def test_a_way_that_is_hardly_better_is_not_worth_a_change() -> None:
    house = House()
    house.rates[CABLE] = house.rates[WIFI] * 1.2
    house.feed(w.Here(A, WIFI, (CABLE,)))
    house.run(3600)
    assert (house.told, house.open, house.ways.chosen(A)) == ([], set(), "")


def test_a_way_that_breaks_is_left_at_once_and_tried_again_much_later() -> None:
    house = met(CABLE)
    house.run(1)
    house.open.clear()
    count = len(house.measured)
    house.feed(w.Failed(A, CABLE))
    assert house.told[-1] == w.Chosen(A)
    house.run(300)
    assert (A, CABLE) not in house.measured[count:]
    house.run(600)  # it is plugged in again
    assert house.told[-1].address == house.ways.chosen(A) == CABLE
    assert house.open == {(A, CABLE)}


def test_where_a_way_turns_slow_another_one_is_taken() -> None:
    house = met(CABLE, SPARE)
    house.run(1)
    house.rates[CABLE] = 1e6
    house.run(6 * TIMING.probe_s)  # until what was measured before no longer counts
    assert house.ways.chosen(A) == SPARE
    assert house.open == {(A, SPARE)}
    assert [told.address for told in house.told] == [CABLE, CABLE, SPARE]  # its figures are news


def test_the_link_itself_going_over_to_the_best_way_needs_no_other() -> None:
    house = met(CABLE)
    house.run(1)
    house.feed(w.Here(A, CABLE, (WIFI,)))
    assert (house.told[-1], house.ways.chosen(A), house.open) == (w.Chosen(A), "", set())
    house.dead.add(CABLE)  # and its end: the link is by the other way again
    house.feed(w.Here(A, WIFI, (CABLE,)))
    house.run(3600)
    assert len(house.told) == 2  # what was known of the cable is no reason to choose it
    assert house.ways.chosen(A) == ""


def test_nothing_is_measured_while_an_end_computes() -> None:
    house = met(CABLE)
    house.busy = True
    house.run(3600)
    assert (house.measured, house.ways.settled(A)) == ([], False)
    house.busy, house.far_busy = False, True
    house.run(60)
    assert (house.told, house.open) == ([], set())
    house.far_busy = False
    house.run(60)
    assert house.ways.chosen(A) == CABLE


def test_what_was_put_off_is_measured_at_once_when_a_hop_is_about_to_be_made() -> None:
    house = House()
    house.far_busy = True
    house.feed(w.Here(A, WIFI, (CABLE,)))
    house.feed(w.Tick(busy=False))
    house.now += TIMING.probe_soon_s
    house.feed(w.Tick(busy=False))
    house.feed(w.Tick(busy=False))
    assert not house.ways.settled(A)
    house.far_busy = False
    house.feed(w.Wanted(B))
    house.feed(w.Tick(busy=False))
    assert not house.ways.settled(A), "it was put off for some seconds"
    house.feed(w.Wanted(A))
    for _ in range(3):
        house.feed(w.Tick(busy=False))
    assert house.ways.settled(A)
    assert house.ways.chosen(A) == CABLE


def test_a_peer_that_left_and_an_address_that_is_gone_leave_no_connection() -> None:
    house = met(CABLE, SPARE)
    house.feed(w.Here(B, WIFI, (CABLE,)))
    house.run(1)
    assert house.open == {(A, CABLE), (B, CABLE)}
    house.feed(w.Here(A, WIFI, (SPARE,)))  # the cable's interface has no address any more
    assert house.told[-1].address == ""
    house.run(1)
    assert house.ways.chosen(A) == SPARE
    house.feed(w.Gone(A))
    house.feed(w.Gone(B))
    assert house.open == set()
    assert house.ways.deadline == math.inf
    house.feed(w.Found(A, SPARE, 0.001, 1e9))  # it was under way
    assert house.ways.settled(A)


def test_a_macs_thunderbolt_bridge_is_a_home_network_and_other_bridges_are_not() -> None:
    found = [Interface(name, True, ("169.254.7.7",)) for name in ("bridge0", "bridge100")]
    assert interfaces.choose(found[:1], system="darwin") == ("169.254.7.7",)
    assert interfaces.choose(found[1:], system="darwin") == ()
    assert interfaces.choose(found, system="linux") == ()


# Over sockets ---------------------------------------------------------------------------------


class One:
    """A transport that keeps what it tells and answers probes beside its links."""

    def __init__(self, home: Path) -> None:
        self.identity, self.told, self.busy = Identity(home), list[Event](), False
        self.transport = Transport(
            self.identity.public, self.identity.secret, tell=self.tell, introduce=self.hello,
            judge=lambda hello, key: None, complaints=Complaints(lambda: 0.0),
        )  # fmt: skip
        self.transport.start(["127.0.0.1", "127.0.0.2"], 0)

    def tell(self, event: Event) -> None:
        self.told.append(event)
        if isinstance(event, Beside):
            self.transport.send_to(event.routing_id, Probed(event.request, self.busy))

    def hello(self) -> Hello:
        me = self.identity.peer_id
        return Hello(protocol=0, cluster="home", peer_id=me, name=me, incarnation=1, addresses=(),
                     version="1", term=0)  # fmt: skip


async def measured(one: One, other: One, timing: Timing) -> tuple[float, float]:
    """What one measures of the other's second address."""
    context = zmq.asyncio.Context()
    aside = None
    try:
        keys = one.identity.public, one.identity.secret
        address = f"tcp://127.0.0.2:{other.transport.port}"
        aside = Aside(context, keys, other.identity.public, address)
        return await aside.measure(timing, lambda: one.busy)
    finally:
        if aside is not None:
            aside.close()
        context.destroy(linger=0)


async def test_a_member_answers_probes_beside_its_link_and_a_stranger_gets_none(
    tmp_path: Path, until: Until
) -> None:
    timing = Config.fast_test().timing
    one, other = One(tmp_path / "one"), One(tmp_path / "other")
    async with asyncio.TaskGroup() as tasks:
        runs = [tasks.create_task(each.transport.run()) for each in (one, other)]
        await one.transport.running.wait()
        await other.transport.running.wait()
        with pytest.raises(ProtocolError):  # a stranger is told that this is no link
            await measured(one, other, timing)
        assert not other.told
        peer_id = other.identity.peer_id
        one.transport.dial(peer_id, other.identity.public, other.transport.addresses[0])
        await until(lambda: any(isinstance(e, Linked) for e in other.told), 10, "linked")
        before = len([e for e in other.told if isinstance(e, Linked)])
        rtt_s, bytes_per_s = await measured(one, other, timing)
        assert rtt_s > 0
        assert bytes_per_s > 1e6
        assert len([e for e in other.told if isinstance(e, Linked)]) == before  # it is no link
        other.busy = True
        with pytest.raises(Busy):
            await measured(one, other, timing)
        for run in runs:
            run.cancel()
    for each in (one, other):
        each.identity.close()
