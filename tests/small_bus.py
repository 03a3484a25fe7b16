"""A system bus with logind on it, small enough for a test: no program but Python is needed.

Speaks D-Bus over a unix socket with dbus-fast's own messages: authentication, Hello, AddMatch, and
of logind Inhibit and its signals. Delivers a signal only where a match was added, as a bus does.
"""

from __future__ import annotations

import asyncio
import io
import os
import socket
import struct
from pathlib import Path
from typing import Any

from dbus_fast import Message, MessageType
from dbus_fast._private.unmarshaller import Unmarshaller

BUS, LOGIND, MANAGER = (
    "org.freedesktop.DBus",
    "org.freedesktop.login1",
    "org.freedesktop.login1.Manager",
)


class SmallBus:
    """One bus for one client at a time.

    asked: bodies of Inhibit. refusal: the error name of the next answers to it. logind: its unique
    name; "" while it does not run.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "bus"
        self.address = f"unix:path={self.path}"
        self.asked: list[list[str]] = []
        self.refusal, self.logind = "", ":1.7"
        self.clients = 0  # ever
        self._rules: list[str] = []
        self._held: list[socket.socket] = []  # our ends of what was given out
        self._client: socket.socket | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._serial = 100

    async def __aenter__(self) -> SmallBus:
        await self.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.stop()
        for end in self._held:
            end.close()

    async def start(self) -> None:
        """Listen (again)."""
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen()
        self._listener.setblocking(False)
        self._tasks = [asyncio.create_task(self._accept(), name="small bus")]

    async def stop(self) -> None:
        """End, with every connection."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._listener.close()
        if self._client:
            self._client.close()
            self._client = None
        self.path.unlink(missing_ok=True)

    @property
    def watched(self) -> bool:
        """Whether somebody is told of sleep."""
        return any("PrepareForSleep" in rule for rule in self._rules)

    def delays(self) -> int:
        """How many of the descriptors that were given out are still open."""
        still = []
        for end in self._held:
            try:
                gone = end.recv(1) == b""
            except BlockingIOError:
                gone = False
            if gone:
                end.close()
            else:
                still.append(end)
        self._held = still
        return len(still)

    async def prepare(self, soon: bool, sender: str = "") -> None:
        """PrepareForSleep, from logind or from somebody who is not."""
        await self.signal(sender or self.logind, MANAGER, "PrepareForSleep", "b", [soon])

    async def owned(self, by: str) -> None:
        """logind ended ("") or began again."""
        before, self.logind = self.logind, by
        await self.signal(BUS, BUS, "NameOwnerChanged", "sss", [LOGIND, before, by])

    async def signal(
        self, sender: str, interface: str, member: str, signature: str, body: list[Any]
    ) -> None:
        """To the client, where it asked for such."""
        if self._client and any(f"member='{member}'" in rule for rule in self._rules):
            path = "/org/freedesktop/DBus" if interface == BUS else "/org/freedesktop/login1"
            message = Message(
                path=path, interface=interface, member=member, sender=sender, body=body,
                signature=signature, message_type=MessageType.SIGNAL, serial=self._next(),
            )  # fmt: skip
            await self._loop.sock_sendall(self._client, _bytes(message))

    @property
    def _loop(self) -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    def _next(self) -> int:
        self._serial += 1
        return self._serial

    async def _accept(self) -> None:
        while True:
            client, _ = await self._loop.sock_accept(self._listener)
            client.setblocking(False)
            self.clients, self._client, self._rules = self.clients + 1, client, []
            try:
                await self._serve(client)
            except (ConnectionError, EOFError):
                self._rules = []
            finally:
                client.close()
                self._client = None

    async def _serve(self, client: socket.socket) -> None:
        await self._authenticate(client)
        while True:
            head = await self._exactly(client, 16)
            (body_bytes,) = struct.unpack_from("<I", head, 4)
            (fields_bytes,) = struct.unpack_from("<I", head, 12)
            rest = await self._exactly(client, (fields_bytes + 7) // 8 * 8 + body_bytes)
            message = Unmarshaller(io.BytesIO(head + rest)).unmarshall()
            assert message is not None
            await self._answer(client, message)

    async def _authenticate(self, client: socket.socket) -> None:
        line = b""
        while not line.endswith(b"BEGIN\r\n"):
            line += await self._exactly(client, 1)
            if line.endswith(b"\r\n") and b"AUTH" in line:
                await self._loop.sock_sendall(client, b"OK 0123456789abcdef0123456789abcdef\r\n")
                line = b""
            elif line == b"NEGOTIATE_UNIX_FD\r\n":
                await self._loop.sock_sendall(client, b"AGREE_UNIX_FD\r\n")
                line = b""

    async def _exactly(self, client: socket.socket, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = await self._loop.sock_recv(client, count - len(data))
            if not more:
                raise EOFError
            data += more
        return data

    async def _answer(self, client: socket.socket, message: Message) -> None:
        given: list[int] = []
        match message.member:
            case "Hello":
                reply = Message.new_method_return(message, "s", [":1.1"])
            case "AddMatch":
                self._rules.append(message.body[0])
                reply = Message.new_method_return(message)
            case "Inhibit" if not self.logind:
                unknown = "org.freedesktop.DBus.Error.ServiceUnknown"
                reply = Message.new_error(message, unknown, "no such name")
            case "Inhibit" if self.refusal:
                self.asked.append(message.body)
                reply = Message.new_error(message, self.refusal, "not for you")
            case "Inhibit":
                self.asked.append(message.body)
                ours, theirs = socket.socketpair()
                ours.setblocking(False)
                self._held.append(ours)
                given = [theirs.detach()]
                reply = Message.new_method_return(message, "h", [0], given)
            case _:
                unknown = "org.freedesktop.DBus.Error.UnknownMethod"
                reply = Message.new_error(message, unknown, "unknown")
        reply.sender = self.logind if message.destination == LOGIND else BUS
        reply.serial = self._next()
        socket.send_fds(client, [_bytes(reply)], given)
        for descriptor in given:
            os.close(descriptor)


def _bytes(message: Message) -> bytes:
    """The message with its sender, which clients never write and a bus always adds (field 7)."""
    data = bytes(message._marshall(True))
    (fields_bytes,) = struct.unpack_from("<I", data, 12)
    fields, body = data[16 : 16 + fields_bytes], data[(16 + fields_bytes + 7) // 8 * 8 :]
    name = (message.sender or "").encode()
    fields += bytes(-len(fields) % 8) + b"\x07\x01s\x00" + struct.pack("<I", len(name)) + name
    fields += b"\x00"
    head = data[:12] + struct.pack("<I", len(fields))
    return head + fields + bytes(-len(fields) % 8) + body
