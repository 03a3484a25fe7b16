"""Medians of steps: of one row, of long ones, and from token to token of an answer alone."""

from __future__ import annotations

import pytest

from peer.ring.paces import POSITION_MAX, PREFILL_ROWS, Paces


def test_medians_of_each_kind_of_step() -> None:
    paces = Paces()
    for seconds in (1.0, 2.0, 3.0, 100.0, 2.0, 2.0, 2.0, 1.0, 3.0):
        paces.computed(1, seconds)
    paces.computed(PREFILL_ROWS * 2, PREFILL_ROWS * 4.0)
    paces.computed(3, 1e6)  # neither
    said = paces.summary()
    assert said.decode_s == 2.0
    assert said.prefill_s == 2.0


def test_nothing_is_said_after_a_few_steps_only() -> None:
    paces = Paces()
    for _ in range(3):
        paces.computed(1, 1.0)
        paces.begun(1, True, 1.0)
    assert paces.summary().decode_s == 0.0
    assert paces.summary().tpot_s == 0.0


def test_tokens_are_apart_what_lies_between_steps_of_one_row_that_follow_each_other() -> None:
    paces, now = Paces(), 0.0
    for _ in range(10):
        paces.begun(1, True, now)
        now += 0.5
    paces.rested()  # the answer ended; the next one comes much later
    now += 1000
    for _ in range(10):
        paces.begun(1, True, now)
        now += 0.5
    paces.begun(200, True, now)  # a prompt between tokens
    now += 99
    paces.begun(1, True, now)
    assert paces.summary().tpot_s == pytest.approx(0.5)


def test_a_summary_is_wanted_again_only_after_new_steps() -> None:
    paces = Paces()
    paces.computed(1, 1.0)
    assert paces.told != paces.seen
    paces.summary()
    assert paces.told == paces.seen


def test_steps_late_in_a_long_answer_do_not_make_a_stage_slow() -> None:
    paces = Paces()
    for position in range(POSITION_MAX - 20, POSITION_MAX + 1000):
        paces.computed(1, 0.001 if position < POSITION_MAX else 0.1, position)
    assert paces.summary().decode_s == 0.001


def test_tokens_are_not_apart_what_lies_between_steps_of_several_answers() -> None:
    paces = Paces()
    for now in range(20):
        paces.begun(1, now % 5 != 0, float(now))
    assert paces.summary().tpot_s == 1.0
    several = Paces()
    for now in range(20):
        several.begun(1, False, float(now))
    assert several.summary().tpot_s == 0.0


def test_waits_and_sends_are_those_of_steps_of_one_row() -> None:
    paces = Paces()
    for _ in range(10):
        paces.computed(1, 1.0, 0, 3.0, 0.25)
        paces.computed(40, 1.0, 0, 99.0, 9.0)
    said = paces.summary()
    assert (said.wait_s, said.send_s) == (3.0, 0.25)
