"""What makes a new plan of a question: who goes away, who comes and goes, which links broke."""

from __future__ import annotations

import dataclasses

from msgspec.structs import replace

from peer.planning.making import Answer, Question, answer
from peer.planning.plan import Plan, PlanId, PlanWindow, Split
from peer.planning.profile import Profile
from tests.coordinator import MIB, A, B, C, D, shape
from tests.unit.test_making import MODEL, ask, fast, planned, ring

BIG = replace(MODEL, layer_bytes=(100 * MIB,) * 12)  # 1,200 MiB


def small(peer_id: str, **changes: object) -> Profile:
    """One that holds half of the big model, and a little more."""
    return fast(peer_id, 1e-2, 800, **changes)


def question(*profiles: Profile, **changes: object) -> Question:
    asked = ask(*profiles, model=BIG)
    return dataclasses.replace(asked, **changes)  # type: ignore[arg-type]


def out(of: Answer) -> dict[str, str]:
    assert of.plan
    return {left.peer_id: left.why for left in of.plan.split.left_out}


# Shaky -----------------------------------------------------------------------------------------


def test_a_plan_does_without_a_peer_that_comes_and_goes_where_it_can() -> None:
    found = answer(question(small(A), small(B), small(C), shaky={B: "it comes and goes"}))
    assert set(ring(found)) == {A, C}
    assert out(found)[B] == "it comes and goes"


def test_of_one_that_cannot_run_the_model_anyway_the_reason_that_stays_is_told() -> None:
    unable = replace(small(B), engines=())
    found = answer(question(small(A), unable, small(C), shaky={B: "it comes and goes"}))
    assert out(found)[B] == unable.why_not(BIG) != ""


def test_and_with_it_where_it_cannot() -> None:
    found = answer(question(small(A), small(B), shaky={B: "it comes and goes"}))
    assert set(ring(found)) == {A, B}


def test_who_comes_and_goes_is_not_named_after_it_went() -> None:
    found = answer(question(small(A), small(C), shaky={B: "it comes and goes"}))
    assert set(ring(found)) == {A, C}
    assert B not in out(found)


def test_a_plan_is_not_given_up_only_because_one_of_its_ring_came_and_went() -> None:
    now = planned(question(small(A), small(B)))
    everyone = small(A), small(B), small(C)
    found = answer(question(*everyone, current=(now,), shaky={B: "it comes and goes"}))
    assert found.kept
    assert found.plan == now


def test_one_that_failed_and_is_shaky_is_not_planned_with_though_there_is_no_plan() -> None:
    failed = {BIG.digest: {B: "its stage failed"}}
    found = answer(question(small(A), small(B), shaky={B: "shaky"}, barred=failed))
    assert found.plan is None
    assert "its stage failed" in found.whys[BIG.digest]


# Leaving ---------------------------------------------------------------------------------------


def test_a_new_plan_does_without_whoever_goes_away() -> None:
    found = answer(question(small(A), small(B, leaving=True), small(C)))
    assert set(ring(found)) == {A, C}
    assert out(found)[B] == "machine-b is going away"


def test_a_plan_whose_peer_goes_away_is_replaced_and_the_others_keep_their_layers() -> None:
    now = planned(question(small(A), small(B), current=()))
    stays, goes = (B, A) if now.head == A else (A, B)
    leaving = [small(p, leaving=p == goes) for p in (A, B)]
    found = answer(question(*leaving, small(C), current=(now,)))
    assert not found.kept
    assert found.gain == f"machine-{goes[0]} goes away"
    assert set(ring(found)) == {stays, C}
    assert found.plan
    (had,) = [w for w in now.split.windows if w.peer_id == stays]
    (has,) = [w for w in found.plan.split.windows if w.peer_id == stays]
    assert has.first <= had.first
    assert has.last >= had.last


def test_a_plan_goes_on_where_nothing_can_serve_without_who_goes_away_and_it_is_said() -> None:
    now = planned(question(small(A), small(B)))
    found = answer(question(small(A), small(B, leaving=True), current=(now,)))
    assert found.kept
    assert found.plan == now
    why = found.whys[BIG.digest]
    assert "cannot be served without machine-b, which is going away: " in why
    assert "MiB are missing" in why


def test_it_goes_on_rather_than_another_model_while_its_answers_can_still_end() -> None:
    now = planned(question(small(A), small(B)))
    leaving = question(small(A), small(B, leaving=True), current=(now,), shapes=(BIG, MODEL))
    assert answer(leaving).plan == now
    gone = answer(question(small(A), shapes=(BIG, MODEL)))
    assert gone.plan
    assert gone.plan.shape == MODEL


def test_it_does_not_go_on_with_a_peer_whose_stage_failed() -> None:
    now = planned(question(small(A), small(B)))
    failed = {BIG.digest: {A: "its stage failed"}}
    both = small(A), small(B, leaving=True)
    found = answer(question(*both, current=(now,), barred=failed))
    assert found.plan is None
    assert "machine-b is going away" in found.whys[BIG.digest]


def test_where_all_go_away_there_is_no_new_plan() -> None:
    found = answer(question(small(A, leaving=True), small(B, leaving=True)))
    assert found.plan is None
    assert "machine-a is going away; machine-b is going away" in found.whys[BIG.digest]


# Links -----------------------------------------------------------------------------------------


