"""What goes into the next step: rows of answers that decode, rows of prompts, guesses. Pure.

With S stages up to S steps are in flight. Answers that decode are shared out evenly among them, so
that no stage waits while there is work; who waited longest goes first. A prompt goes in chunks,
several of them in flight at once.

While answers decode, chunks are only so long that the time between an answer's tokens stays within
GAP times what it takes without the prompt, as far as the pace of steps is known (`ring.tempo`).
Chunks and decoding rows share a step where that reads prompts faster, as on a GPU, which computes
more rows in the same time; where time grows with rows, as on a processor, they take turns.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from peer.protocol import Sampling
from peer.ring.frames import DRAFT_TOKENS_MAX, Copy, Draft, Open, Trim
from peer.ring.slots import Promise, Slot
from peer.ring.speculation import Speculation

GAP = 3.0  # times the usual time between tokens, while a prompt is read
# Rows of a step in which answers decode, at most. Up to so many a processor gives each row the bits
# that it would have alone, so that company and guesses change no token (llama.cpp with flash
# attention; from 64 on other kernels are used, and a few tokens of a hundred are others).
ALIKE_ROWS = 63
CHUNK_LEAST = 4  # rows: a prompt must come further, whatever it costs
CHUNK_UNKNOWN = 32  # while the pace is not known

Key = tuple[Hashable, str]
"""An answer: who asked for it (a connection), and its name there."""


@dataclass(slots=True, eq=False)
class Job:
    """An answer at the head. ids: prompt and tokens. reading: no token has come yet since it took
    its slot. sent: how many of ids have been sent into the ring."""

    key: Key
    ids: list[int]
    sampling: Sampling
    tokens_left: int
    ends: frozenset[int]
    told: float  # when the entry peer last heard of it
    slot: Slot | None = None
    awaits: Promise | None = None  # its beginning, which is being read for another answer
    turn: int = 0  # how often it took a slot: a step of an earlier time says nothing of this one
    reading: bool = True
    began_with: int = 0  # ids that its slot held already
    began_at: int = 0  # step that was the first with it
    doubted: bool = False  # what it began with gave numbers that are not finite
    sent: int = 0
    step: int = 0  # that carried it last
    speculation: Speculation | None = None


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
class Emit:
    """An answer that a step will give tokens for: its ids were so many, and these were guessed."""

    job: Job
    turn: int
    slot: int
    length: int
    draft: tuple[int, ...]


@dataclass(slots=True)
class Flying:
    """A step on its way. carried: whose rows it has, by slot, and which time that job had it."""

    number: int
    rows: int
    began: float
    lone: bool  # nothing else was on its way with it
    emits: list[Emit] = field(default_factory=list)
    carried: dict[int, tuple[Job, int]] = field(default_factory=dict)


class Pace(Protocol):
    """What steps take: `ring.tempo.Tempo`. Seconds, 0 while unknown."""

    @property
    def known(self) -> bool:
        """Whether a step of one row was seen."""
        ...

    def round_s(self, rows: int) -> float:
        """For a step to come around, nothing else in flight."""
        ...

    def stage_s(self, rows: int) -> float:
        """Of the slowest stage."""
        ...

    def rows_within(self, seconds: float, most: int) -> int:
        """The most rows whose stage_s is within so many seconds."""
        ...


@dataclass(frozen=True, slots=True)
class Chunk:
    """How to read prompts: so many rows in a step. in_row: steps of prompts alone that may follow
    on each step of answers; 0: rows of both share a step."""

    rows: int
    in_row: int = 0


def chunk(pace: Pace, decoding: int, groups: int, depth: int, most: int) -> Chunk:
    """How to read prompts while answers decode in so many groups of so many rows each. most: rows
    of a chunk.

    Between two tokens of an answer every stage computes each group once, and the chunks that were
    let in between; sharing steps, as many long ones as are in flight.
    """
    if decoding == 0:
        return Chunk(most)
    room = ALIKE_ROWS - decoding
    own_s = pace.stage_s(decoding)
    if own_s <= 0:
        return Chunk(max(1, min(most, CHUNK_UNKNOWN, room)), 0 if room > 0 else 1)
    bound_s = GAP * depth * own_s
    shared = min(pace.rows_within(bound_s / depth, most + decoding) - decoding, room)
    in_row = max(1, (depth - 1) // groups)
    between = in_row * groups
    apart = pace.rows_within((bound_s - groups * own_s) / between, most)
    shared, apart = (min(most, max(CHUNK_LEAST, rows)) for rows in (shared, apart))
    shared_rate = shared / max(1e-9, pace.stage_s(shared + decoding))
    cycle_s = groups * own_s + between * pace.stage_s(apart)
    if shared <= room and shared_rate >= between * apart / max(1e-9, cycle_s):
        return Chunk(shared)
    return Chunk(apart, in_row)


def drafted(job: Job, slot: Slot, pace: Pace, context: int, rows: int, alone: bool) -> list[int]:
    """What to put behind the job's last id. rows: that a step may still take besides it. alone:
    nothing else decodes, so that the whole way around counts and not the slowest stage's time."""
    if job.speculation is None or not pace.known:
        return []
    length = len(job.ids)
    most = min(DRAFT_TOKENS_MAX, rows, job.tokens_left - 1, slot.cells - length, context - length)
    if most <= 0:
        return []
    cost = pace.round_s if alone else pace.stage_s
    return list(job.speculation.draft(most, lambda guessed: cost(1 + guessed)))


