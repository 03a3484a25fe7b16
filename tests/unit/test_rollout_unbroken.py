"""Coordinating so that answers go on: losses, links that flap, peers that want to go away."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from peer.planning.failures import NEEDED_S
from peer.planning.making import Question, answer
from peer.planning.plan import PlanState
from peer.planning.rollout import Elected, Event, Note, Publish, Reported, Solve, Solved
from peer.planning.running import HURRY_S
from peer.planning.steadiness import STEADY_S
from peer.protocol import Report
from tests.coordinator import TIMING, A, B, C, D, World, profile

SOON_S = 0.1  # well below settle_s


class Asked(World):
    """Remembers what the planner was asked."""

    questions: list[Question]

    def do(self, event: Event) -> None:
        for action in self.rollout.step(event, self.now):
            match action:
                case Solve(question):
                    self.questions = [*getattr(self, "questions", []), question]
                    self.do(Solved(answer(question)))
                case Publish(plans):
                    self.published.append((self.now, plans))
                case Note(text):
                    self.notes.append(text)


def rings(world: World, phase: str) -> list[tuple[str, ...]]:
    return [s.plan.ring for s in world.plans.states if s.phase == phase]


def test_a_ring_that_lost_a_peer_is_planned_anew_without_settling() -> None:
    world = Asked(A, B, C)
    before = world.serve()
    world.lose(B)
    world.wait(SOON_S)
    assert [set(ring) for ring in rings(world, "loading")] == [{A, C}]
    assert world.questions[-1].before == before.plan
    world.obey()
    world.wait(TIMING.settle_s)
    world.profiles[C] = profile(C, 100)
    world.members()
    world.wait(10 * TIMING.settle_s)
    assert world.questions[-1].before is None  # it serves again: nothing is to be kept of the lost


def test_where_answers_wait_a_second_loss_is_not_settled_either() -> None:
    world = Asked(A, B, C, D)
    world.serve()
    world.lose(D)
    world.wait(SOON_S)
    assert rings(world, "loading")
    world.lose(C)
    world.wait(SOON_S)
    assert [set(ring) for ring in rings(world, "loading")] == [{A, B}]


def test_a_loss_that_another_peer_told_first_is_held_against_the_lost_one_too() -> None:
    world = World(A, B, C)
    failed(world, B, world.serve(), why="peer c was lost", lost=C)
    world.lose(C)
    world.wait(SOON_S)
    world.obey()
    world.join(C)
    world.wait(STEADY_S[0] - 0.5)
    world.obey()
    assert [set(ring) for ring in rings(world, "serving")] == [{A, B}]


@pytest.mark.parametrize("period_s", [0.5, 2.0, 10.0])
@pytest.mark.parametrize("what", ["leaving", "unreachable"])
def test_whoever_changes_its_word_all_the_time_makes_few_plans(what: str, period_s: float) -> None:
    world = World(A, B, C)
    world.serve()
    before = len(world.notes)
    end, word = world.now + 120, False
    while world.now < end:
        word = not word
        said: object = word if what == "leaving" else (A, C) if word else ()
        world.profiles[B] = replace(world.profiles[B], **{what: said})
        world.members()
        for _ in range(int(2 * period_s)):
            world.wait(0.5)
            world.obey()
    assert sum(" serves on " in note for note in world.notes[before:]) <= 8


def test_a_loss_outside_of_the_ring_is_settled_first() -> None:
    world = Asked(A, B)
    for peer in (A, B):
        world.profiles[peer] = profile(peer, spread_all=False)
    world.members()
    world.serve()
    (ring,) = rings(world, "serving")
    asked = len(world.questions)
    world.lose(*{A, B}.difference(ring))
    world.wait(TIMING.settle_s / 2)
    assert len(world.questions) == asked
    assert rings(world, "serving") == [ring]


def test_a_peer_that_came_back_is_planned_with_only_once_it_has_stayed() -> None:
    world = World(A, B, C)
    world.serve()
    world.lose(B)
    world.wait(SOON_S)
    world.obey()
    world.join(B)
    world.wait(STEADY_S[0] - 0.5)
    world.obey()
    assert [set(ring) for ring in rings(world, "serving")] == [{A, C}]
    out = {left.peer_id: left.why for s in world.plans.states for left in s.plan.split.left_out}
    assert B not in out or "stayed" in out[B]
    world.wait(1.0 + TIMING.settle_s)
    world.obey()
    assert [set(ring) for ring in rings(world, "serving")] == [{A, B, C}]


def test_a_link_that_flaps_for_a_minute_makes_three_plans_at_most() -> None:
    world = World(A, B, C)
    world.serve()
    for _ in range(10):
        world.lose(B)
        world.wait(3.0)
        world.obey()
        world.join(B)
        world.wait(3.0)
        world.obey()
    numbers = {s.plan.id.number for _, plans in world.published for s in plans.states}
    assert len(numbers) <= 3
    assert len(rings(world, "serving")) == 1


def test_who_needs_a_peer_that_flaps_uses_it_all_the_same() -> None:
    world = World(A, B)
    for peer in (A, B):
        world.profiles[peer] = profile(peer, 8)  # neither can hold the whole model
    world.members()
    world.serve()
    world.lose(B)
    world.wait(1.0)
    assert world.plans.states == ()
    world.profiles[B] = profile(B, 8)
    world.members()
    world.wait(SOON_S + TIMING.settle_s)
    assert [set(ring) for ring in rings(world, "loading")] == [{A, B}]


def leave(world: World, peer: str) -> None:
    world.profiles[peer] = replace(world.profiles[peer], leaving=True)
    world.members()


def test_a_peer_that_wants_to_go_is_planned_without_and_its_answers_go_over() -> None:
    world = World(A, B, C)
    before = world.serve()
    world.active[before.plan.id] = 2
    leave(world, B)
    world.wait(SOON_S)
    assert world.phases[str(before.plan.id)] == "serving"  # until others can
    assert [set(ring) for ring in rings(world, "loading")] == [{A, C}]
    world.obey()
    (old,) = [s for s in world.plans.states if s.plan.id == before.plan.id]
    assert (old.phase, old.hurry) == ("draining", True)
    world.active[before.plan.id] = 0
    world.obey()
    world.wait(HURRY_S)
    assert [set(s.plan.ring) for s in world.plans.states] == [{A, C}]


def test_a_plan_that_drains_already_hurries_when_one_of_its_peers_wants_to_go() -> None:
    world = World(A, B, C)
    before = world.serve()
    world.active[before.plan.id] = 1
    world.lose(C)
    world.wait(SOON_S)
    world.obey()
    (second,) = [s for s in world.plans.states if s.phase == "serving"]
    world.active[second.plan.id] = 1
    world.join(C)
    world.wait(STEADY_S[0] + 2 * TIMING.settle_s)
    world.obey()
    drains = {s.plan.id: s.hurry for s in world.plans.states if s.phase == "draining"}
    assert drains == {second.plan.id: False}
    leave(world, B)
    assert [s.hurry for s in world.plans.states if s.plan.id == second.plan.id] == [True]


def test_without_anybody_who_could_take_over_the_plan_goes_on_and_says_why() -> None:
    world = World(A, B)
    for peer in (A, B):
        world.profiles[peer] = profile(peer, 8)
    world.members()
    before = world.serve()
    leave(world, B)
    world.wait(10 * TIMING.settle_s)
    assert world.phases == {str(before.plan.id): "serving"}
    assert world.plans.why_none


def failed(world: World, peer: str, state: PlanState, **facts: str) -> None:
    world.do(Reported(peer, Report(state.plan.id, "failed", **facts)))  # type: ignore[arg-type]


def test_who_does_not_reach_another_is_not_blamed_for_it() -> None:
    world = World(A, B, C)
    before = world.serve()
    failed(world, B, before, why="peer c was lost", lost=C)
    assert any("does not reach" in note for note in world.notes)
    world.wait(SOON_S)
    assert [set(ring) for ring in rings(world, "loading")] == [{A, B, C}]


def test_who_says_again_and_again_that_others_are_lost_is_done_without_for_a_while() -> None:
    world = World(A, B, C)
    state = world.serve()
    for lost in (C, A):  # they are here all the time
        failed(world, B, state, why="it was lost", lost=lost)
        world.wait(SOON_S)
        (state,) = world.rollout.states
        world.obey()
    assert set(state.plan.ring) == {A, C}
    (why,) = [left.why for left in state.plan.split.left_out if left.peer_id == B]
    assert "2 times" in why
    world.wait(STEADY_S[0] + TIMING.settle_s)
    world.obey()
    assert {A, B, C} in map(set, rings(world, "serving"))  # it may try again
    spoilt = 0
    until = world.now + 120
    while world.now < until:
        for state in world.rollout.states:
            if B in state.plan.ring and state.phase != "draining":
                failed(world, B, state, why="it was lost", lost=C)
                spoilt += 1
        world.wait(0.5)
        world.obey(B)
    assert 1 <= spoilt <= 3


def test_who_said_rightly_that_others_were_lost_takes_part_on() -> None:
    world = World(A, B, C, D)
    state = world.serve()
    for lost in (D, C):
        failed(world, B, state, why="it was lost", lost=lost)
        world.wait(SOON_S)
        world.lose(lost)
        world.wait(SOON_S)
        world.obey()
        state = world.rollout.states[-1]
    assert [set(ring) for ring in rings(world, "serving")] == [{A, B}]


def test_only_the_head_can_say_whose_numbers_are_not_finite() -> None:
    world = World(A, B, C)
    before = world.serve()
    for peer in before.plan.ring[1:]:
        world.report(peer, before, "linked", blamed=C)
    world.wait(TIMING.settle_s)
    assert [set(ring) for ring in rings(world, "serving")] == [{A, B, C}]


def test_whose_numbers_are_not_finite_is_planned_without_and_not_who_says_so() -> None:
    world = World(A, B, C)
    before = world.serve()
    head = before.plan.head
    bad = next(peer for peer in (C, B) if peer != head)
    world.report(head, before, "linked", blamed=bad)
    assert any(f"machine-{bad[0]}" in note and "not finite" in note for note in world.notes)
    for _ in range(2):  # again, each time that it is tried
        while not (loading := [s for s in world.rollout.states if bad in s.plan.ring]):
            world.wait(0.05)
            world.obey(bad)
        world.report(loading[0].plan.head, loading[0], "linked", blamed=bad)
    world.wait(TIMING.settle_s)
    world.obey()
    assert [set(ring) for ring in rings(world, "serving")] == [{A, B, C} - {bad}]


def test_a_new_coordinator_that_lost_the_old_one_from_the_ring_plans_at_once() -> None:
    world = World(B, A, C)
    known = world.serve()
    plan = replace(known.plan, coordinator=C)
    fresh = Asked(A, B)
    fresh.do(Elected(7, (replace(known, plan=plan),)))
    fresh.wait(SOON_S)
    assert fresh.questions[-1].before == plan
    assert [set(ring) for ring in rings(fresh, "loading")] == [{A, B}]


def test_a_new_coordinator_that_goes_on_with_a_plan_keeps_nothing_of_it_for_later() -> None:
    """Else a plan that is better would hardly ever seem so: what is here already would count."""
    known = World(A, B, C).serve()
    fresh = Asked(A, B, C)
    fresh.do(Elected(7, (known,)))
    fresh.wait(2 * TIMING.settle_s)
    assert rings(fresh, "serving") == [known.plan.ring]
    assert fresh.questions[-1].before is None


def test_a_peer_that_nothing_can_be_served_without_is_tried_again_soon() -> None:
    world = World(A)
    world.serve()
    for _ in range(4):
        while not world.rollout.states:
            world.wait(1.0)
        world.report(A, world.rollout.states[-1], "failed", why="killed by hand")
        broke = world.now
    while not world.rollout.states:
        world.wait(1.0)
    assert world.now - broke <= NEEDED_S + 2.0
    world.obey()
    assert rings(world, "serving") == [(A,)]
