"""Measures the ways to members over connections of their own, and keeps the chosen ones open."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from random import Random
from typing import Any

from peer.clockwork import Alarm, Turns
from peer.cluster import addresses, sockets
from peer.cluster import ways as w
from peer.cluster.aside import Aside, Busy
from peer.cluster.identity import Identity
from peer.cluster.listener import Measured
from peer.config import Timing
from peer.errors import PeerError
from peer.planning.profile import Link

log = logging.getLogger("halka.cluster")

AGAIN_S = 0.1  # before ways that a hop waits for are tried again


class Wayfinder:
    """Of one cluster. `run` in a task, at whose end nothing is measured any more.

    Stands between the measuring of the links and who is told of it: where another way than the
    link's was chosen, the figures that are told are that way's. key_of: a member's key. `lost` is
    called with a member and the host by which hops went to it, when that way broke;
    `measures_link` tells whether the measuring of the links is at work.
    """

    def __init__(
        self,
        timing: Timing,
        identity: Identity,
        listener: Measured,
        key_of: Callable[[str], str | None],
    ) -> None:
        self._timing, self._listener, self._key_of = timing, listener, key_of
        self._keys = identity.public, identity.secret
        self._ways = w.Ways(timing, Random(f"ways of {identity.peer_id}"))
        self._turns = Turns()
        self._alarm = Alarm(self._due)
        self._context: sockets.Context | None = None  # with a thread of its own: made when needed
        self._open: dict[tuple[str, str], Aside] = {}
        self._tasks: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._links: dict[str, Link] = {}  # of the main ways
        self._hosts: dict[str, frozenset[str]] = {}  # by which the links go
        self._known: dict[str, tuple[str, ...]] = {}  # that members say they have
        self._group: asyncio.TaskGroup | None = None
        self.measures_link: Callable[[], bool] = lambda: False
        self.lost: Callable[[str, str], None] = lambda peer_id, host: None

    async def run(self) -> None:
        """Measure until cancelled."""
        try:
            async with asyncio.TaskGroup() as self._group:
                self._due()
                await asyncio.Event().wait()
        finally:
            self._group = None
            self._alarm.set(None)
            for aside in self._open.values():
                aside.close()
            self._open.clear()
            if self._context is not None:
                self._context.destroy(linger=0)

    def here(self, peer_id: str, hosts: tuple[str, ...], places: tuple[str, ...]) -> None:
        """The peer is a member, its link goes by these hosts, the first one best, and it may have
        these addresses."""
        before, self._hosts[peer_id] = self._hosts.get(peer_id, frozenset()), frozenset(hosts)
        for host in before - {*hosts, self.way_to(peer_id)}:
            self.lost(peer_id, host)  # a way that was chosen is watched by itself
        read = [(str(ip), port, place) for place in places for ip, port in [addresses.read(place)]]
        self._known[peer_id] = tuple(dict.fromkeys(at for at, _, _ in read))
        if not read:
            return
        main = next((place for at, _, place in read if at == hosts[0]), "")
        main = main or addresses.write(hosts[0], read[0][1])
        others = {at: place for at, _, place in reversed(read)}  # an older port of one is no way
        others.pop(hosts[0], None)
        self._feed(w.Here(peer_id, main, tuple(reversed(others.values()))))

    def gone(self, peer_id: str) -> None:
        """The peer is a member no longer."""
        self._links.pop(peer_id, None)
        self._hosts.pop(peer_id, None)
        self._known.pop(peer_id, None)
        self._feed(w.Gone(peer_id))

    def way_to(self, peer_id: str) -> str | None:
        """The host by which hops go to the peer, None: the one by which its link does."""
        chosen = self._ways.chosen(peer_id)
        return str(addresses.read(chosen)[0]) if chosen else None

    def hosts_of(self, peer_id: str) -> tuple[str, ...]:
        """By which a member says that it can be reached."""
        return self._known.get(peer_id, ())

    async def settled(self, peer_id: str, within_s: float) -> None:
        """Wait until all ways to the peer were tried, but not for long. Those that were put off,
        while a peer measured its engines perhaps, are tried now."""
        deadline = asyncio.get_running_loop().time() + within_s
        while self._group is not None and not self._ways.settled(peer_id):
            self._feed(w.Wanted(peer_id))
            if asyncio.get_running_loop().time() >= deadline:
                return
            await asyncio.sleep(AGAIN_S)

    # Between the links' measuring and its listener ------------------------------------------------

    def busy(self) -> bool:
        """Whether this peer computes, or serves an answer, now."""
        return self._listener.busy()

    def linked(self, link: Link) -> None:
        """The main way to a member was measured."""
        self._links[link.peer_id] = link
        if not self._ways.chosen(link.peer_id):
            self._listener.linked(link)

    # Inside ---------------------------------------------------------------------------------------

    def _due(self) -> None:
        self._feed(w.Tick(busy=self._listener.busy() or self.measures_link()))

    def _feed(self, event: w.Event) -> None:
        if self._group is not None:
            now = asyncio.get_running_loop().time()
            self._turns.take(lambda: self._step(event, now))

    def _step(self, event: w.Event, now: float) -> None:
        for action in self._ways.step(event, now):
            self._perform(action)
        at = self._ways.deadline
        self._alarm.set(at if at < math.inf else None)

    def _perform(self, action: w.Action) -> None:
        match action:
            case w.Measure(peer_id, address):
                assert self._group is not None
                work = self._measure(peer_id, address)
                self._group.create_task(work, name=f"way to {peer_id}")
            case w.Leave(peer_id, address):
                self._close(peer_id, address)
            case w.Chosen(peer_id, address, link):
                if link is not None:
                    rate, rtt = link.bytes_per_s, link.rtt_s
                    log.info("way=%s peer=%s rate=%.0f rtt=%.6f", address, peer_id, rate, rtt)
                    self._listener.linked(link)
                elif (main := self._links.get(peer_id)) is not None:
                    log.info("way=main peer=%s", peer_id)
                    self._listener.linked(main)

    def _close(self, peer_id: str, address: str) -> None:
        if (task := self._tasks.pop((peer_id, address), None)) is not None:
            task.cancel()
        if (aside := self._open.pop((peer_id, address), None)) is not None:
            aside.close()

    async def _measure(self, peer_id: str, address: str) -> None:
        at = (peer_id, address)
        told: w.Event = w.Failed(*at)
        try:
            aside = self._open.get(at) or self._dialled(peer_id, address)
            told = w.Found(*at, *await aside.measure(self._timing, self._listener.busy))
            if at not in self._tasks and at in self._open and self._group is not None:
                self._tasks[at] = self._group.create_task(self._watch(aside, *at))
        except Busy:
            told = w.PutOff(*at)
        except (PeerError, TimeoutError, OSError) as error:
            log.debug("x way peer=%s address=%s because=%s", *at, error or "no answer in time")
        finally:  # also where its connection was closed meanwhile, which cancels this
            self._ended(told)

    def _dialled(self, peer_id: str, address: str) -> Aside:
        if (key := self._key_of(peer_id)) is None:
            raise PeerError("it is a member no longer")
        if self._context is None:
            self._context = sockets.Context()
        aside = Aside(self._context, self._keys, key, address)
        self._open[peer_id, address] = aside
        return aside

    async def _watch(self, aside: Aside, peer_id: str, address: str) -> None:
        why = await aside.broken()
        log.info("way=lost peer=%s address=%s because=%s", peer_id, address, why)
        self._ended(w.Failed(peer_id, address))

    def _ended(self, told: Any) -> None:
        """A measurement ended, or a way that was open broke; who goes by it is told last."""
        before = self._ways.chosen(told.peer_id)
        self._feed(told)
        if isinstance(told, w.Failed) and before == told.address and before:
            self.lost(told.peer_id, str(addresses.read(before)[0]))
