"""Steps of a stage: each window sees each once and in order, several being on their way at once."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from msgspec.structs import replace

from backends.base import Batch
from peer.planning.plan import Plan
from peer.protocol import Sampling
from peer.ring import scheduler as schedule
from peer.ring import steps as module
from peer.ring.frames import (
    Draft,
    Fault,
    Frame,
    FrameHeader,
    Open,
    Sampled,
    Trim,
    decode,
    encode_frame,
    encode_sampled,
    pack_index,
)
from peer.ring.links import Broken
from peer.ring.steps import Steps
from tests.plans import PEERS, plan

ONE_ROUND = plan(4, 8, 12)
FOUR = plan(3, 6, 9, 12)
TWO_ROUNDS = replace(
    FOUR,
    split=replace(
        FOUR.split,
        windows=tuple(
            replace(window, peer_id=PEERS[i % 2]) for i, window in enumerate(FOUR.split.windows)
        ),
    ),
)
GUESS = Draft(0, np.array([7], np.int32).tobytes())


class Links:
    """What comes, and what goes."""

    def __init__(self) -> None:
        self.arrived_s = self.rested_s = 0.0
        self.came: deque[list[Any]] = deque()
        self.sent: list[list[Any]] = []
        self.followers: list[Any] = []
        self.shared: list[list[Any]] = []
        self.waits: list[float] = []

    def receive(self) -> list[memoryview] | None:
        return [memoryview(part) for part in self.came.popleft()] if self.came else None

    def send(self, parts: list[Any]) -> None:
        self.sent.append([bytes(part) for part in parts])

    def share(self, parts: list[Any]) -> None:
        self.shared.append([bytes(part) for part in parts])

    def waited(self, seconds: float) -> None:
        self.waits.append(seconds)


class Stage:
    """One stage's steps on windows that only note what they are asked; `did`: all that."""

    def __init__(self, of: Plan, peer: str, run_s: float = 0.0) -> None:
        self.plan, self.now, self.run_s = of, 0.0, run_s
        self.did: list[Any] = []
        self.links = Links()
        self.events: list[Any] = []
        windows = SimpleNamespace(
            mine=of.windows_of(peer), vocabulary=100, run=self._run, rest=lambda: None,
            apply=lambda ops: self.did.append(ops), sample=self._sample,
        )  # fmt: skip
        head = SimpleNamespace(take=self.events.append) if of.head == peer else None
        self.steps = Steps(of, peer, cast(Any, windows), cast(Any, self.links), cast(Any, head))

    def _run(self, window: int, batch: Batch, x: Any) -> Any:
        self.did.append(window)
        self.now += self.run_s
        return np.full((len(batch.slots), self.plan.shape.hidden), window, np.float32)

    def _sample(self, batch: Batch, logits: Any, faults: list[Fault], drafts: Any) -> Any:
        self.did.append(drafts)
        return (5,) * int(batch.outputs.sum()), ()

    def hear(self, *messages: list[Any]) -> None:
        self.links.came += messages
        while self.links.came:
            self.steps.hear()

    @property
    def sent(self) -> list[Frame | Sampled]:
        return [decode([memoryview(p) for p in parts], self.plan) for parts in self.links.sent]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a stage's own time that of its steps."""

    def use(stage: Stage) -> Stage:
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: stage.now))
        return stage

    return use


def rows(count: int = 1) -> Batch:
    outputs = np.zeros(count, np.bool_)
    outputs[-1] = True
    return Batch(np.zeros(count, np.int32), np.arange(count, dtype=np.int32), outputs)


def frame(of: Plan, step: int, window: int, *ops: Any, **more: Any) -> list[Any]:
    header = FrameHeader(of.id, step, window, 1, of.shape.hidden, ops, **more)
    return encode_frame(header, pack_index(rows()), np.ones((1, of.shape.hidden), np.float32))


def sampled(of: Plan, step: int) -> list[bytes]:
    return encode_sampled(Sampled(of.id, step, (5,)))


