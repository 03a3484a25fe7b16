"""The stage: the process on a peer that runs its windows of one plan. `python -m peer.ring.stage`.

A plain loop: frame in, windows, frame out; no asyncio, no second thread on that way. Its agent
speaks to it over stdin and stdout, one JSON message a line; when stdin ends, the agent is gone and
the stage ends too. A crash of the engine therefore ends this process and nothing else.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import zmq
from numpy.typing import NDArray

import backends
from backends.base import BackendFault, Batch
from peer.errors import HalkaError, ProtocolError, StalePlan
from peer.protocol import StageAdmit, StageConnect, StageNews, StageOrder, StagePing, StageStop
from peer.ring import crashing
from peer.ring import scheduler as schedule
from peer.ring.frames import (
    HEADER_BYTES_MAX,
    Fault,
    Frame,
    FrameHeader,
    Sampled,
    decode,
    encode_frame,
    encode_sampled,
    pack_index,
    unfinite,
)
from peer.ring.head import Broken, Head
from peer.ring.paces import Paces
from peer.ring.pipe import Pipe
from peer.ring.sockets import BROKEN_S, LINK_S, Doorkeeper, Watch, as_client, as_server, bind
from peer.ring.windows import Windows

log = logging.getLogger("halka.stage")

_NEWS_S = 0.5  # at most so often is the agent told of numbers that grow
_PACES_S = 2.0  # and of how long steps take


class Stage:
    """The loop, its sockets, and the scheduler where this stage is the head."""

    def __init__(self, order: StageOrder, pipe: Pipe) -> None:
        self.plan, self.peer_id, self.pipe = order.plan.plan, order.peer_id, pipe
        self.alone = len(self.plan.ring) == 1
        engine = backends.load(
            self.plan.split.windows[self.plan.windows_of(self.peer_id)[0]].backend
        )
        self.windows = Windows(engine, self.plan, self.peer_id, order.threads)
        self.folder = Path(order.folder)
        split = self.plan.split
        self.context: zmq.Context[Any] = zmq.Context()
        self.door = Doorkeeper(self.context)
        self.door.admit("submit", order.admitted)
        public, secret = zmq.curve_keypair()
        self.public, self.secret = public, secret
        ring_bytes_max = max(HEADER_BYTES_MAX, split.batch_tokens * self.plan.shape.hidden * 4)
        self.ring_bytes_max = ring_bytes_max
        self.pull = self.context.socket(zmq.PULL)
        as_server(self.pull, public, secret, "ring", ring_bytes_max)
        self.head = (
            Head(self.context, public, secret, self.plan, order.step_s)
            if self.plan.head == self.peer_id
            else None
        )
        self.bind = order.bind
        self.push: zmq.Socket[Any] | None = None
        self.watch: Watch | None = None
        self.give_up_at: float | None = None  # on the link to the next stage
        self.poller = zmq.Poller()
        self.last_step = 0  # of frames that came in; they come each once and in order
        self.returned = 0
        self.paces, self.paces_at = Paces(), 0.0
        self.computed_s = 0.0  # for the step that is under way
        self.news = StageNews("loading")
        self.told = (StageNews("loading"), 0.0)
        self.stopping = False

    # Beginning ------------------------------------------------------------------------------

    def load(self) -> None:
        """Load the windows, open the sockets, tell the agent where they are."""
        self.tell(force=True)
        used = self.windows.load(self.folder)
        if self.head:
            self.head.vocabulary = self.windows.vocabulary
        self.news = msgspec.structs.replace(
            self.news,
            phase="ready",
            ring_port=bind(self.pull, self.bind),
            submit_port=bind(self.head.socket, self.bind) if self.head else 0,
            key=self.public.decode(),
            weights_bytes=used.weights_bytes,
            kv_bytes=used.kv_bytes,
            compute_bytes=used.compute_bytes,
        )
        self.tell(force=True)

    def connect(self, order: StageConnect) -> None:
        """The ring is complete: link to the next stage."""
        if self.push is None and not self.alone:
            self.door.admit("ring", [order.previous_key])
            self.push = self.context.socket(zmq.PUSH)
            as_client(
                self.push, order.next_key.encode(), self.public, self.secret, self.ring_bytes_max
            )
            self.watch = Watch(self.push)
            self.poller.register(self.watch.socket, zmq.POLLIN)
            self.push.connect(order.next_address)
            self.give_up_at = time.monotonic() + LINK_S
        if self.alone:
            self.linked()

    def linked(self) -> None:
        """The ring may be used as far as this stage can tell."""
        self.give_up_at = None
        self.news = msgspec.structs.replace(self.news, phase="linked")
        self.tell(force=True)

    # The loop -------------------------------------------------------------------------------

    def loop(self) -> None:
        """Run until told to stop, or until the agent is gone."""
        head = self.head
        for source in (self.door.socket, self.pull, 0, *([head.socket] if head else [])):
            self.poller.register(source, zmq.POLLIN)
        while not self.stopping:
            ready = dict(self.poller.poll(0 if head and head.todo else self.wait_ms()))
            if self.door.socket in ready:
                self.door.answer()
            if 0 in ready:
                self.hear_agent()
            if self.pull in ready:
                self.hear_ring()
            self.mind_link()
            if head:
                if head.socket in ready:
                    head.hear()
                if head.todo:
                    run, head.todo = head.todo, None
                    self.begin_step(run)
                elif not head.scheduler.active:
                    self.paces.rested()
                head.take(schedule.Tick())
            self.tell()

    def wait_ms(self) -> int | None:
        """How long the loop may sleep."""
        waits = []
        if self.head and self.head.scheduler.deadline is not None:
            waits.append(self.head.scheduler.deadline - time.monotonic())
        if self.give_up_at is not None:
            waits.append(self.give_up_at - time.monotonic())
        if self.current_news() != self.told[0]:
            waits.append(self.told[1] + _NEWS_S - time.monotonic())
        if self.paces.told != self.paces.seen:
            waits.append(self.paces_at - time.monotonic())
        return math.ceil(max(0.0, min(waits)) * 1000) if waits else None

    def mind_link(self) -> None:
        """A step that was lost with the link to the next stage would never come around."""
        if self.watch is None:
            return
        now = time.monotonic()
        if self.watch.broke():
            self.give_up_at = self.give_up_at or now + BROKEN_S
        elif self.watch.up and self.news.phase == "ready":
            self.linked()
        if self.give_up_at is not None and now >= self.give_up_at:
            what = "broke" if self.news.phase == "linked" else f"did not come up in {LINK_S:.0f} s"
            raise Broken(f"the link to peer {self.plan.after(self.peer_id)} {what}")

    def hear_agent(self) -> None:
        """Orders on stdin."""
        orders = self.pipe.read()
        if orders is None:
            log.info("stage=ending because=agent_gone")
            self.stopping = True
            return
        for order in orders:
            match order:
                case StageConnect():
                    self.connect(order)
                case StageAdmit(keys):
                    self.door.admit("submit", keys)
                    if self.head:
                        self.head.admit(keys)
                case StagePing(number):
                    self.news = msgspec.structs.replace(self.news, pong=number)
                    self.tell(force=True)
                case StageStop():
                    self.stopping = True

    def hear_ring(self) -> None:
        """One frame from the stage before this one."""
        try:
            # Never waits: a link that breaks within a message leaves a socket that seems ready.
            parts = [frame.buffer for frame in self.pull.recv_multipart(zmq.NOBLOCK, copy=False)]
        except zmq.Again:
            return
        try:
            came = decode(parts, self.plan)
            if isinstance(came, Sampled):
                self.hear_sampled(came)
            else:
                self.hear_frame(came)
        except (StalePlan, ProtocolError) as error:
            self.drop(error)

    def drop(self, error: HalkaError) -> None:
        """Refuse a frame: counted, named, without effect."""
        self.news = msgspec.structs.replace(self.news, dropped=self.news.dropped + 1)
        if self.news.dropped <= 10 or self.news.dropped % 1000 == 0:
            log.warning("dropped=frame count=%d because=%s", self.news.dropped, error)

    def hear_frame(self, frame: Frame) -> None:
        """Rows for one of this stage's windows."""
        header = frame.header
        if header.window not in self.windows.mine:
            raise ProtocolError(f"window {header.window} is not this peer's")
        order = header.step * len(self.plan.split.windows) + header.window
        if order <= self.last_step:
            raise ProtocolError(f"step {header.step} came again")
        if header.step > self.last_step // len(self.plan.split.windows) + 1:
            # Its rows are missing from this stage's KV cache: going on would answer wrongly.
            raise Broken(f"frames before step {header.step} were lost on the way to this peer")
        self.last_step = order
        faults = list(header.faults)
        known = {fault.slot for fault in faults}
        before = self.plan.split.windows[header.window - 1].peer_id
        x = frame.x
        bad = [slot for slot in unfinite(frame.batch.slots, x) if slot not in known]
        faults += [Fault(slot, before) for slot in bad]
        if faults:  # the other rows go on; these must not spread
            x = np.where(np.isin(frame.batch.slots, [f.slot for f in faults])[:, None], 0, x)
        if header.window == self.windows.mine[0]:
            self.windows.apply(header.ops)
        self.run_on(header, frame.batch, x, faults)

    def hear_sampled(self, sampled: Sampled) -> None:
        """The tail's tokens, at the head."""
        if not self.head:
            raise ProtocolError("sampled tokens came to a peer that is not the head")
        if sampled.step <= self.returned:
            raise ProtocolError(f"the tokens of step {sampled.step} came again")
        self.returned = sampled.step
        self.head.take(schedule.Returned(sampled.step, sampled.tokens, sampled.faults))

    # Steps ----------------------------------------------------------------------------------

    def begin_step(self, run: schedule.Run) -> None:
        """The head's own first window, then on along the ring."""
        self.paces.begun(len(run.ids), time.monotonic())
        self.windows.apply(run.ops)
        batch = Batch(run.slots, run.positions, run.outputs)
        header = FrameHeader(
            self.plan.id, run.step, 0, len(run.ids), self.plan.shape.hidden, run.ops
        )
        self.run_on(header, batch, run.ids, [])

    def run_on(
        self, header: FrameHeader, batch: Batch, x: NDArray[Any], faults: list[Fault]
    ) -> None:
        """Run this stage's window, and the following ones while they are its own; then send."""
        index = header.window
        while True:
            if header.rows:
                began = time.monotonic()
                x = self.windows.run(index, batch, x)
                self.computed_s += time.monotonic() - began
            index += 1
            if index == len(self.plan.split.windows):
                return self.finish(header, batch, x, faults)
            if index not in self.windows.mine:
                break
        if header.rows == 0:
            x = np.empty((0, header.hidden), np.float32)
        onward = msgspec.structs.replace(header, window=index, faults=tuple(faults))
        if index > self.windows.mine[-1]:  # its last turn in this step
            self.count(header, batch)
        self.send(encode_frame(onward, pack_index(batch), x))
        self.windows.rest()

    def finish(
        self, header: FrameHeader, batch: Batch, logits: NDArray[np.float32], faults: list[Fault]
    ) -> None:
        """The tail: sample, and close the ring."""
        began = time.monotonic()
        tokens = self.windows.sample(batch, logits, faults) if header.rows else ()
        self.computed_s += time.monotonic() - began
        self.count(header, batch)
        if self.head:
            self.returned = header.step
            self.head.take(schedule.Returned(header.step, tokens, tuple(faults)))
        else:
            self.send(encode_sampled(Sampled(self.plan.id, header.step, tokens, tuple(faults))))
        self.windows.rest()

    def count(self, header: FrameHeader, batch: Batch) -> None:
        """Steps, rows and seconds, for status and for planning."""
        self.paces.computed(header.rows, self.computed_s, int(batch.positions.max(initial=0)))
        self.computed_s = 0.0
        self.news = msgspec.structs.replace(
            self.news, steps=self.news.steps + 1, tokens=self.news.tokens + header.rows
        )

    def send(self, parts: list[Any]) -> None:
        """To the next stage. A queue that is full means that it has stopped."""
        if self.push is None:
            raise ProtocolError("a frame came before the ring was linked")
        # A copy is made by libzmq: the engine's buffer is written again by the next step.
        self.push.send_multipart(parts, zmq.NOBLOCK, copy=True)

    # News -----------------------------------------------------------------------------------

    def current_news(self) -> StageNews:
        """What the agent should know now."""
        if not self.head:
            return self.news
        active, blamed = self.head.scheduler.active, self.head.blamed
        return msgspec.structs.replace(self.news, active=active, blamed=blamed)

    def tell(self, force: bool = False) -> None:
        """Tell the agent what changed, not too often."""
        now = time.monotonic()
        if self.paces.told != self.paces.seen and now >= self.paces_at:
            self.paces_at = now + _PACES_S
            self.news = msgspec.structs.replace(self.news, timed=self.paces.summary())
        news = self.current_news()
        if force or (news != self.told[0] and now >= self.told[1] + _NEWS_S):
            self.told = (news, now)
            self.pipe.tell(news)

    def fail(self, why: str) -> None:
        """The last words of a stage that cannot go on."""
        if self.head:
            self.head.fail_all(why)
        self.news = msgspec.structs.replace(self.news, phase="failed", why=why[:1000])
        self.tell(force=True)

    def close(self) -> None:
        """Close sockets, free the engine."""
        if self.watch:
            self.watch.close()
        for socket in (self.pull, self.push):
            if socket:
                socket.close(0)
        if self.head:
            self.head.close()
        self.door.close()
        self.windows.close()
        self.context.term()


def main() -> int:
    """Read the order, load, run. Exit 0 when told to stop, 1 when something failed."""
    logging.basicConfig(
        stream=sys.stderr, level=os.environ.get("HALKA_LOG", "info").upper(), format="%(message)s"
    )
    crashing.prepare()
    pipe = Pipe()
    order = pipe.first()
    if order is None:
        return 0
    stage = None
    try:
        stage = Stage(order, pipe)
        stage.hear_agent()  # may have changed its mind: a plan may be over before it is loaded
        if not stage.stopping:
            stage.load()
            stage.loop()
    except (BackendFault, HalkaError, OSError, zmq.ZMQError, KeyError, ImportError) as error:
        why = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else str(error)
        log.error("stage=failed because=%s", why)
        if stage is None:
            pipe.tell(StageNews("failed", why=why[:1000]))
            return 1
        stage.fail(why)
        stage.close()
        return 1
    stage.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
