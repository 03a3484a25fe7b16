"""A whole ring in one heap around the real scheduler: the head's shell, and all that must hold.

Every step passes through the frames' own encoder and decoder. Every token is compared with the true
answer's when it is delivered. Limits of time are counted in steps, so that they hold whatever steps
take. Whatever must not be is a `Broken` that names its seed.

What is promised to an answer, in steps that are decided one after another:
- it is admitted before all that were asked for after it, unless it waits for its own beginning,
  which is just being read for another answer;
- while prompts are read, one of them has rows in every second step at least;
- while it decodes, fewer than `2 * depth` steps in a row pass it over that it could be in: each
  second one of them at most is of prompts alone;
- no step is held back while fewer than `depth` are on their way and an answer has a row to run.
  At most as many are, one more while nobody decodes, `depth - 1` more where prompts take turns.
So a prompt waits for those before it, which come further all the time, and for shorter ones, which
get half of what is read.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np

from backends.base import Batch
from peer.errors import ProtocolError
from peer.protocol import Sampling
from peer.ring import scheduler as schedule
from peer.ring.frames import (
    FrameHeader,
    Open,
    Sampled,
    Trim,
    decode,
    encode_frame,
    encode_sampled,
    pack_index,
)
from tests.plans import plan, shape
from tests.simulated.head_stages import Answer, Limits, Stage, Step, Tail, groups_of
from tests.simulated.home_engine import END, Truth
from tests.simulated.house import Broken

STEP_S = 60.0
EVENTS_MAX = 100_000
PACKED_EVERY = 4  # seeds: in these, frames go as bytes
UNREAD_MAX = 1
FOLLOWED = 64  # ids of another prompt that is being read: for these an answer waits a little


def make_scheduler(limits: Limits) -> schedule.Scheduler:
    """The real one, as a head makes it, with answers that grow out of what was reserved."""
    return STRETCHED[limits.stretch_tokens](
        limits.slots, limits.context, limits.kv_cells, limits.batch_tokens, STEP_S,
        depth=limits.depth, chunk_tokens=limits.chunk_tokens, rewinds=limits.rewinds,
        speculate=limits.speculate, drafter=limits.drafter,
    )  # fmt: skip


def stretched(tokens: int) -> type[schedule.Scheduler]:
    """The real scheduler; cells are reserved for so many tokens ahead."""

    def stretch(self: schedule.Scheduler, job: Any) -> int:
        return min(len(job.ids) + min(job.tokens_left, tokens), self.context)

    return type("Scheduler", (schedule.Scheduler,), {"__slots__": (), "_stretch": stretch})


STRETCHED = {tokens: stretched(tokens) for tokens in (2, 6, schedule.STRETCH_TOKENS)}


class Ring:
    """Stages, tail, answers and a clock around one scheduler. `play` runs until all is quiet."""

    make_scheduler = staticmethod(make_scheduler)
    make_stage = Stage
    make_tail = Tail

    def __init__(self, seed: int, limits: Limits) -> None:
        self.seed, self.limits, self.rng = seed, limits, random.Random(f"ring {seed}")
        self.now = 1000.0
        self.heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.turn = itertools.count()
        self.scheduler = self.make_scheduler(limits)
        self.stages = [self.make_stage(self, i) for i in range(limits.stages)]
        self.tail = self.make_tail(self)
        self.plan = plan(
            1, 2, model=shape(layers=2, hidden=1), slots=limits.slots, context=limits.context,
            kv_cells=limits.kv_cells, batch_tokens=limits.batch_tokens,
        )  # fmt: skip
        self.answers: dict[tuple[str, str], Answer] = {}
        self.by_seed: dict[int, Answer] = {}
        self.owners: list[Answer | None] = [None] * limits.slots  # as of the last step decided
        self.flying: dict[int, Step] = {}
        self.inbox: deque[schedule.Event] = deque()  # of a head that computes
        self.gone: set[str] = set()  # owners that nobody can reach
        self.unheard: list[tuple[str, str]] = []
        self.timer_at = math.inf
        self.last_end = self.now  # of an answer
        self.steps = 0
        self.unread = 0  # steps in a row without a row of any prompt, though there is one to read
        self.room_for_all = False  # whoever waits when a step begins is a mistake
        self.counts: Counter[str] = Counter()

    def wrong(self, why: str) -> NoReturn:
        raise Broken(f"seed {self.seed}, {self.now - 1000:.4f} s: {why}")

    # Time -----------------------------------------------------------------------------------------

    def at(self, after_s: float, call: Callable[..., None], *arguments: Any) -> None:
        """Later."""
        heapq.heappush(self.heap, (self.now + after_s, next(self.turn), call, arguments))

    def play(self) -> None:
        """Until nothing is left to happen."""
        for _ in range(EVENTS_MAX):
            if not self.heap:
                return
            self.go_on()
        late = [a.key[1] for a in self.answers.values() if not a.ended]
        self.wrong(f"it never ends: {late} of {len(self.answers)} still wait")

    def go_on(self) -> None:
        """What happens next."""
        self.now, _, call, arguments = heapq.heappop(self.heap)
        call(*arguments)

    def rest(self) -> None:
        """At the end: nobody waits, and every slot and every cell can be had again."""
        late = [answer.key[1] for answer in self.answers.values() if not answer.ended]
        if late or self.flying or self.scheduler.active or self.scheduler.running:
            self.wrong(f"it is quiet, and {late} have not ended; {self.scheduler.active} active")
        limits = self.limits
        self.room_for_all = True
        for at in range(min(limits.slots, limits.kv_cells // 8)):
            self.ask([3 + at, 4], 5, "last", temperature=0.8)
        self.play()
        self.room_for_all = False
        self.ask([7] * (limits.context - 1), 5, "last")
        self.play()
        late = [answer.key[1] for answer in self.answers.values() if not answer.ended]
        if late or self.scheduler.active:
            self.wrong(f"{late} do not end at last")

    # The head -------------------------------------------------------------------------------------

    def ask(self, ids: Sequence[int], tokens_max: int, owner: str = "e", **sampling: Any) -> Answer:
        """Somebody asks, now."""
        seed = len(self.answers) + 1
        chosen = Sampling(**{"temperature": 0.0, "seed": seed} | sampling)
        truth = Truth(self.seed, ids, chosen)
        answer = Answer((owner, f"answer-{seed}"), chosen, tokens_max, truth)
        self.answers[answer.key] = self.by_seed[seed] = answer
        ends, prompt = frozenset((END,)), np.array(ids, np.int32)
        self.hear(schedule.Submitted(answer.key, prompt, chosen, tokens_max, ends))
        return answer

    def cancel(self, answer: Answer) -> None:
        """Nobody waits for it any more."""
        self.hear(schedule.Cancelled(answer.key))

    def came_back(self, sampled: Sampled) -> None:
        """A step has come around."""
        s = sampled
        if self.seed % PACKED_EVERY == 0:
            (body,) = encode_sampled(sampled)
            s = decode([memoryview(body)], self.plan)  # type: ignore[assignment]
        self.hear(schedule.Returned(s.step, s.tokens, s.faults, s.taken, s.spent_s, s.slowest_s))

    def hear(self, event: schedule.Event) -> None:
        """Something came to the head."""
        if self.limits.at_rest and self.stages[0].busy:
            self.inbox.append(event)
        else:
            self.take(event)

    def rested(self) -> None:
        """A stage has done a step; what waited for the head's is taken in."""
        while self.inbox and not self.stages[0].busy:
            self.take(self.inbox.popleft())

    def heard(self, event: schedule.Event) -> schedule.Event:
        """As it is; planted mistakes come between."""
        return event

    def decided(self, actions: list[schedule.Action]) -> list[schedule.Action]:
        """As they are."""
        return actions

    def take(self, event: schedule.Event) -> None:
        """Give the scheduler an event and do what it asks for."""
        events = deque([event])
        while events:
            event, before = events.popleft(), self.steps
            if isinstance(event, schedule.Cancelled):
                self.cancelled(self.answers[event.key])
            elif isinstance(event, schedule.Returned):
                self.returned(event)
            for action in self.decided(self.scheduler.step(self.heard(event), self.now)):
                self.perform(action)
            # Only now: a step that is decided meanwhile comes after those that were decided before.
            events += map(schedule.Cancelled, self.unheard)
            self.unheard.clear()
            if self.room_for_all and self.steps > before and self.scheduler.waiting:
                self.wrong("an answer waits, and there is room for it")
        self.look()
        at = self.scheduler.deadline
        if self.timer_at == math.inf and at is not None:
            self.timer_at = at
            self.at(max(0.0, at - self.now) + 1e-6, self.tick)

    def tick(self) -> None:
        self.timer_at = math.inf
        self.take(schedule.Tick())

    def cancelled(self, answer: Answer) -> None:
        answer.ended = answer.ended or "cancelled"
        self.counts["cancelled"] += 1

    def returned(self, event: schedule.Returned) -> None:
        del self.flying[event.step]
        for answer in self.answers.values():
            if answer.awaits == event.step:
                answer.awaits = answer.left_out = 0
                answer.reading = False

    def perform(self, action: schedule.Action) -> None:
        match action:
            case schedule.Run():
                self.begin(action)
            case schedule.Deliver():
                self.deliver(action)
            case schedule.Refuse():
                self.refused(action)
            case schedule.Blame():
                self.counts["blamed"] += 1
            case schedule.Lost(why):
                self.wrong(why)

    # Steps ----------------------------------------------------------------------------------------

    def begin(self, run: schedule.Run) -> None:
        """A step is decided: look at it closely, and give it to the first stage."""
        self.steps += 1
        if run.step != self.steps:
            self.wrong(f"step {run.step} comes where {self.steps} should")
        if self.seed % PACKED_EVERY == 0:
            self.pack(run)
        self.open(run)
        deep = self.limits.depth
        most = deep + 1 if self.only_reads else 2 * deep - 1 if self.reads else deep
        if len(self.flying) >= (most if deep > 1 else 1):
            self.wrong(f"{len(self.flying) + 1} steps are on their way")
        step = self.flying[run.step] = Step(run, tuple(groups_of(run)))
        guesses = {d.slot: np.frombuffer(d.ids, np.int32).tolist() for d in run.drafts}
        for slot, position, ids, outputs in step.groups:
            answer = self.owners[slot]
            if answer is None or answer.ended or answer.awaits:
                self.wrong(f"slot {slot} has rows, and no answer that has any to run")
            guess = guesses.pop(slot, [])
            if [*ids] != [*answer.ids, *guess][position : position + len(ids)]:
                self.wrong(f"rows of {answer.key[1]} are not what comes in it at {position}")
            ends = position + len(ids) == len(answer.ids) + len(guess)
            if outputs != ends * (1 + len(guess)):
                self.wrong(f"{outputs} tokens are wanted of slot {slot}, with {len(guess)} guesses")
            answer.awaits = run.step if outputs else 0
            self.counts["rows"] += len(ids)
            self.counts["guesses"] += len(guess)
        if guesses:
            self.wrong("there are guesses for slots without rows")
        self.count_left_out({slot for slot, *_ in step.groups})
        self.stages[0].come(step)

    def pack(self, run: schedule.Run) -> None:
        """As the frame goes over the wire: its decoder refuses what is beyond the plan."""
        batch = Batch(run.slots, run.positions, run.outputs)
        header = FrameHeader(self.plan.id, run.step, 1, len(run.ids), 1, run.ops, drafts=run.drafts)
        x = np.zeros((len(run.ids), 1), np.float32)
        parts = encode_frame(header, pack_index(batch), x)
        try:
            decode([memoryview(part) for part in parts], self.plan)
        except ProtocolError as error:
            self.wrong(f"the next stage refuses step {run.step}: {error}")

    def open(self, run: schedule.Run) -> None:
        """Who has which slot from this step on."""
        for op in run.ops:
            self.counts[type(op).__name__] += 1
            if isinstance(op, Open):
                answer = self.owners[op.slot] = self.by_seed[op.sampling.seed]
                answer.awaits, answer.reading = 0, True
                self.counts["put back"] += answer.began
                if not answer.began:
                    self.admitted(answer)
            elif isinstance(op, Trim) and op.position == 0:
                self.owners[op.slot] = None

    def admitted(self, answer: Answer) -> None:
        """Nobody who asked before still waits, but for his own beginning."""
        answer.began = True
        for other in itertools.takewhile(lambda a: a is not answer, self.answers.values()):
            if not (other.began or other.ended) and not any(
                o and o.reading and o.ids[:FOLLOWED] == other.ids[:FOLLOWED] for o in self.owners
            ):
                self.wrong(f"{answer.key[1]} begins before {other.key[1]}")

    @property
    def running(self) -> list[Answer]:
        """Answers that have a slot as of the last step that was decided."""
        jobs = self.scheduler.running.items()
        return [a for slot, job in jobs if (a := self.owners[slot]) and a.key == job.key]

    @property
    def only_reads(self) -> bool:
        """Whether nobody waits for a token that comes after a token."""
        return all(answer.reading for answer in self.running)

    @property
    def reads(self) -> bool:
        """Whether a prompt is being read."""
        return any(answer.reading for answer in self.running)

    @property
    def ready(self) -> list[Answer]:
        """Those that have a row to run."""
        return [answer for answer in self.running if not answer.awaits]

    def count_left_out(self, slots: set[int]) -> None:
        """Of those that had a row to run, who was passed over by this step?"""
        inside = {self.owners[slot] for slot in slots}
        reading = False
        for answer in self.ready:
            if answer.reading:
                reading = True
                continue
            answer.left_out = 0 if answer in inside else answer.left_out + 1
            if answer.left_out >= 2 * self.limits.depth:
                self.wrong(f"{answer.key[1]} is passed over {answer.left_out} times")
        read = any(answer and answer.reading for answer in inside)
        self.unread = self.unread + 1 if reading and not read else 0
        if self.unread > UNREAD_MAX:
            self.wrong(f"no prompt is read in {self.unread} steps")

    def look(self) -> None:
        """What must hold between events."""
        if len(self.flying) < self.limits.depth and self.ready:
            names = [answer.key[1] for answer in self.ready]
            self.wrong(f"{names} could run, and only {len(self.flying)} steps are on their way")
        if not self.flying and self.scheduler.waiting:
            self.wrong("all wait, and nothing runs")

    # What comes out -------------------------------------------------------------------------------

    def deliver(self, action: schedule.Deliver) -> None:
        """Every token once, in order, and the right one."""
        answer = self.answers[action.key]
        name, truth = answer.key[1], answer.truth
        if answer.ended:
            self.wrong(f"{name} has ended ({answer.ended}), and goes on")
        if action.position != len(answer.ids):
            self.wrong(f"{name}: token {action.position} instead of {len(answer.ids)}")
        for token in action.ids:
            right = truth.next()
            if token != right or right == END:
                self.wrong(f"{name}: token {len(truth.ids)} is {token} instead of {right}")
            truth.accept(token)
            answer.delivered += 1
        full = answer.delivered >= answer.tokens_max or len(truth.ids) >= self.limits.context
        over = "length" if full else "stop" if truth.next() == END else ""
        if (action.finish and action.finish != over) or (full and not action.finish):
            self.wrong(f"{name} ends with {action.finish!r} instead of {over!r}")
        if answer.delivered > answer.tokens_max:
            self.wrong(f"{name} is longer than it may be")
        if action.finish:
            self.end(answer, action.finish)
        elif action.key[0] in self.gone:
            self.unheard.append(action.key)

    def refused(self, action: schedule.Refuse) -> None:
        """Only what does not fit, or what numbers that are not finite came into."""
        answer = self.answers[action.key]
        fits = len(answer.ids) < self.limits.context
        if answer.ended or not (answer.hurt if action.code == "failed" else not fits):
            self.wrong(f"{answer.key[1]} is refused ({answer.ended}): {action.why}")
        self.end(answer, action.code)

    def end(self, answer: Answer, how: str) -> None:
        answer.ended, self.last_end = how, self.now
        self.counts[how] += 1
        if answer.answered:
            answer.answered(answer)
