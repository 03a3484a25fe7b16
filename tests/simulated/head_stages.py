"""The stages of the ring in which `head` tries schedulers: queues that are exact about their slots.

Each runs its steps one after another, does a step's operations when that step's turn comes, and
hands it on after the time that its rows take. A row must come right behind what its slot holds, at
every stage the same; a token is drawn from all ids of its slot, so that a hole, a forgotten trim or
another answer's rows give another answer than the true one. The tail verifies guesses.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from peer.protocol import Sampling
from peer.ring import scheduler as schedule
from peer.ring.frames import Copy, Fault, Open, Sampled, Trim
from tests.plans import PEERS
from tests.simulated.home_engine import Truth, draw, link, pays


@dataclass(frozen=True, slots=True)
class Limits:
    """A ring: what its plan allows, and what its stages take. row_s, step_s: of a stage."""

    slots: int = 4
    context: int = 200
    kv_cells: int = 800
    batch_tokens: int = 16
    stages: int = 2
    depth: int = 2  # steps in flight at most
    chunk_tokens: int = 0
    rewinds: bool = True
    speculate: bool = False
    stretch_tokens: int = 6  # reserved ahead: few, as answers are short
    row_s: float = 0.001
    step_s: float = 0.002
    hop_s: float = 0.0005
    fault: float = 0.0  # the chance of one, each step
    drafter: Any = None
    at_rest: bool = False  # what comes to a head that computes waits until it is done


@dataclass(eq=False, slots=True)
class Answer:
    """What an entry peer knows of an answer, and what must become of it."""

    key: tuple[str, str]
    sampling: Sampling  # its seed is the answer's alone: a slot is known by it
    tokens_max: int
    truth: Truth
    delivered: int = 0
    ended: str = ""  # stop | length | cancelled | a refusal's code
    hurt: bool = False  # numbers that are not finite came into its slot
    began: bool = False  # it had a slot once
    reading: bool = True  # no token has come since it took its slot
    awaits: int = 0  # the step that brings its next tokens
    left_out: int = 0  # steps in a row without a row of it, though it had one
    answered: Callable[[Answer], None] | None = None

    @property
    def ids(self) -> list[int]:
        """Prompt and tokens so far."""
        return self.truth.ids


@dataclass(slots=True)
class Step:
    """A step on its way around the ring. groups: slot, first position, ids, output rows.
    numbers: what the stages made of the rows, after `before` them."""

    run: schedule.Run
    groups: tuple[tuple[int, int, tuple[int, ...], int], ...]
    before: list[int] = field(default_factory=list)
    numbers: list[list[int]] = field(default_factory=list)
    spent_s: float = 0.0
    slowest_s: float = 0.0


def groups_of(run: schedule.Run) -> list[tuple[int, int, tuple[int, ...], int]]:
    """The rows by slot: slot, first position, ids, output rows, which are the last ones."""
    groups = []
    ids, outputs = run.ids.tolist(), run.outputs.tolist()
    rows = list(enumerate(zip(run.slots.tolist(), run.positions.tolist(), strict=True)))
    for slot, some in itertools.groupby(rows, key=lambda row: row[1][0]):
        places = [at for at, _ in some]
        first, last = places[0], places[-1] + 1
        wanted = outputs[first:last]
        count = sum(wanted)
        assert wanted == [False] * (last - first - count) + [True] * count, "outputs are scattered"
        groups.append((slot, rows[first][1][1], tuple(ids[first:last]), count))
    return groups


class Stage:
    """A stage's slots and its queue. A slot is the list of its positions' numbers, in each of which
    are all ids up to it."""

    def __init__(self, ring: Any, index: int) -> None:
        self.ring, self.index = ring, index
        self.queue: deque[Step] = deque()
        self.busy = False
        self.busy_s = 0.0
        self.held: list[list[int]] = [[] for _ in range(ring.limits.slots)]

    def come(self, step: Step) -> None:
        """A step has arrived."""
        self.queue.append(step)
        self.take_up()

    def take_up(self) -> None:
        """Run the next one, where none is being run."""
        if self.busy or not self.queue:
            return
        step, limits = self.queue.popleft(), self.ring.limits
        self.apply(step.run)
        self.append(step)
        took_s = (limits.step_s + limits.row_s * len(step.run.ids)) if step.groups else 0.0
        step.spent_s += took_s
        step.slowest_s = max(step.slowest_s, took_s)
        self.busy, self.busy_s = True, self.busy_s + took_s
        self.ring.at(took_s, self.done, step)

    def done(self, step: Step) -> None:
        """Hand it on; the last stage closes the ring."""
        self.busy = False
        if self.index + 1 < len(self.ring.stages):
            self.ring.at(self.ring.limits.hop_s, self.ring.stages[self.index + 1].come, step)
        else:
            self.ring.tail.sample(step)
        self.take_up()
        self.ring.rested()

    def apply(self, run: schedule.Run) -> None:
        """Operations, as the engines do them; what an engine would refuse is a mistake."""
        wrong, rewinds, held = self.ring.wrong, self.ring.limits.rewinds, self.held
        for op in run.ops:
            match op:
                case Trim(slot, position):
                    if not rewinds and 0 < position < len(held[slot]):
                        wrong(f"a recurrent slot is trimmed to {position} of {len(held[slot])}")
                    del held[slot][position:]
                case Copy(source, target, length):
                    have = len(held[source])
                    if have < length or (not rewinds and have != length):
                        wrong(f"{length} positions are copied of a slot that holds {have}")
                    held[target] = held[source][:length]

    def append(self, step: Step) -> None:
        """The rows, each behind what its slot holds."""
        wrong, number = self.ring.wrong, step.run.step
        for at, (slot, position, ids, _) in enumerate(step.groups):
            chain = self.held[slot]
            if len(chain) != position:
                wrong(
                    f"stage {self.index}, step {number}: a row for position {position} of slot "
                    f"{slot}, which holds {len(chain)}"
                )
            last = chain[-1] if chain else 0
            if self.index == 0:
                step.before.append(last)
                step.numbers.append([])
                for place, token in enumerate(ids, position):
                    last = link(last, place, token)
                    step.numbers[at].append(last)
            elif last != step.before[at]:
                wrong(f"slot {slot} of stage {self.index} holds what stage 0's does not")
            chain += step.numbers[at]
        cells = sum(map(len, self.held))
        if cells > self.ring.limits.kv_cells:
            wrong(f"{cells} cells of {self.ring.limits.kv_cells} are in use")


class Tail:
    """What the last stage does after its rows: it draws tokens, and verifies guesses."""

    def __init__(self, ring: Any) -> None:
        self.ring = ring
        self.samplers: dict[int, tuple[Answer, deque[int]]] = {}
        self.bad: dict[int, int] = {}  # slot: from where on its numbers are not finite

    def apply(self, run: schedule.Run) -> None:
        for op in run.ops:
            match op:
                case Open(slot, sampling, history):
                    last = sampling.repeat_last_n
                    recent: deque[int] = deque(maxlen=None if last < 0 else last)
                    recent.extend(np.frombuffer(history, np.int32).tolist())
                    self.samplers[slot] = self.ring.by_seed[sampling.seed], recent
                case Trim(slot, position):
                    if self.bad.get(slot, -1) >= position:
                        del self.bad[slot]
                    if position == 0:
                        self.samplers.pop(slot, None)
                case Copy(source, target, length):
                    self.bad.pop(target, None)
                    if self.bad.get(source, length) < length:
                        self.bad[target] = self.bad[source]

    def sample(self, step: Step) -> None:
        """Tokens for the output rows, to the head."""
        self.apply(step.run)
        ring, rng = self.ring, self.ring.rng
        faults: list[Fault] = []
        if step.groups and rng.random() < ring.limits.fault:
            slot, position, *_ = rng.choice(step.groups)
            self.bad.setdefault(slot, position)
            faults.append(Fault(slot, rng.choice(PEERS[:2])))
        guesses = {d.slot: np.frombuffer(d.ids, np.int32).tolist() for d in step.run.drafts}
        tokens: list[int] = []
        taken: list[int] = []
        for at, (slot, position, ids, outputs) in enumerate(step.groups):
            if slot in self.bad:
                if slot in self.samplers:
                    self.samplers[slot][0].hurt = True
                # Numbers that were made zeros are finite again in later stages.
                if slot not in {f.slot for f in faults} and rng.random() < 0.5:
                    faults.append(Fault(slot, rng.choice(PEERS[:2])))
            if outputs:
                numbers = step.numbers[at][-outputs:]
                got = self.draw(slot, position + len(ids), numbers, guesses.get(slot, []))
                tokens += got
                taken.append(len(got))
        sampled = Sampled(
            ring.plan.id, step.run.step, tuple(tokens), tuple(faults),
            tuple(taken) if guesses else (), step.spent_s, step.slowest_s,
        )  # fmt: skip
        ring.at(ring.limits.hop_s if len(ring.stages) > 1 else 0.0, ring.came_back, sampled)

    def draw(self, slot: int, end: int, numbers: list[int], guesses: list[int]) -> list[int]:
        """The tokens of a slot's output rows up to the first guess that was wrong."""
        if slot not in self.samplers:
            self.ring.wrong(f"a token is wanted of slot {slot}, which no answer has opened")
        answer, recent = self.samplers[slot]
        if slot in self.bad:
            return [0]
        got: list[int] = []
        for at, number in enumerate(numbers):
            sampling = answer.sampling
            looks_back = recent if pays(sampling) else ()
            got.append(
                draw(self.ring.seed, sampling, number, end - len(numbers) + 1 + at, looks_back)
            )
            recent.append(got[-1])
            if guesses[at : at + 1] != got[-1:]:
                break
        return got
