"""The head's queue: slots, chunks, batches, ends."""

from __future__ import annotations

import random
from collections import deque
from typing import Any

import numpy as np
import pytest

from peer.protocol import Sampling
from peer.ring.frames import Copy, Fault, Open, Trim
from peer.ring.scheduler import (
    Action,
    Blame,
    Cancelled,
    Deliver,
    Lost,
    Refuse,
    Returned,
    Run,
    Scheduler,
    Submitted,
    Tick,
)


def make(
    slots: int = 8, context: int = 100, kv_cells: int = 400, batch: int = 16, **more: Any
) -> Scheduler:
    return Scheduler(slots, context, kv_cells, batch, step_s=5.0, **more)


def ask(
    key: str, length: int, tokens: int = 4, ends: tuple[int, ...] = (99,), owner: str = "e"
) -> Submitted:
    return Submitted(
        (owner, key), np.arange(length, dtype=np.int32), Sampling(), tokens, frozenset(ends)
    )


def run_of(actions: list[Action]) -> Run:
    (run,) = [action for action in actions if isinstance(action, Run)]
    return run


def test_a_prompt_is_read_in_chunks_and_only_its_last_row_asks_for_a_token() -> None:
    machine = make()
    first = run_of(machine.step(ask("a", 40), 0))
    assert first.positions.tolist() == list(range(16))
    assert not first.outputs.any()
    assert isinstance(first.ops[0], Open)
    second = run_of(machine.step(Returned(1, ()), 0))
    third = run_of(machine.step(Returned(2, ()), 0))
    assert second.ids.tolist() == list(range(16, 32))
    assert third.positions.tolist() == list(range(32, 40))
    assert third.outputs.tolist() == [False] * 7 + [True]


def test_decodes_go_together_in_one_batch_and_new_answers_join_between_steps() -> None:
    machine = make()
    machine.step(ask("a", 3), 0)
    machine.step(ask("b", 2), 0)  # waits for the step in flight
    run = run_of(machine.step(Returned(1, (7,)), 0))
    # a's next token and b's whole prompt: one batch.
    assert run.ids.tolist() == [7, 0, 1]
    assert run.outputs.tolist() == [True, False, True]
    run = run_of(machine.step(Returned(2, (8, 9)), 0))
    assert run.ids.tolist() == [8, 9]
    assert run.positions.tolist() == [4, 2]


def test_a_long_prompt_does_not_keep_a_running_answer_from_its_next_token() -> None:
    machine = make()
    machine.step(ask("a", 2, tokens=50), 0)
    machine.step(ask("long", 90), 0)
    for step in range(1, 6):
        actions = machine.step(Returned(step, (5,)), 0)
        assert [a.key for a in actions if isinstance(a, Deliver)] == [("e", "a")]
        run = run_of(actions)
        assert run.slots[0] == 0
        assert len(run.ids) == 16


def test_an_end_token_is_not_delivered_and_frees_the_slot() -> None:
    machine = make()
    machine.step(ask("a", 3), 0)
    assert machine.step(Returned(1, (99,)), 0) == [Deliver(("e", "a"), 3, (), "stop")]
    assert machine.active == 0


def test_the_answer_ends_with_length_at_its_limit_and_at_the_context() -> None:
    machine = make()
    machine.step(ask("a", 3, tokens=2), 0)
    assert Deliver(("e", "a"), 3, (5,)) in machine.step(Returned(1, (5,)), 0)
    assert Deliver(("e", "a"), 4, (6,), "length") in machine.step(Returned(2, (6,)), 0)
    machine.step(ask("b", 98, tokens=1000), 0)
    for step in range(3, 9):  # six chunks of 16, none of them the last
        assert not any(isinstance(a, Deliver) for a in machine.step(Returned(step, ()), 0))
    assert Deliver(("e", "b"), 98, (1,)) in machine.step(Returned(9, (1,)), 0)
    assert Deliver(("e", "b"), 99, (1,), "length") in machine.step(Returned(10, (1,)), 0)


def test_a_prompt_that_fills_the_context_is_refused_by_name() -> None:
    (refuse,) = make().step(ask("a", 100), 0)
    assert isinstance(refuse, Refuse)
    assert refuse.code == "invalid"
    assert "100" in refuse.why


def test_a_cancelled_answer_stops_within_a_step_and_its_token_in_flight_is_dropped() -> None:
    machine = make()
    machine.step(ask("a", 3), 0)
    assert machine.step(Cancelled(("e", "a")), 0) == []
    assert machine.step(Returned(1, (5,)), 0) == []


