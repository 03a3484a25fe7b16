"""The coordinator's plans: made in quiet, served one at a time, dropped when a peer is gone."""

from __future__ import annotations

import random

import pytest
from msgspec.structs import replace

from peer.planning.plan import PlanId, check
from peer.planning.profile import EngineProfile
from peer.planning.rollout import (
    Deposed,
    Elected,
    Reported,
)
from peer.planning.steadiness import STEADY_S
from peer.protocol import Report
from tests.coordinator import (
    KEY,
    TIMING,
    A,
    B,
    C,
    D,
    World,
    offer,
    profile,
    shape,
)


def test_a_plan_goes_from_loading_over_linking_to_serving() -> None:
    world = World(A, B, C)
    world.do(Elected(3))
    world.wait(TIMING.settle_s - 0.01)
    assert world.published == []
    world.wait(0.02)
    assert world.phases == {"3.1": "loading"}
    state = world.plans.states[0]
    assert check(state.plan) == ""
    assert sorted(state.plan.ring) == [A, B, C]
    assert state.plan.coordinator == A
    assert "3 peers share 12 layers" in state.why
    world.report(A, state, "fetching", done_bytes=3)
    world.report(A, state, "ready")
    world.report(B, state, "loading")
    world.report(C, state, "ready")
    assert world.phases == {"3.1": "loading"}
    world.report(B, state, "ready")
    assert world.phases == {"3.1": "linking"}
    links = world.plans.states[0].links
    assert [(link.peer_id, link.ring_port, link.key) for link in links] == [
        (peer, 1000 + ord(peer[0]), KEY + peer[0]) for peer in state.plan.ring
    ]
    assert links[0].submit_port == 2000
    for peer in (A, B, C):
        assert world.phases == {"3.1": "linking"}
        world.report(peer, state, "linked")
    assert world.phases == {"3.1": "serving"}


def test_nothing_is_said_by_a_peer_that_does_not_coordinate() -> None:
    world = World(A, B)
    world.wait(10)
    assert world.published == []
    assert world.rollout.deadline is None
    world.serve()
    world.do(Deposed())
    count = len(world.published)
    world.wait(10)
    world.lose(B)
    assert len(world.published) == count
    assert world.rollout.states == ()


def test_plans_are_repeated() -> None:
    world = World(A, B)
    world.serve()
    count = len(world.published)
    world.wait(5 * TIMING.publish_s + 0.1)
    assert len(world.published) == count + 5
    assert len({repr(plans) for _, plans in world.published[count:]}) == 1


def test_planning_waits_until_nobody_has_come_for_a_while() -> None:
    world = World(A)
    world.do(Elected(3))
    for peer in (B, C, D):
        world.wait(TIMING.settle_s - 0.1)
        world.join(peer)
    assert world.published == []
    world.wait(TIMING.settle_s)
    assert sorted(world.plans.states[0].plan.ring) == [A, B, C, D]
    assert world.phases == {"3.1": "loading"}


def test_the_old_plan_serves_until_the_new_one_can_and_goes_when_its_answers_have_ended() -> None:
    world = World(A, B)
    old = world.serve()
    world.active[old.plan.id] = 2
    world.join(C)
    world.wait(TIMING.settle_s)
    assert world.phases == {"3.1": "serving", "3.2": "loading"}
    assert "machine-c" in world.plans.states[1].why
    world.obey()
    assert world.phases == {"3.1": "draining", "3.2": "serving"}
    world.wait(30)
    world.obey()
    assert world.phases == {"3.1": "draining", "3.2": "serving"}
    world.active[old.plan.id] = 0
    world.obey()
    assert world.phases == {"3.2": "serving"}


def test_a_head_that_was_idle_just_now_may_still_be_given_answers_by_slow_entries() -> None:
    world = World(A, B)
    world.serve()
    world.join(C)
    world.wait(TIMING.settle_s)
    world.obey()
    assert world.phases == {"3.1": "draining", "3.2": "serving"}
    world.wait(TIMING.publish_s + 0.1)
    world.obey()
    assert world.phases == {"3.2": "serving"}


