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
import zmq

import backends
from backends.base import BackendFault, Island
from peer.errors import HalkaError
from peer.protocol import (
    StageAdmit,
    StageConnect,
    StageNews,
    StageOrder,
    StagePing,
    StageStop,
    Timed,
)
from peer.ring import crashing, drafting
from peer.ring import scheduler as schedule
from peer.ring.frames import Meet, encode_sampled, message_bytes_max
from peer.ring.head import Head
from peer.ring.links import Links
from peer.ring.pipe import Pipe
from peer.ring.rehearsal import Rehearsal
from peer.ring.sockets import Doorkeeper, bind, free_port
from peer.ring.steps import Steps
from peer.ring.windows import Windows

log = logging.getLogger("halka.stage")

_NEWS_S = 0.5  # at most so often is the agent told of numbers that grow
_PACES_S = 2.0  # and of how long steps take
_FEW_ROWS = 8  # so short a step may go before tokens that wait to be told
_SOON_S = 0.01  # where it takes no longer than this


class Stage:
    """The loop, its sockets, and the scheduler where this stage is the head."""

    def __init__(self, order: StageOrder, pipe: Pipe) -> None:
        self.plan, self.peer_id, self.pipe = order.plan.plan, order.peer_id, pipe
        self.alone = len(self.plan.ring) == 1
        self.order = order
        self.engine = backends.load(
            self.plan.split.windows[self.plan.windows_of(self.peer_id)[0]].backend
        )
        self.drafter: drafting.DraftModel | None = None
        self.windows = Windows(self.engine, self.plan, self.peer_id, order.threads, order.weights)
        self.folder = Path(order.folder)
        self.context: zmq.Context[Any] = zmq.Context()
        self.door = Doorkeeper(self.context)
        self.door.admit("submit", order.admitted)
        public, secret = zmq.curve_keypair()
        self.public = public
        self.links = Links(self.context, public, secret, message_bytes_max(self.plan))
        self.head = Head(self.plan, order.step_s) if self.plan.head == self.peer_id else None
        if self.head:
            self.head.open(self.context, public, secret)
        self.steps = Steps(self.plan, self.peer_id, self.windows, self.links, self.head)
        self.rehearsal = Rehearsal(self.plan, self.peer_id)
        self.paces, self.paces_s = self.steps.paces, 0.0  # when they are to be told
        self.bind = order.bind
        self.poller = zmq.Poller()
        self.news = StageNews("loading")
        self.told, self.told_s = self.news, 0.0
        self.stopping = False

    # Beginning ------------------------------------------------------------------------------

    def load(self) -> None:
        """Load the windows, open the sockets, tell the agent where they are. Of an island, whose
        engines load together, the windows wait until all of its stages are there."""
        self.tell(force=True)
        island = self.plan.island_of(self.peer_id)
        if not island:
            self._load(None)
        self.news = msgspec.structs.replace(
            self.news,
            phase="ready",
            ring_port=bind(self.links.pull, self.bind),
            submit_port=bind(self.head.socket, self.bind) if self.head else 0,
            key=self.public.decode(),
            island_port=free_port(self.bind) if island else 0,
        )
        self.tell(force=True)

    def _load(self, island: Island | None) -> None:
        used = self.windows.load(self.folder, island)
        if self.head:
            self.head.vocabulary = self.windows.vocabulary
            if not self.windows.rewinds:
                self.head.scheduler.recurrent()
            elif self.head.scheduler.speculate:
                self.drafter = drafting.of_head(self.engine, self.order, backends.load)
                self.head.scheduler.drafter = self.drafter
        self.news = msgspec.structs.replace(
            self.news,
            weights_bytes=used.weights_bytes,
            kv_bytes=used.kv_bytes,
            compute_bytes=used.compute_bytes,
        )

    def connect(self, order: StageConnect) -> None:
        """The ring is complete: link to the next stage, and to those of this one's island."""
        if self.steps.follows:
            return self.door.admit("ring", [order.previous_key])  # it says where to meet
        if order.island:
            self.links.lead((each.address, each.key) for each in order.followers)
            self.links.share(encode_sampled(Meet(self.plan.id, order.island)))
            self.meet(order.island)
        if self.alone:
            return self.linked()
        self.door.admit("ring", [order.previous_key])
        if watch := self.links.connect(order.next_address, order.next_key):
            self.poller.register(watch.socket, zmq.POLLIN)

    def meet(self, addresses: tuple[str, ...]) -> None:
        """Load together with the other stages of this one's island."""
        window = self.plan.split.windows[self.windows.mine[0]]
        rank = self.plan.island_of(self.peer_id).index(self.peer_id)
        self._load(Island(rank, addresses, window.devices, self.order.step_s))

    def linked(self) -> None:
        """The ring may be used as far as this stage can tell."""
        self.news = msgspec.structs.replace(self.news, phase="linked")
        self.tell(force=True)

    # The loop -------------------------------------------------------------------------------

    def loop(self) -> None:
        """Run until told to stop, or until the agent is gone."""
        head, pull = self.head, self.links.pull
        for source in (pull, self.door.socket, 0, *([head.socket] if head else [])):
            self.poller.register(source, zmq.POLLIN)
        while not self.stopping:
            ready = [source for source, _ in self.wait()]
            if pull in ready:
                self.steps.hear()
                if self.steps.island and self.news.phase == "ready":
                    self.meet(self.steps.island)
                    self.linked()
            if head:
                if head.socket in ready:
                    head.hear()
                self.begin_step(head)
            if self.door.socket in ready:
                self.door.answer()
            if 0 in ready:
                self.hear_agent()
            self.mind_link(ready)
            self.tell()

    def wait(self) -> list[tuple[Any, int]]:
        """What came, as soon as something came or is due."""
        if self.head and self.head.todo and self.steps.may_begin:
            return self.poller.poll(0)
        limit_ms = self.wait_ms()
        look_out = self.links.soon() if limit_ms != 0 else None
        if look_out is None:
            return self.poller.poll(limit_ms)
        from_s, until_s = look_out
        now = time.monotonic()
        if now < until_s:
            sleep_ms = max(0, int((from_s - now) * 1000))
            ready = self.poller.poll(sleep_ms if limit_ms is None else min(sleep_ms, limit_ms))
            if ready:
                return ready
            if self.links.spin(until_s, self.rehearsal.play):
                return [(self.links.pull, zmq.POLLIN)]
        return self.poller.poll(self.wait_ms())

    def wait_ms(self) -> int | None:
        """How long the loop may sleep."""
        waits = []
        if self.head and self.head.scheduler.deadline is not None:
            waits.append(self.head.scheduler.deadline)
        if self.links.give_up_s is not None:
            waits.append(self.links.give_up_s)
        if self.current_news() != self.told:
            waits.append(self.told_s + _NEWS_S)
        if self.paces.told != self.paces.seen:
            waits.append(max(self.paces_s, self.told_s + _NEWS_S))
        if not waits:
            return None
        return math.ceil(max(0.0, min(waits) - time.monotonic()) * 1000)

    def begin_step(self, head: Head) -> None:
        """One of the steps that are to be run. Entry peers are told of the last one's tokens once
        the ring is at work again, where that is soon."""
        if head.todo and self.steps.may_begin:
            run = head.next_step()
            if self.alone or len(run.ids) > _FEW_ROWS or self.paces.last_s > _SOON_S:
                head.deliver()
            self.steps.begin(run, head.scheduler.active == 1)
        elif self.steps.returned == self.steps.begun:
            self.paces.rested()
        head.deliver()
        if (deadline := head.scheduler.deadline) is not None and time.monotonic() >= deadline:
            head.take(schedule.Tick())
            head.deliver()

    def mind_link(self, ready: list[Any]) -> None:
        """What became of the link to the next stage."""
        watch = self.links.watch
        if watch is not None and watch.socket in ready and self.links.mind():
            self.linked()
        self.links.endure(self.plan.after(self.peer_id))

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
                        self.head.deliver()
                case StagePing(number):
                    self.news = msgspec.structs.replace(self.news, pong=number)
                    self.tell(force=True)
                case StageStop():
                    self.stopping = True

    # News -----------------------------------------------------------------------------------

    def current_news(self) -> StageNews:
        """What the agent should know now."""
        steps, head = self.steps, self.head
        return msgspec.structs.replace(
            self.news,
            steps=steps.count,
            tokens=steps.rows,
            dropped=steps.dropped,
            active=head.scheduler.active if head else 0,
            blamed=head.blamed if head else "",
        )

    def tell(self, force: bool = False) -> None:
        """Tell the agent what changed, not too often."""
        now = time.monotonic()
        if not force and now < self.told_s + _NEWS_S:
            return
        if self.paces.told != self.paces.seen and now >= self.paces_s:
            self.paces_s = now + _PACES_S
            self.news = msgspec.structs.replace(self.news, timed=self.timed())
        news = self.current_news()
        if force or news != self.told:
            self.told, self.told_s = news, now
            self.pipe.tell(news)

    def timed(self) -> Timed:
        """What steps took, and at the head what was saved."""
        timed = self.paces.summary()
        if not self.head:
            return timed
        counts = {
            name: getattr(self.head.scheduler, name, 0)
            for name in ("drafted", "accepted", "read", "reused")
        }
        return msgspec.structs.replace(timed, **counts)

    def fail(self, why: str) -> None:
        """The last words of a stage that cannot go on."""
        if self.head:
            self.head.fail_all(why)
        self.news = msgspec.structs.replace(self.news, phase="failed", why=why[:1000])
        self.tell(force=True)

    def close(self) -> None:
        """Close sockets, free the engine."""
        self.links.close()
        if self.head:
            self.head.close()
        self.door.close()
        self.windows.close()
        if self.drafter:
            self.drafter.close()
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
