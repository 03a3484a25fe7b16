"""Stages' real times correct what was measured, and only what was measured."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from peer.planning import costs
from peer.planning.correction import CONFIRM_S, FADE_S, Corrections, corrected, faded
from peer.planning.plan import Plan, PlanId, PlanWindow, Split
from peer.planning.profile import Profile, Speed
from peer.protocol import Timed
from tests.coordinator import A, B, profile, shape

MODEL = shape()
SPEED = Speed(MODEL.digest, "fake", "cpu", 4, (1e-3,), (0.1,), 512, 2e-4, 3e-4)
MINE = profile(A, speeds=(SPEED, replace(SPEED, digest="9" * 64)))
PLAN = Plan(
    PlanId(1, 1),
    A,
    MODEL,
    Split((PlanWindow(A, 0, 8, "fake"), PlanWindow(B, 8, 12, "fake")), 512, 512, 8, 512),
)


def expected_s(of: Profile) -> float:
    found = costs.forecast([of, profile(B)], MODEL, PLAN.split)
    assert found is not None
    return found.peers[0].decode_s - costs.HEAD_S  # what a stage computes


@pytest.mark.parametrize("factor", [0.5, 1.5, 3.0])
def test_after_a_correction_the_forecast_is_what_was_seen(factor: float) -> None:
    seen_s = expected_s(MINE) * factor
    after = corrected(MINE, PLAN, Timed(decode_s=seen_s))
    assert after is not None
    assert expected_s(after) == pytest.approx(seen_s)
    assert after.speeds[0].correction == pytest.approx(factor)
    assert after.speeds[1] == MINE.speeds[1], "another model's speed"
    assert corrected(after, PLAN, Timed(decode_s=seen_s)) is None


def test_small_deviations_and_silence_change_nothing() -> None:
    assert corrected(MINE, PLAN, Timed(decode_s=expected_s(MINE) * 1.05)) is None
    assert corrected(MINE, PLAN, Timed(tpot_s=1.0)) is None


def test_what_is_usual_is_not_corrected() -> None:
    assert corrected(profile(A), PLAN, Timed(decode_s=1.0)) is None


def test_a_stage_that_stood_still_does_not_make_its_peer_absurd() -> None:
    after = corrected(MINE, PLAN, Timed(decode_s=1e6))
    assert after is not None
    assert after.speeds[0].correction == 100.0


def test_what_a_stage_waits_for_its_disk_is_no_slowness_of_its_processor() -> None:
    windows = (replace(PLAN.split.windows[0], streamed_bytes=1 << 20), PLAN.split.windows[1])
    streams = replace(PLAN, split=replace(PLAN.split, windows=windows))
    assert corrected(MINE, streams, Timed(decode_s=expected_s(MINE) * 3)) is None


@pytest.mark.parametrize(("seen", "correction"), [(1.5, 1.0), (2.0, 1.0), (3.0, 1.5), (0.5, 0.5)])
def test_what_a_control_group_withholds_is_not_counted_twice(
    seen: float, correction: float
) -> None:
    half = replace(MINE, cpu_share=0.5)
    after = corrected(half, PLAN, Timed(decode_s=expected_s(half) * seen)) or half
    assert after.speeds[0].correction == pytest.approx(correction)


def test_what_held_a_stage_up_once_is_forgotten_step_by_step() -> None:
    busy: Profile | None = profile(A, speeds=(replace(SPEED, correction=2.0),))
    seen = []
    while busy is not None:
        seen.append(round(busy.speeds[0].correction, 2))
        busy = faded(busy)
    assert seen == [2.0, 1.41, 1.19, 1.09, 1.04, 1.0]


def test_a_moment_of_other_work_is_no_reason_for_a_correction() -> None:
    corrections, right_s = Corrections(0.0), expected_s(MINE)
    slow, right = Timed(decode_s=3 * right_s), Timed(decode_s=right_s)
    for at, timed in ((0, slow), (10, slow), (15, right), (20, slow), (35, slow)):
        assert corrections.told(MINE, PLAN, timed, at) is None
    after = corrections.told(MINE, PLAN, slow, 20 + CONFIRM_S)
    assert after is not None
    assert after.speeds[0].correction == pytest.approx(3.0)


def test_a_correction_fades_while_there_is_no_stage_and_slower_after_each_mistake() -> None:
    corrections, now = Corrections(0.0), FADE_S
    slow = profile(A, speeds=(replace(SPEED, correction=4.0),))
    assert corrections.passed(slow, False, now - 1) is None
    assert corrections.passed(slow, True, now) is None, "a stage tells what is true"
    now += FADE_S
    after = corrections.passed(slow, False, now)
    assert after is not None
    assert after.speeds[0].correction == 2.0
    wrong = Timed(decode_s=2 * expected_s(after))
    assert corrections.told(after, PLAN, wrong, now) is None
    assert corrections.told(after, PLAN, wrong, now + CONFIRM_S) is not None
    assert corrections.passed(slow, True, now) is None
    assert corrections.passed(slow, False, now + 2 * FADE_S - 1) is None
    assert corrections.passed(slow, False, now + 2 * FADE_S) is not None
