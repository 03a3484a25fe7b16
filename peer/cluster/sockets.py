"""ZeroMQ as the cluster uses it: sockets with every limit set, who sent a frame, why a dial ended.

CURVE on every socket; ZAP (this module's `answer_zap`) turns a proved key into the frame's User-Id.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from dataclasses import dataclass
from typing import Any

import zmq
import zmq.asyncio
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from peer.cluster import addresses
from peer.cluster.admission import may_connect
from peer.protocol import MESSAGE_BYTES_MAX

DOMAIN = b"halka"  # of ZAP; must be the same on the socket and in the handler's mind
QUEUE_MESSAGES = 32  # for each link and direction: 8 MiB of chunks; more are dropped, not stored
QUICK_S = 1.0  # a dial that comes to nothing later was not refused
REFUSAL_S = 0.5  # for a refusal to arrive; longer than a bad Wi-Fi's round trip
DIAL_EVENTS = (
    zmq.Event.HANDSHAKE_SUCCEEDED
    | zmq.Event.DISCONNECTED
    | zmq.Event.CLOSED
    | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
    | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
    | zmq.Event.HANDSHAKE_FAILED_AUTH
)
ENDED = {
    zmq.Event.CLOSED: "nobody answers there",
    zmq.Event.DISCONNECTED: "the connection broke",
    zmq.Event.HANDSHAKE_FAILED_AUTH: "it does not admit this peer's key",
    zmq.Event.HANDSHAKE_FAILED_PROTOCOL: "it does not hold the key that it was announced with",
    zmq.Event.HANDSHAKE_FAILED_NO_DETAIL: "it does not hold the key that it was announced with",
}
Context = zmq.asyncio.Context


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a frame came from. key: proved, Z85. fd: this process's number of the connection."""

    key: str
    host: str
    fd: int


def router(context: Context, secret: str) -> Any:
    """The socket that others dial."""
    made = _socket(context, zmq.ROUTER)
    made.curve_server = True
    made.curve_secretkey = secret.encode()
    made.router_mandatory = True
    made.router_handover = True
    return made


def dealer(context: Context, pair: tuple[str, str], server_key: str) -> tuple[Any, Any]:
    """A socket that dials one peer, and its monitor. pair: our public and secret key.

    Raises: OSError where there are no more descriptors.
    """
    try:
        made = _socket(context, zmq.DEALER)
    except zmq.ZMQError as error:
        raise OSError(error.errno, error.strerror) from None
    made.setsockopt(zmq.ROUTING_ID, secrets.token_bytes(16))  # nobody can guess and take it
    made.setsockopt(zmq.RECONNECT_IVL, -1)  # membership decides when to dial again
    made.setsockopt(zmq.IMMEDIATE, 1)
    made.curve_serverkey = server_key.encode()
    made.curve_publickey, made.curve_secretkey = (key.encode() for key in pair)
    try:
        return made, made.get_monitor_socket(DIAL_EVENTS)
    except zmq.ZMQError as error:
        made.close()
        raise OSError(error.errno, error.strerror) from None


def connect(made: Any, address: str) -> None:
    """Dial an address. Raises OSError where that cannot even begin."""
    try:
        made.connect(address)
    except zmq.ZMQError as error:
        raise OSError(error.errno, error.strerror) from None


def close(pair: tuple[Any, Any]) -> None:
    """End a dialled connection; pair: as `dealer` gave it."""
    made, monitor = pair
    if not made.closed:
        made.disable_monitor()
        made.close(0)
    monitor.close(0)


def no_more(error: OSError) -> str:
    """What people read where a dial could not begin."""
    return (
        f"other peers cannot be dialled now ({error.strerror}). It is tried again; if it lasts, "
        "allow more open files: LimitNOFILE= in the service's unit, or ulimit -n"
    )


def bind(made: Any, host: str, port: int) -> tuple[str, int]:
    """Listen on an address; the endpoint and its port (0: the system chooses). Raises OSError."""
    made.ipv6 = ":" in host
    place = f"[{host}]" if ":" in host else host
    try:
        made.bind(f"tcp://{place}:{port or '*'}")
    except zmq.ZMQError as error:
        raise OSError(error.errno, f"{host} port {port}: {error.strerror}") from None
    endpoint = made.last_endpoint.decode().rstrip("\0")
    return endpoint, int(endpoint.rpartition(":")[2])


def origin_of(frame: Any) -> Origin | None:
    """Who sent a frame, from what libzmq proved and knows; None where it says nothing."""
    try:
        key, host, fd = frame.get("User-Id"), frame.get("Peer-Address"), frame.get("__fd")
    except zmq.ZMQError:
        return None
    return Origin(key, host.removeprefix("::ffff:"), int(fd))


def remote_host(fd: int) -> str:
    """Who is at the other end of a connection, for the log. The number may be closed already."""
    try:
        with socket.socket(fileno=os.dup(fd)) as copy:
            return str(copy.getpeername()[0])
    except OSError:
        return "somebody"


async def closed(address: str) -> bool:
    """Whether the machine there answers that nobody listens on that port.

    libzmq's monitor tells of every attempt that fails only that it failed (measured, 4.3.5: CLOSED
    without a reason, at once where the port or the network refuses, after 3 s where no machine
    answers; a failed handshake where the system of a process that ends takes a last connection).
    So it is tried once more, by hand.
    """
    ip, port = addresses.read(address)
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(REFUSAL_S):
            knocked, _ = await loop.create_connection(asyncio.Protocol, str(ip), port)
    except ConnectionRefusedError:
        return True
    except OSError:
        return False  # also TimeoutError
    knocked.abort()
    return False


async def ended(monitor: Any) -> str:
    """Wait until a dialled connection is over; why it is. monitor: as `dealer` gave it."""
    while True:
        event = zmq.Event(parse_monitor_message(await monitor.recv_multipart())["event"])
        if event in ENDED:
            return ENDED[event]


async def answer_zap(zap: Any, own_key: str) -> None:
    """Name the key of every connection; libzmq has proved it and asks whether to go on."""
    while True:
        frames = await zap.recv_multipart()
        key = ""
        if len(frames) == 7 and frames[5] == b"CURVE" and frames[2] == DOMAIN:
            key = z85.encode(frames[6]).decode()
        good = bool(key) and may_connect(key, own_key)
        status = [b"200", b"OK"] if good else [b"400", b"not admitted"]
        await zap.send_multipart([*frames[:2], *status, key.encode(), b""])


def _socket(context: Context, kind: int) -> Any:
    made = context.socket(kind)
    made.linger = 0
    made.maxmsgsize = MESSAGE_BYTES_MAX
    made.sndhwm = made.rcvhwm = QUEUE_MESSAGES
    made.zap_domain = DOMAIN
    made.handshake_ivl = 3000
    # A stopped process or a silent wire is noticed in 3.5 s at most, by libzmq's own thread.
    made.heartbeat_ivl, made.heartbeat_timeout, made.heartbeat_ttl = 1000, 2500, 2500
    made.tcp_keepalive, made.tcp_keepalive_idle = 1, 30
    made.ipv6 = True
    return made
