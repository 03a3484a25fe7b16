"""Hung or at work: what a stage that does not answer is told apart by."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from peer.ring.lease import ASK_S, Action, Bounds, Hung, Lease, Look, Ping, Pong

STEP_S = 120.0
ROWS = 512


@dataclass
class Stage:
    """A stage as its supervisor sees it: looked at once a second, in virtual time."""

    lease: Lease
    now: float = 0.0
    cpu_s: float = 0.0
    read_bytes: int = 0
    state: Literal["runs", "disk", "stopped"] = "runs"
    asked: list[int] = field(default_factory=list)

    def look(self, at: float | None = None) -> str:
        """One look, when it is due or at another time. Why it is hung, or ""."""
        self.now = self.lease.deadline if at is None else at
        return self.take(self.lease.step(Look(self.cpu_s, self.read_bytes, self.state), self.now))

    def take(self, actions: list[Action]) -> str:
        for action in actions:
            match action:
                case Ping(number):
                    self.asked.append(number)
                case Hung(why):
                    return why
        return ""

    def answer(self, after_s: float = 0.0, row_s: float = 0.0) -> None:
        self.now += after_s
        self.lease.step(Pong(self.asked[-1], row_s), self.now)

    def work(self, seconds: int, row_s: float) -> None:
        """It computes for so long, and only then answers."""
        for _ in range(seconds):
            assert not self.look()
            self.cpu_s += 1.0
        self.answer(0.001, row_s)

    def until_hung(self, within_s: float = 1000.0, cpu_share: float = 0.0) -> tuple[float, str]:
        """(when, why) it is said to be hung, with so much processor time meanwhile; inf: never."""
        began = self.now
        while self.now - began < within_s:
            before = self.now
            if why := self.look():
                return self.now - began, why
            self.cpu_s += (self.now - before) * cpu_share
        return float("inf"), ""


def stage(on_gpu: bool = False, bounds: Bounds | None = None) -> Stage:
    """A stage that is ready and answered the first question."""
    found = Stage(Lease(0.0, ROWS, STEP_S, on_gpu, bounds or Bounds()))
    found.look()
    found.answer(0.001)
    return found


def test_a_stage_that_answers_is_asked_once_a_second_for_ever() -> None:
    idle = stage()
    for _ in range(1000):
        assert not idle.look()
        idle.answer(0.01)
    assert idle.asked == list(range(1, 1002))
    assert idle.now < 1002 * ASK_S + 1


def test_one_that_neither_computes_nor_answers_is_hung_within_seven_seconds() -> None:
    after_s, why = stage().until_hung()
    assert 5.0 <= after_s <= 7.0
    assert why == "hung: it neither computed nor answered for 5 s"


def test_one_that_was_stopped_is_said_to_have_been() -> None:
    frozen = stage()
    frozen.state = "stopped"
    after_s, why = frozen.until_hung()
    assert after_s <= 7.0
    assert "stopped" in why


def test_it_is_asked_only_once_while_it_does_not_answer() -> None:
    silent = stage()
    silent.until_hung()
    assert len(silent.asked) == 2


def test_an_honest_first_prompt_on_a_slow_machine_may_take_as_long_as_any_step() -> None:
    after_s, why = stage().until_hung(cpu_share=1.0)
    assert STEP_S <= after_s <= STEP_S + 2 * ASK_S
    assert why == "hung: it did not answer for 120 s while it seemed to compute"


def test_one_that_computes_far_longer_than_any_step_can_is_hung() -> None:
    spinning = stage()
    spinning.look()
    spinning.answer(0.4, row_s=0.001)
    after_s, why = spinning.until_hung(cpu_share=1.0)
    assert 10.0 <= after_s <= 12.0
    assert "while it seemed to compute" in why


def test_four_times_the_longest_gap_is_waited_for() -> None:
    slow = stage()
    slow.work(8, row_s=0.001)
    after_s, why = slow.until_hung(cpu_share=1.0)
    assert 4 * 8.0 <= after_s <= 4 * 8.0 + 2 * ASK_S
    assert "its longest step so far took 8 s" in why


def test_a_full_batch_that_was_never_seen_is_reckoned_with() -> None:
    """Short prompts told that a row takes 40 ms: the longest step may take 20 s, and 80 is fair."""
    slow = stage()
    slow.look()
    slow.answer(0.5, row_s=0.04)
    after_s, _ = slow.until_hung(cpu_share=1.0)
    assert 81.0 <= after_s <= 84.0


def test_no_step_is_waited_for_longer_than_the_ring_waits() -> None:
    slow = stage()
    slow.work(90, row_s=1.0)
    after_s, _ = slow.until_hung(cpu_share=1.0)
    assert after_s <= STEP_S + 2 * ASK_S


def test_reading_is_work_and_so_is_waiting_for_a_disk() -> None:
    reading = stage()
    for _ in range(60):
        reading.read_bytes += 4096
        assert not reading.look()
    spinning_up = stage()
    spinning_up.state = "disk"
    for _ in range(60):
        assert not spinning_up.look()


def test_a_little_of_the_processor_is_what_a_hung_stages_sockets_use() -> None:
    after_s, _ = stage().until_hung(cpu_share=0.001)
    assert after_s <= 7.0


def test_one_that_hangs_after_long_work_is_hung_from_then_on() -> None:
    working = stage()
    for _ in range(30):
        working.cpu_s += 1.0
        assert not working.look()
    after_s, _ = working.until_hung()
    assert 4.0 <= after_s <= 6.0


def test_a_gpu_may_be_waited_for_without_computing_but_not_by_a_stopped_process() -> None:
    after_s, why = stage(on_gpu=True).until_hung()
    assert after_s >= STEP_S
    assert "120 s" in why
    known = stage(on_gpu=True)
    known.look()
    known.answer(0.4, row_s=0.001)
    assert 10.0 <= known.until_hung()[0] <= 12.0
    frozen = stage(on_gpu=True)
    frozen.state = "stopped"
    assert frozen.until_hung()[0] <= 7.0


def test_time_in_which_nobody_looked_is_not_held_against_the_stage() -> None:
    """The agent was stopped together with its stage, or starved: the answer may still be coming."""
    slept = stage()
    slept.look()
    assert not slept.look(at=slept.now + 300.0)
    assert not slept.look()
    slept.answer(0.01, row_s=0.001)
    # The sleep was no gap between answers, either.
    after_s, _ = slept.until_hung(cpu_share=1.0)
    assert after_s <= 4 * 4.0 + 2 * ASK_S


def test_an_answer_that_waited_while_nobody_looked_is_no_late_one() -> None:
    slept = stage()
    slept.look()
    slept.answer(300.0, row_s=0.001)
    after_s, _ = slept.until_hung(cpu_share=1.0)
    assert after_s <= 12.0


def test_a_stage_that_hangs_while_the_agent_is_late_again_and_again_is_found_in_the_end() -> None:
    silent = stage()
    began = silent.now
    for _ in range(20):
        if silent.look(at=silent.lease.deadline + 0.5):
            break
    else:
        raise AssertionError("never noticed")
    assert silent.now - began <= 12.0


def test_an_answer_to_an_older_question_is_none() -> None:
    confused = stage()
    confused.look()
    confused.lease.step(Pong(1), confused.now + 0.1)
    after_s, _ = confused.until_hung()
    assert after_s <= 7.0
