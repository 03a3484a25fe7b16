"""Runs the measuring of links on the clock and over the links; answers those who measure."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from random import Random

from peer.clockwork import Alarm, Turns
from peer.cluster import probing as p
from peer.cluster.listener import Measured
from peer.config import Timing
from peer.protocol import Control, Message, Probe, Probed


class Prober:
    """Of one cluster. `run` in a task, at whose end nothing is measured any more.

    seed: differs between peers, so that they do not measure at the same times. send, host_of: the
    cluster's: whether a member's link took a message; by which host a member is reached.
    """

    def __init__(
        self,
        timing: Timing,
        seed: str,
        listener: Measured,
        send: Callable[[str, Message], bool],
        host_of: Callable[[str], str | None],
    ) -> None:
        self._listener, self._send, self._host_of = listener, send, host_of
        self._probing = p.Probing(timing, Random(seed))
        self._turns = Turns()
        self._alarm = Alarm(lambda: self._feed(p.Tick(busy=listener.busy())))
        self._ended = False

    async def run(self) -> None:
        """Measure until cancelled."""
        try:
            await asyncio.Event().wait()
        finally:
            self._ended = True
            self._alarm.set(None)

    def here(self, peer_id: str) -> None:
        """The peer is a member; its address may have changed."""
        if (host := self._host_of(peer_id)) is not None:
            self._feed(p.Here(peer_id, host))

    @property
    def measures(self) -> bool:
        """Whether a link is being measured now."""
        return self._probing.measures

    def answer(self, request: int) -> Probed:
        """To a member's probe, which was sent on its link or beside it."""
        self._feed(p.Asked())
        return Probed(request, busy=self._listener.busy())

    def gone(self, peer_id: str) -> None:
        """The peer is a member no longer."""
        self._feed(p.Gone(peer_id))

    def take(self, peer_id: str, message: Control) -> bool:
        """A message from a member: whether it was one of these."""
        match message:
            case Probe(request):
                # At once, and never kept: if the link's queue is full, the other one finds the
                # link slow, which it is.
                self._send(peer_id, self.answer(request))
            case Probed(request, busy):
                self.here(peer_id)  # one of two connections may have ended silently
                self._feed(p.Answered(peer_id, request, busy or self._listener.busy()))
            case _:
                return False
        return True

    def _feed(self, event: p.Event) -> None:
        if not self._ended:
            now = asyncio.get_running_loop().time()
            self._turns.take(lambda: self._step(event, now))

    def _step(self, event: p.Event, now: float) -> None:
        for action in self._probing.step(event, now):
            match action:
                case p.Send(peer_id, request, padding_bytes):
                    if not self._send(peer_id, Probe(request, bytes(padding_bytes))):
                        self._feed(p.Unsent(peer_id, request))
                case p.Measured(link):
                    self._listener.linked(link)
        at = self._probing.deadline
        self._alarm.set(at if at < math.inf else None)
