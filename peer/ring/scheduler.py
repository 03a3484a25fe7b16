"""What the head runs next: slots, chunked prefill, one batch for all decodes. Pure.

One step is in flight at a time. A step's batch holds one row for every answer that decodes and
then, up to the plan's batch size, chunks of the prompts that are still to be read, oldest first.
An answer is admitted when a slot is free and KV cells for its prompt and the next stretch of its
tokens are. It takes further stretches as it grows; where there is no room left, the answer that
came last goes back to the front of the queue and is read anew later: none is lost or changed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from peer.protocol import Sampling
from peer.ring.frames import Copy, Draft, Fault, Open, Trim

WAITING_MAX = 64
WAITING_OF_ONE_MAX = 32  # of one entry peer, so that it cannot keep all others out
STRETCH_TOKENS = 512  # KV cells are reserved so many ahead: few answers are ever put back
ALIVE_S = 5.0  # an answer that waits or is being read gives a sign of life so often
FAULTY_STEPS = 3  # in a row, without a good number between: the fault is a peer's, no answer's


Key = tuple[Hashable, str]
"""An answer: who asked for it (a connection), and its name there."""


@dataclass(frozen=True, slots=True)
class Submitted:
    """An entry peer asks for an answer."""

    key: Key
    ids: NDArray[np.int32]
    sampling: Sampling
    tokens_max: int
    ends: frozenset[int]


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Nobody waits for this answer any more."""

    key: Key


@dataclass(frozen=True, slots=True)
class Returned:
    """A step came around the ring. Fields as in frames.Sampled."""

    step: int
    tokens: tuple[int, ...]
    faults: tuple[Fault, ...] = ()
    taken: tuple[int, ...] = ()
    spent_s: float = 0.0
    slowest_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed."""


Event = Submitted | Cancelled | Returned | Tick


@dataclass(frozen=True, slots=True)
class Run:
    """Run this step. ids, slots, positions: int32 [rows]; outputs: bool [rows]. drafts: of slots
    whose last rows are guesses (see frames.Draft)."""

    step: int
    ids: NDArray[np.int32]
    slots: NDArray[np.int32]
    positions: NDArray[np.int32]
    outputs: NDArray[np.bool_]
    ops: tuple[Open | Trim | Copy, ...]
    drafts: tuple[Draft, ...] = ()


@dataclass(frozen=True, slots=True)
class Deliver:
    """Tokens for the entry peer; `position` is the first one's. finish as in protocol.Tokens.

    Without tokens and finish it is a sign of life.
    """

    key: Key
    position: int
    ids: tuple[int, ...]
    finish: Literal["", "stop", "length"] = ""


@dataclass(frozen=True, slots=True)
class Refuse:
    """The answer does not begin, or does not go on. code as in protocol.Unanswered."""

    key: Key
    code: Literal["busy", "stale", "invalid", "failed"]
    why: str


@dataclass(frozen=True, slots=True)
class Lost:
    """A step did not come back in time: the ring's state is unknown, the stage must end."""

    why: str


@dataclass(frozen=True, slots=True)
class Blame:
    """This peer computes numbers that are not finite, whatever it is asked."""

    peer_id: str


Action = Run | Deliver | Refuse | Lost | Blame


@dataclass(slots=True)
class _Job:
    key: Key
    ids: list[int]
    sampling: Sampling
    tokens_left: int
    ends: frozenset[int]
    told: float  # when the entry peer last heard of it
    reserved: int = 0  # KV cells
    slot: int = -1
    filled: int = 0  # positions that have been sent into the ring


