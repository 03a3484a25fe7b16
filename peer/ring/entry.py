"""The entry peer's side of answers: one DEALER to the head of each plan that serves or drains.

A shell: it turns messages, plans and the clock into events of `generation` and sends what comes
out. Answers outlive plans and links: they end here only when they are whole, or cannot go on.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from peer.errors import AnswerFailed, NoPlan, ProtocolError, RequestError
from peer.planning.plan import PlanId
from peer.protocol import (
    MESSAGE_BYTES_MAX,
    Cancel,
    Sampling,
    Submit,
    Tokens,
    Unanswered,
    decode_answering,
    encode,
)
from peer.ring.generation import (
    Action,
    Arrived,
    ClientGone,
    Continued,
    Event,
    Fail,
    Generation,
    Give,
    GoOver,
    LinkBroke,
    Offer,
    Patience,
    PlanLost,
    Send,
    Serves,
    Tick,
    Underway,
)
from peer.ring.sockets import as_client

log = logging.getLogger("halka.ring")

_READ_AHEAD = 4096  # tokens that a slow client may lag behind before its answer ends


@dataclass(slots=True)
class _Head:
    """A link to the head of one plan."""

    plan: PlanId
    socket: zmq.asyncio.Socket
    monitor: zmq.asyncio.Socket
    tasks: tuple[asyncio.Task[None], ...]


@dataclass(slots=True)
class _Answer:
    machine: Generation
    queue: asyncio.Queue[Give | Fail] = field(default_factory=asyncio.Queue)


class Entry:
    """Sends answers to heads and hands out their tokens. keys: the agent's CURVE pair."""

    def __init__(self, public: bytes, secret: bytes, patience: Patience) -> None:
        self._public, self._secret, self._patience = public, secret, patience
        self._context = zmq.asyncio.Context()
        self._heads: dict[PlanId, _Head] = {}
        self._answers: dict[str, _Answer] = {}
        self._offer: Offer | None = None
        self.served = 0
        self.failed = 0
        self.continued = 0  # times that an answer went on on another ring

    @property
    def running(self) -> int:
        """Answers that are under way."""
        return len(self._answers)

    @property
    def waiting(self) -> int:
        """Of these, answers that wait for a plan that serves."""
        return sum(answer.machine.plan is None for answer in self._answers.values())

    def open(self, plan: PlanId, address: str, key: str) -> None:
        """Make a link to a plan's head. address: tcp://host:port; key: the stage's public key."""
        if plan in self._heads:
            return
        socket = self._context.socket(zmq.DEALER)
        as_client(socket, key.encode(), self._public, self._secret, MESSAGE_BYTES_MAX)
        # Before it connects: that the link came up must not be missed.
        monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        socket.connect(address)
        tasks = (
            asyncio.create_task(self._read(plan, socket), name=f"answers of plan {plan}"),
            asyncio.create_task(self._watch(plan, monitor), name=f"link of plan {plan}"),
        )
        self._heads[plan] = _Head(plan, socket, monitor, tasks)

    def serve(self, offer: Offer | None) -> None:
        """New answers, and those that wait, go to this plan's head; None: they wait."""
        self._offer = offer if offer and offer.plan in self._heads else None
        self._take_all(Serves(self._offer))

    def underway(self, digest: str) -> None:
        """A plan for this model is being made ready: answers that wait for it may wait longer."""
        self._take_all(Underway(digest))

    def go_over(self, plan: PlanId) -> None:
        """Answers leave this plan for the one that serves."""
        self._take_all(GoOver(plan))

    def end(self, plan: PlanId, why: str) -> None:
        """The plan is over, for this reason: its answers wait for the next one."""
        if self._offer and self._offer.plan == plan:
            self._offer = None
            self._take_all(Serves(None))
        self._take_all(PlanLost(plan, why))
        if head := self._heads.pop(plan, None):
            for task in head.tasks:
                task.cancel()
            head.socket.disable_monitor()
            head.monitor.close(0)  # nobody else does: a descriptor for every plan there ever was
            head.socket.close(0)

    async def answer(
        self,
        prompt: tuple[int, ...],
        sampling: Sampling,
        tokens_max: int,
        ends: tuple[int, ...],
        digest: str,
    ) -> AsyncGenerator[Give, None]:
        """Tokens as they come, of whichever plan serves the model with this digest. Closing the
        iterator cancels the answer in every stage.

        Raises: NoPlan where the ring is full, RequestError, AnswerFailed.
        """
        request = secrets.token_hex(12)
        machine = Generation(request, prompt, sampling, tokens_max, ends, digest, self._patience)
        answer = self._answers[request] = _Answer(machine)
        begun = False
        try:
            self._take(request, Serves(self._offer))
            while True:
                given = await self._next(request, answer)
                if isinstance(given, Fail):
                    self.failed += 1
                    raise _error(given, begun)
                if not given.ids and not given.finish:
                    continue  # a sign of life
                begun = True
                if given.finish:
                    self.served += 1
                yield given
                if given.finish:
                    return
        finally:
            self._take(request, ClientGone())
            del self._answers[request]

    async def _next(self, request: str, answer: _Answer) -> Give | Fail:
        while answer.queue.empty():
            # Looked at again at the latest after a second: the machine may be in another hurry by
            # then, because of an event that was not for this queue.
            deadline = answer.machine.deadline
            wait_s = 1.0 if deadline is None else min(1.0, max(0.0, deadline - time.monotonic()))
            try:
                return await asyncio.wait_for(answer.queue.get(), wait_s)
            except TimeoutError:
                self._take(request, Tick())
        return answer.queue.get_nowait()  # `wait_for` of nothing left would not even look

    def _take_all(self, event: Event) -> None:
        for request in list(self._answers):
            self._take(request, event)

    def _take(self, request: str, event: Event) -> None:
        answer = self._answers.get(request)
        if answer is None:
            return
        for action in answer.machine.step(event, time.monotonic()):
            self._perform(answer, action)

    def _perform(self, answer: _Answer, action: Action) -> None:
        match action:
            case Send(message):
                head = self._heads.get(message.plan)
                if head is None:
                    return self._take(answer.machine.request, LinkBroke(message.plan))
                if error := _send(head.socket, message):
                    log.warning("sent=no to=head plan=%s because=%s", message.plan, error)
                    self._take(answer.machine.request, LinkBroke(message.plan))
            case Continued(plan, delivered, why):
                self.continued += 1
                log.info("answer=continued plan=%s tokens=%d because=%s", plan, delivered, why)
            case Give() | Fail():
                if answer.queue.qsize() == _READ_AHEAD:
                    self._take(answer.machine.request, ClientGone())
                    action = Fail("failed", "the client read too slowly")
                answer.queue.put_nowait(action)

    async def _read(self, plan: PlanId, socket: zmq.asyncio.Socket) -> None:
        while True:
            parts = await socket.recv_multipart()
            try:
                message = decode_answering(parts[-1])
            except ProtocolError as error:
                log.warning("dropped=message from=head plan=%s because=%s", plan, error)
                continue
            if isinstance(message, Tokens | Unanswered) and message.plan == plan:
                self._heard(message, socket)

    def _heard(self, message: Tokens | Unanswered, socket: zmq.asyncio.Socket) -> None:
        request = message.request.rpartition(".")[0]
        answer = self._answers.get(request)
        machine = answer.machine if answer else None
        reads = machine and (machine.plan, machine.name) == (message.plan, message.request)
        if not reads and isinstance(message, Tokens) and not message.finish:
            # What should have told the head that nobody reads it any more was lost.
            _send(socket, Cancel(message.request, message.plan))
        self._take(request, Arrived(message))

    async def _watch(self, plan: PlanId, monitor: zmq.asyncio.Socket) -> None:
        """The head knows this peer by its connection: after a new one it cannot go on with answers
        that began on the old one, and it will not say so. Where there was none yet, what was asked
        still waits here to be sent, and must not be asked twice."""
        up = False
        while True:
            event = parse_monitor_message(await monitor.recv_multipart())["event"]
            broke, up = up, event == zmq.EVENT_HANDSHAKE_SUCCEEDED
            if broke and not up:
                self._take_all(LinkBroke(plan))

    async def close(self) -> None:
        """End all answers and links."""
        for answer in list(self._answers.values()):
            self._take(answer.machine.request, ClientGone())
            answer.queue.put_nowait(Fail("failed", "this peer is going away"))
        heads = list(self._heads.values())
        for head in heads:
            self.end(head.plan, "this peer is going away")
        tasks = [task for head in heads for task in head.tasks]
        await asyncio.gather(*tasks, return_exceptions=True)
        self._context.destroy(0)


def _send(socket: zmq.asyncio.Socket, message: Submit | Cancel) -> BaseException | None:
    """Why it was not sent. Never waits: a full queue means that the head is gone or far behind."""
    sent = asyncio.ensure_future(socket.send(encode(message), zmq.NOBLOCK))
    return sent.exception() if sent.done() else None


def _error(given: Fail, begun: bool) -> Exception:
    if given.code == "invalid":
        return RequestError(given.why)
    if given.code == "busy" and not begun:
        return NoPlan(given.why)
    return AnswerFailed(given.why)
