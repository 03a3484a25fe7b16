"""How long a prompt takes that is read in chunks, and which length of chunks is best. Pure.

With a step in flight for each stage, a ring is a pipeline: the first chunk visits all stages, the
others follow at the pace of whatever is slowest: a stage; a link, which a chunk takes up for as
long as its bytes need; or the way around itself, as no more steps are on it than there are stages.
Short chunks fill the pipeline sooner, long ones are computed with less effort a row. A ring of
several rounds has one step in flight: its stages visit each other's windows in between.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

PROMPT_TOKENS = 512  # of the prompt whose TTFT is told
LONG_TOKENS = 1536  # and of a longer one: chunks are to suit both
# Rows; what is tried. Below 64 llama.cpp attends row by row: with 32 two stages read 512 tokens in
# 1.47 s instead of 1.33, and 1,500 in 5.5 instead of 4.1.
CHUNKS = (64, 96, 128, 192, 256, 384, 512)
AS_FAST = 0.01  # of the best: closer than that, longer chunks mean fewer steps
GROUP_TOKENS = 4  # rows of a step where many answers run: 8 of them on two stages

# What a row of a short chunk takes, of one of 512. cpu: measured, SmolLM2 on one core of an x86-64.
# gpu: a guess, as no GPU was at hand: long chunks are wanted there. One that was measured says so.
USUAL: dict[str, tuple[tuple[int, float], ...]] = {
    "cpu": ((16, 1.5), (32, 1.35), (64, 1.03), (256, 1.0)),
    "gpu": ((16, 1.6), (64, 1.6), (128, 1.4), (256, 1.1)),
}


@dataclass(frozen=True)
class Curve:
    """What a chunk takes by its rows, in rows of a chunk of `longest`: beyond it, as many as it
    has. points: (rows, what they take), ascending in both, the last (longest, longest)."""

    points: tuple[tuple[float, float], ...]

    def took(self, rows: float) -> float:
        """In rows of the longest chunk."""
        if rows >= self.points[-1][0]:
            return rows
        above = max(1, bisect.bisect_right(self.points, rows, key=lambda point: point[0]))
        (a, from_a), (b, from_b) = self.points[above - 1], self.points[above]
        return from_a + (rows - a) / (b - a) * (from_b - from_a)

    @cached_property
    def group(self) -> float:
        """What a token takes in a step of GROUP_TOKENS, of one that is alone in its step. Never
        more: a small batch is no slower than its rows one by one."""
        return min(1.0, self.took(GROUP_TOKENS) / self.took(1) / GROUP_TOKENS)


def curve(kind: str, longest: int, alone: float, short: Sequence[tuple[int, float]] = ()) -> Curve:
    """Of a kind of processor. longest: rows of the chunk that was measured. alone: what a step of
    one row takes, in rows of that chunk. short: (rows, what a row takes) of shorter ones, in the
    same; what is usual where nothing was measured."""
    usual = USUAL.get(kind, USUAL["gpu"])
    between = sorted((at, at * each) for at, each in short or usual if 1 < at < longest)
    points = [(1.0, alone), *between] if longest > 1 else []
    rows, took, least = [], [], 0.0
    for at, value in points:
        least = min(max(least, value), longest)
        rows.append(float(at))
        took.append(least)
    return Curve(tuple(zip([*rows, float(longest)], [*took, float(longest)], strict=True)))


@dataclass(frozen=True, slots=True)
class Reading:
    """What a stage takes for a chunk of a prompt. fixed_s: whatever its rows. each: for each kind
    of processor, (seconds of a row in a long chunk, its curve). end_s: the last chunk's besides."""

    fixed_s: float = 0.0
    each: tuple[tuple[float, Curve], ...] = ()
    end_s: float = 0.0
    read_s: float = 0.0  # from its disk, for every chunk
    slower: float = 1.0  # so many times as long as it computes: throttled

    def computing_s(self, rows: int) -> float:
        """Of a chunk of so many rows, with nothing in its way."""
        return self.fixed_s + sum(row_s * by.took(rows) for row_s, by in self.each)

    def seconds(self, rows: int) -> float:
        """Of a chunk of so many rows."""
        return self.computing_s(rows) * self.slower + self.read_s


NOTHING = Reading()


@dataclass(frozen=True, slots=True)
class Ways:
    """What the links of a ring take, all rounds together. along_s: of a chunk's way, but for its
    bytes; row_s: of it, for each row's bytes; busiest_s: of the busiest link, for each row;
    closing_s: from tail to head."""

    along_s: float = 0.0
    row_s: float = 0.0
    busiest_s: float = 0.0
    closing_s: float = 0.0


def in_flight(stages: int, rounds: int) -> int:
    """Steps that the head keeps on their way: see `ring.scheduler`, `depth`."""
    return stages if rounds == 1 else 1


def ttft_s(
    tokens: int, chunk_tokens: int, stages: Sequence[Reading], ways: Ways, rounds: int
) -> float:
    """Seconds from a prompt of so many tokens to the first token of its answer."""
    chunk = min(chunk_tokens, tokens)
    steps, last = -(-tokens // chunk), (tokens - 1) % chunk + 1
    trip = _trip(stages, ways)
    first = trip(chunk) + sum(stage.end_s for stage in stages) + ways.closing_s
    if steps == 1:
        return first
    pace = _pace(stages, ways, rounds, trip)
    return first + (steps - 2) * pace(chunk) + pace(last)


def best_chunk(stages: Sequence[Reading], ways: Ways, rounds: int, batch_tokens: int) -> int:
    """Rows of a prompt in one step, while nothing else runs. A ring of one has nothing to fill."""
    if len(stages) == 1:
        return batch_tokens
    tried = sorted({min(rows, batch_tokens) for rows in CHUNKS} | {batch_tokens})
    prompts = (PROMPT_TOKENS, LONG_TOKENS)
    took = [
        sum(ttft_s(tokens, rows, stages, ways, rounds) / tokens for tokens in prompts)
        for rows in tried
    ]
    limit = min(took) * (1 + AS_FAST)
    return max(rows for rows, seconds in zip(tried, took, strict=True) if seconds <= limit)


def _trip(stages: Sequence[Reading], ways: Ways) -> Callable[[int], float]:
    """What a chunk takes to the end of the ring, by its rows."""

    def seconds(rows: int) -> float:
        return sum(stage.seconds(rows) for stage in stages) + ways.along_s + rows * ways.row_s

    return seconds


def _pace(
    stages: Sequence[Reading], ways: Ways, rounds: int, trip: Callable[[int], float]
) -> Callable[[int], float]:
    """From one chunk to the next, by its rows."""
    steps = in_flight(len(stages), rounds)

    def seconds(rows: int) -> float:
        slowest = max(stage.seconds(rows) for stage in stages)
        return max(slowest, rows * ways.busiest_s, (trip(rows) + ways.closing_s) / steps)

    return seconds
