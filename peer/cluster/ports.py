"""A port that is free for TCP (links) and UDP (the key door) alike, on all of some addresses."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence


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


def taken(error: OSError) -> str:
    """What people read where no port, or not the pinned one, can be had."""
    return (
        f"cannot listen for other peers ({error.strerror}). End the program that uses the port, or "
        "choose another one with the setting `port`"
    )