def test_a_plan_over_a_link_that_broke_is_replaced_and_the_link_is_named() -> None:
    everyone = [fast(p, 1e-3, spread_all=True) for p in (A, B, C, D)]
    now = planned(ask(*everyone))
    assert len(now.ring) == 4
    for at, first in enumerate(now.ring):
        second = (*now.ring, now.head)[at + 1]
        told = [replace(p, unreachable=(second,) if p.peer_id == first else ()) for p in everyone]
        found = answer(ask(*told, current=(now,)))
        assert not found.kept
        names = f"machine-{first[0]} and machine-{second[0]} do not reach each other any more"
        assert found.gain == names
        assert set(ring(found)) == set(now.ring)
        assert found.plan
        ways = zip(found.plan.ring, (*found.plan.ring[1:], found.plan.head), strict=True)
        assert {first, second} not in [set(way) for way in ways]


def test_a_broken_link_between_others_changes_nothing() -> None:
    everyone = [fast(p, 1e-3, spread_all=True) for p in (A, B, C, D)]
    now = planned(ask(*everyone))
    across = now.ring[0], now.ring[2]
    told = [replace(p, unreachable=(across[1],) if p.peer_id == across[0] else ())
            for p in everyone]  # fmt: skip
    assert answer(ask(*told, current=(now,))).kept


def test_without_a_way_round_it_the_link_is_the_reason_why_there_is_no_plan() -> None:
    found = answer(question(small(A, unreachable=(B,)), small(B)))
    assert found.plan is None
    assert "machine-a and machine-b cannot reach each other" in found.whys[BIG.digest]


def test_the_head_is_one_that_a_peer_without_an_engine_reaches_too() -> None:
    first = planned(question(small(A), small(B))).head
    other = B if first == A else A
    asks = replace(small(C), engines=(), unreachable=(first,))
    assert planned(question(small(A), small(B), asks)).head == other


# Before ----------------------------------------------------------------------------------------


def served(*windows: tuple[str, int, int]) -> Plan:
    """A plan for the big model as no planner would make it anew."""
    rows = (PlanWindow(peer_id, a, b, "fake") for peer_id, a, b in windows)
    return Plan(PlanId(1, 6), A, BIG, Split(tuple(rows), 512, 512, 8, 512))


def has(found: Answer) -> list[tuple[str, int, int]]:
    assert found.plan
    return [(w.peer_id, w.first, w.last) for w in found.plan.split.windows]


def test_survivors_grow_into_the_hole_wherever_their_windows_lay() -> None:
    before = served((A, 0, 3), (B, 3, 9), (C, 9, 12))
    left = small(A), fast(C, 1e-2, 800)
    assert has(answer(question(*left, before=before))) != has(answer(question(*left)))
    assert has(answer(question(*left, before=before))) == [(A, 0, 7), (C, 7, 12)]


def test_so_they_do_where_a_peer_goes_away_or_fails_or_a_link_breaks() -> None:
    now = served((A, 0, 3), (B, 3, 9), (C, 9, 12))
    grown = [(A, 0, 7), (C, 7, 12)]
    leaving = answer(question(small(A), small(B, leaving=True), small(C), current=(now,)))
    assert (has(leaving), leaving.gain) == (grown, "machine-b goes away")
    failed = {BIG.digest: {B: "its stage failed"}}
    everyone = small(A), small(B), small(C)
    assert has(answer(question(*everyone, current=(now,), barred=failed))) == grown
    cut = small(A), small(B, unreachable=(A, C)), small(C)
    assert has(answer(question(*cut, current=(now,)))) == grown


def lost_one() -> tuple[Plan, str, list[Profile]]:
    """A plan that served on three, the one that was lost, and the others, who have more room."""
    three = [fast(p, 1e-2, 550) for p in (A, B, C)]
    before = planned(ask(*three, model=BIG))
    assert len(before.ring) == 3
    lost = before.ring[1]
    return before, lost, [fast(p, 1e-2, 850) for p in (A, B, C) if p != lost]


def kept(before: Plan, found: Answer) -> bool:
    """Whether all survivors have what they had."""
    assert found.plan
    new = {(w.peer_id, at) for w in found.plan.split.windows for at in range(w.first, w.last)}
    had = {(w.peer_id, at) for w in before.split.windows for at in range(w.first, w.last)}
    return all(each in new for each in had if each[0] in found.plan.ring)


def test_of_the_plan_before_the_survivors_keep_what_they_have() -> None:
    before, lost, left = lost_one()
    found = answer(question(*left, before=before))
    assert kept(before, found)
    assert ring(found) == tuple(p for p in before.ring if p != lost)


def test_the_plan_before_does_not_count_where_another_model_is_wanted_first() -> None:
    before, _, left = lost_one()
    huge = replace(shape("huge", "1"), layer_bytes=(1 << 33,) * 12)
    late = question(*left, before=before, shapes=(huge, BIG))
    assert answer(late).plan == answer(dataclasses.replace(late, before=None)).plan


def test_who_is_new_and_who_failed_do_not_keep_the_others_from_staying() -> None:
    before, lost, left = lost_one()
    failed = {BIG.digest: {lost: "its stage failed"}}
    found = answer(question(*left, fast(lost, 1e-2, 850), fast(D, 1e-2, 850),
                            before=before, barred=failed))  # fmt: skip
    assert kept(before, found)
    assert lost not in ring(found)


def test_the_next_look_at_things_does_not_change_the_plan_once_more() -> None:
    before, _, left = lost_one()
    found = answer(question(*left, before=before))
    assert found.plan
    assert answer(question(*left, current=(found.plan,))).kept
