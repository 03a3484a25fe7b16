"""Several prompts at once: who is read when."""

from __future__ import annotations

from peer.ring.scheduler import Returned, Run, Scheduler
from tests.unit.test_pipelining import ask, finish, make, runs


def on(machine: Scheduler, run: Run) -> list[Run]:
    """The step comes back."""
    return runs(machine.step(Returned(run.step, (7,) * int(run.outputs.sum())), 0))


def running(machine: Scheduler, key: str) -> bool:
    return any(job.key[1] == key for job in machine.running.values())


def test_a_question_is_read_beside_a_book_that_came_before_it() -> None:
    machine = make(depth=1, chunk_tokens=16)
    (run,) = runs(machine.step(ask("book", range(900)), 0))
    machine.step(ask("question", range(2000, 2020)), 0)
    rows = []
    while True:
        (run,) = on(machine, run)
        rows.append((run.slots == 1).sum())
        if run.outputs.any():
            break
    assert rows == [8, 8, 4]
    assert (run.slots == 0).sum() == 12


def test_short_prompts_without_end_do_not_stop_a_long_one() -> None:
    machine = make(depth=1, chunk_tokens=16)
    (run,) = runs(machine.step(ask("book", range(900), tokens=1), 0))
    for i in range(900 // 8 + 2):
        machine.step(ask(f"q{i}", range(2000 + 30 * i, 2012 + 30 * i), tokens=1), 0)
        (run,) = on(machine, run)
        if not running(machine, "book"):
            return finish(machine, [run])
    raise AssertionError("the book is not read")


def test_a_step_of_one_row_is_the_oldest_answers() -> None:
    machine = make(depth=1, chunk_tokens=1)
    (run,) = runs(machine.step(ask("a", range(10)), 0))
    machine.step(ask("b", range(2000, 2003)), 0)
    for _ in range(9):
        (run,) = on(machine, run)
        assert run.slots.tolist() == [0]


def test_an_answer_that_is_asked_for_twice_is_one() -> None:
    machine = make(depth=1, chunk_tokens=16)
    (run,) = runs(machine.step(ask("a", range(5), tokens=1), 0))
    assert machine.step(ask("a", range(5), tokens=1), 0) == []
    assert on(machine, run) == []
    assert machine.active == 0