def test_a_slot_taken_again_does_not_receive_its_forerunners_token() -> None:
    machine = make(slots=1)
    machine.step(ask("a", 3), 0)
    machine.step(ask("b", 2), 0)
    machine.step(Cancelled(("e", "a")), 0)
    actions = machine.step(Returned(1, (5,)), 0)
    assert not any(isinstance(action, Deliver) for action in actions)
    run = run_of(actions)
    assert run.ops[0] == Trim(0, 0)
    assert isinstance(run.ops[1], Open)
    assert run.ids.tolist() == [0, 1]


def test_answers_wait_until_the_cells_they_may_need_are_free() -> None:
    machine = make(kv_cells=100)
    machine.step(ask("a", 10, tokens=50), 0)
    machine.step(ask("b", 10, tokens=50), 0)
    run = run_of(machine.step(Returned(1, (5,)), 0))
    assert set(run.slots.tolist()) == {0}
    run = run_of(machine.step(Returned(2, (99,)), 0))
    assert run.slots.tolist() == [0]  # where all of its prompt but the last id lies already
    assert run.ops[0] == Trim(0, 9)


def test_an_answer_that_waits_or_is_read_gives_signs_of_life() -> None:
    machine = make(slots=1)
    machine.step(ask("long", 90, tokens=50), 0)
    machine.step(ask("waits", 10), 1)
    assert machine.deadline == 5.0
    actions = machine.step(Returned(1, ()), 4.5)  # late is at 9.5, signs are due at 5 and 6
    assert not any(isinstance(action, Deliver) for action in actions)
    assert machine.deadline == 5.0
    assert machine.step(Tick(), 5.0) == [Deliver(("e", "long"), 90, ())]
    assert machine.step(Tick(), 6.0) == [Deliver(("e", "waits"), 10, ())]
    assert machine.deadline == 9.5


def test_the_answer_that_came_last_is_put_back_where_answers_outgrow_the_cache() -> None:
    """Both begin, because nobody knows how long they will be; neither is lost."""
    machine = make(context=2000, kv_cells=2600, batch=2000)
    machine.step(ask("a", 700, tokens=1300), 0)
    machine.step(ask("b", 700, tokens=1300), 0)
    given: dict[str, list[int]] = {"a": [], "b": []}
    finished: list[str] = []
    first = run_of(machine.step(Returned(1, (1,)), 0))
    assert set(first.slots.tolist()) == {0, 1}
    run: Run | None = first
    given["a"].append(1)
    put_back = False
    while run is not None:
        tokens = tuple(range(int(run.outputs.sum())))
        put_back |= Trim(1, 0) in run.ops and not finished
        actions, run = machine.step(Returned(run.step, tokens), 0), None
        for action in actions:
            if isinstance(action, Run):
                run = action
            elif isinstance(action, Deliver):
                key = action.key[1]
                assert action.position == 700 + len(given[key])
                given[key] += action.ids
                finished += [key] if action.finish else []
    assert put_back
    assert finished == ["a", "b"]
    assert [len(ids) for ids in given.values()] == [1300, 1300]


def test_a_fault_ends_only_the_answer_it_touches_and_names_the_peer() -> None:
    machine = make()
    machine.step(ask("a", 2), 0)
    machine.step(ask("b", 2), 0)
    machine.step(Returned(1, (5,)), 0)
    actions = machine.step(Returned(2, (6, 7), (Fault(0, "q" * 16),)), 0)
    refused = [action for action in actions if isinstance(action, Refuse)]
    assert [r.key for r in refused] == [("e", "a")]
    assert "q" * 16 in refused[0].why
    assert Deliver(("e", "b"), 2, (7,)) in actions


def test_one_entry_peer_cannot_keep_the_others_out() -> None:
    machine = make(slots=1)
    refused = [
        action
        for i in range(40)
        for action in machine.step(ask(f"r{i}", 5, owner="greedy"), 0)
        if isinstance(action, Refuse)
    ]
    assert {(r.code, r.key[0]) for r in refused} == {("busy", "greedy")}
    assert not any(isinstance(a, Refuse) for a in machine.step(ask("one", 5, owner="meek"), 0))


def test_a_step_that_does_not_return_ends_every_answer_with_a_reason() -> None:
    machine = make()
    machine.step(ask("a", 2), 0)
    machine.step(ask("b", 2), 1)
    assert machine.step(Tick(), 4.9) == []
    actions = machine.step(Tick(), 5.0)
    assert [type(a) for a in actions if not isinstance(a, Deliver)] == [Refuse, Refuse, Lost]


def test_a_result_of_an_old_step_changes_nothing() -> None:
    machine = make()
    machine.step(ask("a", 2), 0)
    machine.step(Returned(1, (5,)), 0)
    assert machine.step(Returned(1, (6,)), 0) == []


def blamed(actions: list[Action]) -> list[str]:
    return [action.peer_id for action in actions if isinstance(action, Blame)]


