"""A connection with a member beside the link: by one of its addresses, to measure that way.

Nothing is said on it but probes. The member's ROUTER answers them because the connection's key is
that of a peer it is linked with; a peer of an older version says that this is no link, and its ways
are not measured. A connection that is kept is watched by libzmq's own heartbeats: a wire that went
dead is noticed in 3.5 s, whoever computes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from peer.cluster import sockets
from peer.cluster.probing_once import Once
from peer.config import Timing
from peer.errors import PeerError, ProtocolError
from peer.protocol import Probe, Probed, decode_control, encode

UNASKED_MAX = 16  # answers in one measurement; those of one that was put off come late, 4 at most


class Busy(PeerError):
    """One of the two ends computes; asked again later."""


class Aside:
    """One connection with one address of a member.

    keys: this peer's, public and secret. key: the member's, which it must prove.
    Raises: OSError where there are no more descriptors, or the address is none of a network here.
    """

    def __init__(
        self, context: sockets.Context, keys: tuple[str, str], key: str, address: str
    ) -> None:
        self._pair = sockets.dealer(context, keys, key)
        self._socket: Any = self._pair[0]
        self._number = 0
        try:
            sockets.connect(self._socket, address)
        except OSError:
            self.close()
            raise

    async def measure(self, timing: Timing, busy: Callable[[], bool]) -> tuple[float, float]:
        """Round trip in seconds, and bytes a second (0: could not be told).

        Raises: PeerError, TimeoutError where nobody answers in time; Busy where an end computes.
        """
        now = asyncio.get_running_loop().time
        once, unasked = Once("", False, now() + timing.request_s), 0
        async with asyncio.timeout(timing.dial_s) as limit:  # to be connected, and once around
            while True:
                for padding_bytes in once.wanted(now()):
                    self._number += 1
                    once.sent(self._number, padding_bytes, now())
                    await self._socket.send(encode(Probe(self._number, bytes(padding_bytes))))
                if not once.flying:
                    return once.rtt_s, once.bytes_per_s
                answer = self._read(await self._socket.recv_multipart())
                limit.reschedule(once.deadline)
                if answer.busy or busy():
                    raise Busy("an end of the way computes")
                if not once.answered(answer.request, now()):
                    unasked += 1
                    if unasked > UNASKED_MAX:
                        raise ProtocolError("it answers probes that were not asked")

    def _read(self, frames: list[bytes]) -> Probed:
        message = decode_control(frames[0]) if len(frames) == 1 else None
        if not isinstance(message, Probed):
            raise ProtocolError("it does not answer probes beside its link")
        return message

    async def broken(self) -> str:
        """Wait until the connection is over; why it is."""
        return await sockets.ended(self._pair[1])

    def close(self) -> None:
        """End it."""
        sockets.close(self._pair)
