"""CURVE on every socket of the ring, and which keys a stage lets in.

A stage draws a key pair of its own for each plan; agents tell it the keys of the stage before it
and of the agents that may submit. The ZAP answers (RFC 27) are given in the stage's own loop, so
that no second thread runs beside the compute.
"""

from __future__ import annotations

import socket as net
from collections import deque
from collections.abc import Iterable
from typing import Any

import zmq
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

HEARTBEAT_MS = 3000
ENVELOPE_BYTES = 256  # what CURVE (RFC 26) and the framing add to a message part, and some
RECONNECT_MS = 50
RECONNECT_MAX_MS = 1000
# Frees the sockets of peers that vanished, and no more: whatever is on its way is lost with a link.
# Who is silent is for membership to notice, long before; a process that slept for less goes on.
HEARTBEAT_TIMEOUT_MS = 15000
LINK_S = 30.0  # for a link to come up at all; the stage at its other end may be told of it later
BROKEN_S = 3.0  # from a broken link to giving up; who died is known better by then, and said
HANDSHAKE_MS = 3000
WAITING_MAX = 64  # handshakes whose key is not known; older ones run into their deadline


def _common(socket: zmq.Socket[Any], bytes_max: int) -> None:
    socket.linger = 0
    socket.setsockopt(zmq.MAXMSGSIZE, bytes_max + ENVELOPE_BYTES)
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
    socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
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


def bind(socket: zmq.Socket[Any], interface: str) -> int:
    """Listen on a port that the system chooses, which is returned."""
    try:
        return socket.bind_to_random_port(f"tcp://{interface}")
    except zmq.ZMQError:  # no IPv6 here
        socket.setsockopt(zmq.IPV6, 0)
        return socket.bind_to_random_port(f"tcp://{interface}")


def free_port(interface: str) -> int:
    """A TCP port that nobody listens on now, for a library that takes nothing else. Whoever else is
    given it until then makes that library fail, which says so."""
    family = net.AF_INET6 if ":" in interface else net.AF_INET
    with net.socket(family, net.SOCK_STREAM) as probe:
        probe.bind(("" if interface == "*" else interface.strip("[]"), 0))
        return int(probe.getsockname()[1])


class Watch:
    """Tells whether a client's link broke after it had been up: what was on its way may be lost.

    Made before the socket connects. `socket` is to be polled; `up`: the link is there now.
    """

    def __init__(self, client: zmq.Socket[Any]) -> None:
        self.socket = client.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        )
        self._client, self.up = client, False

    def broke(self) -> bool:
        """Look at every event that has come."""
        broke = False
        while self.socket.poll(0):
            event = recv_monitor_message(self.socket)["event"]
            broke = broke or (self.up and event == zmq.EVENT_DISCONNECTED)
            self.up = event == zmq.EVENT_HANDSHAKE_SUCCEEDED
        return broke

    def close(self) -> None:
        """Before the client is closed."""
        self._client.disable_monitor()
        self.socket.close(0)


class Doorkeeper:
    """Answers ZAP requests of one context.

    A key that is not admitted waits rather than being refused: it may be told of a moment after the
    peer that holds it dials, and libzmq never tries again after a refusal. The handshake's own
    deadline ends those that wait in vain.
    """

    def __init__(self, context: zmq.Context[Any]) -> None:
        self.socket = context.socket(zmq.ROUTER)
        self.socket.linger = 0
        self.socket.bind("inproc://zeromq.zap.01")
        self._admitted: dict[str, frozenset[str]] = {}
        self._waiting: deque[list[bytes]] = deque(maxlen=WAITING_MAX)

    def admit(self, domain: str, keys: Iterable[str]) -> None:
        """From now on exactly these public keys (Z85) may connect to sockets of the domain."""
        self._admitted[domain] = frozenset(keys)
        for parts in [self._waiting.popleft() for _ in range(len(self._waiting))]:
            self._judge(parts)

    def answer(self) -> None:
        """Look at every request that has come."""
        while True:
            try:
                self._judge(self.socket.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                return

    def _judge(self, parts: list[bytes]) -> None:
        # envelope, b"", version, request, domain, address, identity, mechanism, key (32 bytes)
        if len(parts) < 9 or parts[2] != b"1.0" or parts[7] != b"CURVE" or len(parts[8]) != 32:
            return
        key = z85.encode(parts[8])
        if key.decode() in self._admitted.get(parts[4].decode("ascii", "replace"), ()):
            self.socket.send_multipart([*parts[:3], parts[3], b"200", b"OK", key, b""])
        else:
            self._waiting.append(parts)

    def close(self) -> None:
        """Close the ZAP socket."""
        self.socket.close(0)
