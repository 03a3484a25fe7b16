"""The head's side of answers: entry peers on a ROUTER, the scheduler behind it."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Collection, Hashable
from typing import Any, cast

import numpy as np
import zmq

from peer.errors import ProtocolError
from peer.planning.plan import Plan
from peer.protocol import (
    MESSAGE_BYTES_MAX,
    Cancel,
    Message,
    Submit,
    Tokens,
    Unanswered,
    decode_answering,
    encode,
)
from peer.ring import scheduler as schedule
from peer.ring.links import Broken
from peer.ring.sockets import as_server

log = logging.getLogger("halka.stage")

_LAST_WORDS_MS = 200  # to reach entry peers when the stage ends
_HEARD_MAX = 64  # messages of entry peers between steps: who floods the head does not halt the ring

_Key = tuple[Hashable, str]  # whose answer it is: a connection, and its name there


class Head:
    """Takes answers in, hands tokens out. `todo`: steps to be run next, in order.

    What entry peers are told waits for `deliver`, which keeps it in order, so that the next step
    can be sent on its way first.
    """

    socket: zmq.Socket[Any]

    def __init__(self, plan: Plan, step_s: float) -> None:
        self.plan = plan
        split = plan.split
        one_round = len(split.windows) == len(plan.ring)  # else see Steps.may_begin
        self.scheduler = schedule.Scheduler(
            split.slots,
            split.context,
            split.kv_cells,
            split.batch_tokens,
            step_s,
            depth=len(plan.ring) if one_round else 1,
            chunk_tokens=split.chunk_tokens,
            speculate=split.speculation == "auto",
        )
        self.todo: deque[schedule.Run] = deque()
        self._untold: deque[tuple[_Key, Message]] = deque()
        self._keys: dict[bytes, str] = {}  # of the agents behind connections, as ZAP found them
        self.vocabulary = 0  # token ids below it exist; set once the windows are loaded
        self.dropped = 0
        self.blamed = ""  # whose numbers were not finite, step after step

    def open(self, context: zmq.Context[Any], public: bytes, secret: bytes) -> None:
        """The socket of entry peers, still to be bound."""
        self.socket = context.socket(zmq.ROUTER)
        as_server(self.socket, public, secret, "submit", MESSAGE_BYTES_MAX)
        self.socket.router_mandatory = True

    def hear(self) -> None:
        """What entry peers ask for now, so much of it as leaves the ring at work; the rest is heard
        the next time, as the socket stays readable."""
        for _ in range(_HEARD_MAX):
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            owner, data = frames[0].bytes, frames[-1].bytes
            self._keys[owner] = str(frames[-1].get("User-Id"))
            try:
                self._heard(owner, data if len(frames) > 1 else b"")
            except ProtocolError as error:
                self.dropped += 1
                log.warning("dropped=message from=entry because=%s", error)

    def _heard(self, owner: bytes, data: bytes) -> None:
        match decode_answering(data):
            case Submit() as message:
                self._submitted((owner, message.request), message)
            case Cancel() as message:
                self.take(schedule.Cancelled((owner, message.request)))
            case _:
                raise ProtocolError("an entry peer sent what only a head may send")

    def _submitted(self, key: tuple[bytes, str], message: Submit) -> None:
        ids = np.frombuffer(message.ids, np.int32) if len(message.ids) % 4 == 0 else None
        if message.plan != self.plan.id:
            why = f"plan {message.plan} is over, {self.plan.id} is served here"
            # In the name of the plan that was asked for: an answer takes word of no other.
            self._untold.append((key, Unanswered(key[1], message.plan, "stale", why)))
        elif ids is None or (
            len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocabulary
        ):
            why = f"the prompt has token ids that are not among the model's {self.vocabulary}"
            self._perform(schedule.Refuse(key, "invalid", why))
        else:
            self.take(
                schedule.Submitted(
                    key, ids, message.sampling, message.tokens_max, frozenset(message.ends)
                )
            )

    def admit(self, keys: Collection[str]) -> None:
        """Only agents with these keys wait for answers from now on; the others are gone, or were
        out of reach for so long that they are told to ask anew when they hear of it."""
        for key in self._asked():
            if self._keys.get(key[0]) not in keys:
                self._perform(
                    schedule.Refuse(key, "stale", "this peer was out of the head's reach")
                )
                self.take(schedule.Cancelled(key))
        active = {owner for owner, _ in self._asked()}
        self._keys = {owner: key for owner, key in self._keys.items() if owner in active}

    def _asked(self) -> list[tuple[bytes, str]]:
        """Owner and request of every answer that runs or waits."""
        jobs = (*self.scheduler.running.values(), *self.scheduler.waiting)
        return [cast(tuple[bytes, str], job.key) for job in jobs]

    def take(self, event: schedule.Event) -> None:
        """Give the scheduler an event and do what it asks for. Raises Broken."""
        for action in self.scheduler.step(event, time.monotonic()):
            self._perform(action)

    def next_step(self) -> schedule.Run:
        """The first of `todo`, to be begun now."""
        run = self.todo.popleft()
        self.scheduler.begins(run.step, time.monotonic())
        return run

    def _perform(self, action: schedule.Action) -> None:
        plan = self.plan.id
        match action:
            case schedule.Run():
                self.todo.append(action)
            case schedule.Deliver(key, position, ids, finish):
                self._untold.append((key, Tokens(key[1], plan, position, ids, finish)))
            case schedule.Refuse(key, code, why):
                self._untold.append((key, Unanswered(key[1], plan, code, why[:1000])))
            case schedule.Blame(peer_id):
                self.blamed = peer_id
                log.error("blamed=%s because=not_finite", peer_id)
            case schedule.Lost(why):
                raise Broken(why)

    def deliver(self) -> None:
        """Tell the entry peers what is theirs; where one is gone, so is its answer."""
        while self._untold:
            key, message = self._untold.popleft()
            try:
                self.socket.send_multipart([cast(bytes, key[0]), encode(message)], zmq.NOBLOCK)
            except zmq.ZMQError:
                self.take(schedule.Cancelled(key))

    def forget(self) -> None:
        """Tell nobody."""
        self._untold.clear()

    def fail_all(self, why: str) -> None:
        """Tell every entry peer that its answers end here: through no fault of theirs."""
        for key in self._asked():
            self._perform(schedule.Refuse(key, "stale", why))
        self.deliver()

    def close(self) -> None:
        """Close the socket, with a moment for the last words."""
        self.socket.close(_LAST_WORDS_MS)