def test_a_peer_whose_numbers_are_not_finite_three_times_in_a_row_is_blamed_once() -> None:
    machine = make()
    found = []
    for i in range(6):
        run = run_of(machine.step(ask(f"try.{i}", 3), 0))
        found.append(blamed(machine.step(Returned(run.step, (0,), (Fault(0, "p"),)), 0)))
    assert found == [[], [], ["p"], [], [], []]


def test_a_poisoned_prompt_beside_good_answers_blames_nobody() -> None:
    """Not even where every single step has a row of it: the others' tokens come from good ones."""
    machine = make()
    run = run_of(machine.step(ask("good", 3, tokens=90), 0))
    told: list[Action] = []
    for i in range(12):
        told += machine.step(ask(f"bad.{i}", 3), 0)  # joins the next step
        bad = [slot for slot, job in machine.running.items() if job.key[1] != "good"]
        faults = tuple(Fault(slot, "p") for slot in bad)
        told += (actions := machine.step(Returned(run.step, (7,) * sum(run.outputs), faults), 0))
        run = run_of(actions)
    assert [a.key[1] for a in told if isinstance(a, Refuse)] == [f"bad.{i}" for i in range(11)]
    assert blamed(told) == []


def test_two_bad_steps_and_a_good_one_blame_nobody_and_each_peer_is_counted_for_itself() -> None:
    machine = make()
    for i, peer in enumerate(["p", "p", "", "p", "p", "q", "p", "p", "p", "p"]):
        run = run_of(machine.step(ask(f"try.{i}", 3), 0))
        faults = (Fault(int(run.slots[0]), peer),) if peer else ()
        actions = machine.step(Returned(run.step, (99,), faults), 0)
        assert blamed(actions) == (["p"] if i == 8 else []), i


def test_faults_in_the_middle_of_a_prompt_count_too() -> None:
    machine, found = make(batch=4), []
    for i in range(3):
        run = run_of(machine.step(ask(f"try.{i}", 10), 0))
        assert not run.outputs.any()
        found += blamed(machine.step(Returned(run.step, (), (Fault(0, "p"),)), 0))
    assert found == ["p"]


class Ring:
    """Plays the stages: keeps what each slot holds, and checks every row against it."""

    def __init__(self, machine: Scheduler) -> None:
        self.machine = machine
        self.flying: deque[Run] = deque()
        self.filled = dict.fromkeys(range(machine.slots), 0)
        self.ended: set[str] = set()
        self.longest = 0  # steps in flight at once

    def take(self, event: Submitted | Cancelled | Returned) -> None:
        for action in self.machine.step(event, 0.0):
            if isinstance(action, Run):
                self.run(action)
            elif isinstance(action, Refuse) or (isinstance(action, Deliver) and action.finish):
                self.ended.add(action.key[1])

    def run(self, run: Run) -> None:
        self.flying.append(run)
        self.longest = max(self.longest, len(self.flying))
        assert 0 < len(run.ids) <= self.machine.batch_tokens
        for op in run.ops:
            if isinstance(op, Trim):
                assert op.position <= self.filled[op.slot]
                self.filled[op.slot] = op.position
            elif isinstance(op, Copy):
                assert op.length <= self.filled[op.source]
                self.filled[op.target] = op.length
        for slot, position in zip(run.slots.tolist(), run.positions.tolist(), strict=True):
            assert self.filled[slot] == position
            self.filled[slot] += 1
        assert sum(self.filled.values()) <= self.machine.kv_cells

    def answer(self, draw: random.Random, choices: tuple[int, ...]) -> None:
        run = self.flying.popleft()
        tokens = tuple(draw.choice(choices) for _ in range(int(run.outputs.sum())))
        self.take(Returned(run.step, tokens))


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_whatever_happens_rows_are_right_and_all_answers_end(depth: int) -> None:
    """Random answers, cancels and ends: each slot's rows continue where they stopped."""
    longest = 0
    for seed in range(100):
        draw = random.Random(seed)
        ring = Ring(make(slots=3, context=60, kv_cells=120, batch=8, depth=depth))
        asked: list[str] = []
        for turn in range(200):
            choice = draw.random()
            if choice < 0.15:
                asked.append(f"r{turn}")
                ring.take(ask(asked[-1], draw.randint(1, 59), draw.randint(1, 20)))
            elif choice < 0.2 and set(asked) - ring.ended:
                key = draw.choice(sorted(set(asked) - ring.ended))
                ring.ended.add(key)
                ring.take(Cancelled(("e", key)))
            elif ring.flying:
                ring.answer(draw, (1, 2, 99))
        for _ in range(2000):
            if not ring.flying:
                break
            ring.answer(draw, (99,))
        assert set(asked) == ring.ended, f"seed {seed}"
        assert ring.machine.active == 0, f"seed {seed}"
        longest = max(longest, ring.longest)
    assert longest == depth + (depth > 1)
