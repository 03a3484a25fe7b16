"""The cluster as the daemon sees it: runs membership and election over sockets and the clock.

Everything that happens becomes an event for one of the two machines, and what they answer is done
here, in order; nothing is decided here. All calls are from the event loop's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol, overload

from peer import VERSION
from peer.cluster import admission, interfaces, transport
from peer.cluster import election as e
from peer.cluster import membership as m
from peer.cluster.asks import Asks
from peer.cluster.complaints import Complaints
from peer.cluster.discovery import Discovery
from peer.cluster.identity import Identity, peer_id_of
from peer.cluster.mdns import Announced, cluster_mark
from peer.cluster.ports import free_port
from peer.config import Config
from peer.errors import ConfigError
from peer.planning.profile import PEERS_MAX
from peer.protocol import (
    PROTOCOL,
    ChunkHere,
    ChunkWanted,
    Control,
    Goodbye,
    Gossip,
    Heartbeat,
    Hello,
    ManifestHere,
    ManifestWanted,
    Message,
    NotHere,
    Refused,
    Sighted,
    Welcome,
)

log = logging.getLogger("halka.cluster")

LOOK_AGAIN_S = 15.0  # at the interfaces; more often has hung Macs, and nobody roams faster
REFUSED_MAX = 32  # kept for status
START_TRIES = 10  # to find a port that is free for TCP and UDP


class Listener(Protocol):
    """Who is told. Called from the loop; must not block, and what it raises ends the agent."""

    def joined(self, peer_id: str) -> None:
        """The peer is a member now."""
        ...

    def lost(self, peer_id: str, why: str) -> None:
        """The peer is a member no longer."""
        ...

    def elected(self, coordinator: str, term: int) -> None:
        """From now on this peer coordinates; "" while nobody does. Also when it claimed anew."""
        ...

    def received(self, peer_id: str, message: Control) -> None:
        """A message that is not the cluster's own business."""
        ...


@dataclass(frozen=True, slots=True)
class Member:
    """A peer in the cluster. since: by `Cluster.clock`."""

    peer_id: str
    name: str
    addresses: tuple[str, ...]
    version: str
    incarnation: int
    since: float


@dataclass(frozen=True, slots=True)
class Turned:
    """A refusal, for status. by_us: we refused it; else it refused us. at: by `Cluster.clock`."""

    peer_id: str
    host: str
    code: str
    why: str
    by_us: bool
    at: float


