"""A port that is free for TCP (links) and UDP (the key door) alike, on all of some addresses."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Sequence

from peer.cluster.transport import Transport
from peer.errors import ConfigError

START_TRIES = 10  # to find a port that is free for TCP and UDP


def free_port(hosts: Sequence[str]) -> int:
    """A port of the system's choice. It may be taken a moment later: try again then.

    Raises: OSError where the system's choice is taken on another address or for UDP.
    """
    port = 0
    with contextlib.ExitStack() as held:
        for host in hosts:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                probe = held.enter_context(socket.socket(family, kind))
                probe.bind((host, port))
                port = int(probe.getsockname()[1])
    return port


def listening(make: Callable[[], Transport], hosts: Sequence[str], pinned: int) -> Transport:
    """A transport that listens on these addresses. pinned: the setting `port`, 0: any port.

    Raises: ConfigError where the pinned port, or any, cannot be had.
    """
    for left in reversed(range(START_TRIES)):
        transport: Transport | None = None
        try:
            port = pinned or free_port(hosts)
            transport = make()
            transport.start(hosts, port)
            return transport
        except OSError as error:
            if transport is not None:
                transport.close()
            if pinned or not left:
                raise ConfigError(taken(error)) from None
    raise AssertionError("the last try returns or raises")


def taken(error: OSError) -> str:
    """What people read where no port, or not the pinned one, can be had."""
    return (
        f"cannot listen for other peers ({error.strerror}). End the program that uses the port, or "
        "choose another one with the setting `port`"
    )