class Step:
    """A step that is being put together."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.emits: list[Emit] = []
        self.carried: dict[int, tuple[Job, int]] = {}
        self._ids: list[int] = []
        self._slots: list[int] = []
        self._positions: list[int] = []
        self._outputs: list[bool] = []
        self._drafts: list[Draft] = []

    @property
    def rows(self) -> int:
        """So far."""
        return len(self._ids)

    def read(self, job: Job, slot: Slot, most: int) -> int:
        """A stretch of the job's prompt; where it is the last, a token is wanted. How many rows."""
        begin = job.sent
        end = min(len(job.ids), begin + most)
        ends = end == len(job.ids)
        self._add(slot, begin, job.ids[begin:end], 1 if ends else 0)
        if ends:
            self.emits.append(Emit(job, job.turn, slot.number, end, ()))
        self.carried[slot.number] = job, job.turn
        job.sent, job.step = end, self.number
        slot.length, slot.extra = end, 0
        return end - begin

    def decode(self, job: Job, slot: Slot, draft: Sequence[int]) -> None:
        """The job's last id, and guesses behind it."""
        length = len(job.ids)
        self._add(slot, length - 1, [job.ids[-1], *draft], 1 + len(draft))
        if draft:
            self._drafts.append(Draft(slot.number, np.array(draft, np.int32).tobytes()))
        self.emits.append(Emit(job, job.turn, slot.number, length, tuple(draft)))
        self.carried[slot.number] = job, job.turn
        job.sent, job.step = length, self.number
        slot.length, slot.extra = length, len(draft)

    def _add(self, slot: Slot, first: int, ids: Sequence[int], outputs: int) -> None:
        count = len(ids)
        self._ids += ids
        self._slots += [slot.number] * count
        self._positions += range(first, first + count)
        self._outputs += [False] * (count - outputs) + [True] * outputs

    def run(self, ops: tuple[Open | Trim | Copy, ...]) -> Run:
        """The step, whole."""
        return Run(
            self.number,
            np.array(self._ids, np.int32),
            np.array(self._slots, np.int32),
            np.array(self._positions, np.int32),
            np.array(self._outputs, np.bool_),
            ops,
            tuple(self._drafts),
        )


def read(step: Step, prompts: Sequence[Job], rows: int) -> None:
    """Put so many rows of prompts into the step. The one with the least left gets half of them, so
    that a question does not wait for another's book to be read; then the oldest comes first."""
    shortest = min(prompts, key=lambda job: len(job.ids) - job.sent)
    first = 0
    if shortest is not prompts[0] and rows > 1:
        first = step.read(shortest, _slot(shortest), rows // 2)
    rows -= first
    for job in prompts:
        if rows <= 0:
            return
        if job is not shortest or not first:
            rows -= step.read(job, _slot(job), rows)


def _slot(job: Job) -> Slot:
    assert job.slot is not None
    return job.slot