def test_answers_that_never_end_do_not_hold_a_plan_for_ever() -> None:
    world = World(A, B)
    old = world.serve()
    world.active[old.plan.id] = 1
    world.join(C)
    world.wait(TIMING.settle_s)
    world.obey()
    world.wait(TIMING.drain_s - 1)
    assert world.phases == {"3.1": "draining", "3.2": "serving"}
    world.wait(2)
    assert world.phases == {"3.2": "serving"}


def test_a_plan_that_lost_a_peer_is_over_at_once_and_the_next_does_without() -> None:
    world = World(A, B, C)
    world.serve()
    world.lose(B)
    assert world.phases == {}
    assert "machine-b" in world.plans.why_none
    world.wait(TIMING.settle_s)
    assert world.phases == {"3.2": "loading"}
    assert sorted(world.plans.states[0].plan.ring) == [A, C]
    assert "machine-b" in world.plans.states[0].why
    assert world.plans.why_none == ""
    world.obey()
    assert world.phases == {"3.2": "serving"}


def test_a_loss_among_those_who_only_joined_leaves_what_serves_alone() -> None:
    world = World(A, B)
    world.serve()
    world.join(C)
    world.wait(TIMING.settle_s)
    world.lose(C)
    assert world.phases == {"3.1": "serving"}
    world.wait(60)
    assert world.phases == {"3.1": "serving"}


def test_a_newcomer_while_loading_is_taken_in_and_the_half_made_plan_dropped() -> None:
    world = World(A, B)
    world.do(Elected(3))
    world.wait(TIMING.settle_s)
    world.join(C)
    world.wait(TIMING.settle_s)
    assert world.phases == {"3.2": "loading"}
    assert sorted(world.plans.states[0].plan.ring) == [A, B, C]


def test_free_memory_that_moves_does_not_move_windows() -> None:
    world = World(A, B)
    world.serve()
    world.profiles[B] = profile(B, 400)
    world.members()
    world.wait(30)
    assert world.phases == {"3.1": "serving"}


def test_memory_that_becomes_free_ends_a_lack_of_it() -> None:
    world = World(A)
    world.profiles[A] = profile(A, 1)
    world.members()
    world.do(Elected(3))
    world.wait(TIMING.settle_s)
    assert "MiB are missing" in world.plans.why_none
    world.profiles[A] = profile(A, 4000)
    world.members()
    world.wait(TIMING.settle_s)
    assert world.phases == {"3.1": "loading"}


def test_a_failed_stage_is_tried_again_twice_and_then_left_out_with_its_reason() -> None:
    world = World(A, B)
    world.do(Elected(3))
    world.wait(TIMING.settle_s)
    waits = []
    for _ in range(3):
        while not (with_b := [s for s in world.rollout.states if B in s.plan.ring]):
            world.wait(0.05)
            world.obey(B)
        if waits:
            waits[-1] = world.now - waits[-1]
        world.report(B, with_b[0], "failed", why="the engine is ill")
        assert all(B not in s.plan.ring for s in world.rollout.states)
        waits.append(world.now)
    assert waits[:2] == pytest.approx([0.15, 5.05], abs=0.7)
    world.wait(590)
    world.obey()
    assert [s.plan.ring for s in world.rollout.states if s.phase == "serving"] == [(A,)]
    left = world.rollout.states[-1].plan.split.left_out
    assert left[0].peer_id == B
    assert "the engine is ill" in left[0].why
    world.wait(15)
    assert sorted(world.rollout.states[-1].plan.ring) == [A, B]