@dataclass(slots=True)
class Scheduler:
    """The head's queue. slots, context, kv_cells, batch_tokens: the plan's."""

    slots: int
    context: int
    kv_cells: int
    batch_tokens: int
    step_s: float
    waiting: deque[_Job] = field(default_factory=deque)
    running: dict[int, _Job] = field(default_factory=dict)  # by slot, in order of admission
    late: float | None = None  # when the step in flight is late
    _steps: int = 0
    _faulty: dict[str, int] = field(default_factory=dict)  # steps in a row, by peer
    _emits: list[_Job] | None = None  # output rows of the step in flight
    _ops: list[Open | Trim | Copy] = field(default_factory=list)
    _free: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._free = list(range(self.slots))

    @property
    def active(self) -> int:
        """Answers that run or wait."""
        return len(self.waiting) + len(self.running)

    @property
    def deadline(self) -> float | None:
        """When a Tick is wanted."""
        signs = [job.told + ALIVE_S for job in (*self.running.values(), *self.waiting)]
        return min([*signs, *([] if self.late is None else [self.late])], default=None)

    def step(self, event: Event, now: float) -> list[Action]:
        """Take one event in; what is to be done comes out."""
        actions: list[Action] = []
        match event:
            case Submitted():
                actions += self._submitted(event, now)
            case Cancelled(key):
                self._drop(key)
            case Returned():
                actions += self._returned(event, now)
            case Tick():
                if self.late is not None and now >= self.late:
                    actions += self._give_up()
        if self._emits is None:
            actions += self._next(now)
        return actions + self._signs(now)

    def _signs(self, now: float) -> list[Action]:
        """Signs of life of answers from which nothing was heard for a while."""
        quiet = [
            job for job in (*self.running.values(), *self.waiting) if now - job.told >= ALIVE_S
        ]
        for job in quiet:
            job.told = now
        return [Deliver(job.key, len(job.ids), ()) for job in quiet]

    def _submitted(self, event: Submitted, now: float) -> list[Action]:
        length = len(event.ids)
        if not 0 < length < self.context:
            why = f"{length} tokens do not fit into a context of {self.context}"
            return [Refuse(event.key, "invalid", why)]
        if len(self.waiting) >= WAITING_MAX:
            return [Refuse(event.key, "busy", f"{WAITING_MAX} answers are waiting already")]
        if sum(job.key[0] == event.key[0] for job in self.waiting) >= WAITING_OF_ONE_MAX:
            why = f"{WAITING_OF_ONE_MAX} answers that this peer asked for are waiting already"
            return [Refuse(event.key, "busy", why)]
        self.waiting.append(
            _Job(event.key, event.ids.tolist(), event.sampling, event.tokens_max, event.ends, now)
        )
        return []

    def _drop(self, key: Key) -> None:
        for job in self.waiting:
            if job.key == key:
                self.waiting.remove(job)
                return
        for job in list(self.running.values()):
            if job.key == key:
                self._release(job)

    def _release(self, job: _Job) -> None:
        del self.running[job.slot]
        self._ops.append(Trim(job.slot, 0))
        self._free.append(job.slot)

    def _returned(self, event: Returned, now: float) -> list[Action]:
        if event.step != self._steps or self._emits is None:
            return []
        emits, self._emits, self.late = self._emits, None, None
        actions: list[Action] = []
        broken = {fault.slot: fault.peer_id for fault in event.faults}
        for job in list(self.running.values()):
            if job.slot in broken:
                why = f"peer {broken[job.slot]} computed numbers that are not finite"
                actions.append(Refuse(job.key, "failed", why))
                self._release(job)
        actions += self._blame(broken, [job.slot for job in emits])
        if len(event.tokens) != len(emits):
            return [*actions, Lost("the tail answered with another number of tokens")]
        for job, token in zip(emits, event.tokens, strict=True):
            if self.running.get(job.slot) is job:  # else cancelled or broken meanwhile
                job.told = now
                actions.append(self._sampled(job, token))
        return actions

    def _blame(self, broken: Mapping[int, str], emits: Sequence[int]) -> list[Action]:
        """Count faulty steps. broken: by whom, by slot. emits: slots that a token came for."""
        faulty = set(broken.values())
        if any(slot not in broken for slot in emits):
            faulty = set()  # who can give good numbers is not to blame for one answer's trouble
        before = self._faulty if not emits else {p: self._faulty.get(p, 0) for p in faulty}
        self._faulty = before | {p: before.get(p, 0) + 1 for p in faulty}
        return [Blame(p) for p in sorted(faulty) if self._faulty[p] == FAULTY_STEPS]

    def _sampled(self, job: _Job, token: int) -> Deliver:
        position = len(job.ids)
        if token in job.ends:
            self._release(job)
            return Deliver(job.key, position, (), "stop")
        job.ids.append(token)
        job.tokens_left -= 1
        if job.tokens_left <= 0 or len(job.ids) >= self.context:
            self._release(job)
            return Deliver(job.key, position, (token,), "length")
        return Deliver(job.key, position, (token,))

    def _give_up(self) -> list[Action]:
        why = f"a step did not come around the ring within {self.step_s:.0f} s"
        jobs = [*self.running.values(), *self.waiting]
        self.running.clear()
        self.waiting.clear()
        self.late = None
        return [*(Refuse(job.key, "failed", why) for job in jobs), Lost(why)]

    def _stretch(self, job: _Job) -> int:
        """Cells for what the job has and for the next stretch of its tokens."""
        return min(len(job.ids) + min(job.tokens_left, STRETCH_TOKENS), self.context)

    def _room(self) -> int:
        """KV cells that nobody has reserved."""
        return self.kv_cells - sum(job.reserved for job in self.running.values())

    def _grow(self) -> None:
        """Give every answer the cells of its next tokens, the oldest first; put back the last ones
        where there is no room. The oldest always fits: kv_cells hold at least one context."""
        for job in list(self.running.values()):
            if self.running.get(job.slot) is not job or len(job.ids) <= job.reserved:
                continue
            wanted = self._stretch(job)
            while self._room() < wanted - job.reserved:
                last = list(self.running.values())[-1]
                self._put_back(last)
                if last is job:
                    break
            else:
                job.reserved = wanted

    def _put_back(self, job: _Job) -> None:
        """Take the slot away; the answer goes on from its ids when there is room again."""
        self._release(job)
        job.slot, job.filled, job.reserved = -1, 0, 0
        self.waiting.appendleft(job)

    def _admit(self) -> None:
        while self.waiting and self._free:
            job = self.waiting[0]
            if self._room() < self._stretch(job):
                return  # the oldest waits until there is room: nobody starves
            self.waiting.popleft()
            job.reserved = self._stretch(job)
            job.slot = min(self._free)
            self._free.remove(job.slot)
            self.running[job.slot] = job
            self._ops.append(Open(job.slot, job.sampling, _history(job)))

    def _next(self, now: float) -> list[Action]:
        self._grow()
        self._admit()
        room = self.batch_tokens
        rows: list[tuple[_Job, int]] = []  # job, rows of it
        jobs = list(self.running.values())
        for job in sorted(jobs, key=lambda job: len(job.ids) - job.filled > 1):  # decodes first
            take = min(len(job.ids) - job.filled, room)
            if take > 0:
                rows.append((job, take))
                room -= take
        if not rows and not self._ops:
            return []
        self._steps += 1
        self._emits = []
        ids: list[int] = []
        slots: list[int] = []
        positions: list[int] = []
        outputs: list[bool] = []
        for job, take in rows:
            end = job.filled + take
            ids += job.ids[job.filled : end]
            slots += [job.slot] * take
            positions += range(job.filled, end)
            outputs += [False] * take
            job.filled = end
            if end == len(job.ids):
                outputs[-1] = True
                self._emits.append(job)
        ops, self._ops = tuple(self._ops), []
        self.late = now + self.step_s
        return [
            Run(
                self._steps,
                np.array(ids, np.int32),
                np.array(slots, np.int32),
                np.array(positions, np.int32),
                np.array(outputs, np.bool_),
                ops,
            )
        ]


def _history(job: _Job) -> bytes:
    """The ids that penalties look back on; nothing where there are none to pay."""
    chosen = job.sampling
    if (
        chosen.repeat_penalty == 1.0
        and chosen.frequency_penalty == 0.0
        and chosen.presence_penalty == 0.0
    ):
        return b""
    count = len(job.ids) if chosen.repeat_last_n < 0 else chosen.repeat_last_n
    return np.array(job.ids[-count:] if count else [], np.int32).tobytes()
