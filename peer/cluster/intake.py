"""Bytes from a connection become messages here, within bounds of size and of the loop's time.

libzmq collects all frames of a message before it hands over the first, and bounds the size of each
but not their number: what a stranger with a key of its own sends as one message of many frames is
held by this process until it ends. Nothing can be set about that. Here it is dropped uncopied.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from peer.cluster.complaints import Complaints
from peer.errors import ProtocolError
from peer.protocol import Control, decode_control

EARLY_BYTES_MAX = 8 << 10  # of a hello or welcome; nobody else's bytes are looked at
BUSY_S = 0.01  # of reading without a rest


class Intake:
    """Of one transport. All its readers together take at most half of the loop's time."""

    def __init__(self, complaints: Complaints) -> None:
        self._complaints = complaints
        self._rested_at = 0.0

    def read(self, frames: Sequence[Any], who: str, *, agreed: bool) -> Control | None:
        """The message, or None where it is dropped. frames: zmq.Frame, without the routing id.

        agreed: the connection said hello, and was welcome.
        """
        if len(frames) != 1:
            self._complaints.note(who, "message of several frames")
        elif not agreed and len(frames[0]) > EARLY_BYTES_MAX:
            self._complaints.note(who, "large message before hello")
        else:
            try:
                return decode_control(frames[0].buffer)
            except ProtocolError as error:
                self._complaints.note(who, "malformed message", str(error))
        return None

    async def rest(self, began: float) -> None:
        """Let others run as long as was worked since `began` (by `now`), once that is worth it.

        Awaiting messages that are there already would never let anybody else run.
        """
        self._rested_at = max(self._rested_at, began) + 2 * (now() - began)
        if (rest_s := self._rested_at - now()) > BUSY_S:
            await asyncio.sleep(rest_s)


now = time.perf_counter
