"""The coordinator and its planner: what is waited for, asked, and answered too late."""

from __future__ import annotations

from msgspec.structs import replace

from peer.planning.making import answer
from peer.planning.patience import SETTLE_TIMES
from peer.planning.profile import EngineProfile, Link, Speed
from peer.planning.rollout import Elected, Solve, Solved, Tick
from peer.protocol import Timed
from tests.coordinator import TIMING, A, B, C, World, offer, profile, shape


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


def test_plans_are_made_though_something_changes_all_the_time() -> None:
    world = World(A, B, C)
    world.do(Elected(3))
    for turn in range(100):
        links = (Link(B, 1e-4 * 4 ** (turn % 3), 1e8),)
        world.profiles[A] = replace(world.profiles[A], links=links)
        world.members()
        world.wait(TIMING.settle_s / 2)
        if world.rollout.states:
            break
    assert world.now <= 100 + (SETTLE_TIMES + 1) * TIMING.settle_s


def test_peers_that_come_one_by_one_to_measure_do_not_keep_a_plan_waiting() -> None:
    world = World(A)
    world.do(Elected(3))
    for letter in "bcdefg":
        world.profiles[letter * 16] = profile(letter * 16, unmeasured=())
        world.members()
        world.wait(TIMING.measure_s / 4)
    assert world.rollout.states


def test_what_served_and_was_lost_is_replaced_before_newcomers_have_measured() -> None:
    world = World(A, B)
    world.serve()
    world.profiles[C] = profile(C, unmeasured=())
    world.members()
    world.wait(2 * TIMING.settle_s)
    assert len(world.rollout.states) == 1, "while it serves, there is time to wait for C"
    world.lose(B)
    world.wait(TIMING.settle_s)
    assert set(world.rollout.states[0].plan.ring) == {A, C}


def test_a_plan_with_a_peer_that_was_lost_while_it_was_thought_of_is_not_rolled_out() -> None:
    world = World(A, B)
    world.do(Elected(3))
    world.now += TIMING.settle_s
    (asked,) = [a for a in world.rollout.step(Tick(), world.now) if isinstance(a, Solve)]
    back = world.profiles[B]
    world.lose(B)
    world.do(Solved(answer(asked.question)))
    assert world.rollout.states == ()
    world.profiles[B] = back  # all is again as it was when it was asked
    world.members()
    world.wait(TIMING.settle_s)
    assert set(world.rollout.states[0].plan.ring) == {A, B}


def test_a_model_that_was_lost_while_it_was_thought_of_is_not_rolled_out() -> None:
    world = World(A, B, offers={B: [offer(shape())]})
    world.profiles[B] = profile(B, engines=())  # it has the model, and cannot run it
    world.members()
    world.do(Elected(3))
    world.now += TIMING.settle_s
    (asked,) = [a for a in world.rollout.step(Tick(), world.now) if isinstance(a, Solve)]
    found = answer(asked.question)
    assert found.plan is not None
    assert found.plan.ring == (A,)
    world.lose(B)
    world.do(Solved(found))
    world.wait(2 * TIMING.settle_s)
    assert world.rollout.states == ()
    assert world.plans.why_none


def test_a_peer_that_is_back_at_once_does_not_leave_the_cluster_without_a_plan() -> None:
    world = World(A, B)
    world.do(Elected(3))
    world.wait(TIMING.settle_s)
    back = world.profiles[B]
    world.lose(B)
    assert world.rollout.states == ()
    world.profiles[B] = back
    world.members()
    world.wait(TIMING.settle_s)
    assert set(world.rollout.states[0].plan.ring) == {A, B}


def test_a_plan_is_replaced_where_only_the_processor_changes() -> None:
    cpu, gpu = EngineProfile("fake", "CPU", "cpu"), EngineProfile("fake", "GPU", "cuda", 4 << 30)
    world = World(A)
    alone = profile(A, spread_all=False, engines=(cpu, gpu), unmeasured=())
    world.profiles[A] = alone
    world.members()
    assert world.serve().plan.split.windows[0].gpu_layers == -1, "as is usual for a GPU"
    speed = Speed(shape().digest, "fake", "cpu", 4, (1e-4,), (0.1,), 512)
    slow = replace(speed, kind="cuda", decode_s=(1e-2,))
    world.profiles[A] = replace(alone, speeds=(speed, slow))
    world.members()
    world.wait(TIMING.settle_s)
    assert world.rollout.states[-1].plan.split.windows[0].gpu_layers == 0


def test_what_peers_reported_is_told_along_and_is_no_reason_to_tell() -> None:
    world = World(A, B)
    state = world.serve()
    before = len(world.published)
    world.report(B, state, "linked", timed=Timed(decode_s=1e-3))
    assert len(world.published) == before, "it changes with every answer"
    world.wait(TIMING.publish_s)
    reports = {told.peer_id: told.report for told in world.plans.reports}
    assert set(reports) == {A, B}
    assert reports[B].timed == Timed(decode_s=1e-3)