def test_a_peer_that_was_left_out_is_taken_back_when_its_profile_changes() -> None:
    world = World(A, B)
    world.do(Elected(3))
    for _ in range(4):
        world.wait(20)
        world.obey(B)
        world.report(B, world.rollout.states[-1], "failed", why="ill")
    world.wait(30)
    assert sorted(world.rollout.states[-1].plan.ring) == [A]
    world.profiles[B] = replace(profile(B), engines=(EngineProfile("fake", "other", "cpu"),))
    world.members()
    world.wait(1)
    assert sorted(world.rollout.states[-1].plan.ring) == [A, B]


def test_a_failure_of_the_only_peer_is_told_and_tried_again() -> None:
    world = World(A)
    state = world.serve()
    world.report(A, state, "failed", why="killed by signal 9")
    assert world.phases == {}
    assert "killed by signal 9" in world.plans.why_none
    world.wait(2)
    assert world.phases == {"3.2": "loading"}


def test_why_a_newer_model_is_not_served_is_told_while_the_older_one_goes_on() -> None:
    world = World(A)
    state = world.serve()
    world.offers = {A: [offer(shape()), offer(shape(digest="b"), pulled_s=2.0)]}
    world.members()
    for _ in range(6):
        world.wait(20)
        for new in [s for s in world.rollout.states if s.phase == "loading"]:
            world.report(A, new, "failed", why="its tensors are of wrong shapes")
    assert "its tensors are of wrong shapes" in world.plans.why_none
    assert world.phases == {str(state.plan.id): "serving"}
    world.offers = {A: [offer(shape())]}
    world.members()
    world.wait(2)
    assert world.plans.why_none == ""
    assert world.phases == {str(state.plan.id): "serving"}


def test_failures_that_were_a_loss_are_not_held_against_the_survivors() -> None:
    world = World(A, B, C)
    for _ in range(6):
        world.join(C)
        if not world.rollout.states:
            world.do(Elected(3)) if not world.published else None
        world.wait(2 * STEADY_S[-1])  # it was lost each time
        world.obey()
        state = next(s for s in world.rollout.states if s.phase == "serving")
        assert sorted(state.plan.ring) == [A, B, C]
        world.report(B, state, "failed", why=f"peer {C} was lost: silence")
        world.lose(C)
    world.wait(2)
    world.obey()
    assert sorted(world.rollout.states[-1].plan.ring) == [A, B]


def test_a_stage_that_started_again_ends_its_plan() -> None:
    for phase in ("loading", "ready"):
        world = World(A, B)
        state = world.serve()
        world.report(B, state, phase, **({"key": "z" * 40} if phase == "ready" else {}))
        assert world.phases == {}
        assert "machine-b" in world.plans.why_none


@pytest.mark.parametrize("missing", [{"ring_port": 0}, {"key": ""}, {"submit_port": 0}])
def test_a_report_that_does_not_say_where_the_stage_listens_is_a_failure(
    missing: dict[str, object],
) -> None:
    world = World(A)
    world.do(Elected(3))
    world.wait(TIMING.settle_s)
    world.report(A, world.plans.states[0], "ready", **missing)
    assert world.phases == {}
    assert "ready" in world.plans.why_none


def test_a_peer_that_makes_no_progress_is_given_up_and_one_that_does_is_not() -> None:
    world = World(A, B)
    world.do(Elected(3))
    world.wait(TIMING.settle_s)
    state = world.plans.states[0]
    world.report(A, state, "ready")
    for done in range(1, 6):
        world.wait(TIMING.load_s - 1)
        world.report(B, state, "fetching", done_bytes=done, total_bytes=10)
        assert world.phases == {"3.1": "loading"}
    world.wait(TIMING.load_s + 1)
    assert "3.1" not in world.phases
    assert any("machine-b" in note and "progress" in note for note in world.notes)


def test_a_ring_that_does_not_link_is_given_up() -> None:
    world = World(A, B)
    world.do(Elected(3))
    world.wait(TIMING.settle_s)
    state = world.plans.states[0]
    world.report(A, state, "ready")
    world.report(B, state, "ready")
    world.report(A, state, "linked")
    world.wait(TIMING.step_s + 0.1)
    assert "3.1" not in world.phases


