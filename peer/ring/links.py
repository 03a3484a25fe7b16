"""A stage's links: frames from the stage before it, frames to the stage after it.

What a frame costs is mostly the sleep before it: a processor that went idle takes as long to come
back as all else around a short step. So `Links.soon` says when the next frame is likely to come,
from the waits of the latest steps, and `Links.spin` looks for it again and again around that time,
yielding to ZeroMQ's thread, which may have the same core. Whoever finds that others use this core
sleeps like anybody else.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import zmq

from peer.errors import HalkaError, ProtocolError
from peer.ring.sockets import BROKEN_S, LINK_S, Watch, as_client, as_server

BEFORE_S = 0.0008  # the expected time is looked out for: waits differ, and a rehearsal takes half
AFTER_S = 0.001
WORTH_S = 0.03  # after a longer wait than this nobody sees what a wake-up took
CROWDED_S = 0.0003  # between two looks: something else ran here, and no frame came of it
CROWDED_TIMES = 4  # in a row, and others are at home here, not just a client for a moment
CROWDED_STEPS = 256  # that are slept through then
_KEPT = 8  # waits
PARTS_MAX = 2  # of a message; more than that is none of ours

_yield = getattr(os, "sched_yield", lambda: time.sleep(0))  # not on every system


class Broken(HalkaError):
    """The ring's state is not what this stage believes; only a new ring can answer rightly."""


class Links:
    """The sockets of a stage's two neighbours. `arrived_s`, `rested_s`: when the last frame came,
    and when all that it asked for was done (monotonic)."""

    def __init__(
        self, context: zmq.Context[Any], public: bytes, secret: bytes, bytes_max: int
    ) -> None:
        self._context, self._keys, self._bytes_max = context, (public, secret), bytes_max
        self.pull: zmq.Socket[Any] = context.socket(zmq.PULL)
        as_server(self.pull, public, secret, "ring", bytes_max)
        self._push: zmq.Socket[Any] | None = None
        self.followers: list[zmq.Socket[Any]] = []  # stages that compute the same window, too
        self.watch: Watch | None = None
        self.up = False  # the link to the next stage was there once
        self.give_up_s: float | None = None  # when, on the link to the next stage
        self.arrived_s = self.rested_s = 0.0
        self._waits: deque[float] = deque(maxlen=_KEPT)
        self._crowded = self._disturbed = 0
        self._early: list[memoryview] | None = None  # came while it was looked out for

    # To the next stage ----------------------------------------------------------------------

    def connect(self, address: str, key: str) -> Watch | None:
        """Link to the next stage; what is to be polled for news of it. None: it was done before."""
        if self._push is not None:
            return None
        self._push = self._context.socket(zmq.PUSH)
        as_client(self._push, key.encode(), *self._keys, self._bytes_max)
        self.watch = Watch(self._push)
        self._push.connect(address)
        self.give_up_s = time.monotonic() + LINK_S
        return self.watch

    def lead(self, followers: Iterable[tuple[str, str]]) -> None:
        """Link to the stages that are to compute each step together with this one. Their links are
        not minded: without one of them this stage's engine fails, and says so."""
        for address, key in followers:
            socket = self._context.socket(zmq.PUSH)
            as_client(socket, key.encode(), *self._keys, self._bytes_max)
            socket.connect(address)
            self.followers.append(socket)

    def share(self, parts: list[Any]) -> None:
        """To every follower. A queue that is full means that one has stopped: zmq.Again."""
        for socket in self.followers:
            socket.send_multipart(parts, zmq.NOBLOCK, copy=True)

    def mind(self) -> bool:
        """Look at the news of the link; whether it is up for the first time."""
        assert self.watch is not None
        if self.watch.broke():
            self.give_up_s = self.give_up_s or time.monotonic() + BROKEN_S
        elif self.watch.up and not self.up:
            self.up, self.give_up_s = True, None
            return True
        return False

    def endure(self, next_peer: str) -> None:
        """A step that was lost with the link would never come around. Raises Broken in the end."""
        if self.give_up_s is not None and time.monotonic() >= self.give_up_s:
            what = "broke" if self.up else f"did not come up in {LINK_S:.0f} s"
            raise Broken(f"the link to peer {next_peer} {what}")

    def send(self, parts: list[Any]) -> None:
        """To the next stage. A queue that is full means that it has stopped: zmq.Again.

        libzmq makes a copy, since the engine's buffer is written again by the next step. It costs a
        hundredth of the encryption that follows, which another thread does: without it that thread
        would have to tell this one, through a third one, when the buffer is free.
        """
        if self._push is None:
            raise ProtocolError("a frame came before the ring was linked")
        self._push.send_multipart(parts, zmq.NOBLOCK, copy=True)
        if not self._crowded:
            _yield()  # to the thread that sends it, where that one has the same core

    # From the stage before ------------------------------------------------------------------

    def receive(self) -> list[memoryview] | None:
        """One message, in place; None: there is none."""
        parts, self._early = self._early, None
        if parts is not None:
            return parts
        try:
            # Never waits: a link that breaks within a message leaves a socket that seems ready.
            frame = self.pull.recv(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return None
        parts = [frame.buffer]
        while frame.more:  # all of a message are there, or none
            frame = self.pull.recv(zmq.NOBLOCK, copy=False)
            if len(parts) <= PARTS_MAX:
                parts.append(frame.buffer)
        return parts

    def waited(self, seconds: float) -> None:
        """A short step's frame came after so long: the next one's may, too."""
        if seconds < WORTH_S:
            self._waits.append(seconds)

    def soon(self) -> tuple[float, float] | None:
        """From when to when the next frame is to be looked out for; None: sleep until it comes."""
        if self._crowded:
            self._crowded -= 1
            return None
        if not self._waits:
            return None
        expected_s = self.rested_s + min(self._waits)
        return expected_s - BEFORE_S, expected_s + AFTER_S

    def spin(self, until_s: float, rehearse: Callable[[], None]) -> bool:
        """Rehearse, then look for a frame until then; whether one came, for `receive` to give."""
        rehearse()
        now = time.monotonic
        looked_s = now()
        while (early := self.receive()) is None and looked_s < until_s:
            _yield()
            at_s = now()
            if at_s - looked_s > CROWDED_S:
                early = self.receive()
                break
            looked_s = at_s
        self._early = early
        if early is not None or looked_s >= until_s:
            self._disturbed = 0
        else:
            self._disturbed += 1
            if self._disturbed >= CROWDED_TIMES:
                self._disturbed, self._crowded = 0, CROWDED_STEPS
        return early is not None

    def close(self) -> None:
        """Close the sockets."""
        if self.watch:
            self.watch.close()
        for socket in (self.pull, self._push, *self.followers):
            if socket:
                socket.close(0)
