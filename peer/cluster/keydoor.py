"""The key door: tells whoever asks which peer listens on a port, and with which public key.

A static peer is host:port without a key, and CURVE needs the key before it dials. So each agent
answers one UDP datagram on the port number of its control transport. The answer is no longer than
the query (nothing to amplify), repeats the query's random number (nobody who did not see the query
can forge it), and holds only what mDNS announces anyway. Like a sighting it is a hint, not a proof.
This format never changes: peers of different protocol versions must be able to refuse each other.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from peer.cluster.identity import peer_id_of

ASK, TELL = b"halka key?", b"halka key!"
NONCE_BYTES = 16
QUERY_BYTES = 96
ANSWER = struct.Struct(f">10s{NONCE_BYTES}sH16s40s")
ANSWERS_A_SECOND = 200  # beyond it nobody is answered; askers ask again

Address = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Answer:
    """Who listens there, by its own account."""

    protocol: int
    peer_id: str
    key: str


class _Door(asyncio.DatagramProtocol):
    def __init__(self, answer: Answer, clock: Callable[[], float]) -> None:
        self._answer, self._clock = answer, clock
        self._second, self._answered = 0, 0
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: Address) -> None:
        if len(data) != QUERY_BYTES or not data.startswith(ASK) or self._transport is None:
            return
        if int(self._clock()) != self._second:
            self._second, self._answered = int(self._clock()), 0
        self._answered += 1
        if self._answered <= ANSWERS_A_SECOND:
            mine, nonce = self._answer, data[len(ASK) : len(ASK) + NONCE_BYTES]
            told = (mine.protocol, mine.peer_id.encode(), mine.key.encode())
            self._transport.sendto(ANSWER.pack(TELL, nonce, *told), addr)


class _Question(asyncio.DatagramProtocol):
    def __init__(self, nonce: bytes) -> None:
        self._nonce = nonce
        self.answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

    def datagram_received(self, data: bytes, addr: Address) -> None:
        if len(data) != ANSWER.size or self.answer.done():
            return
        magic, nonce, protocol, peer_id, key = ANSWER.unpack(data)
        if magic != TELL or nonce != self._nonce:
            return
        with contextlib.suppress(ValueError):  # bytes that are no key: wait for better ones
            if peer_id_of(key.decode()) == peer_id.decode():
                self.answer.set_result(Answer(protocol, peer_id.decode(), key.decode()))


async def open_door(
    host: str, port: int, answer: Answer, clock: Callable[[], float]
) -> asyncio.DatagramTransport:
    """Answer key queries on this address until the transport is closed. Raises OSError."""
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(
        lambda: _Door(answer, clock), local_addr=(host, port)
    )
    return transport


async def ask(host: str, port: int, timeout_s: float = 1.0) -> Answer:
    """Ask who listens at a literal address. Raises OSError or TimeoutError."""
    nonce = secrets.token_bytes(NONCE_BYTES)
    loop = asyncio.get_running_loop()
    transport, question = await loop.create_datagram_endpoint(
        lambda: _Question(nonce), remote_addr=(host, port)
    )
    try:
        transport.sendto((ASK + nonce).ljust(QUERY_BYTES, b"\0"))
        return await asyncio.wait_for(question.answer, timeout_s)
    finally:
        transport.close()