def test_reports_of_strangers_and_of_old_plans_change_nothing() -> None:
    world = World(A, B)
    state = world.serve()
    published = len(world.published)
    world.report(C, state, "failed", why="let me in")
    world.do(Reported(B, Report(PlanId(2, 9), "failed", why="long ago")))
    assert len(world.published) == published
    assert world.phases == {"3.1": "serving"}


def test_a_new_coordinator_adopts_what_serves() -> None:
    before = World(A, B)
    known = before.serve()
    world = World(A, B)
    world.do(Elected(7, (known,)))
    assert world.phases == {"3.1": "serving"}
    world.wait(60)
    world.obey()
    assert world.phases == {"3.1": "serving"}
    assert world.plans.term == 7
    world.join(C)
    world.wait(TIMING.settle_s)
    assert world.phases == {"3.1": "serving", "7.1": "loading"}


def test_a_new_coordinator_waits_for_the_peers_of_what_serves_to_be_seen() -> None:
    before = World(A, B)
    known = before.serve()
    world = World(A)
    world.do(Elected(7, (known,)))
    world.wait(TIMING.settle_s / 2)
    assert world.published == []
    world.join(B)
    assert world.phases == {"3.1": "serving"}


def test_a_plan_whose_peers_are_gone_is_not_adopted() -> None:
    before = World(A, B)
    known = before.serve()
    world = World(A)
    world.do(Elected(7, (known, replace(known, phase="draining"))))
    world.wait(TIMING.settle_s)
    assert world.phases == {"7.1": "loading"}
    later = World(A, B)
    later.do(Elected(2, (known,)))  # of a term to come: its numbers could not grow
    later.wait(TIMING.settle_s)
    assert later.phases == {"2.1": "loading"}


def test_numbers_go_on_within_a_term() -> None:
    before = World(A, B)
    known = before.serve()
    world = World(A)
    world.do(Elected(3, (known,)))
    world.wait(TIMING.settle_s)
    assert world.phases == {"3.2": "loading"}


def test_the_model_pulled_last_is_served_unless_a_setting_names_another() -> None:
    one, two = shape("one", "1"), shape("two", "2")
    world = World(A, B, offers={A: [offer(one, 5.0)], B: [offer(two, 9.0)]})
    assert world.serve().plan.shape.model == "two"
    world.profiles[B] = profile(B, model_wanted="one")  # not the coordinator's
    world.members()
    world.wait(2)
    assert [s.plan.shape.model for s in world.rollout.states] == ["two"]
    world.profiles[A] = profile(A, model_wanted="one")
    world.members()
    world.wait(2)
    world.obey()
    assert world.rollout.states[-1].plan.shape.model == "one"
    assert world.rollout.states[-1].phase == "serving"
    world.profiles[A] = profile(A, model_wanted="three")
    world.members()
    world.wait(2)
    assert any("three" in note for note in world.notes)
    assert world.rollout.states[-1].plan.shape.model == "one"


def test_what_is_missing_is_said_while_nothing_is_served() -> None:
    world = World(A, offers={})
    world.do(Elected(3))
    world.wait(1)
    assert world.plans.states == ()
    assert world.plans.why_none == "no model yet: halka pull smollm2"
    world.offers = {A: [offer(shape(), without=("layer-004", "output"))]}
    world.members()
    world.wait(1)
    assert "2 parts of small are on no peer here (layer-004, output)" in world.plans.why_none
    world.profiles[A] = profile(A, engines=())
    world.offers = {A: [offer(shape())]}
    world.members()
    world.wait(1)
    assert "machine-a has no engine" in world.plans.why_none
    world.profiles[A] = profile(A, model_wanted="other")
    world.members()
    world.wait(1)
    assert "`model` names other" in world.plans.why_none
    world.join(A)
    world.wait(1)
    assert world.plans.states[0].why.startswith("all that it needs is here now; ")


