"""Before this machine sleeps, others take over: by logind's delay of sleep, on Linux.

A delay inhibitor is a file descriptor that logind gives out (systemd's "Inhibitor Locks"): as long
as it is open, sleep waits, up to InhibitDelayMaxSec (5 s by default). PrepareForSleep(true) comes
before sleep, PrepareForSleep(false) after it. Without a bus, without logind or without the right to
ask, the machine just sleeps, and the peer is missed when it is silent. macOS needs nothing of this
here: its notice of sleep reaches no daemon that has no run loop, and peers notice the silence.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from dbus_fast import Message
    from dbus_fast.aio import MessageBus

log = logging.getLogger("halka.sleep")

LOGIND, PATH, MANAGER = (
    "org.freedesktop.login1",
    "/org/freedesktop/login1",
    "org.freedesktop.login1.Manager",
)
BUS = "org.freedesktop.DBus"
REQUEST = ["sleep", "halka", "hand over the model's layers", "delay"]  # what, who, why, mode
SIGNALS = (
    f"type='signal',sender='{LOGIND}',path='{PATH}',interface='{MANAGER}',member='PrepareForSleep'",
    f"type='signal',sender='{BUS}',member='NameOwnerChanged',arg0='{LOGIND}'",
)
ANSWER_S = 10.0  # for the bus or logind to answer
AGAIN_S, AGAIN_MAX_S = 2.0, 300.0  # between attempts to reach a bus that was there once
TRIES = 10  # in a row; half an hour in all


class Sleeper(Protocol):
    """Who is to be asked before sleep; `leaving.Parting` is one."""

    async def ready(self, reason: Any) -> None:
        """Returns when the machine may sleep, within a bound of its own."""
        ...

    def stay(self, reason: Any) -> None:
        """The machine is awake again."""
        ...


class Sleep:
    """Delays sleep until the sleeper is ready. bus_address: None, as the system says."""

    def __init__(self, sleeper: Sleeper, bus_address: str | None = None) -> None:
        self._sleeper, self._bus_address = sleeper, bus_address
        self._lock: int | None = None  # the file descriptor that delays sleep
        self._logind = ""  # who gave it: signals of others do not count
        self._heard: asyncio.Queue[Message | None] = asyncio.Queue()  # None: the bus is gone
        self._asleep = False  # or about to be
        self._told = False  # why sleep is not delayed

    @property
    def delays(self) -> bool:
        """Whether sleep waits for this peer."""
        return self._lock is not None

    async def run(self) -> None:
        """Until cancelled; returns where sleep cannot be delayed, which is nothing to worry about.

        A bus that goes away is looked for again, after twice as long each time, and not for ever.
        """
        if not sys.platform.startswith("linux"):
            return
        try:  # in a thread: it is a library of some size
            await asyncio.to_thread(__import__, "dbus_fast.aio")
        except ImportError as error:
            self._tell(f"{error}; pip install dbus-fast")
            return
        from dbus_fast import DBusFastError

        again_s, tries = AGAIN_S, 0
        while tries < TRIES:
            try:
                await self._follow()
            except (OSError, EOFError, DBusFastError) as error:  # a TimeoutError is an OSError
                self._tell(f"the system bus: {str(error) or type(error).__name__}")
            finally:
                worked = self.delays
                self._release()
                self._awake()
            again_s, tries = (AGAIN_S, 0) if worked else (again_s, tries)
            await asyncio.sleep(again_s)
            again_s, tries = min(2 * again_s, AGAIN_MAX_S), tries + 1

    async def _follow(self) -> None:
        """Delay sleep for as long as the bus is there. Raises OSError, EOFError, DBusFastError."""
        self._heard = asyncio.Queue()
        async with self._connected() as bus:
            for rule in SIGNALS:
                await self._call(bus, BUS, "/org/freedesktop/DBus", BUS, "AddMatch", "s", [rule])
            await self._delay(bus)
            while (message := await self._heard.get()) is not None:
                await self._take(bus, message)

    async def _take(self, bus: MessageBus, message: Message) -> None:
        """A signal. logind's own only: any program may send one."""
        body = message.body
        if message.member == "NameOwnerChanged" and message.sender == BUS:
            # Another logind knows nothing of what the one before gave out; none keeps nobody awake.
            self._release()
            self._awake()
            self._logind = ""
            if body and body[-1]:
                await self._delay(bus)
        elif message.member == "PrepareForSleep" and message.sender == self._logind != "":
            if body == [True]:
                self._asleep = True
                log.info("sleep=soon")
                await self._sleeper.ready("sleep")
                self._release()
            elif body == [False]:
                log.info("sleep=over")
                self._awake()
                await self._delay(bus)

    async def _delay(self, bus: MessageBus) -> None:
        """Ask logind for the descriptor that delays sleep, unless it is here."""
        if self._lock is not None:
            return
        reply = await self._call(bus, LOGIND, PATH, MANAGER, "Inhibit", "ssss", REQUEST)
        found = [*reply.unix_fds]
        if reply.error_name or not found or reply.body != [0]:
            for descriptor in found:
                os.close(descriptor)
            self._tell(f"logind: {reply.error_name or 'it gave no descriptor'} {reply.body[:1]}")
            return
        self._lock, *others = found
        for descriptor in others:
            os.close(descriptor)
        self._logind, self._told = reply.sender or "", False
        log.info("sleep=delayed until others have taken over")

    async def _call(
        self,
        bus: MessageBus,
        to: str,
        path: str,
        interface: str,
        member: str,
        signature: str,
        body: list[str],
    ) -> Message:
        """The reply, which may be an error."""
        from dbus_fast import Message

        message = Message(to, path, interface, member, signature=signature, body=body)
        async with asyncio.timeout(ANSWER_S):
            return await bus.call(message)

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[MessageBus]:
        """The system bus; what it says is put into `_heard`, and None once it is gone."""
        from dbus_fast import BusType, MessageType
        from dbus_fast.aio import MessageBus

        def hear(message: Message) -> None:
            if message.message_type is MessageType.SIGNAL:
                self._heard.put_nowait(message)

        bus: Any = MessageBus(self._bus_address, BusType.SYSTEM, negotiate_unix_fd=True)
        async with asyncio.timeout(ANSWER_S):
            await bus.connect()
        gone = asyncio.ensure_future(bus.wait_for_disconnect())
        gone.add_done_callback(lambda _: self._heard.put_nowait(None))
        bus.add_message_handler(hear)
        try:
            yield bus
        finally:
            bus.disconnect()
            await asyncio.wait({gone}, timeout=1.0)
            if not gone.cancel() and not gone.cancelled():
                gone.exception()  # how it went away: it was not needed any more, or is looked for

    def _release(self) -> None:
        """Delay sleep no longer."""
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)

    def _awake(self) -> None:
        """Nobody says (any more) that the machine is about to sleep."""
        if self._asleep:
            self._asleep = False
            self._sleeper.stay("sleep")

    def _tell(self, why: str) -> None:
        """Once, until sleep is delayed again: most containers have neither bus nor logind."""
        log.log(logging.DEBUG if self._told else logging.INFO, "sleep=not delayed because=%s", why)
        self._told = True
