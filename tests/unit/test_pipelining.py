"""Several steps in flight: groups of answers, chunks of prompts, guesses behind a last id."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from peer.protocol import Sampling
from peer.ring import slots
from peer.ring.batching import ALIKE_ROWS, CHUNK_LEAST, GAP, Chunk, chunk
from peer.ring.frames import Copy, Fault, Open, Trim
from peer.ring.scheduler import (
    Action,
    Cancelled,
    Deliver,
    Lost,
    Refuse,
    Returned,
    Run,
    Scheduler,
    Submitted,
)
from peer.ring.slots import FOLLOW_LEAST, common


def make(depth: int = 2, slots: int = 8, kv_cells: int = 4000, chunk_tokens: int = 16) -> Scheduler:
    return Scheduler(slots, 1000, kv_cells, 64, 5.0, depth=depth, chunk_tokens=chunk_tokens)


def ask(key: str, ids: Sequence[int], tokens: int = 40) -> Submitted:
    return Submitted(("e", key), np.array(ids, np.int32), Sampling(), tokens, frozenset({99_999}))


def runs(actions: list[Action]) -> list[Run]:
    return [action for action in actions if isinstance(action, Run)]


def told(actions: list[Action]) -> list[tuple[str, tuple[int, ...]]]:
    return [(action.key[1], action.ids) for action in actions if isinstance(action, Deliver)]


def finish(machine: Scheduler, flying: list[Run], token: int = 7) -> None:
    """Answer steps until none is in flight."""
    while flying:
        run = flying.pop(0)
        flying += runs(machine.step(Returned(run.step, (token,) * int(run.outputs.sum())), 0))


class Linear:
    """A pace of so many seconds a step, and a row."""

    known = True

    def __init__(self, fixed_s: float, row_s: float) -> None:
        self._fixed_s, self._row_s = fixed_s, row_s

    def stage_s(self, rows: int) -> float:
        return self._fixed_s + rows * self._row_s

    def round_s(self, rows: int) -> float:
        return 2 * self.stage_s(rows)

    def rows_within(self, seconds: float, most: int) -> int:
        return max(1, min(most, int((seconds - self._fixed_s) / self._row_s)))


def test_chunks_of_a_prompt_are_in_flight_in_all_stages_and_one_more_waits() -> None:
    machine = make()
    first = runs(machine.step(ask("a", range(100)), 0))
    assert [run.positions[0] for run in first] == [0, 16, 32]
    (after,) = runs(machine.step(Returned(1, ()), 0))
    assert after.positions[0] == 48


def test_chunks_of_several_prompts_share_a_step() -> None:
    machine = make(depth=1)
    machine.step(ask("a", range(10)), 0)
    machine.step(ask("b", range(500, 510)), 0)
    machine.step(ask("c", range(700, 710)), 0)
    (run,) = runs(machine.step(Returned(1, (7,)), 0))
    assert run.slots.tolist() == [0] + [1] * 10 + [2] * 6


def test_a_prompt_is_read_where_answers_fill_every_step() -> None:
    machine = Scheduler(8, 1000, 8000, 4, 5.0, depth=1)
    flying: list[Run] = []
    for i in range(4):
        flying += runs(machine.step(ask(f"r{i}", range(i * 100, i * 100 + 3), tokens=500), 0))
    flying += runs(machine.step(ask("late", range(500, 520)), 0))
    heard: set[str] = set()
    for _ in range(100):
        run = flying.pop(0)
        actions = machine.step(Returned(run.step, (7,) * int(run.outputs.sum())), 0)
        heard |= {key for key, _ in told(actions)}
        flying += runs(actions)
    assert heard == {"r0", "r1", "r2", "r3", "late"}


def test_eight_answers_are_shared_out_evenly_among_two_stages() -> None:
    machine = make(chunk_tokens=64)
    flying: list[Run] = []
    for i in range(8):
        flying += runs(machine.step(ask(f"r{i}", range(i * 100, i * 100 + 5)), 0))
    for _ in range(8):  # all prompts are read
        run = flying.pop(0)
        flying += runs(machine.step(Returned(run.step, (7,) * int(run.outputs.sum())), 0))
    for _ in range(6):
        assert [len(run.ids) for run in flying] == [4, 4]
        assert not set(flying[0].slots.tolist()) & set(flying[1].slots.tolist())
        run = flying.pop(0)
        flying += runs(machine.step(Returned(run.step, (7,) * 4), 0))


def test_the_next_turn_of_a_chat_reads_only_what_is_new() -> None:
    machine = make(chunk_tokens=64)
    finish(machine, runs(machine.step(ask("a", range(50), tokens=3), 0)))
    (run,) = runs(machine.step(ask("b", [*range(50), 7, 7, 7, 500, 501]), 0))
    assert run.ids.tolist() == [7, 500, 501]  # nothing was ever run after the last 7
    assert run.positions.tolist() == [52, 53, 54]
    assert not any(isinstance(op, Trim | Copy) for op in run.ops)
    assert (machine.read, machine.reused) == (50 + 3, 52)


def test_a_turn_that_was_edited_goes_on_from_where_it_differs() -> None:
    machine = make(chunk_tokens=64)
    finish(machine, runs(machine.step(ask("a", range(50), tokens=3), 0)))
    (run,) = runs(machine.step(ask("b", [*range(40), 500]), 0))
    assert run.ops[0] == Trim(0, 40)
    assert run.ids.tolist() == [500]


def test_a_short_common_beginning_is_copied_and_the_long_conversation_kept() -> None:
    machine = make(chunk_tokens=64)
    finish(machine, runs(machine.step(ask("long", range(60), tokens=3), 0)))
    (run,) = runs(machine.step(ask("other", [*range(20), *range(500, 510)], tokens=2), 0))
    assert run.ops[0] == Copy(0, 1, 20)
    finish(machine, [run])
    (run,) = runs(machine.step(ask("on", [*range(60), 7]), 0))
    assert run.ids.tolist() == [7]


def test_answers_with_one_system_prompt_wait_for_the_first_of_them_to_read_it() -> None:
    machine = make(chunk_tokens=64, depth=1)
    system = list(range(200))
    flying = runs(machine.step(ask("a", [*system, 500, 501]), 0))
    for i in range(3):
        machine.step(ask(f"b{i}", [*system, 600 + i, 601]), 0)
    for _ in range(5):
        run = flying.pop(0)
        flying += runs(machine.step(Returned(run.step, (7,) * int(run.outputs.sum())), 0))
    assert machine.reused >= 3 * (200 - FOLLOW_LEAST)
    assert machine.read <= 202 + 3 * (2 + FOLLOW_LEAST)


def test_waiting_for_a_long_beginning_compares_no_ids_in_every_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """64 answers that waited for 100,000 ids took 150 ms of each step."""
    machine = Scheduler(8, 9000, 20_000, 64, 5.0, depth=2, chunk_tokens=64)
    text = list(range(8000))
    flying = runs(machine.step(ask("a", text), 0))
    for i in range(30):
        flying += runs(machine.step(ask(f"b{i}", [*text, i]), 0))
    compared = 0

    def counted(a: Sequence[int], b: Sequence[int], most: int) -> int:
        nonlocal compared
        found = common(a, b, most)
        compared += found
        return found

    monkeypatch.setattr(slots, "common", counted)
    after = 50  # steps in which two answers have all cells
    while after:
        after -= len(machine.running) == 2
        run = flying.pop(0)
        flying += runs(machine.step(Returned(run.step, (7,) * int(run.outputs.sum())), 0))
    assert compared <= 2 * 31 * len(text)  # once or twice for each answer
    assert machine.reused >= len(text) - FOLLOW_LEAST


def test_what_was_kept_longest_is_given_up_first_when_cells_are_wanted() -> None:
    machine = make(kv_cells=1000, chunk_tokens=64)
    for name, first in (("old", 0), ("new", 1000)):
        finish(machine, runs(machine.step(ask(name, range(first, first + 300), tokens=2), 0)))
    found = runs(machine.step(ask("big", range(5000, 5500), tokens=40), 0))
    assert Trim(0, 0) in found[0].ops
    finish(machine, found)
    (run,) = runs(machine.step(ask("again", [*range(1000, 1300), 8]), 0))
    assert len(run.ids) == 1


def test_a_recurrent_model_goes_on_from_whole_slots_only() -> None:
    machine = make(chunk_tokens=64)
    machine.recurrent()
    finish(machine, runs(machine.step(ask("a", range(50), tokens=3), 0)))
    (run,) = runs(machine.step(ask("edited", [*range(40), 500], tokens=2), 0))
    assert len(run.ids) == 41
    finish(machine, [run])
    (run,) = runs(machine.step(ask("on", [*range(50), 7, 7, 7, 500]), 0))
    assert run.ids.tolist() == [7, 500]


def test_a_cancelled_answers_rows_in_flight_do_not_end_in_another_answer() -> None:
    machine = make(slots=1, depth=2)
    machine.step(ask("a", range(5)), 0)
    (run,) = runs(machine.step(Cancelled(("e", "a")), 0) + machine.step(ask("b", [8, 9]), 0))
    assert run.ops[0] == Trim(0, 0)
    assert told(machine.step(Returned(1, (7,)), 0)) == []
    assert told(machine.step(Returned(2, (6,)), 0)) == [("b", (6,))]


def test_numbers_of_a_cancelled_answer_that_are_not_finite_end_nobody_elses() -> None:
    machine = make(slots=1, depth=2)
    machine.step(ask("a", range(20)), 0)
    machine.step(Cancelled(("e", "a")), 0)
    machine.step(ask("b", [*range(12), 900]), 0)  # begins with what a's chunks in flight give
    actions = machine.step(Returned(1, (), (Fault(0, "p"),)), 0)
    (run,) = runs(actions)
    assert run.ops[0] == Trim(0, 0)
    assert isinstance(run.ops[1], Open)
    assert len(run.ids) == 13  # b is read anew, and trusts nothing
    for step in range(2, run.step):  # of a's rest, and of b's first beginning
        actions += machine.step(Returned(step, (6,), (Fault(0, "p"),)), 0)
    actions += machine.step(Returned(run.step, (5,)), 0)
    assert not any(isinstance(action, Refuse) for action in actions)
    assert told(actions) == [("b", (5,))]


class Guess:
    """Guesses the same ids always."""

    def __init__(self, *ids: int) -> None:
        self.ids = ids
        self.seen: list[int] = []

    def draft(self, most: int, cost_s: object) -> tuple[int, ...]:
        return self.ids[:most]

    def took(self, ids: Sequence[int]) -> None:
        self.seen += ids


def guessing(tokens: int = 40, *guess: int) -> tuple[Scheduler, Run, Guess]:
    machine = make()
    for rows in (1, 8):
        machine.tempo.observe(rows, 0.02, 0.01, 0.03)
    machine.step(ask("a", range(10), tokens), 0)
    speculation = Guess(*guess)
    machine.running[0].speculation = speculation  # type: ignore[assignment]
    (run,) = runs(machine.step(Returned(1, (50,)), 0))
    return machine, run, speculation


def test_guesses_follow_the_last_id_and_those_that_are_right_are_all_given_at_once() -> None:
    machine, run, speculation = guessing(40, 51, 52, 53)
    assert run.ids.tolist() == [50, 51, 52, 53]
    assert run.outputs.all()
    assert np.frombuffer(run.drafts[0].ids, np.int32).tolist() == [51, 52, 53]
    actions = machine.step(Returned(2, (51, 52, 60), taken=(3,)), 0)
    assert told(actions) == [("a", (51, 52, 60))]
    (after,) = runs(actions)
    assert after.ops == (Trim(0, 13),)  # 10 of the prompt, 50, 51, 52
    assert after.positions.tolist()[0] == 13
    assert after.ids.tolist()[0] == 60
    assert (machine.drafted, machine.accepted) == (6, 2)
    assert speculation.seen == [50, 51, 52, 60]


def test_guesses_stop_before_the_answers_last_token() -> None:
    _, run, _ = guessing(3, 51, 52, 53)
    assert run.ids.tolist() == [50, 51]


def test_an_end_among_the_tokens_ends_the_answer_and_what_was_computed_stays() -> None:
    machine, _, _ = guessing(40, 51, 99_999, 53)
    actions = machine.step(Returned(2, (51, 99_999, 53, 54), taken=(4,)), 0)
    assert [a for a in actions if isinstance(a, Deliver)] == [
        Deliver(("e", "a"), 11, (51,), "stop")
    ]
    (run,) = runs(machine.step(ask("b", [*range(10), 50, 51, 8]), 0))
    assert run.ids.tolist() == [8]
    assert Trim(0, 12) in run.ops


def test_a_tail_that_accepts_what_was_not_guessed_is_not_believed() -> None:
    machine, _, _ = guessing(40, 51, 52)
    actions = machine.step(Returned(2, (60, 61), taken=(2,)), 0)
    assert any(isinstance(action, Lost) for action in actions)


def test_nothing_is_guessed_while_more_answers_run_than_stages() -> None:
    machine = make(chunk_tokens=64)
    for rows in (1, 8):
        machine.tempo.observe(rows, 0.02, 0.01, 0.03)
    flying: list[Run] = []
    for i in range(3):
        flying += runs(machine.step(ask(f"r{i}", range(i * 100, i * 100 + 5)), 0))
        machine.running[i].speculation = Guess(1, 2)  # type: ignore[assignment]
    for _ in range(8):
        run = flying.pop(0)
        flying += runs(machine.step(Returned(run.step, (7,) * int(run.outputs.sum())), 0))
    assert not any(run.drafts for run in flying)


def test_alone_a_prompt_goes_in_whole_chunks() -> None:
    assert chunk(Linear(0.001, 0.001), 0, 1, 2, 256) == Chunk(256)


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_beside_answers_a_chunk_keeps_the_time_between_their_tokens_within_the_bound(
    depth: int,
) -> None:
    for groups in range(1, depth + 1):
        for pace in (Linear(0.001, 0.001), Linear(0.01, 0.0001), Linear(0.0, 0.004)):
            found = chunk(pace, 1, groups, depth, 512)
            own_s = pace.stage_s(1)
            gap_s = depth * pace.stage_s(1 + found.rows)
            if found.in_row:
                gap_s = groups * (own_s + found.in_row * pace.stage_s(found.rows))
            assert gap_s <= GAP * depth * own_s * 1.001 or found.rows == CHUNK_LEAST


def test_no_step_with_decoding_rows_is_so_long_that_company_changes_their_bits() -> None:
    for decoding in (1, 4, 32, 63):
        for pace in (Linear(0.01, 0.00001), Linear(0.001, 0.001), Linear(0.0, 0.0)):
            found = chunk(pace, decoding, 1, 2, 512)
            assert found.in_row or found.rows + decoding <= ALIKE_ROWS


def test_prompts_share_steps_where_rows_are_nearly_free_and_take_turns_where_not() -> None:
    assert chunk(Linear(0.01, 0.00001), 4, 1, 2, 48) == Chunk(48)
    assert chunk(Linear(0.0, 0.004), 1, 1, 2, 256).in_row == 1


@pytest.mark.parametrize(("depth", "answers"), [(1, 1), (2, 1), (2, 4), (3, 1), (3, 3), (4, 2)])
def test_tokens_go_on_coming_while_a_long_prompt_is_read(depth: int, answers: int) -> None:
    """In a ring of equal stages whose steps take as long as on a processor: most gaps within the
    bound, none far beyond it, and the stages at work."""
    ring = Clocked(depth)
    for i in range(answers):
        ring.ask(f"a{i}", range(1000 * i, 1000 * i + 20), 400)
    ring.until(lambda: len(ring.came.get("a0", [])) >= 60)
    usual_s = float(np.median(np.diff(ring.came["a0"])[-30:]))
    begun_s = ring.now
    ring.ask("long", range(20_000, 20_500), 3)
    ring.until(lambda: "long" in ring.came)
    times = [at for at in ring.came["a0"] if at >= begun_s]
    gaps = np.diff(times) / usual_s
    least = (ring.stage_s(1) + ring.stage_s(CHUNK_LEAST)) / ring.stage_s(1)
    assert float(np.percentile(gaps, 90)) <= max(GAP * 1.5, least)
    assert float(gaps[4:].max()) <= 2.5 * GAP  # of the first chunks the pace was a guess
    assert ring.now - begun_s <= 6 * ring.stage_s(500)


class Clocked:
    """Equal stages in virtual time."""

    ROWS, MS = (1, 2, 4, 8, 16, 64, 512), (7, 16, 28, 46, 80, 301, 2406)  # SmolLM2 on one core

    def __init__(self, depth: int) -> None:
        self.machine = make(depth=depth, chunk_tokens=64)
        self.depth = depth
        self.now = 0.0
        self.came: dict[str, list[float]] = {}
        self._free = [0.0] * depth
        self._flying: deque[tuple[float, Run]] = deque()

    def stage_s(self, rows: int) -> float:
        return float(np.interp(rows, self.ROWS, self.MS)) / 1000 / self.depth

    def ask(self, key: str, ids: Sequence[int], tokens: int) -> None:
        self._do(self.machine.step(ask(key, ids, tokens), self.now))

    def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self.now, run = self._flying.popleft()
            tokens = (7,) * int(run.outputs.sum())
            took_s = self.stage_s(len(run.ids))
            returned = Returned(run.step, tokens, spent_s=took_s * self.depth, slowest_s=took_s)
            self._do(self.machine.step(returned, self.now))

    def _do(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Deliver) and action.ids:
                self.came.setdefault(action.key[1], []).append(self.now)
            elif isinstance(action, Run):
                at = self.now
                for stage in range(self.depth):
                    at = max(at, self._free[stage]) + self.stage_s(len(action.ids))
                    self._free[stage] = at
                self._flying.append((at, action))