def test_parts_on_several_peers_make_one_model_and_an_incomplete_one_is_passed_over() -> None:
    some = [offer(shape(), without=("layer-001",)), offer(shape("new", "9"), 99.0, ("embed",))]
    rest = [offer(shape(), without=("layer-005", "head"))]
    world = World(A, B, offers={A: some, B: rest})
    assert world.serve().plan.shape.model == "small"
    world.offers = {A: some}
    world.members()
    world.wait(5)
    assert [s.phase for s in world.rollout.states] == ["serving"]


def test_every_peer_gets_a_layer_where_any_peer_asks_for_that() -> None:
    world = World(A, B, C)
    world.profiles[B] = profile(B, 40, spread_all=True)
    world.members()
    assert set(world.serve().plan.ring) == {A, B, C}


def test_a_context_setting_of_the_coordinator_is_kept_to() -> None:
    world = World(A, B)
    world.profiles[A] = profile(A, context_wanted=100)
    world.members()
    assert world.serve().plan.split.context == 100


def test_nothing_is_planned_before_its_own_profile_is_known() -> None:
    world = World(B)
    world.do(Elected(3))
    world.wait(10)
    assert world.published == []
    world.join(A)
    world.wait(TIMING.settle_s)
    assert world.phases == {"3.1": "loading"}


@pytest.mark.parametrize("seed", range(60))
def test_whatever_happens_plans_stay_sound_and_one_serves_in_the_end(seed: int) -> None:
    draw = random.Random(seed)
    world = World(A, B)
    world.do(Elected(1))
    term = 1
    for _ in range(draw.randint(20, 120)):
        alive = [peer for peer in world.profiles if peer != A]
        match draw.choice(["wait", "wait", "join", "lose", "report", "report", "obey", "elect"]):
            case "wait":
                world.wait(draw.choice([0.1, 0.5, 1.0, 5.0, 700.0]))
            case "join":
                world.join(draw.choice([B, C, D]))
            case "lose" if alive:
                world.lose(draw.choice(alive))
            case "report" if world.rollout.states:
                state = draw.choice(world.rollout.states)
                phases = ("fetching", "loading", "ready", "linked", "failed")
                world.active[state.plan.id] = draw.randint(0, 1)
                world.report(draw.choice(state.plan.ring), state, draw.choice(phases))
            case "obey":
                world.obey(*draw.sample(alive, draw.randint(0, len(alive))))
            case "elect":
                term += draw.randint(1, 2)
                known = world.rollout.states
                world.do(Deposed())
                world.do(Elected(term, known))
        sound(world)
    world.active.clear()
    for _ in range(12):
        world.wait(150)
        world.obey()
        world.wait(3)
        world.obey()
    sound(world)
    assert [state.phase for state in world.plans.states] == ["serving"], world.notes[-5:]
    assert set(world.plans.states[0].plan.ring) == set(world.profiles)


def sound(world: World) -> None:
    """Of all that was published since the last look."""
    seen = getattr(world, "seen", 0)
    for _, plans in world.published[seen:]:
        assert [s.phase for s in plans.states].count("serving") <= 1
        assert [s.phase in ("loading", "linking") for s in plans.states].count(True) <= 1
        ids = [state.plan.id for state in plans.states]
        assert ids == sorted(set(ids))
        assert all(check(state.plan) == "" for state in plans.states)
        new = [i for i in ids if i not in world.__dict__.setdefault("ids", [])]
        assert all(i > old for i in new for old in world.__dict__["ids"])
        world.__dict__["ids"] += new
    if world.published[seen:]:
        _, last = world.published[-1]
        assert all(set(s.plan.ring) <= set(world.profiles) for s in last.states)
        if not any(s.phase != "draining" for s in last.states):
            assert last.why_none
    world.__dict__["seen"] = len(world.published)
