"""The cluster as the daemon sees it: runs membership and election over sockets and the clock.

Everything that happens becomes an event for one of the two machines, and what they answer is done
here, in order; nothing is decided here. All calls are from the event loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from types import MappingProxyType

from peer import VERSION
from peer.cluster import admission, interfaces, links, refusals
from peer.cluster import election as e
from peer.cluster import membership as m
from peer.cluster.addresses import on_host
from peer.cluster.asks import Asks
from peer.cluster.complaints import Complaints
from peer.cluster.discovery import Discovery
from peer.cluster.identity import Identity
from peer.cluster.listener import Listener, Member, clock
from peer.cluster.machines import Action, Machines
from peer.cluster.mdns import Announced, cluster_mark
from peer.cluster.memory import Memory
from peer.cluster.ports import listening
from peer.cluster.probing_shell import Prober
from peer.cluster.refusals import Refusal, Refusals
from peer.cluster.transport import Transport
from peer.cluster.ways_shell import Wayfinder
from peer.config import Config
from peer.errors import ProtocolError
from peer.planning.profile import PEERS_MAX
from peer.protocol import (
    PROTOCOL,
    Control,
    Gossip,
    Heartbeat,
    Hello,
    Message,
    Opinion,
    Refused,
    Sighted,
    Suspect,
    Welcome,
)

log = logging.getLogger("halka.cluster")

LOOK_AGAIN_S = 15.0  # at the interfaces; more often has hung Macs, and nobody roams faster


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
        self.name = interfaces.host_name() or self.me
        self.clock = clock
        self._config, self._identity, self._listener = config, identity, listener
        self._version, self._protocol = version, protocol
        self._machines = Machines(self.me, config.timing, identity.term, self._perform)
        self._stop, self._ended = asyncio.Event(), asyncio.Event()
        self._goodbye, self._not_listening, self._running = "", "", False
        self._members: dict[str, Member] = {}
        self._links: dict[str, links.Linked] = {}
        self._refusals, self._memory = Refusals(), Memory(identity, self._kept)
        self._hosts = interfaces.Hosts(config.interfaces)
        self._transport: Transport | None = None
        self.complaints = Complaints(clock)
        self._asks = Asks(self.send)
        self.ask = self._asks.ask  # a numbered question to a member; see there
        self.ways = Wayfinder(config.timing, identity, listener, self.key_of)
        self._prober = Prober(config.timing, self.me, self.ways, self.send, self.address_of)
        self.ways.measures_link = lambda: self._prober.measures
        self._takers = self._asks, self._machines, self._prober
        self.discovery = Discovery(
            config, me=self._record, seen=self._seen, other_cluster=self._foreign, clock=clock
        )

    # What others ask ------------------------------------------------------------------------------

    @property
    def term(self) -> int:
        """Of the coordinator's claim, or of the last one."""
        return self._machines.election.term

    @property
    def coordinator(self) -> str:
        """Peer id of who coordinates, "" while nobody does."""
        return self._machines.election.coordinator

    @property
    def followers(self) -> frozenset[str]:
        """Members that follow this peer's claim."""
        return self._machines.election.followers

    @property
    def members(self) -> Mapping[str, Member]:
        """The others in the cluster, by peer id."""
        return MappingProxyType(self._members)

    @property
    def refused(self) -> tuple[Refusal, ...]:
        """Peers that were refused, or refused us, the latest last."""
        return self._refusals.all()

    @property
    def problem(self) -> str:
        """What is wrong with discovery or storage, for people; "" where nothing is."""
        dials = self._transport.problem if self._transport is not None else ""
        crowded = refusals.CROWDED if self._machines.membership.crowded else ""
        told = (self._hosts.problem, self._not_listening, self.discovery.problem, dials, crowded)
        return "; ".join(text for text in (*told, self._memory.problem) if text)

    @property
    def port(self) -> int:
        """Of the control transport."""
        return self._transport.port if self._transport is not None else 0

    @property
    def hosts(self) -> tuple[str, ...]:
        """This peer's addresses on home networks (or on loopback where there is none)."""
        return self._hosts.used

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where others can dial this peer."""
        return self._transport.addresses if self._transport is not None else ()

    def address_of(self, peer_id: str) -> str | None:
        """The host of a member, also where its link broke a moment ago; None: it is no member."""
        hosts = self._transport.hosts_of(peer_id) if self._transport is not None else ()
        last = self._links[peer_id].host if peer_id in self._members else None
        return hosts[0] if hosts else last

    def key_of(self, peer_id: str) -> str | None:
        """The CURVE public key that a member proved (Z85), or this peer's own."""
        if peer_id == self.me:
            return self._identity.public
        link = self._links.get(peer_id)
        return link.key if link is not None else None

    def send(self, peer_id: str, message: Message) -> bool:
        """Hand a message to the link with a member.

        False: there is no link, its queue is full, or no peer would accept the message (logged).
        """
        assert peer_id != self.me, "a peer does not send messages to itself"
        if self._transport is None or peer_id not in self._members:
            return False
        try:
            return self._transport.send(peer_id, message)
        except ProtocolError as error:
            self.complaints.note(self.me, "own message that cannot be sent", str(error))
            return False

    def broadcast(self, message: Message) -> None:
        """Send to every member that can be reached."""
        for peer_id in tuple(self._members):
            self.send(peer_id, message)

    # Life -----------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Listen. Raises ConfigError where the pinned port is taken."""
        await self._hosts.look()
        self._transport = listening(self._new_transport, self.hosts, self._config.port)
        await self.discovery.follow(self.hosts, self.port)
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
            remembered = await self._memory.recall()
            async with asyncio.TaskGroup() as tasks:
                jobs = [tasks.create_task(self._transport.run())]
                await self._transport.running.wait()
                self._machines.begin(self._identity.term)  # listening begins here
                others = (self._machines, self.discovery, self._memory, self._prober, self.ways)
                jobs += [tasks.create_task(other.run()) for other in others]
                jobs.append(tasks.create_task(self._watch_interfaces()))
                for sighted in remembered:
                    self._seen(sighted)
                await self._stop.wait()
                await self._transport.farewell(self._goodbye)
                for job in jobs:
                    job.cancel()
        finally:
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

    def _free(self) -> None:
        self.discovery.close()
        if self._transport is not None:
            self._transport.close()

    # Events to machines, actions to sockets -------------------------------------------------------

    def _perform(self, action: Action) -> None:
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
            case m.Lost(peer_id, why, heard_by):
                self._lost(peer_id, why, heard_by)
            case m.Ask(peer_id, others):
                for other in others:
                    self.send(other, Suspect(peer_id))
            case m.Answer(to, peer_id, heard, ago_s):
                self.send(to, Opinion(peer_id, heard, ago_s))
            case m.SendBeats() | e.Publish():
                self.broadcast(self._beat())
            case e.StoreTerm(term, lower):
                self._memory.keep_term(term, lower=lower)
            case e.Doubt(peer_id, what):
                self.complaints.note(peer_id, what)
            case e.Elected(coordinator, term):
                role = "coordinator" if coordinator == self.me else "member"
                log.info("role=%s coordinator=%s term=%d", role, coordinator or "none", term)
                self._listener.elected(coordinator, term)

    def _beat(self) -> Heartbeat:
        mine = self._machines.election.claim
        return Heartbeat(mine.term, mine.coordinator, mine.followed)

    def _joined(self, peer_id: str) -> None:
        hello = (link := self._links[peer_id]).hello
        self._members[peer_id] = Member(
            peer_id, hello.name, hello.addresses, hello.version, hello.incarnation, clock()
        )
        self._refusals.forget(peer_id)
        count = len(self._members) + 1
        log.info("joined=%s name=%s host=%s peers=%d", peer_id, hello.name, link.host, count)
        self._memory.met(self._sighted(peer_id))
        self._machines.feed(e.PeerUp(peer_id))
        self._listener.joined(peer_id)
        self._here(peer_id)
        self._gossip()

    def _lost(self, peer_id: str, why: str, heard_by: str) -> None:
        name, count = self._members.pop(peer_id).name, len(self._members) + 1
        log.info("lost=%s name=%s peers=%d because=%s", peer_id, name, count, why)
        self._asks.lost(peer_id, why)
        self._prober.gone(peer_id)
        self.ways.gone(peer_id)
        self._machines.feed(e.PeerDown(peer_id))
        self._listener.lost(peer_id, why, *([heard_by] if heard_by else []))

    def _here(self, peer_id: str) -> None:
        """It is a member, and is reached as it was or by other ways."""
        self._prober.here(peer_id)
        if self._transport is not None and (hosts := self._transport.hosts_of(peer_id)):
            self.ways.here(peer_id, hosts, self._machines.membership.addresses_of(peer_id))

    def _kept(self, term: int, stored: bool) -> None:
        self._machines.feed(e.Stored(term) if stored else e.StoreFailed(term))

    # From the transport ---------------------------------------------------------------------------

    def _new_transport(self) -> Transport:
        return Transport(
            self._identity.public,
            self._identity.secret,
            tell=self._told,
            introduce=self._hello,
            judge=self._judge,
            complaints=self.complaints,
            protocol=self._protocol,
        )

    def _told(self, event: links.Event) -> None:
        match event:
            case links.Linked(peer_id, key, hello, host, dialled):
                self._links[peer_id] = event
                places = self.discovery.usable(Sighted(peer_id, key, hello.addresses)).addresses
                at = dialled or on_host(places, host)
                self._machines.feed(m.LinkUp(peer_id, key, hello.incarnation, places, dialled, at))
                self.send(peer_id, self._beat())  # it need not wait to hear whom I follow
                if peer_id in self._members:
                    self._here(peer_id)
            case links.Unlinked(peer_id, why):
                self._machines.feed(m.LinkDown(peer_id, why))
            case links.Narrowed(peer_id) if peer_id in self._members:
                self._here(peer_id)
            case links.NotReached(peer_id, why, refused, closed):
                log.debug("x dial peer=%s because=%s", peer_id, why)
                self._machines.feed(m.DialFailed(peer_id, refused, closed))
            case links.Turned(peer_id, host, refusal, by_us):
                self._turned(peer_id, host, refusal.code, refusal.why, by_us=by_us)
            case links.Beside(routing_id, request) if self._transport:
                self._transport.send_to(routing_id, self._prober.answer(request))
            case links.Received(peer_id, message):
                self._machines.feed(m.Heard(peer_id))
                self._received(peer_id, message)

    def _received(self, peer_id: str, message: Control) -> None:
        if peer_id not in self._members:
            return
        match message:
            case Gossip(peers):
                for sighted in peers:
                    self._seen(self.discovery.usable(sighted))
            case _ if any(each.take(peer_id, message) for each in self._takers):
                return
            case _:
                self._listener.received(peer_id, message)

    def _hello(self) -> Hello:
        return Hello(
            protocol=self._protocol, cluster=self._config.cluster, peer_id=self.me, name=self.name,
            incarnation=self._identity.incarnation, addresses=self.addresses[:32],
            version=self._version, term=self.term,
        )  # fmt: skip

    def _judge(self, hello: Hello | Welcome, key: str) -> Refused | None:
        refusal = admission.admit(hello, key, self._config, self._protocol)
        if refusal is None and not self._machines.membership.has_room(hello.peer_id):
            self._machines.membership.turn_away()
            return Refused(code="admission", why=refusals.FULL, protocol=self._protocol)
        return refusal

    def _turned(self, peer_id: str, host: str, code: str, why: str, *, by_us: bool) -> None:
        self._refusals.note(Refusal(peer_id, host, code, why, by_us, clock()))

    # Sightings ------------------------------------------------------------------------------------

    def _seen(self, sighted: Sighted) -> None:
        if sighted.peer_id != self.me and admission.genuine(sighted.peer_id, sighted.key):
            self._machines.feed(m.Seen(sighted.peer_id, sighted.key, sighted.addresses))

    def _foreign(self, record: Announced) -> None:
        host = record.addresses[0] if record.addresses else "unknown"
        why = f"it is announced for another cluster than {self._config.cluster!r}"
        self._turned(record.peer_id, host, "cluster", why, by_us=True)

    def _record(self) -> Announced:
        mark = cluster_mark(self._config.cluster)
        return Announced(self._protocol, self.me, self._identity.public, mark, self.addresses)

    def _sighted(self, peer_id: str) -> Sighted:
        places = self._machines.membership.addresses_of(peer_id)
        return Sighted(peer_id, self._links[peer_id].key, places)

    def _gossip(self) -> None:
        known = [Sighted(self.me, self._identity.public, self.addresses[:32])]
        known += [self._sighted(peer_id) for peer_id in self._members]
        self.broadcast(Gossip(tuple(known[:PEERS_MAX])))

    async def _watch_interfaces(self) -> None:
        while True:
            await asyncio.sleep(LOOK_AGAIN_S)
            changed = await self._hosts.look()
            assert self._transport is not None
            if changed or self._not_listening or not self.discovery.complete:
                self._not_listening = "; ".join(self._transport.listen(self.hosts))
                await self.discovery.follow(self.hosts, self.port)
                log.info("interfaces=changed listening=%s", ",".join(self.addresses))
            for peer_id in tuple(self._members):
                self._here(peer_id)
            self._gossip()