def run(step: int, *ops: Any, count: int = 1, drafts: tuple[Draft, ...] = ()) -> schedule.Run:
    batch = rows(count)
    ids = np.ones(count, np.int32)
    if drafts:
        batch.outputs[-2:] = True
    return schedule.Run(step, ids, batch.slots, batch.positions, batch.outputs, ops, drafts)


def test_steps_may_follow_each_other_before_the_first_has_come_around() -> None:
    stage = Stage(TWO_ROUNDS, PEERS[1])
    trims = [(Trim(1, step),) for step in (1, 2)]
    stage.hear(
        frame(TWO_ROUNDS, 1, 1, *trims[0]), frame(TWO_ROUNDS, 2, 1, *trims[1]),
        frame(TWO_ROUNDS, 1, 3, *trims[0]), frame(TWO_ROUNDS, 2, 3, *trims[1]),
    )  # fmt: skip
    assert stage.did == [trims[0], 1, trims[1], 1, 3, (), 3, ()], "slots are seen to once a step"
    onward, _, closing, _ = stage.sent
    assert isinstance(onward, Frame)
    assert (onward.header.step, onward.header.window) == (1, 2)
    assert isinstance(closing, Sampled)
    assert stage.steps.count == 2


@pytest.mark.parametrize("again", [(1, 1), (1, 3), (2, 1)])
def test_a_step_that_comes_again_to_a_window_does_nothing(again: tuple[int, int]) -> None:
    stage = Stage(TWO_ROUNDS, PEERS[1])
    stage.hear(*[frame(TWO_ROUNDS, *at) for at in ((1, 1), (2, 1), (1, 3))])
    did = len(stage.did)
    stage.hear(frame(TWO_ROUNDS, *again))
    assert len(stage.did) == did
    assert stage.steps.dropped == 1


@pytest.mark.parametrize("after_gap", [(3, 1), (2, 3)])
def test_a_window_that_misses_a_step_is_the_end_of_the_ring(after_gap: tuple[int, int]) -> None:
    stage = Stage(TWO_ROUNDS, PEERS[1])
    stage.hear(frame(TWO_ROUNDS, 1, 1))
    with pytest.raises(Broken, match=f"before step {after_gap[0]} were lost"):
        stage.hear(frame(TWO_ROUNDS, *after_gap))


def test_another_peers_window_is_refused() -> None:
    stage = Stage(ONE_ROUND, PEERS[1])
    stage.hear(frame(ONE_ROUND, 1, 2), sampled(ONE_ROUND, 1))
    assert (stage.did, stage.steps.dropped) == ([], 2)


def test_the_head_has_one_step_for_each_stage_on_its_way_but_in_a_ring_of_rounds_only_one() -> None:
    one = Stage(ONE_ROUND, PEERS[0])
    for step in (1, 2, 3):
        assert one.steps.may_begin
        one.steps.begin(run(step), alone=False)
    assert [f.header.step for f in one.sent if isinstance(f, Frame)] == [1, 2, 3]
    two = Stage(TWO_ROUNDS, PEERS[0])
    two.steps.begin(run(1), alone=True)
    assert not two.steps.may_begin, "its slots may be trimmed before step 1 has come to window 2"
    two.hear(frame(TWO_ROUNDS, 1, 2))
    assert not two.steps.may_begin
    two.hear(sampled(TWO_ROUNDS, 1))
    assert two.steps.may_begin


def test_tokens_that_come_again_or_too_early_do_nothing_and_a_gap_is_the_end() -> None:
    head = Stage(ONE_ROUND, PEERS[0])
    for step in (1, 2, 3):
        head.steps.begin(run(step), alone=False)
    head.hear(sampled(ONE_ROUND, 1), sampled(ONE_ROUND, 1), sampled(ONE_ROUND, 2))
    assert [event.step for event in head.events] == [1, 2]
    assert head.steps.dropped == 1
    head.steps.begin(run(4), alone=False)
    with pytest.raises(Broken):
        head.hear(sampled(ONE_ROUND, 4))
    ahead = Stage(ONE_ROUND, PEERS[0])
    ahead.hear(sampled(ONE_ROUND, 1))
    assert (ahead.events, ahead.steps.dropped) == ([], 1)


