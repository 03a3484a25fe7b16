"""CURVE on every socket of the ring, and which keys a stage lets in.

A stage draws a key pair of its own for each plan; agents tell it the keys of the stage before it
and of the agents that may submit. The ZAP answers (RFC 27) are given in the stage's own loop, so
that no second thread runs beside the compute.
"""

from __future__ import annotations

from typing import Any

import zmq
from zmq.utils import z85

HEARTBEAT_MS = 1000
HEARTBEAT_TIMEOUT_MS = 2500  # a silent link is noticed within 3.5 s
HANDSHAKE_MS = (
    30_000  # a stage answers handshakes between steps; a long prefill chunk takes seconds
)


def _common(socket: zmq.Socket[Any], bytes_max: int) -> None:
    socket.linger = 0
    socket.setsockopt(zmq.MAXMSGSIZE, bytes_max)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TTL, HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.IPV6, 1)


def as_client(
    socket: zmq.Socket[Any], server_key: bytes, public: bytes, secret: bytes, bytes_max: int
) -> None:
    """Make a socket, before it connects, a CURVE client of the peer with `server_key`."""
    _common(socket, bytes_max)
    socket.curve_serverkey = server_key
    socket.curve_publickey = public
    socket.curve_secretkey = secret


def as_server(
    socket: zmq.Socket[Any], public: bytes, secret: bytes, domain: str, bytes_max: int
) -> None:
    """Make a socket, before it binds, a CURVE server whose clients `Doorkeeper` admits."""
    _common(socket, bytes_max)
    socket.curve_server = True
    socket.curve_publickey = public
    socket.curve_secretkey = secret
    socket.zap_domain = domain.encode()


class Doorkeeper:
    """Answers ZAP requests of one context. admitted: public keys (Z85) by domain."""

    def __init__(self, context: zmq.Context[Any]) -> None:
        self.socket = context.socket(zmq.ROUTER)
        self.socket.linger = 0
        self.socket.bind("inproc://zeromq.zap.01")
        self.admitted: dict[str, set[str]] = {}
        self.refused = 0

    def answer(self) -> None:
        """Answer every request that waits."""
        while True:
            try:
                parts = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._answer(parts)

    def _answer(self, parts: list[bytes]) -> None:
        # envelope, b"", version, request, domain, address, identity, mechanism, key (32 bytes)
        if len(parts) < 9 or parts[2] != b"1.0":
            return
        envelope, request = parts[:2], parts[3]
        key = z85.encode(parts[8]).decode() if len(parts[8]) == 32 else ""
        known = parts[7] == b"CURVE" and key in self.admitted.get(
            parts[4].decode("ascii", "replace"), ()
        )
        self.refused += not known
        code, text = (b"200", b"OK") if known else (b"400", b"unknown key")
        user = key.encode() if known else b""
        self.socket.send_multipart([*envelope, b"1.0", request, code, text, user, b""])

    def close(self) -> None:
        """Close the ZAP socket."""
        self.socket.close(0)
