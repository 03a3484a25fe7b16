"""The port of the HTTP endpoint: an address that may be listened on, and patience where it is held.

Linux and macOS give outgoing connections a port from a range that 42552 lies in. A connection of
any program over loopback can so be given it: it keeps everybody from listening there while it
lives, and for some time after its end, while TCP waits for what may still be on its way. A client
that asks for an agent that does not listen yet can even reach itself, with the port at both ends
(measured on Linux 6.18: one attempt in some ten thousand does, and the port is held for 60 s more).
Such a holder goes by itself, so it is waited for. A program that listens there mostly stays.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import socket
import struct
from dataclasses import dataclass
from typing import Literal

from peer.errors import ConfigError

log = logging.getLogger("halka.api")

AGAIN_S = 0.25  # between attempts to have a port that is taken
KNOCK_S = 1.0  # for an agent to say that it is one
PAGE_BYTES_MAX = 1 << 16  # of an agent's first page: it has a few hundred
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: a connection that is closed so holds no port after it

Holder = Literal["halka", "program", "connection"]


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds that a taken port is waited for. Together with what an agent needs to start, less
    than the 90 s that its service is given for it."""

    program_s: float = 5.0  # somebody listens there, who may be about to end
    connection_s: float = 65.0  # nobody does: > the 60 s of Linux (macOS: 30 s) after its end


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on a loopback address (port 0: chosen by the system).

    Raises: ConfigError, when the address is taken, is not ours or is not a loopback one.
    """
    address = _loopback(host, port)
    try:
        return _open(address, port)
    except OSError as error:
        raise _refusal(error, address, port) from None


async def take(
    host: str, port: int, stop: asyncio.Event, patience: Patience | None = None
) -> socket.socket | None:
    """The same; a port that is taken is waited for, except where another agent has it.

    None: `stop` was set meanwhile. Raises ConfigError.
    """
    address, patience = _loopback(host, port), patience or Patience()
    clock = asyncio.get_running_loop().time
    began, told = clock(), ""
    while not stop.is_set():
        try:
            return _open(address, port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise _refusal(error, address, port) from None
            holder = await _holder(address, port)
            waits_s = patience.connection_s if holder == "connection" else patience.program_s
            if holder == "halka" or clock() - began >= waits_s:
                raise _refusal(error, address, port) from None
        if told != holder:
            told = holder
            log.warning("http=waiting port=%d because=a %s has it for_s=%g", port, holder, waits_s)
        try:
            async with asyncio.timeout(AGAIN_S):
                await stop.wait()
        except TimeoutError:
            continue
    return None


def _loopback(host: str, port: int) -> str:
    """The address of a host. Raises ConfigError."""
    address = "127.0.0.1" if host == "localhost" else host
    try:
        loopback = ipaddress.ip_address(address).is_loopback
    except ValueError:
        raise ConfigError(
            f"HALKA_HTTP={host}:{port}: `{host}` is not an address; use 127.0.0.1:{port}"
        ) from None
    if not loopback:
        raise ConfigError(
            f"HALKA_HTTP={host}:{port}: HTTP has no key yet, so it listens on this machine only; "
            f"use 127.0.0.1:{port}"
        )
    return address


def _open(address: str, port: int) -> socket.socket:
    """Listens at once: a port that is only bound could still be had by another. Raises OSError."""
    listening = socket.socket(_family(address))
    try:
        # An agent that is started again finds its port, whatever is left of its old connections.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.setblocking(False)
        listening.bind((address, port))
        listening.listen(128)
    except OSError:
        listening.close()
        raise
    return listening


async def _holder(address: str, port: int) -> Holder:
    """What has a port that is taken: an agent, another program that listens, or a connection."""
    loop = asyncio.get_running_loop()
    page = b""
    with socket.socket(_family(address)) as knocking:
        knocking.setblocking(False)
        knocking.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        try:
            async with asyncio.timeout(KNOCK_S):
                await loop.sock_connect(knocking, (address, port))
                if knocking.getsockname() == knocking.getpeername():
                    return "connection"  # it was free a moment ago, and this one reached itself
                await loop.sock_sendall(knocking, b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n")
                while len(page) < PAGE_BYTES_MAX and (more := await loop.sock_recv(knocking, 4096)):
                    page += more
        except ConnectionRefusedError:
            return "connection"
        except OSError:  # also TimeoutError: it says nothing, or not what an agent says
            pass
    return "halka" if b'"name":"halka"' in page else "program"


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _refusal(error: OSError, address: str, port: int) -> ConfigError:
    """What people read where the port cannot be had."""
    if error.errno == errno.EADDRINUSE:
        return ConfigError(
            f"port {port} is taken by another program. Give halka another one: "
            f"HALKA_HTTP={address}:{port + 1 if port < 65535 else port - 1}"
        )
    return ConfigError(f"HALKA_HTTP={address}:{port}: cannot listen there: {error.strerror}")