def test_all_tokens_that_came_are_heard_before_the_next_frame_is_computed() -> None:
    head = Stage(TWO_ROUNDS, PEERS[0])
    head.steps.begin(run(1), alone=False)
    head.links.came += [frame(TWO_ROUNDS, 1, 2), sampled(TWO_ROUNDS, 1), frame(TWO_ROUNDS, 2, 2)]
    head.steps.hear()
    assert len(head.links.came) == 2, "one frame, then whoever else waits is looked at"
    head.steps.begin(run(2), alone=False)
    head.steps.hear()
    assert not head.links.came
    assert head.did == [0, 2, 0, 2]
    assert len(head.events) == 1


def test_a_head_refuses_frames_of_steps_that_it_did_not_begin() -> None:
    head = Stage(TWO_ROUNDS, PEERS[0])
    head.hear(frame(TWO_ROUNDS, 1, 2))
    assert (head.did, head.steps.dropped) == ([], 1)


def test_what_was_computed_is_summed_around_the_ring_and_the_slowest_stage_known(
    clock: Any,
) -> None:
    head = clock(Stage(ONE_ROUND, PEERS[0], run_s=0.25))
    head.steps.begin(run(1), alone=True)
    middle = clock(Stage(ONE_ROUND, PEERS[1], run_s=1.0))
    middle.hear(head.links.sent[0])
    tail = clock(Stage(ONE_ROUND, PEERS[2], run_s=0.5))
    tail.hear(middle.links.sent[0])
    clock(head).hear(tail.links.sent[0])
    (returned,) = head.events
    assert (returned.spent_s, returned.slowest_s) == (1.75, 1.0)


def test_a_peers_windows_of_two_rounds_count_together(clock: Any) -> None:
    head, tail = Stage(TWO_ROUNDS, PEERS[0], run_s=0.5), Stage(TWO_ROUNDS, PEERS[1], run_s=0.25)
    clock(head).steps.begin(run(1), alone=True)
    clock(tail).hear(head.links.sent[0])
    clock(head).hear(tail.links.sent[0])
    clock(tail).hear(head.links.sent[1])
    clock(head).hear(tail.links.sent[1])
    assert (head.events[0].spent_s, head.events[0].slowest_s) == (1.5, 1.0)


def test_a_wait_is_from_the_end_of_a_step_to_the_next_frame(clock: Any) -> None:
    stage = clock(Stage(ONE_ROUND, PEERS[1], run_s=1.0))
    for step in range(1, 11):
        stage.hear(frame(ONE_ROUND, step, 1))
        stage.now += 3.0
    assert stage.steps.paces.summary().wait_s == 3.0
    assert stage.steps.paces.summary().decode_s == 1.0
    assert stage.links.waits[1:] == [3.0] * 9


def test_guesses_go_around_with_their_rows() -> None:
    head, tail = Stage(plan(4, 12), PEERS[0]), Stage(plan(4, 12), PEERS[1])
    head.steps.begin(run(1, Open(0, Sampling()), count=3, drafts=(GUESS,)), alone=True)
    tail.hear(head.links.sent[0])
    assert tail.did == [(Open(0, Sampling()),), 1, (GUESS,)]
    head.hear(tail.links.sent[0])
    assert head.events[0].tokens == (5, 5)


def test_a_step_with_guesses_does_not_count_as_one_of_a_prompt() -> None:
    of = plan(4, 12)
    head = Stage(of, PEERS[0])
    head.steps.begin(run(1, count=64, drafts=(GUESS,)), alone=True)
    assert head.steps.paces.summary().prefill_s == 0.0
    head.steps.begin(run(2, count=64), alone=True)
    assert head.steps.paces.summary().prefill_s > 0.0
