"""planning.leaving, leaving: who goes away waits for what others need, and never in vain."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

from peer.config import Config, Timing
from peer.leaving import REFUSED, Parting, _names
from peer.planning import leaving as l
from peer.planning.leaving import Leaving, Over, Reason, Saw, Scene, Stayed, Tell, Wished
from peer.planning.plan import PlanState
from peer.planning.profile import Profile
from peer.protocol import Report
from peer.words.state import Going
from tests.conftest import Until
from tests.plans import PEERS, plan, state

ME, OTHER, THIRD = PEERS[:3]
OLD = state(plan(4, 8, 12, number=1), "serving")  # on ME, OTHER and THIRD
TIMING = Timing()


def without_me(phase: str = "loading", number: int = 2) -> PlanState:
    """A plan of the other two."""
    of = plan(4, 8, 12, number=number)
    windows = [replace(w, peer_id=OTHER if w.first < 8 else THIRD) for w in of.split.windows]
    return state(replace(of, split=replace(of.split, windows=tuple(windows))), phase)


def seen(
    *states: PlanState, running: int = 0, stays: tuple[str, ...] = (OTHER, THIRD), why: str = "",
    done: int = 0, active: int = 0,
) -> Saw:  # fmt: skip
    """How things are. done: bytes that OTHER has fetched of a plan. active: answers on each."""

    def told(peer_id: str, plan_id: Any) -> Report | None:
        return Report(plan_id, "loading", done if peer_id == OTHER else 0, 100, active=active)

    return Saw(l.scene(ME, states, told, stays, running, why))


def wished(reason: Reason, saw: Saw) -> Leaving:
    """A peer that has just told everybody, and has to wait."""
    machine = Leaving(TIMING)
    assert machine.step(saw, 0.0) == []
    assert machine.step(Wished(reason), 0.0) == [Tell(True)]
    return machine


def draining(of: PlanState, hurry: bool = True) -> PlanState:
    return replace(of, phase="draining", hurry=hurry)


@pytest.mark.parametrize("reason", ["stop", "leave", "sleep"])
@pytest.mark.parametrize("stays", [(), (OTHER,)])
def test_whoever_nobody_needs_goes_at_once(reason: Reason, stays: tuple[str, ...]) -> None:
    machine = Leaving(TIMING)
    for states in ((), (without_me("serving"),)):
        machine.step(seen(*states, stays=stays), 0.0)
        assert machine.step(Wished(reason), 0.0) == [Tell(True), Over(reason)]
        assert machine.step(seen(*states, stays=stays), 9e9) == [], "told twice"
        assert machine.step(Stayed(reason), 9e9) == [Tell(False)]


def test_the_last_peer_waits_for_its_own_answers_only_and_refuses_new_ones() -> None:
    machine = wished("stop", seen(OLD, running=2, stays=()))
    assert machine.refuses
    assert machine.phase("stop", 1.0) == "alone"
    assert machine.step(seen(OLD, running=1, stays=()), 5.0) == []
    assert machine.step(seen(OLD, running=0, stays=()), 6.0) == [Over("stop")]


def test_a_peer_of_the_ring_goes_once_its_plan_is_gone() -> None:
    machine = wished("stop", seen(OLD))
    assert machine.phase("stop", 0.1) == "asking"
    assert machine.step(seen(OLD, without_me("loading")), 1.0) == []
    assert machine.phase("stop", 1.0) == "loading"
    assert machine.step(seen(OLD, without_me("linking")), 8.0) == []
    assert machine.step(seen(draining(OLD), without_me("serving")), 9.0) == []
    assert machine.phase("stop", 9.0) == "draining"
    assert machine.step(seen(without_me("serving"), running=1), 10.0) == []
    assert machine.phase("stop", 10.0) == "answers"
    assert machine.step(seen(without_me("serving")), 11.0) == [Over("stop")]


def test_a_plan_that_only_loads_with_this_peer_holds_nobody() -> None:
    machine = Leaving(TIMING)
    machine.step(seen(replace(OLD, phase="loading")), 0.0)
    assert Over("stop") in machine.step(Wished("stop"), 0.0)


def test_nobody_waits_in_vain_where_the_coordinator_has_no_other_plan() -> None:
    machine = wished("stop", seen(OLD, why="8B was pulled last, but it needs 5 GiB"))
    assert machine.step(seen(OLD, why="8B was pulled last, but it needs 5 GiB"), 0.5) == []
    why = "without oak, 2 GiB are missing"
    assert machine.step(seen(OLD, why=why, active=1), 0.6) == [], "an answer still needs it"
    assert machine.phase("stop", 0.6) == "alone"
    assert machine.step(seen(OLD, why=why), 0.7) == [Over("stop", f"nobody can take over: {why}")]


def test_nobody_waits_in_vain_where_the_coordinator_says_nothing() -> None:
    machine = wished("stop", seen(OLD))
    assert machine.step(seen(OLD), TIMING.leave_quiet_s - 0.1) == []
    assert machine.step(seen(OLD), TIMING.leave_quiet_s) == [Over("stop", "nobody takes over")]


def test_whoever_takes_over_is_waited_for_whatever_else_cannot_be() -> None:
    machine = wished("stop", seen(OLD))
    why = "8B was pulled last, but without oak it needs 5 GiB: serving an earlier tiny"
    assert machine.step(seen(OLD, without_me("loading"), why=why), 9.0) == []
    assert machine.phase("stop", 9.0) == "loading"


def test_a_plan_that_fails_gives_the_next_one_time_to_begin() -> None:
    machine = wished("stop", seen(OLD))
    machine.step(seen(OLD, without_me("loading")), 5.0)
    assert machine.step(seen(OLD), 5.1) == []
    assert machine.step(seen(OLD, without_me("loading", number=3)), 7.9) == []
    assert machine.step(seen(OLD, without_me("loading", number=3)), 12.0) == []


def test_peers_that_leave_together_do_not_wait_for_each_other() -> None:
    machine = wished("stop", seen(OLD))
    assert machine.step(seen(OLD, stays=()), 0.1) == [Over("stop")]


@pytest.mark.parametrize(
    ("saw", "why"),
    [
        (seen(OLD, without_me("loading")), "the others were not ready yet to take over"),
        (seen(without_me("serving"), running=3), "3 answers still ran"),
        (seen(draining(OLD), without_me("serving")), "the answers had not all gone over yet"),
    ],
)
def test_a_signal_is_obeyed_in_time_whatever_is_left(saw: Saw, why: str) -> None:
    machine = wished("stop", saw)
    assert machine.step(saw, TIMING.leave_s - 0.1) == []
    assert machine.step(saw, TIMING.leave_s) == [Over("stop", f"after 20 s {why}")]


def test_leave_waits_as_long_as_others_come_further() -> None:
    machine, now = wished("leave", seen(OLD)), 0.0
    for done in range(1, 8):
        now += TIMING.load_s - 1
        assert machine.step(seen(OLD, without_me("loading"), done=done), now) == []
    assert machine.step(seen(OLD, without_me("loading"), done=7), now + TIMING.load_s - 1) == []
    late = machine.step(seen(OLD, without_me("loading"), done=7), now + TIMING.load_s)
    assert late == [Over("leave", "after 600 s the others were not ready yet to take over")]


def test_before_sleep_only_others_answers_count_and_new_ones_are_taken() -> None:
    machine = wished("sleep", seen(OLD, running=1))
    assert not machine.refuses
    saw = seen(without_me("serving"), running=1)
    assert machine.step(saw, 1.0) == [Over("sleep")], "its own go on when it wakes"
    assert machine.step(Stayed("sleep"), 2.0) == [Tell(False)]
    machine.step(seen(OLD), 3.0)
    assert machine.step(Wished("sleep"), 3.0) == [Tell(True)]
    assert machine.step(seen(OLD, without_me("loading")), 3.0 + 4.4) == []
    assert machine.step(seen(OLD, without_me("loading")), 3.0 + 4.5) != []


def test_a_wish_that_is_taken_back_leaves_the_other_one() -> None:
    machine = wished("leave", seen(OLD))
    assert machine.step(Wished("stop"), 1.0) == [], "everybody knows already"
    assert machine.step(Stayed("leave"), 2.0) == []
    assert machine.step(Stayed("leave"), 2.0) == []
    assert machine.wishes == ("stop",)
    assert machine.step(Stayed("stop"), 2.0) == [Tell(False)]
    assert not machine.refuses
    assert machine.step(seen(OLD), 9e9) == []


# The shell ----------------------------------------------------------------------------------------


class OneAgent:
    """What a parting sees of an agent: it serves alone unless a test says otherwise."""

    me = ME

    def __init__(self, *states: PlanState, others: tuple[str, ...] = (OTHER, THIRD)) -> None:
        self.config = Config.fast_test()
        self.profiles = {p: Profile(p, f"{p[0]}-host", "linux", 2, 1, 1) for p in (ME, *others)}
        self.cluster = SimpleNamespace(members=dict.fromkeys(others))
        self.entry = SimpleNamespace(running=0)
        self.reports: dict[Any, Report] = {}
        self.duty = SimpleNamespace(parts={}, why_none="")
        self.measuring = SimpleNamespace(change=self._change)
        self.told: list[bool] = []
        self.lists(*states)

    def lists(self, *states: PlanState) -> None:
        """The plans of now."""
        self.duty.parts = {
            s.plan.id: SimpleNamespace(state=s, dead="", report=Report(s.plan.id, "linked"))
            for s in states
        }

    def _change(self, *, leaving: bool) -> None:
        self.told.append(leaving)


class Watched:
    """A parting that looks at its agent; over: the reasons that are."""

    def __init__(self, agent: OneAgent) -> None:
        self.over: list[Reason] = []
        self.parting = Parting(agent, self.over.append)  # type: ignore[arg-type]

    async def __aenter__(self) -> Watched:
        self._task = asyncio.create_task(self.parting.run())
        return self

    async def __aexit__(self, *error: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


async def test_an_agent_that_serves_nothing_is_over_within_the_call() -> None:
    agent = OneAgent()
    async with Watched(agent) as watched:
        watched.parting.wish("stop")
        assert watched.over == ["stop"]
    assert agent.told == [True]


async def test_progress_tells_who_takes_over_and_ends_with_what_was_left(until: Until) -> None:
    agent = OneAgent(OLD)
    async with Watched(agent) as watched:
        parting = watched.parting
        assert parting.refuses == ""
        parting.wish("leave")
        assert parting.refuses == REFUSED
        shown: list[Going] = []

        async def follow() -> None:
            shown.extend([step async for step in parting.progress()])

        following = asyncio.create_task(follow())
        coming = without_me("loading")
        agent.reports[OTHER, coming.plan.id] = Report(coming.plan.id, "fetching", 30, 100)
        agent.reports[THIRD, coming.plan.id] = Report(coming.plan.id, "ready", 50, 50)
        agent.lists(OLD, coming)
        await until(lambda: "others load" in parting.told(), 5, "it loads")
        await asyncio.wait({following}, timeout=0.6)
        agent.lists(without_me("serving"))
        await asyncio.wait_for(following, 5)
        assert watched.over == ["leave"]
    loading = next(step for step in shown if step.phase == "loading")
    assert loading == Going("loading", "tiny", ("b-host", "c-host"), 30, 100)
    assert shown[-1] == Going("gone")


async def test_taking_it_back_ends_the_progress_and_tells_everybody(until: Until) -> None:
    agent = OneAgent(OLD)
    async with Watched(agent) as watched:
        watched.parting.wish("leave")
        steps = watched.parting.progress()
        assert (await anext(steps)).phase == "asking"
        watched.parting.stay("leave")
        assert [step async for step in steps] == [Going("stays")]
        assert (watched.over, agent.told, watched.parting.refuses) == ([], [True, False], "")
        watched.parting.wish("leave")
        assert agent.told == [True, False, True]


async def test_a_plan_that_is_over_for_this_peer_is_no_reason_to_wait() -> None:
    agent = OneAgent(OLD)
    agent.duty.parts[OLD.plan.id].dead = "peer b was lost"
    async with Watched(agent) as watched:
        watched.parting.wish("stop")
        assert watched.over == ["stop"]


async def test_peers_that_leave_at_once_do_not_count_on_each_other(until: Until) -> None:
    agent = OneAgent(OLD)
    agent.entry.running = 1
    async with Watched(agent) as watched:
        watched.parting.wish("stop")
        assert "asking others" in watched.parting.told()
        for peer_id in (OTHER, THIRD):
            agent.profiles[peer_id] = replace(agent.profiles[peer_id], leaving=True)
        await until(lambda: "nobody can" in watched.parting.told(), 0.5, "they all leave")
        agent.entry.running = 0
        await until(lambda: watched.over == ["stop"], 0.5, "nobody is waited for")


async def test_sleep_waits_for_its_bound_and_no_longer() -> None:
    agent = OneAgent(OLD, without_me("loading"))
    async with Watched(agent) as watched:
        began = asyncio.get_running_loop().time()
        await asyncio.wait_for(watched.parting.ready("sleep"), 5)
        took_s = asyncio.get_running_loop().time() - began
        assert agent.config.timing.sleep_s <= took_s < agent.config.timing.sleep_s + 1
        assert watched.over == ["sleep"]
        watched.parting.stay("sleep")
    assert agent.told == [True, False]


def test_what_stands_in_a_scene() -> None:
    states = [draining(OLD), without_me("serving", 2), without_me("loading", 3)]
    found = seen(*states, running=1, active=2).scene
    assert found == Scene(
        True, (OLD.plan.id,), states[2], 1, 2, ((states[2].plan.id, "loading", 0), 1)
    )


def test_who_takes_over_is_told_by_names_that_tell_them_apart() -> None:
    names = {ME: "pi", OTHER: "pi", THIRD: "desk"}
    profiles = {peer: Profile(peer, name, "linux", 4, 1, 1) for peer, name in names.items()}
    agent: Any = SimpleNamespace(profiles=profiles)
    told = [f"pi {peer[:4]}" for peer in (ME, OTHER)]
    assert [*_names(agent, (THIRD, ME, OTHER, "x"))] == ["desk", *told, "x"]
