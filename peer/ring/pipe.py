"""The channel between a stage and its agent: stdin and stdout, one JSON message a line."""

from __future__ import annotations

import contextlib
import os

import msgspec
import zmq

from peer.protocol import Message, StageAdmit, StageConnect, StageOrder, StagePing, StageStop

Order = StageOrder | StageConnect | StageAdmit | StagePing | StageStop

_decoder: msgspec.json.Decoder[Order] = msgspec.json.Decoder(Order)


class Pipe:
    """The channel to the agent. What the engine prints to stdout goes to stderr instead."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "wb", buffering=0)
        os.dup2(2, 1)
        self._pending = b""
        self._after: list[Order] = []  # what came together with the first order
        os.set_blocking(0, False)

    def tell(self, message: Message) -> None:
        """Write one message. Where the agent is gone, `read` will say so."""
        data = msgspec.json.encode(message) + b"\n"
        with contextlib.suppress(BrokenPipeError):
            while data:
                data = data[self._out.write(data) or 0 :]

    def read(self) -> list[Order] | None:
        """All whole messages that wait; None once the agent is gone.

        To be called once after `first`, ready or not: more may have come together with it.
        """
        after, self._after = self._after, []
        try:
            data = os.read(0, 1 << 20)
        except BlockingIOError:
            return after
        if not data:
            return None
        *lines, self._pending = (self._pending + data).split(b"\n")
        return after + [_decoder.decode(line) for line in lines]

    def first(self) -> StageOrder | None:
        """Wait for the order that begins this stage; None if the agent went away before."""
        poller = zmq.Poller()
        poller.register(0, zmq.POLLIN)
        while True:
            poller.poll()
            orders = self.read()
            if orders is None:
                return None
            for i, order in enumerate(orders):
                if isinstance(order, StageOrder):
                    self._after = orders[i + 1 :]
                    return order
