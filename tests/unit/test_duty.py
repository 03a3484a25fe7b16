"""A peer's own part in plans: told as events in, actions out."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from msgspec.structs import replace

from peer.planning.duty import (
    Action,
    ConnectStage,
    Duty,
    EndPlan,
    Exited,
    Fetch,
    Fetched,
    Fetching,
    GoOver,
    Heard,
    MemberJoined,
    MemberLost,
    Serve,
    StartStage,
    StopStage,
    Tell,
    Tick,
    Told,
    Underway,
)
from peer.planning.plan import Plan, PlanId, PlanState
from peer.protocol import Plans, Report, StageNews
from tests.plans import PEERS, links, plan, state

PLAN = plan(4, 8, 12)
UNDERWAY = [Underway(PLAN.shape.digest)]
READY = StageNews("ready", ring_port=4001, key="k" * 40)


def heard(*states: PlanState, why_none: str = "") -> Heard:
    return Heard(Plans(1, states, why_none))


def make(peer: str = PEERS[1], met: Sequence[str] = PEERS) -> Duty:
    machine = Duty(peer, publish_s=2.0)
    for other in met:
        if other != peer:
            assert machine.step(MemberJoined(other), 0) == []
    return machine


def reports(actions: list[Action]) -> list[Report]:
    return [action.report for action in actions if isinstance(action, Tell)]


def serving(machine: Duty, of: Plan = PLAN) -> list[Action]:
    machine.step(heard(state(of)), 0)
    machine.step(Fetched(of.id), 0)
    machine.step(Told(of.id, READY), 0)
    machine.step(heard(state(of, "linking")), 0)
    machine.step(Told(of.id, StageNews("linked", ring_port=4001, key="k" * 40)), 0)
    return machine.step(heard(state(of, "serving")), 0)


@pytest.mark.parametrize("place", [0, 1])
def test_an_island_is_refused_by_a_peer_whose_setting_is_off_whoever_plans_it(place: int) -> None:
    """What the peers of an island send each other is not encrypted: its owner has to ask for it."""
    alone = plan(12)
    window = replace(alone.split.windows[0], backend="mlx", island=(PEERS[1],))
    of = replace(alone, split=replace(alone.split, windows=(window,)))
    machine = make(PEERS[place])
    actions = machine.step(heard(state(of)), 0)
    assert not any(isinstance(action, Fetch) for action in actions)
    (report,) = reports(actions)
    assert report.phase == "failed"
    assert "the setting `islands` is off here" in report.why
    willing = Duty(PEERS[place], publish_s=2.0, islands=True)
    assert any(isinstance(action, Fetch) for action in willing.step(heard(state(of)), 0))


def test_a_peer_of_the_ring_fetches_its_parts_then_starts_then_reports() -> None:
    machine = make()
    fetch, *underway = machine.step(heard(state(PLAN)), 0)
    assert underway == UNDERWAY
    assert isinstance(fetch, Fetch)
    assert fetch.parts == ("head", "layer-004", "layer-005", "layer-006", "layer-007")
    machine.step(Fetching(PLAN.id, 10, 100), 0)
    actions = machine.step(Fetched(PLAN.id), 0)
    assert [r.phase for r in reports(actions)] == ["loading"]
    assert isinstance(actions[-1], StartStage)
    (report,) = reports(machine.step(Told(PLAN.id, READY), 0))
    assert (report.phase, report.ring_port, report.done_bytes) == ("ready", 4001, 10)


def test_a_peer_outside_the_ring_fetches_only_the_head_and_serves_it() -> None:
    machine = make(PEERS[4])
    fetch, *underway = machine.step(heard(state(PLAN)), 0)
    assert underway == UNDERWAY
    assert isinstance(fetch, Fetch)
    assert fetch.parts == ("head",)
    assert machine.step(Fetched(PLAN.id), 0) == []
    assert machine.step(heard(state(PLAN, "linking")), 0) == UNDERWAY
    assert machine.step(heard(state(PLAN, "serving")), 0) == [Serve(PLAN, links(PLAN)[0])]


def test_an_entry_peer_that_could_not_get_the_head_asks_again() -> None:
    machine = make(PEERS[4])
    machine.step(heard(state(PLAN)), 0)
    assert machine.step(Fetched(PLAN.id, "nobody has it"), 0) == []
    assert machine.deadline == 2.0
    assert machine.step(Tick(), 2.0) == [Fetch(PLAN, ("head",))]


def test_the_stage_is_connected_once_to_the_one_after_it() -> None:
    machine = make(PEERS[2])  # the tail: the head comes after it
    machine.step(heard(state(PLAN)), 0)
    machine.step(Fetched(PLAN.id), 0)
    machine.step(Told(PLAN.id, READY), 0)
    first, _, _ = links(PLAN)
    connect, _ = machine.step(heard(state(PLAN, "linking")), 0)
    assert connect == ConnectStage(PLAN.id, first, "b" * 40)
    assert machine.step(heard(state(PLAN, "linking")), 0) == UNDERWAY


def test_the_stage_is_connected_only_once_the_peer_after_it_is_in_reach() -> None:
    # The coordinator has met the head already, this peer has not: it knows no way there yet.
    machine = make(PEERS[2], met=PEERS[1:])
    machine.step(heard(state(PLAN)), 0)
    machine.step(Fetched(PLAN.id), 0)
    machine.step(Told(PLAN.id, READY), 0)
    assert machine.step(heard(state(PLAN, "linking")), 0) == UNDERWAY
    first, _, _ = links(PLAN)
    connect = ConnectStage(PLAN.id, first, "b" * 40)
    assert machine.step(MemberJoined(PEERS[0]), 1) == [connect]
    assert machine.step(heard(state(PLAN, "linking")), 1) == UNDERWAY


def test_a_plan_is_opened_for_answers_only_once_its_head_is_in_reach() -> None:
    machine = make(PEERS[4], met=PEERS[1:])
    machine.step(heard(state(PLAN)), 0)
    machine.step(Fetched(PLAN.id), 0)
    assert machine.step(heard(state(PLAN, "serving")), 0) == []
    assert machine.serving() is None
    assert machine.step(MemberJoined(PEERS[0]), 1) == [Serve(PLAN, links(PLAN)[0])]
    assert machine.serving() == state(PLAN, "serving")


def test_plans_heard_again_change_nothing() -> None:
    machine = make()
    serving(machine)
    assert machine.step(heard(state(PLAN, "serving")), 1) == []


def test_a_plan_that_serves_is_opened_and_one_that_drains_is_kept_until_it_is_gone() -> None:
    machine = make()
    assert serving(machine) == [Serve(PLAN, links(PLAN)[0])]
    after = plan(6, 12, number=2)
    actions = machine.step(heard(state(PLAN, "draining"), state(after, "serving")), 3)
    assert Serve(after, links(after)[0]) in actions
    assert not any(isinstance(action, EndPlan | StopStage) for action in actions)
    actions = machine.step(heard(state(after, "serving")), 4)
    assert actions[0] == EndPlan(PLAN.id, "the plan was replaced")
    assert actions[1] == StopStage(PLAN.id)


def test_a_lost_peer_ends_its_plans_here_at_once_and_says_why() -> None:
    machine = make()
    serving(machine)
    actions = machine.step(MemberLost(PEERS[2], "no heartbeat for 3.8 s"), 5)
    (report,) = reports(actions)
    assert report.phase == "failed"
    assert any(isinstance(action, EndPlan) and "no heartbeat" in action.why for action in actions)
    assert StopStage(PLAN.id) in actions
    assert Serve(None) in actions
    # The coordinator may not know yet: its repetition must not bring the plan back.
    assert machine.step(heard(state(PLAN, "serving")), 6) == []


def test_a_lost_peer_outside_the_ring_disturbs_nothing() -> None:
    machine = make()
    serving(machine)
    assert machine.step(MemberLost(PEERS[4], "gone"), 5) == []


def test_a_stage_that_died_is_reported_and_ends_the_answers_with_its_words() -> None:
    machine = make()
    serving(machine)
    actions = machine.step(Exited(PLAN.id, "ended by SIGKILL"), 5)
    assert reports(actions)[0].why == "ended by SIGKILL"
    assert EndPlan(PLAN.id, "ended by SIGKILL") in actions


def test_the_peers_own_trouble_is_remembered_until_a_stage_of_its_own_is_linked() -> None:
    machine = make()
    serving(machine)
    machine.step(MemberLost(PEERS[2], "gone"), 5)
    assert machine.trouble == "", "another peer's loss is no trouble of this one"
    later = replace(PLAN, id=PlanId(PLAN.id.term, PLAN.id.number + 1))
    machine.step(heard(state(later, "loading")), 6)
    machine.step(Fetched(later.id, "no space left on the disk"), 6)
    assert machine.trouble == "no space left on the disk"
    machine.step(heard(), 7)
    assert machine.trouble == "no space left on the disk"
    machine.step(MemberJoined(PEERS[2]), 8)
    again = replace(PLAN, id=PlanId(PLAN.id.term, PLAN.id.number + 2))
    serving(machine, again)
    assert machine.trouble == ""


def test_a_plan_that_cannot_be_is_refused_before_anything_is_loaded() -> None:
    machine = make()
    actions = machine.step(heard(state(plan(4, 4, 12))), 0)
    (report,) = reports(actions)
    assert report.phase == "failed"
    assert "cannot be" in report.why
    assert not any(isinstance(action, Fetch) for action in actions)


def test_reports_are_repeated_so_that_a_lost_message_does_no_harm() -> None:
    machine = make()
    machine.step(heard(state(PLAN)), 0)
    assert machine.deadline == 2.0
    assert reports(machine.step(Tick(), 2.0))[0].phase == "fetching"
    assert machine.deadline == 4.0


def test_the_end_of_the_last_answer_is_told_at_once() -> None:
    machine = make()
    serving(machine)
    news = StageNews("linked", ring_port=4001, key="k" * 40, active=2)
    assert reports(machine.step(Told(PLAN.id, news), 5))[0].active == 2
    fewer = StageNews("linked", ring_port=4001, key="k" * 40, active=1)
    assert machine.step(Told(PLAN.id, fewer), 5) == []
    none = StageNews("linked", ring_port=4001, key="k" * 40, active=0)
    assert reports(machine.step(Told(PLAN.id, none), 5))[0].active == 0


def test_an_entry_peer_that_lost_sight_of_the_ring_serves_again_when_it_is_back() -> None:
    machine = make(PEERS[4])
    machine.step(heard(state(PLAN, "serving")), 0)
    # Of a peer that it does not speak to itself, the coordinator knows better.
    assert machine.step(MemberLost(PEERS[1], "the connection broke"), 1) == []
    actions = machine.step(MemberLost(PEERS[0], "the connection broke"), 1)
    assert any(isinstance(action, EndPlan) for action in actions)
    machine.step(MemberJoined(PEERS[1]), 1)
    assert machine.step(heard(state(PLAN, "serving")), 2) == []
    machine.step(MemberJoined(PEERS[0]), 3)
    actions = machine.step(heard(state(PLAN, "serving")), 4)
    assert actions == [Fetch(PLAN, ("head",)), Serve(PLAN, links(PLAN)[0])]


def test_an_entry_peer_needs_the_head_back_and_nobody_else_of_the_ring() -> None:
    """A cable between it and a peer in the middle of the ring may stay cut for days."""
    machine = make(PEERS[4], met=(PEERS[0], PEERS[2], PEERS[3]))
    machine.step(heard(state(PLAN, "serving")), 0)
    machine.step(MemberLost(PEERS[0], "the connection broke", heard_by=PEERS[2]), 1)
    machine.step(MemberJoined(PEERS[0]), 3)
    assert Serve(PLAN, links(PLAN)[0]) in machine.step(heard(state(PLAN, "serving")), 4)


def test_a_plan_without_all_of_its_links_is_not_opened() -> None:
    machine = make(PEERS[4])
    bare = PlanState(PLAN, "serving", links(PLAN)[1:])
    assert not any(isinstance(action, Serve) for action in machine.step(heard(bare), 0))


def test_a_storm_of_plans_starts_few_stages() -> None:
    machine = make()
    started = 0
    plans = [plan(4, 8, 12, number=number) for number in range(1, 8)]
    machine.step(heard(*(state(each) for each in plans)), 0)
    for each in plans:
        actions = machine.step(Fetched(each.id), 0)
        started += any(isinstance(action, StartStage) for action in actions)
        if started == 4 and not any(isinstance(action, StartStage) for action in actions):
            assert reports(actions)[0].phase == "failed"
    assert started == 4


@pytest.mark.parametrize(
    ("me", "lost", "over"),
    [(0, 1, True), (1, 0, True), (1, 2, True), (2, 0, True), (3, 1, False), (1, 3, False)],
)
def test_a_peer_that_others_hear_matters_only_to_those_who_speak_to_it(
    me: int, lost: int, over: bool
) -> None:
    of_four = plan(3, 6, 9, 12)
    machine = make(PEERS[me])
    serving(machine, of_four)
    actions = machine.step(MemberLost(PEERS[lost], "silent", heard_by=PEERS[4]), 5)
    assert any(isinstance(action, EndPlan) for action in actions) == over
    assert [report.lost for report in reports(actions)] == [PEERS[lost]] * over


def test_whose_numbers_are_not_finite_is_told_at_once() -> None:
    machine = make()
    serving(machine)
    news = StageNews("linked", ring_port=4001, key="k" * 40, blamed=PEERS[2])
    (report,) = reports(machine.step(Told(PLAN.id, news), 5))
    assert (report.phase, report.blamed) == ("linked", PEERS[2])


def test_answers_on_a_plan_that_is_in_a_hurry_are_to_go_over() -> None:
    machine = make()
    serving(machine)
    after = plan(6, 12, number=2)
    before = PlanState(PLAN, "draining", links(PLAN), hurry=True)
    actions = machine.step(heard(before, state(after, "serving")), 3)
    assert actions.index(GoOver(PLAN.id)) > actions.index(Serve(after, links(after)[0]))


def test_another_coordinators_plan_of_the_same_number_is_another_plan() -> None:
    machine = make()
    serving(machine)
    twin = replace(plan(6, 12), coordinator=PEERS[2])
    assert twin.id == PLAN.id
    actions = machine.step(heard(state(twin, "serving")), 0)
    assert [type(action) for action in actions] == [EndPlan, StopStage, Serve, Fetch, Serve]
    assert actions[2] == Serve(None)
    assert actions[-1] == Serve(twin, links(twin)[0])
    assert machine.step(heard(state(twin, "serving")), 0) == []
