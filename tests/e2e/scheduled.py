"""The head's scheduler over a model's windows in this process, beside one ordinary context.

Every step that the scheduler decides is run by the windows, one after another, and by one ordinary
llama.cpp context in the same batch shape with the same operations before it: their logits must be
equal to the last bit. So the tokens are those that the same model gives under the same batches,
whatever the scheduler made of prompts, slots and guesses.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from backends.base import Batch
from peer.protocol import Sampling
from peer.ring.frames import Copy, Fault, Open, Trim
from peer.ring.scheduler import Deliver, Event, Refuse, Returned, Run, Scheduler, Submitted
from peer.ring.tail import Tail
from tests.plain_llama import PlainLlama
from tests.windows import Ring

STEP_S, ROW_S = 0.02, 0.0005  # that steps are said to take: more rows cost little, guesses pay


class Lockstep:
    """Windows and whole model, doing the same; or the windows alone. `counts`: what was seen."""

    def __init__(self, ring: Ring, whole: PlainLlama | None) -> None:
        self.ring, self.whole = ring, whole
        self.counts: Counter[str] = Counter()

    def step(
        self,
        ids: Sequence[int],
        positions: Sequence[int],
        slots: Sequence[int],
        outputs: Sequence[bool],
    ) -> NDArray[np.float32]:
        """Logits [rows with outputs, vocabulary] of both, which are equal."""
        ours = self.ring.step(ids, positions, slots=slots, outputs=outputs)
        if self.whole:
            theirs = self.whole.step(ids, positions, slots=slots, outputs=outputs)
            np.testing.assert_array_equal(ours, theirs)
        assert ours.shape[0] == sum(outputs)
        self.counts["steps"] += 1
        self.counts["rows"] += len(ids)
        self.counts["shared steps"] += len(set(slots)) > 1
        return ours

    def trim(self, slot: int, position: int) -> None:
        self.ring.backend.trim(slot, position)
        if self.whole:
            self.whole.trim(slot, position)
        self.counts["trims"] += 1

    def copy(self, source: int, target: int, length: int) -> None:
        self.ring.backend.copy(source, target, length)
        if self.whole:
            self.whole.copy(source, target, length)
        self.counts["copies"] += 1


class Scheduled:
    """Answers through the real scheduler, steps decided ahead of what has come back. `opened`: how
    often an answer took a slot. `ahead`: steps that were on their way at once."""

    def __init__(self, both: Lockstep, scheduler: Scheduler) -> None:
        self.both, self.scheduler = both, scheduler
        self.now = 0.0
        self.flying: deque[Run] = deque()
        self.tail = Tail("t" * 16)
        self.answers: dict[str, list[int]] = {}
        self.shapes: list[tuple[tuple[int, int], ...]] = []  # of steps: (slot, rows)
        self.opened = self.ahead = 0

    def ask(self, name: str, ids: Sequence[int], tokens_max: int, **sampling: float) -> None:
        """An answer is asked for; it comes to `answers`."""
        self.answers[name] = []
        chosen = Sampling(**{"temperature": 0.0, **sampling})  # type: ignore[arg-type]
        prompt = np.array(ids, np.int32)
        self._take(Submitted(("e", name), prompt, chosen, tokens_max, frozenset()))

    def run(self, steps: int = 1 << 30) -> None:
        """So many steps, or until all answers are there."""
        while self.flying and steps:
            self._take(self._ran(self.flying.popleft()))
            steps -= 1
        assert steps == 0 or not self.scheduler.active

    def _take(self, event: Event) -> None:
        self.now += 0.001
        for action in self.scheduler.step(event, self.now):
            match action:
                case Run():
                    self.flying.append(action)
                case Deliver(key, _, ids, _):
                    self.answers[key[1]] += ids
                case Refuse():
                    raise AssertionError(action.why)
        self.ahead = max(self.ahead, len(self.flying))

    def _ran(self, run: Run) -> Returned:
        """What the stages do: operations, rows; and the tail."""
        for op in run.ops:
            match op:
                case Trim(slot, position):
                    self.both.trim(slot, position)
                case Copy(source, target, length):
                    self.both.copy(source, target, length)
                case Open(slot, sampling, history):
                    self.tail.open(slot, sampling, history)
                    self.opened += 1
        slots, positions = run.slots.tolist(), run.positions.tolist()
        logits = self.both.step(run.ids.tolist(), positions, slots, run.outputs.tolist())
        self.shapes.append(tuple((slot, len([*some])) for slot, some in groupby(slots)))
        faults: list[Fault] = []
        batch = Batch(run.slots, run.positions, run.outputs)
        tokens, taken = self.tail.sample(batch, logits, faults, run.drafts)
        assert not faults
        took_s = STEP_S + ROW_S * len(slots)
        self.now += took_s
        return Returned(run.step, tokens, (), taken, took_s, took_s)
