"""A plan that serves is replaced only where that is worth it, and the reason is told."""

from __future__ import annotations

import dataclasses

from msgspec.structs import replace

from peer.planning.making import WORTH, Answer, Members, Question, answer, measured, pace
from peer.planning.plan import Plan, PlanId
from peer.planning.profile import Link, ModelShape, Profile, Speed
from tests.coordinator import MIB, A, B, C, offer, profile, shape

MODEL = shape()


def fast(peer_id: str, decode_s: float, memory_mib: int = 4000, **changes: object) -> Profile:
    """A peer that takes no part for the sake of it, and so long for each layer."""
    speed = Speed(MODEL.digest, "fake", "cpu", 4, (decode_s,), (decode_s * 50,), 512)
    return profile(peer_id, memory_mib, speeds=(speed,), **({"spread_all": False} | changes))


def ask(
    *profiles: Profile,
    current: tuple[Plan, ...] = (),
    holders: str = A,
    model: ModelShape = MODEL,
    barred: dict[str, str] | None = None,
) -> Question:
    members = Members(
        frozenset(p.peer_id for p in profiles),
        {p.peer_id: p for p in profiles},
        {peer_id: [offer(model)] for peer_id in [holders]},
    )
    return Question(1, PlanId(1, 7), A, members, (model,), {model.digest: barred or {}}, current)


def planned(question: Question) -> Plan:
    plan = answer(question).plan
    assert plan is not None
    return plan


def ring(of: Answer) -> tuple[str, ...]:
    assert of.plan is not None
    return of.plan.ring


def test_without_a_plan_the_fastest_peer_runs_all() -> None:
    first = answer(ask(fast(A, 2e-3), fast(B, 1e-3)))
    assert ring(first) == (B,)
    assert not first.kept


def test_of_equal_peers_the_one_that_has_the_parts_runs_them() -> None:
    assert ring(answer(ask(fast(A, 1e-3), fast(B, 1e-3), holders=B))) == (B,)
    assert ring(answer(ask(fast(A, 1e-3), fast(B, 1e-3), holders=A))) == (A,)


def test_a_faster_peer_replaces_the_plan_only_by_the_stated_margin() -> None:
    now = planned(ask(fast(A, 1e-3)))
    little = answer(ask(fast(A, 1e-3), fast(B, 1e-3 * (1 - WORTH / 2)), current=(now,)))
    assert little.kept
    assert little.plan == now
    much = answer(ask(fast(A, 1e-3), fast(B, 1e-3 * (1 - 2 * WORTH)), current=(now,)))
    assert not much.kept
    assert ring(much) == (B,)
    assert "instead of" in much.gain


def test_a_peer_that_joins_and_would_not_help_changes_nothing() -> None:
    now = planned(ask(fast(A, 1e-3)))
    assert answer(ask(fast(A, 1e-3), fast(B, 5e-3), fast(C, 1e-3), current=(now,))).kept


def test_a_plan_goes_on_though_its_own_weights_fill_the_memory_now() -> None:
    now = planned(ask(fast(A, 1e-3)))
    assert answer(ask(fast(A, 1e-3, memory_mib=1), current=(now,))).kept or (
        answer(ask(fast(A, 1e-3, memory_mib=1), current=(now,))).plan is None
    )
    both = answer(ask(fast(A, 1e-3, memory_mib=1), fast(B, 1e-3), current=(now,)))
    assert both.kept
    assert ring(both) == (A,)


def test_a_plan_whose_peer_is_done_without_is_replaced() -> None:
    now = planned(ask(fast(A, 1e-3)))
    other = answer(
        ask(fast(A, 1e-3), fast(B, 9e-3), current=(now,), barred={A: "its stage failed"})
    )
    assert ring(other) == (B,)
    assert "done without" in other.gain


def test_a_plan_with_a_peer_that_talks_nonsense_now_is_replaced() -> None:
    now = planned(ask(fast(A, 1e-3)))
    other = answer(ask(fast(A, 1e-3, cpu_share=0.0), fast(B, 9e-3), current=(now,)))
    assert ring(other) == (B,)
    assert "machine-a" in other.gain


def test_everyone_takes_part_as_soon_as_they_are_here_where_that_is_wanted() -> None:
    alone = ask(fast(A, 1e-3, spread_all=True))
    both = answer(ask(fast(A, 1e-3, spread_all=True), fast(B, 9e-3), current=(planned(alone),)))
    assert not both.kept
    assert set(ring(both)) == {A, B}


def test_room_for_twice_the_context_is_worth_a_change() -> None:
    model = replace(MODEL, context=4096, layer_kv_bytes=(MIB // 64,) * 12, hidden=1)
    small = planned(ask(fast(A, 1e-3, 400), model=model))
    assert small.split.context < 4096
    more = answer(ask(fast(A, 1e-3, 400), fast(B, 1e-3, 4000), current=(small,), model=model))
    assert not more.kept
    assert more.plan is not None
    assert more.plan.split.context == 4096


def test_a_context_that_is_set_counts_though_it_is_less_or_hardly_more() -> None:
    now = planned(ask(fast(A, 1e-3, context_wanted=300)))
    for wanted, context in ((200, 200), (400, 400), (10_000, MODEL.context)):
        other = answer(ask(fast(A, 1e-3, context_wanted=wanted), current=(now,)))
        assert other.plan is not None
        assert other.plan.split.context == context
        assert not other.kept
        again = ask(fast(A, 1e-3, context_wanted=wanted), current=(other.plan,))
        assert answer(again).kept
    assert answer(ask(fast(A, 1e-3), current=(now,))).kept, "nothing is set"


def test_a_model_that_fits_nowhere_says_what_is_missing_and_the_next_one_is_served() -> None:
    huge = replace(shape("huge", "1"), layer_bytes=(1 << 33,) * 12)
    question = dataclasses.replace(ask(fast(A, 1e-3)), shapes=(huge, MODEL))
    found = answer(question)
    assert found.plan is not None
    assert found.plan.shape == MODEL
    assert "are missing" in found.whys[huge.digest]


def test_a_profile_counts_as_measured_by_a_speed_of_its_engine_or_by_saying_that_it_cannot() -> (
    None
):
    assert measured(fast(A, 1e-3, unmeasured=()), MODEL)
    assert not measured(fast(A, 1e-3, unmeasured=()), replace(MODEL, digest="f" * 64))
    assert measured(profile(A, unmeasured=(MODEL.digest,)), MODEL)
    other = replace(fast(A, 1e-3).speeds[0], backend="llama_cpp")
    assert not measured(profile(A, speeds=(other,), unmeasured=()), MODEL)


def test_small_changes_of_speed_and_links_are_no_reason_to_plan_again() -> None:
    before = fast(A, 1e-3, links=(Link(B, 1e-3, 1e8),))
    after = fast(A, 1.02e-3, links=(Link(B, 1.1e-3, 1.1e8),))
    assert pace(before, MODEL.digest) == pace(after, MODEL.digest)
    assert pace(before, MODEL.digest) != pace(fast(A, 2e-3, links=before.links), MODEL.digest)
    slow = fast(A, 1e-3, links=(Link(B, 1e-3, 1e7),))
    assert pace(before, MODEL.digest) != pace(slow, MODEL.digest)
