"""What steps take: medians by classes of rows, lines between them, outliers, a changed pace."""

from __future__ import annotations

import pytest

from peer.ring.tempo import Tempo

# Measured: a small model on two cores, milliseconds by rows.
CPU_MS = {1: 7.1, 2: 17.5, 3: 24, 4: 30, 5: 39, 8: 49, 16: 83, 512: 2414}


def seen(steps: dict[int, float], times: int = 3, hops_s: float = 0.004) -> Tempo:
    """Steps of so many rows took so long, half of it in the slowest stage."""
    tempo = Tempo()
    for _ in range(times):
        for rows, seconds in steps.items():
            tempo.observe(rows, seconds, seconds / 2, seconds + hops_s)
    return tempo


def cpu(times: int = 3) -> Tempo:
    return seen({rows: ms / 1e3 for rows, ms in CPU_MS.items()}, times)


def test_nothing_is_known_at_first() -> None:
    tempo = Tempo()
    assert not tempo.known
    assert tempo.round_s(1) == tempo.stage_s(7) == 0.0
    assert tempo.rows_within(0.001, 300) == 300


def test_it_is_known_once_a_step_of_one_row_was_seen() -> None:
    tempo = seen({40: 0.2})
    assert not tempo.known
    tempo.observe(1, 0.007, 0.004, None)
    assert tempo.known


def test_a_step_without_rows_tells_nothing() -> None:
    tempo = Tempo()
    tempo.observe(0, 1.0, 1.0, 1.0)
    assert tempo.round_s(1) == 0.0


def test_what_was_seen_is_what_is_told() -> None:
    tempo = cpu()
    for rows in (1, 2, 16, 512):
        assert tempo.round_s(rows) == pytest.approx(CPU_MS[rows] / 1e3 + 0.004)
        assert tempo.stage_s(rows) == pytest.approx(CPU_MS[rows] / 2e3)


def test_between_what_was_seen_lie_lines() -> None:
    tempo = cpu()
    assert tempo.stage_s(264) == pytest.approx((83 + 2414) / 2 / 2e3)
    assert tempo.stage_s(12) == pytest.approx((tempo.stage_s(8) + tempo.stage_s(16)) / 2, rel=0.1)


def test_beyond_what_was_seen_compute_grows_with_the_rows_and_a_hop_does_not() -> None:
    tempo = seen({4: 0.04, 10: 0.1})
    assert tempo.round_s(1000) == pytest.approx(10 + 0.004)
    assert tempo.round_s(2) == pytest.approx(0.02 + 0.004)


def test_hops_of_long_steps_may_take_longer() -> None:
    tempo = Tempo()
    for _ in range(5):
        tempo.observe(1, 0.01, 0.01, 0.012)
        tempo.observe(512, 1.0, 1.0, 1.05)
    assert tempo.round_s(1) == pytest.approx(0.012)
    assert tempo.round_s(512) == pytest.approx(1.05)


def test_only_steps_that_were_alone_tell_of_hops() -> None:
    tempo = seen({1: 0.01}, hops_s=0.002)
    for _ in range(50):
        tempo.observe(1, 0.01, 0.005, None)
    assert tempo.round_s(1) == pytest.approx(0.012)


def test_a_clock_that_says_less_than_was_computed_makes_no_hop_negative() -> None:
    tempo = seen({1: 0.01}, hops_s=-0.005)
    assert tempo.round_s(1) == pytest.approx(0.01)


def test_more_rows_never_take_less() -> None:
    tempo = seen({1: 0.02, 2: 0.01, 4: 0.03, 8: 0.025, 16: 0.08})
    told = [tempo.round_s(rows) for rows in range(1, 40)]
    assert told == sorted(told)
    assert tempo.stage_s(2) == pytest.approx(0.01)  # no less than one row's 0.02 / 2


def test_many_rows_as_fast_as_one_are_known_to_be() -> None:
    tempo = seen({1: 0.008, 30: 0.008, 256: 0.009})
    assert tempo.round_s(65) < 0.013
    assert tempo.rows_within(0.0046, 1000) >= 256


