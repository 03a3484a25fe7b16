"""Time, machines, and the wires between their processes, for a whole home in one heap.

A wire is what TCP and ZeroMQ make of a connection: first in, first out, reliable until it breaks.
What is sent into a cut cable waits and is sent again; after `SILENCE_S` of it both ends give up.
A process that ends has its connections closed by its system, unless the machine lost its power:
then nobody is told. What was on its way when an end gave up is lost.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

from tests.simulated.house import Broken

SILENCE_S = 15.0  # as ring.sockets.HEARTBEAT_TIMEOUT_MS; membership notices long before
SHAKE_S = 3.0  # a handshake that is not answered
AGAIN_MIN_S, AGAIN_MAX_S = 0.05, 1.0  # between attempts of a socket to connect again
STORY_LINES = 120
BEGIN = 1000.0


@dataclass(eq=False)
class Machine:
    """A computer: it has power or not, a disk that outlives its processes, and one agent."""

    name: str
    powered: bool = False
    stored_term: int = 0
    runs: int = 0  # how often its agent was started
    parts: set[str] = field(default_factory=set)  # of the model, on its disk
    processes: dict[Process, None] = field(default_factory=dict)
    ghosts: list[Wire] = field(default_factory=list)  # its ends went with its power
    agent: Any = None

    @property
    def short(self) -> str:
        """For the story."""
        return self.name[0]


@dataclass(eq=False)
class Process(ABC):
    """Something that runs on a machine and speaks over wires."""

    home: Any
    machine: Machine
    alive: bool = True
    stopped: bool = False  # it does not run, and what comes waits
    woke: float = -math.inf  # when it went on, after it did not run
    backlog: deque[tuple[Any, ...]] = field(default_factory=deque)
    wires: dict[Wire, None] = field(default_factory=dict)
    links: dict[Wire, Dialled] = field(default_factory=dict)  # those that it dialled as a client

    @abstractmethod
    def hear(self, wire: Wire, body: Any) -> None:
        """Something came."""

    @abstractmethod
    def broke(self, wire: Wire) -> None:
        """The wire is over."""

    def do(self, call: Callable[..., None], *arguments: Any) -> None:
        """Now, or when this process runs again; never, where it has ended."""
        if self.stopped:
            self.backlog.append((call, arguments))
        elif self.alive:
            call(*arguments)

    def stop(self) -> None:
        """As SIGSTOP, or sleep."""
        self.stopped = True

    def go_on(self) -> None:
        """Run again: what waited comes now."""
        self.stopped, self.woke = False, self.home.now
        while self.backlog and self.alive and not self.stopped:
            call, arguments = self.backlog.popleft()
            call(*arguments)


class Wire:
    """A connection. Ends: 0 dialled, 1 listened; each is open until it learns otherwise."""

    __slots__ = ("cut_at", "ends", "fin", "held", "last", "over")

    def __init__(self, dialler: Process, listener: Process) -> None:
        self.ends = (dialler, listener)
        self.over = [False, False]
        self.last = [0.0, 0.0]  # when the last packet to this end arrives
        self.held: tuple[deque[Any], deque[Any]] = (deque(), deque())  # for a cut that mends
        self.fin = [False, False]  # the same for the end of the connection
        self.cut_at: float | None = None
        dialler.wires[self] = listener.wires[self] = None


class World:
    """A clock, machines, and packets. `blocked`: (from, to), names of machines."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.now = BEGIN
        self.heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.order = itertools.count()
        self.machines: dict[str, Machine] = {}
        self.blocked: set[tuple[str, str]] = set()
        self.ports: dict[int, Process] = {}
        self.delay_max_s = 0.01
        self.spike = 0.0  # the share of packets that TCP had to send twice
        self.story: deque[tuple[Any, ...]] = deque(maxlen=STORY_LINES)
        self.counts: defaultdict[str, int] = defaultdict(int)

    # Time -----------------------------------------------------------------------------------------

    def at(self, wait_s: float, call: Callable[..., Any], *arguments: Any) -> None:
        """Call in so many seconds."""
        heapq.heappush(self.heap, (self.now + wait_s, next(self.order), call, arguments))

    def play(self, seconds: float) -> None:
        """Let time pass."""
        until, heap = self.now + seconds, self.heap
        while heap and heap[0][0] <= until:
            self.now, _, call, arguments = heapq.heappop(heap)
            call(*arguments)
        self.now = until

    def tell(self, *words: Any) -> None:
        """A line of the story."""
        self.story.append((f"{self.now - BEGIN:8.3f}", *words))

    def fail(self, why: str) -> NoReturn:
        """Something that must hold does not."""
        lines = "\n".join(" ".join(str(word) for word in line) for line in self.story)
        raise Broken(f"seed {self.seed}: {why}\nlast events:\n{lines}\nseed {self.seed}: {why}")

    def delay(self) -> float:
        """Of one packet."""
        random_ = self.rng.random
        delay_s = 0.001 + random_() * self.delay_max_s
        if self.spike and random_() < self.spike:
            delay_s += 0.2 + random_() * 0.4
        return delay_s

    # Cables ---------------------------------------------------------------------------------------

    def hears(self, source: Process, target: Process) -> bool:
        """Whether a packet would arrive."""
        return (
            target.machine.powered
            and (source.machine.name, target.machine.name) not in self.blocked
        )

    def block(self, *pairs: tuple[str, str]) -> None:
        """Cut these directions."""
        self.blocked.update(pairs)
        for source, target in pairs:
            for process in self.machines[source].processes:
                for wire in process.wires:
                    if target in (wire.ends[0].machine.name, wire.ends[1].machine.name):
                        self.cut(wire)

    def cut(self, wire: Wire) -> None:
        """From now on at least one end hears nothing."""
        if wire.cut_at is None:
            wire.cut_at = self.now
            self.at(SILENCE_S, self.silent, wire, self.now)

    def silent(self, wire: Wire, since: float) -> None:
        """Heartbeats were missing for too long."""
        if wire.cut_at == since:
            for end in (0, 1):
                wire.ends[end].do(self.learn, wire, end)

    def unblock(self, *pairs: tuple[str, str]) -> None:
        """Mend these directions; what waited is sent again, after TCP's patience."""
        for pair in pairs:
            self.blocked.discard(pair)
        for source, target in pairs:
            for process in self.machines[source].processes:
                for wire in list(process.wires):
                    if target in (wire.ends[0].machine.name, wire.ends[1].machine.name):
                        self.at(self.rng.random() * 0.8, self.flush, wire)

    def flush(self, wire: Wire) -> None:
        """Send again what a cut held back."""
        one, other = wire.ends
        if self.hears(one, other) and self.hears(other, one):
            wire.cut_at = None
        for end in (0, 1):
            if self.hears(wire.ends[1 - end], wire.ends[end]):
                while wire.held[end]:
                    self.take(wire, end, wire.held[end].popleft())
                if wire.fin[end]:
                    wire.fin[end] = False
                    self.end(wire, end)

    # Wires ----------------------------------------------------------------------------------------

    def send(self, wire: Wire, source: Process, body: Any) -> bool:
        """Whether the sender's end took it."""
        to = 1 if source is wire.ends[0] else 0
        if wire.over[1 - to]:
            return False
        at = wire.last[to] = max(self.now + self.delay(), wire.last[to])
        heapq.heappush(self.heap, (at, next(self.order), self.arrive, (wire, to, body)))
        return True

    def arrive(self, wire: Wire, to: int, body: Any) -> None:
        """At the other machine, or at the cut before it."""
        if wire.held[to] or not self.hears(wire.ends[1 - to], wire.ends[to]):
            wire.held[to].append(body)
        else:
            self.take(wire, to, body)

    def take(self, wire: Wire, to: int, body: Any) -> None:
        """By the process, where there is one."""
        target = wire.ends[to]
        if wire.over[to] or not target.alive:
            self.finish(wire, 1 - to)  # reset
        elif target.stopped:
            target.backlog.append((self.take, (wire, to, body)))
        else:
            target.hear(wire, body)

    def finish(self, wire: Wire, end: int) -> None:
        """Tell this end, after what is on its way to it, that the connection is over."""
        at = max(self.now + self.delay(), wire.last[end])
        heapq.heappush(self.heap, (at, next(self.order), self.end, (wire, end)))

    def end(self, wire: Wire, end: int) -> None:
        """The word of it has come, or waits at a cut."""
        if wire.over[end]:
            return
        if wire.held[end] or not self.hears(wire.ends[1 - end], wire.ends[end]):
            wire.fin[end] = True
        else:
            wire.ends[end].do(self.learn, wire, end)

    def learn(self, wire: Wire, end: int) -> None:
        """This end knows now."""
        if not wire.over[end]:
            self.forget(wire, end)
            wire.ends[end].broke(wire)

    def reset(self, wire: Wire) -> None:
        """Something on the way ends the connection; what was on its way may be lost."""
        for end in (0, 1):
            self.at(self.delay(), wire.ends[end].do, self.learn, wire, end)

    def forget(self, wire: Wire, end: int) -> None:
        """No more through this end."""
        wire.over[end] = True
        wire.ends[end].wires.pop(wire, None)

    def close(self, wire: Wire, source: Process) -> None:
        """The process closes its end."""
        end = 0 if source is wire.ends[0] else 1
        if not wire.over[end]:
            self.forget(wire, end)
            self.finish(wire, 1 - end)

    def over(self, process: Process, *, powered: bool = True) -> None:
        """The process has ended; its system closes its connections if it still can."""
        if not process.alive:
            return
        process.alive = process.stopped = False
        process.backlog.clear()
        process.machine.processes.pop(process, None)
        for wire in list(process.wires):
            end = 0 if process is wire.ends[0] else 1
            self.forget(wire, end)
            if powered:
                self.finish(wire, 1 - end)
            else:
                wire.held[1 - end].clear()
                self.cut(wire)
                process.machine.ghosts.append(wire)

    def power_up(self, machine: Machine) -> None:
        """Whoever still speaks to its last run is told that it knows nothing of it."""
        machine.powered = True
        for wire in machine.ghosts:
            for end in (0, 1):
                self.at(self.rng.random() * SHAKE_S, self.finish, wire, end)
        machine.ghosts.clear()