def clock() -> float:
    """Seconds that never jump and go on while the machine sleeps."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.clock_gettime(time.CLOCK_MONOTONIC)  # on macOS this one counts sleep


class Cluster:
    """This peer among the others. `start`, then `run` in the caller's TaskGroup, then `close`."""

    def __init__(
        self,
        config: Config,
        identity: Identity,
        listener: Listener,
        *,
        version: str = VERSION,
        protocol: int = PROTOCOL,
    ) -> None:
        self.me = identity.peer_id
        self.name = socket.gethostname()[:128] or self.me
        self.clock = clock
        self._config, self._identity, self._listener = config, identity, listener
        self._version, self._protocol = version, protocol
        self._make_machines()
        self._inbox: deque[m.Event | e.Event] = deque()
        self._draining = False
        self._timer: asyncio.TimerHandle | None = None
        self._due = asyncio.Event()
        self._stop, self._ended = asyncio.Event(), asyncio.Event()
        self._goodbye, self._running = "", False
        self._members: dict[str, Member] = {}
        self._links: dict[str, transport.Linked] = {}
        self._refused: dict[tuple[str, str, bool], Turned] = {}
        self._remembered: dict[str, Sighted] = {}
        self._remember = asyncio.Event()
        self._disk = asyncio.Lock()
        self._store_problem = ""
        self._hosts: tuple[str, ...] = ()
        self._tasks: asyncio.TaskGroup | None = None
        self._transport: transport.Transport | None = None
        self.complaints = Complaints(clock)
        self._asks = Asks(self.send)
        self.discovery = Discovery(
            config, me=self._record, seen=self._seen, other_cluster=self._foreign, clock=clock
        )

    # What others ask ------------------------------------------------------------------------------

    @property
    def term(self) -> int:
        """Of the coordinator's claim, or of the last one."""
        return self._election.term

    @property
    def coordinator(self) -> str:
        """Peer id of who coordinates, "" while nobody does."""
        return self._election.coordinator

    @property
    def followers(self) -> frozenset[str]:
        """Members that follow this peer's claim."""
        return self._election.followers

    @property
    def members(self) -> Mapping[str, Member]:
        """The others in the cluster, by peer id."""
        return MappingProxyType(self._members)

    @property
    def refused(self) -> tuple[Turned, ...]:
        """Peers that were refused, or refused us, the latest last."""
        return tuple(self._refused.values())

    @property
    def problem(self) -> str:
        """What is wrong with discovery or storage, for people; "" where nothing is."""
        return "; ".join(text for text in (self.discovery.problem, self._store_problem) if text)

    @property
    def port(self) -> int:
        """Of the control transport."""
        return self._transport.port if self._transport is not None else 0

    @property
    def hosts(self) -> tuple[str, ...]:
        """This peer's addresses on home networks (or on loopback where there is none)."""
        return self._hosts

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where others can dial this peer."""
        return self._transport.addresses if self._transport is not None else ()

    def address_of(self, peer_id: str) -> str | None:
        """The host by which the peer is reached now; None where there is no link."""
        return self._transport.host_of(peer_id) if self._transport is not None else None

    def key_of(self, peer_id: str) -> str | None:
        """The CURVE public key that a member proved (Z85), or this peer's own."""
        if peer_id == self.me:
            return self._identity.public
        link = self._links.get(peer_id)
        return link.key if link is not None else None

    def send(self, peer_id: str, message: Message) -> bool:
        """Hand a message to the link with a member. False: no link, or its queue is full."""
        assert peer_id != self.me, "a peer does not send messages to itself"
        if self._transport is None or peer_id not in self._members:
            return False
        return self._transport.send(peer_id, message)

    def broadcast(self, message: Message) -> None:
        """Send to every member that can be reached."""
        for peer_id in tuple(self._members):
            self.send(peer_id, message)

    @overload
    async def ask(
        self, peer_id: str, message: ManifestWanted, timeout_s: float
    ) -> ManifestHere: ...
    @overload
    async def ask(self, peer_id: str, message: ChunkWanted, timeout_s: float) -> ChunkHere: ...
    async def ask(
        self, peer_id: str, message: ManifestWanted | ChunkWanted, timeout_s: float
    ) -> ManifestHere | ChunkHere:
        """Ask a member; the request's number is set here.

        Raises: PeerLost, PartError (it does not have it), ProtocolError (a wrong answer).
        """
        return await self._asks.ask(peer_id, message, timeout_s)

    # Life -----------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Listen. Raises ConfigError where the pinned port is taken."""
        await self._look_at_interfaces()
        for left in reversed(range(START_TRIES)):
            try:
                port = self._config.port or free_port(self._hosts)
                self._transport = self._new_transport()
                self._transport.start(self._hosts, port)
                break
            except OSError as error:
                if self._transport is not None:
                    self._transport.close()
                    self._transport = None
                if self._config.port or not left:
                    raise ConfigError(
                        f"cannot listen for other peers ({error.strerror}). End the program that "
                        "uses the port, or choose another one with the setting `port`"
                    ) from None
        await self.discovery.follow(self._hosts, self.port)
        log.info(
            "peer=%s name=%s cluster=%s listening=%s",
            self.me, self.name, self._config.cluster, ",".join(self.addresses),
        )  # fmt: skip
        log.info("admission=open because=%s", admission.NOTICE)

    async def run(self) -> None:
        """Take part until `close` or cancellation."""
        if self._stop.is_set():
            return
        self._running = True
        try:
            if self._transport is None:
                await self.start()
            assert self._transport is not None
            remembered = await asyncio.to_thread(self._identity.remembered)
            self._remembered = {sighted.peer_id: sighted for sighted in reversed(remembered)}
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                jobs = [
                    tasks.create_task(job)
                    for job in (
                        self._transport.run(), self.discovery.run(), self._tick(),
                        self._watch_interfaces(), self._write_memory(),
                    )
                ]  # fmt: skip
                await self._transport.running.wait()
                self._make_machines()  # listening for a coordinator begins here
                for sighted in remembered:
                    self._seen(sighted)
                self._feed(m.Tick(), e.Tick())
                await self._stop.wait()
                await self._transport.farewell(self._goodbye)
                for job in jobs:
                    job.cancel()
        finally:
            self._tasks = None
            if self._timer is not None:
                self._timer.cancel()
            for peer_id in tuple(self._members):
                self._asks.lost(peer_id, "this peer is ending")
            self._free()
            self._ended.set()

    async def close(self, why: str) -> None:
        """Say goodbye, so that others need not wait for silence, and end `run`."""
        self._goodbye = why
        self._stop.set()
        if self._running:
            await self._ended.wait()
        self._free()

    def _make_machines(self) -> None:
        now, timing = clock(), self._config.timing
        self._membership = m.Membership(self.me, timing, now)
        self._election = e.Election(self.me, timing, now, term=self._identity.term)

    def _free(self) -> None:
        self.discovery.close()
        if self._transport is not None:
            self._transport.close()

    # Events to machines, actions to sockets -------------------------------------------------------

    def _feed(self, *events: m.Event | e.Event) -> None:
        self._inbox.extend(events)
        if self._draining:
            return
        self._draining = True
        try:
            while self._inbox:
                self._step(self._inbox.popleft())
        finally:
            self._draining = False
        self._arm()

    def _step(self, event: m.Event | e.Event) -> None:
        actions: list[m.Action] | list[e.Action]
        if isinstance(event, e.Event):
            actions = self._election.step(event, clock())
        else:
            actions = self._membership.step(event, clock())
        for action in actions:
            self._perform(action)

    def _perform(self, action: m.Action | e.Action) -> None:
        assert self._transport is not None
        match action:
            case m.Dial(peer_id, key, address):
                self._transport.dial(peer_id, key, address)
            case m.HangUp(peer_id):
                self._transport.hang_up(peer_id)
            case m.GiveUp(peer_id):
                self._transport.give_up(peer_id)
            case m.Joined(peer_id):
                self._joined(peer_id)
            case m.Lost(peer_id, why):
                self._lost(peer_id, why)
            case m.SendBeats() | e.Publish():
                self.broadcast(self._beat())
            case e.StoreTerm(term):
                if self._tasks is not None:
                    self._tasks.create_task(self._store(term))
            case e.Elected(coordinator, term):
                role = "coordinator" if coordinator == self.me else "member"
                log.info("role=%s coordinator=%s term=%d", role, coordinator or "none", term)
                self._listener.elected(coordinator, term)

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        at = min(self._membership.deadline, self._election.deadline)
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(max(0.0, at - clock()), self._due.set)

    async def _tick(self) -> None:
        while True:
            await self._due.wait()
            self._due.clear()
            self._feed(m.Tick(), e.Tick())

    def _beat(self) -> Heartbeat:
        claim = self._election.claim
        return Heartbeat(claim.term, claim.coordinator, claim.followed)

    def _joined(self, peer_id: str) -> None:
        link = self._links[peer_id]
        hello = link.hello
        self._members[peer_id] = Member(
            peer_id, hello.name, hello.addresses, hello.version, hello.incarnation, clock()
        )
        for key in [k for k in self._refused if k[0] == peer_id]:
            del self._refused[key]
        log.info(
            "joined=%s name=%s host=%s peers=%d",
            peer_id, hello.name, link.host, len(self._members) + 1,
        )  # fmt: skip
        self._remembered.pop(peer_id, None)
        self._remembered[peer_id] = self._sighted(peer_id)  # the latest last
        self._remember.set()
        self._inbox.append(e.PeerUp(peer_id))
        self._listener.joined(peer_id)
        self._gossip()

    def _lost(self, peer_id: str, why: str) -> None:
        member = self._members.pop(peer_id)
        log.info(
            "lost=%s name=%s peers=%d because=%s",
            peer_id, member.name, len(self._members) + 1, why,
        )  # fmt: skip
        self._asks.lost(peer_id, why)
        self._inbox.append(e.PeerDown(peer_id))
        self._listener.lost(peer_id, why)

    async def _store(self, term: int) -> None:
        try:
            async with self._disk:
                await asyncio.to_thread(self._identity.store_term, term)
        except OSError as error:
            self._store_problem = (
                f"the term cannot be stored in {self._identity.home} ({error.strerror}), so this "
                "peer claims nothing; free disk space or make the folder writable"
            )
            log.error("store=failed because=%s", self._store_problem)
            self._feed(e.StoreFailed(term))
        else:
            self._store_problem = ""
            self._feed(e.Stored(term))

    # From the transport ---------------------------------------------------------------------------

    def _new_transport(self) -> transport.Transport:
        return transport.Transport(
            self._identity.public,
            self._identity.secret,
            tell=self._told,
            introduce=self._hello,
            judge=self._judge,
            complaints=self.complaints,
            protocol=self._protocol,
        )

    def _told(self, event: transport.Event) -> None:
        match event:
            case transport.Linked(peer_id, key, hello, _, dialled):
                self._links[peer_id] = event
                places = self.discovery.usable(Sighted(peer_id, key, hello.addresses)).addresses
                self._feed(m.LinkUp(peer_id, key, hello.incarnation, places, dialled))
                self.send(peer_id, self._beat())  # it need not wait to hear whom I follow
            case transport.Unlinked(peer_id, why):
                self._feed(m.LinkDown(peer_id, why))
            case transport.NotReached(peer_id, why, refused):
                log.debug("x dial peer=%s because=%s", peer_id, why)
                self._feed(m.DialFailed(peer_id, refused))
            case transport.Turned(peer_id, host, refusal, by_us):
                self._turned(peer_id, host, refusal.code, refusal.why, by_us=by_us)
            case transport.Received(peer_id, message):
                self._feed(m.Heard(peer_id))
                self._received(peer_id, message)

    def _received(self, peer_id: str, message: Control) -> None:
        if peer_id not in self._members:
            return
        match message:
            case Heartbeat(term, coordinator, followed):
                self._feed(e.Beat(peer_id, term, coordinator, followed))
            case Gossip(peers):
                for sighted in peers:
                    self._seen(self.discovery.usable(sighted))
            case Goodbye(why):
                self._feed(m.Left(peer_id, why))
            case ManifestHere() | ChunkHere() | NotHere():
                if not self._asks.answer(peer_id, message):
                    log.debug("< late answer peer=%s", peer_id)
            case _:
                self._listener.received(peer_id, message)

    def _hello(self) -> Hello:
        return Hello(
            protocol=self._protocol,
            cluster=self._config.cluster,
            peer_id=self.me,
            name=self.name,
            incarnation=self._identity.incarnation,
            addresses=self.addresses[:32],
            version=self._version,
            term=self.term,
        )

    def _judge(self, hello: Hello | Welcome, key: str) -> Refused | None:
        refusal = admission.admit(hello, key, self._config, self._protocol)
        if refusal is None and not self._membership.has_room(hello.peer_id):
            why = f"the cluster is full: it has {PEERS_MAX} peers"
            return Refused(code="admission", why=why, protocol=self._protocol)
        return refusal

    def _turned(self, peer_id: str, host: str, code: str, why: str, *, by_us: bool) -> None:
        known = self._refused.pop((peer_id, code, by_us), None)
        if known is None or known.why != why:
            log.warning(
                "refused=%s peer=%s host=%s code=%s because=%s",
                "by_us" if by_us else "by_them", peer_id, host, code, why,
            )  # fmt: skip
        if len(self._refused) >= REFUSED_MAX:
            del self._refused[next(iter(self._refused))]
        self._refused[peer_id, code, by_us] = Turned(peer_id, host, code, why, by_us, clock())

    # Sightings ------------------------------------------------------------------------------------

    def _seen(self, sighted: Sighted) -> None:
        try:
            genuine = peer_id_of(sighted.key) == sighted.peer_id
        except ValueError:
            genuine = False
        if genuine and sighted.peer_id != self.me:
            self._feed(m.Seen(sighted.peer_id, sighted.key, sighted.addresses))

    def _foreign(self, record: Announced) -> None:
        host = record.addresses[0] if record.addresses else "unknown"
        why = f"it is announced for another cluster than {self._config.cluster!r}"
        self._turned(record.peer_id, host, "cluster", why, by_us=True)

    def _record(self) -> Announced:
        mark = cluster_mark(self._config.cluster)
        return Announced(self._protocol, self.me, self._identity.public, mark, self.addresses)

    def _sighted(self, peer_id: str) -> Sighted:
        places = self._membership.addresses_of(peer_id)
        return Sighted(peer_id, self._links[peer_id].key, places)

    def _gossip(self) -> None:
        known = [Sighted(self.me, self._identity.public, self.addresses[:32])]
        known += [self._sighted(peer_id) for peer_id in self._members]
        self.broadcast(Gossip(tuple(known[:PEERS_MAX])))

    async def _watch_interfaces(self) -> None:
        while True:
            await asyncio.sleep(LOOK_AGAIN_S)
            if await self._look_at_interfaces() and self._transport is not None:
                for problem in self._transport.listen(self._hosts):
                    log.warning("listening=partly because=%s", problem)
                await self.discovery.follow(self._hosts, self.port)
                log.info("interfaces=changed listening=%s", ",".join(self.addresses))
            self._gossip()

    async def _look_at_interfaces(self) -> bool:
        """Whether the addresses to use have changed."""
        wanted = self._config.interfaces
        found = interfaces.choose(await asyncio.to_thread(interfaces.survey), wanted)
        self.discovery.no_interface = interfaces.missing(found, wanted)
        before, self._hosts = self._hosts, found or ("127.0.0.1",)
        return self._hosts != before

    async def _write_memory(self) -> None:
        while True:
            await self._remember.wait()
            await asyncio.sleep(0.5)  # several join at once
            self._remember.clear()
            latest = tuple(reversed(self._remembered.values()))[:PEERS_MAX]
            self._remembered = {s.peer_id: s for s in reversed(latest)}
            with contextlib.suppress(OSError):  # only hints; the term's store tells of a full disk
                async with self._disk:
                    await asyncio.to_thread(self._identity.remember, latest)
