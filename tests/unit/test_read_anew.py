"""Answers whose numbers are not finite: who is read anew, in which order, and who is forgotten."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from peer.ring.frames import Fault
from peer.ring.scheduler import Returned, Scheduler
from tests.unit.test_pipelining import ask, finish, make, runs


def doubted() -> tuple[Scheduler, list[str]]:
    """After three answers that went on from the same beginning all had such numbers; their names
    in the order in which they ran."""
    machine = make(depth=1, chunk_tokens=64)
    system = list(range(200))
    finish(machine, runs(machine.step(ask("first", system, tokens=2), 0)))
    (run,) = runs(machine.step(ask("b0", [*system, 600]), 0))
    machine.step(ask("b1", [*system, 601]), 0)
    machine.step(ask("b2", [*system, 602]), 0)
    for _ in range(2):
        (run,) = runs(machine.step(Returned(run.step, (7,) * int(run.outputs.sum())), 0))
    names = [job.key[1] for job in machine.running.values()]
    faults = tuple(Fault(slot, "p") for slot in run.slots.tolist())
    machine.step(Returned(run.step, (0,) * len(faults), faults), 0)
    return machine, names


def test_answers_that_are_read_anew_keep_their_order_and_do_not_wait_for_each_others_numbers() -> (
    None
):
    machine, names = doubted()
    assert [job.key[1] for job in machine.running.values()] == names == ["b0", "b1", "b2"]


def test_the_drafter_keeps_nothing_of_an_answer_that_ended_by_its_numbers() -> None:
    forgotten: list[Hashable] = []

    class Silent:
        seconds_each = 1.0

        def draft(self, key: Hashable, ids: Sequence[int], most: int) -> tuple[int, ...]:
            return ()

        def forget(self, key: Hashable) -> None:
            forgotten.append(key)

    machine = make(depth=1)
    machine.drafter = Silent()
    (run,) = runs(machine.step(ask("a", range(5)), 0))
    machine.step(Returned(run.step, (0,), (Fault(0, "p"),)), 0)
    assert forgotten == [("e", "a")]
