"""Links between agents: one ROUTER that others dial, one DEALER for each peer that we dialled.

CURVE on every socket. Who a message is from is what the link's key proves (ZAP's User-Id), never
what the message says. A link works both ways whoever dialled it, and however many connections
there are to one peer they are one link: it is up while any of them is. What is malformed,
oversized, early or from nobody is dropped, counted and said in the log, not too often.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from peer.cluster import addresses, intake, links, sockets
from peer.cluster.complaints import Complaints
from peer.cluster.identity import peer_id_of
from peer.cluster.intake import Intake
from peer.cluster.links import Event, Linked, NotReached, Path, Received, Turned, Unlinked
from peer.errors import ProtocolError
from peer.protocol import (
    MESSAGE_BYTES_MAX,
    PROTOCOL,
    Control,
    Goodbye,
    Hello,
    Message,
    Probe,
    Refused,
    Welcome,
    encode,
)

log = logging.getLogger("halka.cluster")

INCOMING_MAX = 2  # connections from one peer that are kept; an older one was replaced
FAREWELL_S = 0.1  # for a goodbye to leave; a peer that takes longer misses it and hears silence


class Transport:
    """All links of one agent. `start`, then `run` in a task; calls are from the loop's thread.

    tell: takes every Event. introduce: our Hello of now. judge: None, or why a peer that said hello
    must not come in.
    """

    def __init__(
        self,
        public: str,
        secret: str,
        *,
        tell: Callable[[Event], None],
        introduce: Callable[[], Hello],
        judge: Callable[[Hello | Welcome, str], Refused | None],
        complaints: Complaints,
        protocol: int = PROTOCOL,
    ) -> None:
        self._protocol = protocol
        self._public, self._secret = public, secret
        self._listener, self._introduce, self._judge = tell, introduce, judge
        self._leaving = False
        self._complaints, self._intake = complaints, Intake(complaints)
        self._context = zmq.asyncio.Context()
        self._router: Any = None
        self._bound: dict[str, str] = {}  # host → endpoint
        self._links: dict[str, list[Path]] = {}  # up, best first
        self._dials: dict[str, Path] = {}  # by peer id, also those not yet up
        self._incoming: dict[bytes, Path] = {}
        self._strangers: dict[int, str] = {}  # fd → host, until the connection proves itself
        self._tasks: asyncio.TaskGroup | None = None
        self.port = 0
        self.running = asyncio.Event()  # dials are possible
        self.problem = ""  # why the last dial could not even begin, for people

    # Life -----------------------------------------------------------------------------------------

    def start(self, hosts: Sequence[str], port: int) -> None:
        """Listen on these addresses, all on one port (0: the system chooses). Raises OSError."""
        self._zap = self._context.socket(zmq.REP)
        self._zap.bind("inproc://zeromq.zap.01")  # before any socket that it guards
        self._router = sockets.router(self._context, self._secret)
        self._monitor = self._router.get_monitor_socket(zmq.Event.ACCEPTED | zmq.Event.DISCONNECTED)
        for host in hosts:
            self._bind(host, self.port or port)

    def listen(self, hosts: Sequence[str]) -> list[str]:
        """Follow the machine's addresses. Returns what could not be bound, as sentences."""
        problems = []
        for host in set(self._bound) - set(hosts):
            with contextlib.suppress(zmq.ZMQError):
                self._router.unbind(self._bound[host])
            del self._bound[host]
        for host in hosts:
            if host not in self._bound:
                try:
                    self._bind(host, self.port)
                except OSError as error:
                    problems.append(f"cannot listen on {host} port {self.port}: {error.strerror}")
        return problems

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where others can dial this peer."""
        return tuple(addresses.write(host, self.port) for host in self._bound)

    async def run(self) -> None:
        """Serve all links until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                self.running.set()
                tasks.create_task(sockets.answer_zap(self._zap, self._public))
                tasks.create_task(self._read_router())
                tasks.create_task(self._watch_router())
        finally:
            self._tasks = None
            self._context.destroy(linger=0)

    async def farewell(self, why: str) -> None:
        """Say goodbye on every link and give it a moment to leave. Nothing is told any more."""
        for peer_id in list(self._links):
            self.send(peer_id, Goodbye(why=why))
        self._leaving = True
        await asyncio.sleep(FAREWELL_S)  # libzmq's own thread sends meanwhile

    def close(self) -> None:
        """Free the sockets where `run` was never reached."""
        self._context.destroy(linger=0)

    # Links ----------------------------------------------------------------------------------------

    def dial(self, peer_id: str, key: str, address: str) -> None:
        """Connect and say hello. Ends in Linked or NotReached, unless taken back."""
        assert self._tasks is not None, "dial after `running`"
        if self._leaving:
            return
        self.give_up(peer_id)
        try:
            pair = sockets.dealer(self._context, (self._public, self._secret), key)
        except OSError as error:
            self.problem = sockets.no_more(error)
            return self._tell(NotReached(peer_id, self.problem))
        self.problem = ""
        host, _ = addresses.read(address)
        path = Path(peer_id, key, str(host), pair[0], dialled=address)
        self._dials[peer_id] = path
        path.task = self._tasks.create_task(self._run_dial(path, pair[1]))

    def give_up(self, peer_id: str) -> None:
        """Close the dialled connection if it is not up yet."""
        if (path := self._dials.get(peer_id)) is not None and not path.up:
            self._forget(path)

    def hang_up(self, peer_id: str) -> None:
        """Close every connection with the peer; nothing is told."""
        for path in [*self._links.pop(peer_id, ()), self._dials.get(peer_id)]:
            if path is not None:
                self._end(path)

    def send(self, peer_id: str, message: Message) -> bool:
        """Hand a message to the link. False: there is none, or its queue is full.

        Raises: ProtocolError where no peer would accept it.
        """
        data = encode(message)
        if len(data) > MESSAGE_BYTES_MAX:
            raise ProtocolError(f"a message of {len(data)} bytes is more than peers accept")
        return any(self._send(path, data) for path in tuple(self._links.get(peer_id, ())))

    def hosts_of(self, peer_id: str) -> tuple[str, ...]:
        """The hosts by which the peer is reached now, best first."""
        return tuple(path.host for path in self._links.get(peer_id, ()))

    def _tell(self, event: Event) -> None:
        if not self._leaving:
            self._listener(event)

    # Inside ---------------------------------------------------------------------------------------

    def _bind(self, host: str, port: int) -> None:
        self._bound[host], self.port = sockets.bind(self._router, host, port)

    def _send(self, path: Path, data: bytes) -> bool:
        frames = [data] if path.dialled else [path.routing_id, data]
        try:
            error = path.socket.send_multipart(frames, flags=zmq.DONTWAIT).exception()
        except zmq.ZMQError as closed:
            error = closed
        if error is not None and not isinstance(error, zmq.Again):
            self._drop(path, "its connection is gone")
        return error is None

    def _up(self, path: Path, hello: Hello | Welcome) -> None:
        """The connection agreed: it is (part of) the link from now on."""
        paths = self._links.setdefault(path.peer_id, [])
        if any(other.incarnation > hello.incarnation for other in paths):
            self._end(path)  # an earlier run's hello, overtaken by its successor's
            return
        path.up, path.incarnation = True, hello.incarnation
        for other in [p for p in paths if p.incarnation != path.incarnation]:
            paths.remove(other)  # of a run of that peer that is over
            self._end(other)
        paths.append(path)
        paths.sort(key=lambda p: not p.dialled)  # ours first: we see it break at once
        theirs = [p for p in paths if not p.dialled]
        for other in theirs[:-INCOMING_MAX]:
            paths.remove(other)
            self._end(other)
        log.debug("= link peer=%s host=%s dialled=%s", path.peer_id, path.host, bool(path.dialled))
        self._tell(Linked(path.peer_id, path.key, hello, path.host, path.dialled))

    def _drop(self, path: Path, why: str, *, refused: bool = False, closed: bool = False) -> None:
        """A connection is over; tell what that means."""
        current = path is self._dials.get(path.peer_id) or path in self._links.get(path.peer_id, ())
        self._forget(path)
        paths = self._links.get(path.peer_id, [])
        if path in paths:
            paths.remove(path)
            if not paths:
                del self._links[path.peer_id]
            self._tell(links.Narrowed(path.peer_id) if paths else Unlinked(path.peer_id, why))
        elif current:
            self._tell(NotReached(path.peer_id, why, refused, closed))

    def _forget(self, path: Path) -> None:
        if path.dialled:
            if self._dials.get(path.peer_id) is path:
                del self._dials[path.peer_id]
            if path.task is not None:
                path.task.cancel()
        else:
            self._incoming.pop(path.routing_id, None)

    def _end(self, path: Path) -> None:
        self._forget(path)
        self._say_over(path)

    def _say_over(self, path: Path) -> None:
        """Tell whoever dialled that its connection is no link (any more). It closes it then.

        A ROUTER cannot close one connection, and a goodbye would end the peer's other ones too.
        """
        if not path.dialled:
            over = Refused(code="identity", why="this link is over", protocol=self._protocol)
            self.send_to(path.routing_id, over)

    # Dialled connections --------------------------------------------------------------------------

    async def _run_dial(self, path: Path, monitor: Any) -> None:
        assert self._tasks is not None
        reader = self._tasks.create_task(self._read_dealer(path))
        try:
            path.socket.connect(path.dialled)
            began = intake.now()
            why = await self._watch_dial(path, monitor)
            quick = intake.now() - began < sockets.QUICK_S
            closed = quick and not path.up and await sockets.closed(path.dialled)
            self._drop(path, why, closed=closed)
        except zmq.ZMQError as error:  # connect: no such interface, no more sockets
            self._drop(path, str(error))
        finally:
            reader.cancel()
            if not path.socket.closed:
                path.socket.disable_monitor()
                path.socket.close()
            monitor.close(0)

    async def _watch_dial(self, path: Path, monitor: Any) -> str:
        """Say hello when the connection stands; return why it ended."""
        while True:
            told = parse_monitor_message(await monitor.recv_multipart())
            event = zmq.Event(told["event"])
            if event == zmq.Event.HANDSHAKE_SUCCEEDED:
                path.socket.send(encode(self._introduce()), flags=zmq.DONTWAIT).exception()
            elif event in sockets.ENDED:
                return sockets.ENDED[event]

    async def _read_dealer(self, path: Path) -> None:
        who = f"{path.peer_id}@{path.host}"
        while True:
            frames = await path.socket.recv_multipart(copy=False)
            began = intake.now()
            message = self._intake.read(frames, who, agreed=path.up)
            if message is None:
                pass
            elif path.up:
                self._take(path, message)
            elif isinstance(message, Welcome):
                self._welcomed(path, message)
            elif isinstance(message, Refused):
                self._tell(Turned(path.peer_id, path.host, message, by_us=False))
                self._drop(path, message.why, refused=True)
            else:
                self._complaints.note(who, "message before welcome")
            await self._intake.rest(began)

    def _welcomed(self, path: Path, welcome: Welcome) -> None:
        if (refusal := self._judge(welcome, path.key)) is None:
            return self._up(path, welcome)
        self._tell(Turned(path.peer_id, path.host, refusal, by_us=True))
        self._drop(path, refusal.why, refused=True)

    # Connections of those who dialled us ----------------------------------------------------------

    async def _read_router(self) -> None:
        while True:
            frames = await self._router.recv_multipart(copy=False)
            began = intake.now()
            origin = sockets.origin_of(frames[-1])
            if origin is None:
                self._complaints.note("somebody", "message without a key")
            else:
                self._strangers.pop(origin.fd, None)
                self._sort(origin, frames[0].bytes, frames[1:])
            await self._intake.rest(began)

    def _sort(self, origin: sockets.Origin, routing_id: bytes, frames: Sequence[Any]) -> None:
        peer_id = peer_id_of(origin.key)
        who = f"{peer_id}@{origin.host}"
        path = self._incoming.get(routing_id)
        if path is not None and path.key != origin.key:
            return self._complaints.note(who, "message on another peer's link")
        message = self._intake.read(frames, who, agreed=path is not None or peer_id in self._links)
        if message is None or self._leaving:
            return
        here = Path(peer_id, origin.key, origin.host, self._router, "", routing_id, origin.fd)
        if isinstance(message, Hello):
            self._greet(here, message)
        elif path is not None:
            self._take(path, message)
        elif isinstance(message, Probe) and peer_id in self._links:
            self._tell(links.Beside(routing_id, message.request))
        else:
            # It may take for a link what we forgot. Told so, it dials again.
            self._say_over(here)
            self._complaints.note(who, "message before hello")

    def _greet(self, path: Path, hello: Hello) -> None:
        refusal = self._judge(hello, path.key)
        if refusal is not None:
            self.send_to(path.routing_id, refusal)
            self._tell(Turned(path.peer_id, path.host, refusal, by_us=True))
            return
        mine = self._introduce()
        welcome = Welcome(**{name: getattr(mine, name) for name in Welcome.__struct_fields__})
        if not self.send_to(path.routing_id, welcome):
            return
        known = self._incoming.get(path.routing_id)
        if known and known.incarnation == hello.incarnation:
            return  # said twice
        self._incoming[path.routing_id] = path
        self._up(path, hello)

    async def _watch_router(self) -> None:
        while True:
            event = parse_monitor_message(await self._monitor.recv_multipart())
            fd = int(event["value"])
            if event["event"] == zmq.Event.ACCEPTED:
                self._strangers[fd] = sockets.remote_host(fd)
                continue
            if (host := self._strangers.pop(fd, None)) is not None:
                self._complaints.note(host, "connection that spoke no halka")
            for path in [p for p in self._incoming.values() if p.fd == fd]:
                await self._probe(path)

    async def _probe(self, path: Path) -> None:
        """Whether the connection is really gone: its number may be another's already.

        The ROUTER knows a moment after the monitor tells: it refuses what is sent there. The hello
        that it is tried with says nothing new, and who gets it after all drops it.
        """
        for wait_s in (0.0, 0.02, 0.2):
            await asyncio.sleep(wait_s)
            if path.routing_id not in self._incoming:
                return
            if not self.send_to(path.routing_id, self._introduce()):
                self._drop(path, "the connection broke")
                return

    def send_to(self, routing_id: bytes, message: Message) -> bool:
        """To a connection of one who dialled us: whether it took it."""
        sent = self._router.send_multipart([routing_id, encode(message)], flags=zmq.DONTWAIT)
        error = sent.exception()
        return error is None or isinstance(error, zmq.Again)

    # Both -----------------------------------------------------------------------------------------

    def _take(self, path: Path, message: Control) -> None:
        if isinstance(message, Refused):
            self._drop(path, "the peer ended the link")
        if isinstance(message, Hello | Welcome | Refused):
            return  # said twice, or a probe
        self._tell(Received(path.peer_id, message))
