"""What the head runs next: who gets a slot, which steps are on their way, what came around. Pure.

Up to `depth` steps are in flight, one for each stage. An answer is admitted when a slot is free and
KV cells for its prompt and the next stretch of its tokens are, where possible to a slot that holds
its beginning already (`ring.slots`). It takes further stretches as it grows; where there is no room
left, the answer that came last goes back to the front of the queue and is read anew later: none is
lost or changed. What a step is made of: `ring.batching`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from peer.ring import batching
from peer.ring.batching import Emit, Flying, Job, Key, Step
from peer.ring.batching import Run as Run
from peer.ring.frames import Open
from peer.ring.scheduler_events import Action as Action
from peer.ring.scheduler_events import Blame as Blame
from peer.ring.scheduler_events import Cancelled as Cancelled
from peer.ring.scheduler_events import Deliver as Deliver
from peer.ring.scheduler_events import Event as Event
from peer.ring.scheduler_events import Lost as Lost
from peer.ring.scheduler_events import Refuse as Refuse
from peer.ring.scheduler_events import Returned as Returned
from peer.ring.scheduler_events import Submitted as Submitted
from peer.ring.scheduler_events import Tick as Tick
from peer.ring.slots import Slot, Slots
from peer.ring.speculation import Drafter, Speculation
from peer.ring.tempo import Tempo

WAITING_MAX = 64
WAITING_OF_ONE_MAX = 32  # of one entry peer, so that it cannot keep all others out
STRETCH_TOKENS = 512  # KV cells are reserved so many ahead: few answers are ever put back
ALIVE_S = 5.0  # an answer that waits or is being read gives a sign of life so often
FAULTY_STEPS = 3  # in a row, without a good number between: the fault is a peer's, no answer's


@dataclass(slots=True)
class Scheduler:
    """The head's queue. slots, context, kv_cells, batch_tokens, chunk_tokens: the plan's.

    depth: steps in flight at most: the number of stages; 1 where a step visits them several times.
    rewinds: see `ring.slots`. speculate: guess tokens where it pays. drafter: a model that guesses.
    """

    slots: int
    context: int
    kv_cells: int
    batch_tokens: int
    step_s: float
    depth: int = 1
    chunk_tokens: int = 0
    rewinds: bool = True
    speculate: bool = False
    drafter: Drafter | None = None
    waiting: deque[Job] = field(default_factory=deque)
    running: dict[int, Job] = field(default_factory=dict)  # by slot, in order of admission
    drafted: int = 0  # ids that were guessed, and of them right
    accepted: int = 0
    read: int = 0  # ids of prompts that were computed, and that slots held already
    reused: int = 0
    tempo: Tempo = field(default_factory=Tempo)
    _cache: Slots = field(init=False)
    _flying: deque[Flying] = field(default_factory=deque)
    _since: float = 0.0  # the oldest step is on its way, and nothing else is awaited
    _steps: int = 0
    _in_row: int = 1  # steps of prompts alone that may follow before one of answers
    _faulty: dict[str, int] = field(default_factory=dict)  # steps in a row, by peer

    def __post_init__(self) -> None:
        self._cache = Slots(self.slots, self.kv_cells, self.rewinds)

    @property
    def active(self) -> int:
        """Answers that run or wait."""
        return len(self.waiting) + len(self.running)

    @property
    def late(self) -> float | None:
        """When the oldest step in flight is late."""
        return self._since + self.step_s if self._flying else None

    @property
    def deadline(self) -> float | None:
        """When a Tick is wanted."""
        signs = [job.told + ALIVE_S for job in (*self.running.values(), *self.waiting)]
        return min([*signs, *([] if self.late is None else [self.late])], default=None)

    def recurrent(self) -> None:
        """The model keeps states that cannot be taken back: slots are reused whole, or not at all,
        and nothing is guessed. Told before the first answer comes."""
        self.rewinds = self._cache.rewinds = self.speculate = False

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
        while (run := self._next(now)) is not None:
            actions.append(run)
        return actions + self._signs(now)

    def begins(self, step: int, now: float) -> None:
        """A step leaves now. To choose it may have taken a drafter's time, which is no hop's."""
        for flying in self._flying:
            if flying.number == step:
                flying.began = now

    def _signs(self, now: float) -> list[Action]:
        """Signs of life of answers from which nothing was heard for a while."""
        quiet = [
            job for job in (*self.running.values(), *self.waiting) if now - job.told >= ALIVE_S
        ]
        for job in quiet:
            job.told = now
        return [Deliver(job.key, len(job.ids), ()) for job in quiet]

    # Answers come and go --------------------------------------------------------------------

    def _submitted(self, event: Submitted, now: float) -> list[Action]:
        length = len(event.ids)
        if any(job.key == event.key for job in (*self.waiting, *self.running.values())):
            return []  # asked twice: the first time counts
        if not 0 < length < self.context:
            why = f"{length} tokens do not fit into a context of {self.context}"
            return [Refuse(event.key, "invalid", why)]
        if len(self.waiting) >= WAITING_MAX:
            return [Refuse(event.key, "busy", f"{WAITING_MAX} answers are waiting already")]
        if sum(job.key[0] == event.key[0] for job in self.waiting) >= WAITING_OF_ONE_MAX:
            why = f"{WAITING_OF_ONE_MAX} answers that this peer asked for are waiting already"
            return [Refuse(event.key, "busy", why)]
        self.waiting.append(
            Job(event.key, event.ids.tolist(), event.sampling, event.tokens_max, event.ends, now)
        )
        return []

    def _drop(self, key: Key) -> None:
        for job in (*self.waiting, *self.running.values()):
            if job.key == key:
                if job.slot is None:
                    self.waiting.remove(job)
                else:
                    self._release(job)
                if self.drafter is not None:
                    self.drafter.forget(key)
                return

    def _release(self, job: Job, forget: bool = False) -> None:
        """The job's slot is free, and keeps what it holds unless told to forget."""
        assert job.slot is not None
        del self.running[job.slot.number]
        if forget:
            self._cache.drop(job.slot)
        else:
            self._cache.give_back(job.slot, job.slot.length)
        job.slot = None

    def _put_back(self, job: Job) -> None:
        """Take the slot away; the answer goes on from its ids when there is room again."""
        self._release(job, forget=True)
        job.reading, job.sent = True, 0
        self.waiting.appendleft(job)

    def _give_up(self) -> list[Action]:
        why = f"a step did not come around the ring within {self.step_s:.0f} s"
        jobs = [*self.running.values(), *self.waiting]
        self.running.clear()
        self.waiting.clear()
        self._flying.clear()
        return [*(Refuse(job.key, "failed", why) for job in jobs), Lost(why)]

    def _stretch(self, job: Job) -> int:
        """Cells for what the job has and for the next stretch of its tokens."""
        return min(len(job.ids) + min(job.tokens_left, STRETCH_TOKENS), self.context)

    def _grow(self) -> None:
        """Give every answer the cells of its next tokens, the oldest first; put back the last ones
        where there is no room. The oldest always fits: kv_cells hold at least one context."""
        for job in list(self.running.values()):
            slot = job.slot
            if slot is None or len(job.ids) <= slot.cells:
                continue
            while not self._cache.grow(slot, self._stretch(job)):
                last = list(self.running.values())[-1]
                self._put_back(last)
                if last is job:
                    break

    def _admit(self) -> None:
        for job in list(self.waiting):
            if self._cache.laden or not self._cache.free:
                return
            cells = self._stretch(job)
            if not self._cache.room(cells):
                return  # the oldest waits until there is room: nobody starves
            if job.awaits is None or not job.awaits.stands:
                job.awaits = None if job.doubted else self._cache.promised(job.ids)
            if job.awaits is not None:
                continue  # soon there is more to begin with; others need not wait for that
            slot = self._cache.take(job.ids, cells, fresh=job.doubted)
            assert slot is not None  # there is room
            self.waiting.remove(job)
            job.slot, job.sent, job.turn = slot, slot.length, job.turn + 1
            job.began_with, job.began_at = slot.length, self._steps + 1
            self.running[slot.number] = job
            self.reused += slot.length
            self.read += len(job.ids) - slot.length
            if self.speculate and job.speculation is None:
                job.speculation = Speculation(job.ids, self.drafter, job.key)
            self._cache.ops.append(Open(slot.number, job.sampling, _history(job)))

    # Steps go and come ----------------------------------------------------------------------

    def _next(self, now: float) -> Run | None:
        """The next step, where one more may be in flight and there is something to run."""
        if len(self._flying) >= max(self.depth + (self.depth > 1), 2 * self.depth - 1):
            return None
        self._grow()
        self._admit()
        decoding = [job for job in self.running.values() if not job.reading]
        prompts = [j for j in self.running.values() if j.reading and j.sent < len(j.ids)]
        share = min(-(-len(decoding) // self.depth), self.batch_tokens, batching.ALIKE_ROWS)
        chunk = self._chunk(len(decoding), share) if prompts else None
        if len(self._flying) >= self._most(decoding, chunk):
            return None
        step = Step(self._steps + 1)
        apart = chunk is not None and bool(decoding) and chunk.in_row > 0
        if not apart or self._in_row == 0:
            ready = [job for job in decoding if job.sent < len(job.ids)]
            for job in sorted(ready, key=lambda job: job.step)[:share]:
                step.decode(job, _slot(job), self._guess(job, decoding, prompts))
        if step.rows:
            self._in_row = chunk.in_row if chunk else 1
        may = self._in_row > 0 or len(self._flying) < self.depth  # stages must not stand idle
        if chunk is not None and (not apart or (may and not step.rows)):
            self._read(step, prompts, min(chunk.rows, self.batch_tokens - step.rows))
            self._in_row = max(0, self._in_row - 1)
        return self._begin(step, now) if step.rows else None

    def _chunk(self, decoding: int, share: int) -> batching.Chunk:
        """How prompts are read beside so many answers, of which so many share a step."""
        most = min(self.chunk_tokens or self.batch_tokens, self.batch_tokens)
        if share >= self.batch_tokens:
            return batching.Chunk(most, 1)  # beside them no row is left
        groups = -(-decoding // share) if share else 1
        return batching.chunk(self.tempo, share, groups, self.depth, most)

    def _most(self, decoding: Sequence[Job], chunk: batching.Chunk | None) -> int:
        """Steps in flight: one for each stage. Chunks that take turns with answers have places of
        their own, or stages would wait; and while nobody decodes, one more waits at the first."""
        if self.depth == 1:
            return 1
        if not decoding:
            return self.depth + 1
        return 2 * self.depth - 1 if chunk is not None and chunk.in_row else self.depth

    def _read(self, step: Step, prompts: Sequence[Job], rows: int) -> None:
        batching.read(step, prompts, rows)

    def _guess(self, job: Job, decoding: Sequence[Job], prompts: Sequence[Job]) -> list[int]:
        """Only while stages have time for it: more answers than stages fill them already."""
        if len(decoding) > self.depth or prompts:
            return []
        rows = min(self.batch_tokens, batching.ALIKE_ROWS) - 1
        return batching.drafted(job, _slot(job), self.tempo, self.context, rows, len(decoding) == 1)

    def _begin(self, step: Step, now: float) -> Run:
        lone = not self._flying
        for flying in self._flying:
            flying.lone = False
        if lone:
            self._since = now
        self._steps = step.number
        self._flying.append(Flying(step.number, step.rows, now, lone, step.emits, step.carried))
        self.drafted += sum(len(emit.draft) for emit in step.emits)
        return step.run(self._cache.flush())

    def _returned(self, event: Returned, now: float) -> list[Action]:
        if not self._flying or event.step != self._flying[0].number:
            return []
        flying, self._since = self._flying.popleft(), now
        if event.spent_s > 0 and flying.rows:
            elapsed_s = now - flying.began if flying.lone else None
            self.tempo.observe(flying.rows, event.spent_s, event.slowest_s, elapsed_s)
        actions = self._faults(event, flying)
        taken = event.taken or (1,) * len(flying.emits)
        if len(taken) != len(flying.emits) or sum(taken) != len(event.tokens):
            return [*actions, Lost("the tail answered with another number of tokens")]
        at = 0
        for emit, count in zip(flying.emits, taken, strict=True):
            tokens, at = event.tokens[at : at + count], at + count
            if count > 1 + len(emit.draft) or tokens[:-1] != emit.draft[: count - 1]:
                return [*actions, Lost("the tail accepted what was not guessed")]
            job = emit.job
            if job.slot is not None and job.turn == emit.turn:  # else cancelled, broken, put back
                job.told = now
                actions.append(self._sampled(job, emit, tokens))
        return actions

    def _sampled(self, job: Job, emit: Emit, tokens: tuple[int, ...]) -> Deliver:
        """The answer is so many tokens longer; of its guesses all but the last one were right."""
        position, slot = len(job.ids), _slot(job)
        finish: Literal["", "stop", "length"] = ""
        given: list[int] = []
        for token in tokens:
            if token in job.ends:
                finish = "stop"
                break
            given.append(token)
            if len(given) >= job.tokens_left or position + len(given) >= self.context:
                finish = "length"
                break
        job.ids += given
        job.tokens_left -= len(given)
        job.reading = False
        self.accepted += len(tokens) - 1
        self._cache.settle(slot, min(emit.length + len(tokens) - 1, len(job.ids)))
        job.sent = slot.length
        if job.speculation is not None and not finish:
            job.speculation.took(given)
        if finish:
            self._release(job)
            if self.drafter is not None:
                self.drafter.forget(job.key)
        return Deliver(job.key, position, tuple(given), finish)

    # Numbers that are not finite ------------------------------------------------------------

    def _faults(self, event: Returned, flying: Flying) -> list[Action]:
        """Answers with such numbers end. One that began with what a slot held already may not be to
        blame: it is read anew, once. So are all that took over something since the step began: the
        numbers were made zeros on their way, and what they spoilt looks good. Nothing that was
        kept is trusted any more."""
        actions: list[Action] = []
        broken = {fault.slot: fault.peer_id for fault in event.faults}
        for number, peer_id in broken.items():
            job, turn = flying.carried.get(number, (None, 0))
            if job is None or job.slot is None or job.turn != turn:
                continue
            if not job.began_with:
                why = f"peer {peer_id} computed numbers that are not finite"
                actions.append(Refuse(job.key, "failed", why))
                self._release(job, forget=True)
                if self.drafter is not None:
                    self.drafter.forget(job.key)
        for job in [*reversed(self.running.values())] if broken else ():  # to wait in their order
            hit = flying.carried.get(_slot(job).number, (None, 0)) == (job, job.turn)
            hit = hit and _slot(job).number in broken
            if job.began_with and (hit or job.began_at > event.step):
                job.doubted = True
                self._put_back(job)
        if broken:
            self._cache.forget()
        return actions + self._blame(broken, [emit.slot for emit in flying.emits])

    def _blame(self, broken: Mapping[int, str], emits: Sequence[int]) -> list[Action]:
        """Count faulty steps. broken: by whom, by slot. emits: slots that a token came for."""
        faulty = set(broken.values())
        if any(slot not in broken for slot in emits):
            faulty = set()  # who can give good numbers is not to blame for one answer's trouble
        before = self._faulty if not emits else {p: self._faulty.get(p, 0) for p in faulty}
        self._faulty = before | {p: before.get(p, 0) + 1 for p in faulty}
        return [Blame(p) for p in sorted(faulty) if self._faulty[p] == FAULTY_STEPS]


def _slot(job: Job) -> Slot:
    assert job.slot is not None
    return job.slot


def _history(job: Job) -> bytes:
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