@pytest.mark.parametrize("seconds", [0.0, 0.003, 0.0035, 0.01, 0.0416, 0.3, 1.2, 9.0])
def test_rows_within_are_the_most_that_stay_within(seconds: float) -> None:
    tempo = cpu()
    rows = tempo.rows_within(seconds, 1000)
    assert 1 <= rows <= 1000
    assert rows == 1 or tempo.stage_s(rows) <= seconds
    assert rows == 1000 or tempo.stage_s(rows + 1) > seconds


def test_rows_within_are_at_least_one_and_at_most_what_is_asked() -> None:
    tempo = cpu()
    assert tempo.rows_within(0.0, 64) == 1
    assert tempo.rows_within(1e9, 64) == 64


def test_single_steps_of_ten_times_their_time_move_nothing() -> None:
    tempo = cpu(times=15)
    for step in range(60):
        slow = 10 if step % 4 == 0 else 1
        tempo.observe(1, 0.0071 * slow, 0.00355 * slow, 0.0111 * slow)
    assert tempo.round_s(1) == pytest.approx(0.0111)
    assert tempo.stage_s(1) == pytest.approx(0.00355)


def test_a_changed_pace_is_known_within_some_tens_of_steps() -> None:
    tempo = cpu(times=200)
    for _ in range(20):
        tempo.observe(1, 0.0142, 0.0071, 0.0182)
    assert tempo.round_s(1) == pytest.approx(0.0182)
    for _ in range(20):
        tempo.observe(1, 0.0071, 0.00355, 0.0111)
    assert tempo.round_s(1) == pytest.approx(0.0111)


def test_the_first_step_of_a_class_does_not_forbid_it_because_it_was_disturbed() -> None:
    tempo = seen({1: 0.0071, 512: 2.4}, times=10)
    tempo.observe(16, 0.83, 0.4, None)
    assert tempo.round_s(16) < 0.1
    tempo.observe(16, 0.083, 0.04, None)
    tempo.observe(16, 0.083, 0.04, None)
    assert tempo.round_s(16) == pytest.approx(0.087)


def test_of_two_steps_the_undisturbed_one_counts() -> None:
    tempo = seen({1: 0.07}, times=1)
    tempo.observe(1, 0.007, 0.004, None)
    assert tempo.stage_s(1) == pytest.approx(0.004)


def test_what_is_true_of_a_class_is_believed_after_three_steps_even_where_it_is_unlikely() -> None:
    tempo = seen({1: 0.007, 512: 2.4}, times=10)
    for _ in range(3):
        tempo.observe(2, 0.05, 0.02, None)
    assert tempo.round_s(2) == pytest.approx(0.054)


def test_a_class_that_was_slow_long_ago_is_tried_again() -> None:
    tempo = seen({1: 0.007, 512: 2.4}, times=10)
    for _ in range(15):
        tempo.observe(16, 0.9, 0.4, None)
    assert tempo.round_s(16) > 0.9
    for _ in range(600):
        tempo.observe(1, 0.007, 0.003, None)
    assert tempo.round_s(16) < 0.1


def test_a_class_is_told_by_the_rows_that_its_steps_had() -> None:
    """Steps of 300 and of 500 rows are of one class: neither is taken for 512."""
    tempo = seen({1: 0.01, 300: 3.0, 500: 5.0}, times=10)
    assert tempo.stage_s(500) == pytest.approx(2.5)
    assert tempo.stage_s(300) == pytest.approx(1.5, rel=0.01)
    tempo.observe(300, 3.0, 1.5, None)
    tempo.observe(300, 3.0, 1.5, None)
    assert tempo.stage_s(500) == pytest.approx(2.5, rel=0.01)
    assert tempo.stage_s(300) == pytest.approx(1.5, rel=0.01)


def test_what_is_kept_is_bounded() -> None:
    tempo = Tempo()
    for rows in range(1, 20_000):
        tempo.observe(rows, rows / 1e3, rows / 2e3, rows / 1e3)
    curves = (tempo._spent, tempo._slowest, tempo._hops)
    assert sum(len(steps) for curve in curves for steps in curve.seconds) <= 3 * 14 * 15
    assert tempo.round_s(20_000) == pytest.approx(20, rel=0.01)
