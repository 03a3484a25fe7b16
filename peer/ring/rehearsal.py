"""A step that nobody asked for, played by the stage's own code on nothing, to keep that code near.

While a stage waits, its engine's weights, which went through the processor's caches a moment ago,
have pushed everything else out of them: what then takes 40 microseconds in a loop takes 400 after a
wait (measured: reading a frame 65 instead of 3, a decision of the scheduler 140 instead of 35). So
shortly before a frame is expected, a stage plays a step of one row: the same functions, with
windows that compute nothing, links that lead nowhere, and a scheduler with an answer of its own.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from backends.base import Batch
from peer.planning.plan import Plan
from peer.protocol import Sampling
from peer.ring import scheduler as schedule
from peer.ring.frames import (
    FrameHeader,
    Sampled,
    encode_frame,
    encode_sampled,
    pack_index,
)
from peer.ring.head import Head
from peer.ring.steps import Steps
from peer.ring.tail import Tail

_PROMPT = 1  # id: whatever the plan's chunks are, a step of one row
_ANSWER = 512  # tokens: a longer answer would grow, and be indexed anew while a frame is expected
_WORDS = 64  # of the vocabulary that is sampled from
_IDS, _STRIDE = 50_021, 7919  # prime: a text that does not repeat itself would not be guessed
_GREEDY = Sampling(temperature=0.0)


class Rehearsal:
    """Of one stage, which has neighbours. `play` it as often as you like."""

    def __init__(self, plan: Plan, peer_id: str) -> None:
        self._plan, self._came = plan, list[Any]()
        mine, hidden = plan.windows_of(peer_id), plan.shape.hidden
        tail = Tail(peer_id)
        tail.open(0, _GREEDY, b"")
        is_last = mine[-1] == len(plan.split.windows) - 1
        self._result = np.zeros((_PROMPT, _WORDS if is_last else hidden), np.float32)
        windows = SimpleNamespace(
            mine=mine, vocabulary=0, run=self._run, sample=tail.sample,
            apply=_nothing, rest=_nothing,
        )  # fmt: skip
        links = SimpleNamespace(
            receive=self._receive,
            send=_nothing,
            waited=_nothing,
            arrived_s=0.0,
            rested_s=0.0,
            followers=(),
        )
        self._head = Head(plan, 1.0) if plan.head == peer_id else None
        self._steps = Steps(plan, peer_id, cast(Any, windows), cast(Any, links), self._head)
        self._first, self._step = mine[0], 0
        self._follows_head = self._steps.follows and mine[0] == 0
        one = Batch(np.zeros(1, np.int32), np.zeros(1, np.int32), np.ones(1, np.bool_))
        self._index, self._x = pack_index(one), np.zeros((1, hidden), np.float32)

    def play(self) -> None:
        """One step."""
        if self._head is None:
            self._step += 1
            header = FrameHeader(self._plan.id, self._step, self._first, 1, self._x.shape[1])
            rows = np.zeros(1, np.int32) if self._follows_head else self._x
            self._came = encode_frame(header, self._index, rows)
            self._steps.hear()
            return
        if step := self._steps.begun:
            token = step * _STRIDE % _IDS
            self._came = encode_sampled(Sampled(self._plan.id, step, (token,)))
            self._steps.hear()
        if not self._head.todo:  # none has been begun, or the last one has its tokens
            ids = np.arange(_PROMPT, dtype=np.int32)
            asked = schedule.Submitted((b"", ""), ids, _GREEDY, _ANSWER, frozenset())
            self._head.take(asked)
        self._steps.begin(self._head.next_step(), True)
        self._head.forget()

    @property
    def dropped(self) -> int:
        """Frames of its own that were refused: none, or it rehearses nothing."""
        return self._steps.dropped

    @property
    def waiting(self) -> int:
        """What has still to be run or told."""
        return 0 if self._head is None else len(self._head.todo) + self._head.scheduler.active

    def _receive(self) -> list[memoryview] | None:
        parts, self._came = self._came, []
        return [memoryview(part) for part in parts] or None

    def _run(self, window: int, batch: Batch, x: Any) -> Any:
        return self._result[: len(batch.slots)]


def _nothing(*_: object) -> None:
    pass