class Dialled:
    """A client's socket: it connects again by itself, and keeps what is sent meanwhile.

    up, down: called when the link is there, and when it broke after it was there.
    """

    def __init__(
        self,
        owner: Process,
        port: int,
        up: Callable[[Dialled], None],
        down: Callable[[Dialled], None],
    ) -> None:
        self.owner, self.port, self.up, self.down = owner, port, up, down
        self.wire: Wire | None = None
        self.queue: deque[Any] = deque()
        self.closed = False
        self.again_s = AGAIN_MIN_S
        self.dial()

    def dial(self) -> None:
        """Begin a handshake: two ways, then the listener's leave."""
        home = self.owner.home
        home.at(home.delay() + home.delay(), self.shake)

    def shake(self) -> None:
        """See what became of it."""
        owner, home = self.owner, self.owner.home
        if self.closed or not owner.alive:
            return
        target = home.ports[self.port]
        if owner.stopped or target.stopped:
            wait_s = 0.5
        elif not (home.hears(owner, target) and home.hears(target, owner)):
            wait_s = SHAKE_S
        elif not target.alive:
            wait_s = self.again_s
            self.again_s = min(2 * self.again_s, AGAIN_MAX_S)
        elif not target.admits(owner):
            wait_s = 0.3
        else:
            self.wire, self.again_s = Wire(owner, target), AGAIN_MIN_S
            owner.links[self.wire] = self
            self.up(self)
            while self.queue and self.wire:
                home.send(self.wire, owner, self.queue.popleft())
            return
        home.at(wait_s, self.dial)

    def send(self, body: Any) -> None:
        """Now, or once it is linked (again)."""
        if self.wire is None or not self.owner.home.send(self.wire, self.owner, body):
            self.queue.append(body)

    def broke(self) -> None:
        """The wire is over."""
        self.wire = None
        self.down(self)
        if not self.closed:
            self.dial()

    def close(self) -> None:
        """For good."""
        self.closed = True
        if self.wire:
            self.owner.home.close(self.wire, self.owner)
            self.owner.links.pop(self.wire, None)
            self.wire = None
