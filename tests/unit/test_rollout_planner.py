"""The coordinator and its planner: what is waited for, asked, and answered too late."""

from __future__ import annotations

from peer.planning.making import answer
from peer.planning.rollout import Elected, Solve, Solved, Tick
from tests.coordinator import TIMING, A, B, C, World, profile, shape


def test_a_plan_waits_for_peers_that_still_measure_the_model() -> None:
    world = World(A)
    world.profiles[B] = profile(B, unmeasured=())
    world.members()
    world.do(Elected(3))
    world.wait(TIMING.settle_s + 5)
    assert world.rollout.states == ()
    world.profiles[B] = profile(B, unmeasured=("0" * 64,))
    world.members()
    world.wait(TIMING.settle_s)
    assert [state.phase for state in world.rollout.states] == ["loading"]
    assert set(world.rollout.states[0].plan.ring) == {A, B}


def test_a_peer_that_never_measures_is_waited_for_once_and_not_for_ever() -> None:
    world = World(A)
    world.profiles[B] = profile(B, unmeasured=())
    world.members()
    world.do(Elected(3))
    world.wait(TIMING.settle_s + TIMING.measure_s)
    assert set(world.rollout.states[0].plan.ring) == {A, B}
    world.obey()
    world.join(C)
    world.wait(2 * TIMING.settle_s)
    assert len(world.rollout.states) == 2, "B was waited for before"


def test_a_peer_alone_waits_for_no_numbers() -> None:
    world = World()
    world.profiles[A] = profile(A, unmeasured=())
    world.members()
    world.do(Elected(3))
    world.wait(TIMING.settle_s)
    assert [state.plan.ring for state in world.rollout.states] == [(A,)]


def test_what_was_planned_is_told_with_the_model_that_is_to_be_measured() -> None:
    world = World(A, B)
    world.serve()
    assert world.plans.measure == (shape().digest,)


def test_an_answer_of_the_planner_to_an_older_question_changes_nothing() -> None:
    world = World(A, B)
    questions = []
    world.do(Elected(3))
    world.now += TIMING.settle_s
    for action in world.rollout.step(Tick(), world.now):
        if isinstance(action, Solve):
            questions.append(action.question)
    assert len(questions) == 1
    assert world.rollout.states == (), "nothing is decided before the answer"
    world.join(C)
    world.wait(TIMING.settle_s)
    before = world.rollout.states
    assert set(before[0].plan.ring) == {A, B, C}
    world.do(Solved(answer(questions[0])))
    assert world.rollout.states == before


def test_a_peer_that_joins_and_would_not_help_changes_nothing_that_runs() -> None:
    world = World(A, B)
    for peer in (A, B):
        world.profiles[peer] = profile(peer, spread_all=False)
    world.members()
    serving = world.serve()
    assert serving.plan.ring == (A,)
    world.profiles[C] = profile(C, spread_all=False)
    world.members()
    world.wait(10 * TIMING.settle_s)
    assert world.plans.states == (serving,)
    assert not any("over" in note for note in world.notes)
