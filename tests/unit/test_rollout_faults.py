"""Coordinating among peers that are wrong: models that nobody can serve, plans that cannot be."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from peer.planning.plan import STAGES_MAX, TERM_MAX, PlanId, PlanState, PlanWindow
from peer.planning.profile import EngineProfile, ModelOffer
from peer.planning.rollout import Elected
from peer.protocol import decode_control, encode
from tests.coordinator import TIMING, A, B, C, World, offer, profile, shape

OLD = shape("old", "1")
NEW = shape("new", "2")
BOTH: dict[str, list[ModelOffer]] = {A: [offer(OLD, 5.0), offer(NEW, 9.0)]}


def live(world: World, seconds: float, every: float = 0.5) -> None:
    """Let time pass; whoever is asked for NEW fails, for anything else obeys."""
    end = world.now + seconds
    while world.now < end:
        world.wait(every)
        for state in world.rollout.states:
            if state.plan.shape == NEW and state.phase == "loading":
                world.report(state.plan.ring[0], state, "failed", why="it cannot be fetched")
            elif state.plan.shape != NEW:
                phase = "ready" if state.phase == "loading" else "linked"
                for peer in state.plan.ring:
                    world.report(peer, state, phase)


def served(world: World) -> list[str]:
    return [s.plan.shape.model for s in world.plans.states if s.phase == "serving"]


@pytest.mark.parametrize("peers", [(A,), (A, B, C)])
def test_a_newest_model_that_fails_everywhere_gives_way_to_the_next(peers: tuple[str, ...]) -> None:
    world = World(*peers, offers=BOTH)
    world.do(Elected(3))
    live(world, 30)
    assert served(world) == ["old"]
    whys = [plans.why_none for _, plans in world.published if "serving old" in plans.why_none]
    assert whys[-1].startswith("new was pulled last, but the stage on machine-")
    assert "it cannot be fetched" in whys[-1]
    assert any(whys[-1] in note for note in world.notes)


def test_a_newest_model_that_failed_is_tried_again_beside_what_serves_and_taken_when_it_can() -> (
    None
):
    world = World(A, offers=BOTH)
    world.do(Elected(3))
    live(world, 60)
    old = next(s.plan.id for s in world.plans.states if s.phase == "serving")
    tried = sum("for new:" in note for note in world.notes)
    world.profiles[A] = profile(A, 2000)  # what serves takes memory, and stays where it is
    world.members()
    live(world, 640)
    assert sum("for new:" in note for note in world.notes) > tried
    assert [s.plan.id for s in world.plans.states if s.phase == "serving"] == [old]
    for _ in range(1300):
        world.wait(0.5)
        world.obey()
    assert served(world) == ["new"]
    assert world.plans.why_none == ""


def test_the_next_model_may_finish_loading_before_the_newest_fails_once_more() -> None:
    world = World(A, offers=BOTH)
    world.do(Elected(3))
    for _ in range(2):
        world.wait(2)
        world.report(A, world.rollout.states[0], "failed", why="ill")
    world.wait(2)
    old = world.rollout.states
    assert [s.plan.shape for s in old] == [OLD]
    world.wait(TIMING.load_s / 2)  # the bar ended long ago
    assert [s.plan.id for s in world.rollout.states] == [old[0].plan.id]
    world.obey()
    assert served(world) == ["old"]
    world.wait(2)
    assert [s.plan.shape.model for s in world.rollout.states] == ["old", "new"]


def test_a_model_that_a_setting_names_gives_way_to_none() -> None:
    world = World(A, offers=BOTH)
    world.profiles[A] = profile(A, model_wanted="new")
    world.members()
    world.do(Elected(3))
    live(world, 60)
    assert served(world) == []
    assert "it cannot be fetched" in world.plans.why_none


def test_a_newest_model_that_does_not_fit_gives_way_to_the_next() -> None:
    huge = replace(NEW, layer_bytes=(1 << 40,) * 12)
    world = World(A, B, offers={A: [offer(OLD, 5.0)], B: [offer(huge, 9.0)]})
    state = world.serve()
    assert state.plan.shape == OLD
    assert "MiB are missing" in world.plans.why_none
    assert world.plans.why_none.endswith(": serving old")
    world.wait(60)
    assert world.phases == {str(state.plan.id): "serving"}
    assert sum("serving old" in note for note in world.notes) == 1
    world.offers = {A: [offer(OLD, 5.0)]}
    world.members()
    world.wait(2)
    assert world.plans.why_none == ""
    assert world.phases == {str(state.plan.id): "serving"}


def test_a_peer_that_lies_about_a_model_is_named_once_and_the_true_shape_is_served() -> None:
    lie = replace(shape("lied", layers=3), context=600)
    world = World(B, A, C, offers={B: [offer(shape())], C: [offer(shape())], A: [offer(lie, 4e9)]})
    world.rollout = type(world.rollout)(B, TIMING)
    world.members()
    assert world.serve().plan.shape == shape()
    world.wait(20)
    world.members()
    assert [note for note in world.notes if "otherwise than this peer" in note] == [
        note for note in world.notes if note.startswith(f"machine-a ({A}): its offer of lied")
    ]
    assert sum("its offer of lied" in note for note in world.notes) == 1


def test_whatever_is_announced_plans_can_be_decoded() -> None:
    huge = 1 << 60
    gpus = tuple(EngineProfile("fake", f"GPU {i}", "cuda", huge, huge) for i in range(64))
    for model in (
        replace(NEW, layer_bytes=(huge,) * 12),
        replace(NEW, layer_bytes=(huge // 12 - 99,) * 12, layer_kv_bytes=(0,) * 12),
        replace(NEW, whole_why="w" * 1000),
    ):
        world = World(A, B, offers={A: [offer(OLD, 5.0)], B: [offer(model, 9.0)]})
        world.profiles[B] = profile(B, engines=gpus, memory_available_bytes=huge)
        world.members()
        world.do(Elected(3))
        world.wait(5)
        assert world.plans.states
        for _, plans in world.published:
            assert decode_control(encode(plans)) == plans


@pytest.mark.parametrize("key", ["é" * 40, "~" * 40, "#" * 40, "k" * 39])
def test_a_key_that_is_none_is_the_failure_of_the_peer_that_tells_it(key: str) -> None:
    world = World(A, B)
    world.do(Elected(3))
    world.wait(TIMING.settle_s)
    state = world.plans.states[0]
    world.report(A, state, "ready")
    world.report(B, state, "ready", key=key)
    assert world.phases == {}
    assert "machine-b" in world.plans.why_none
    assert "key" in world.plans.why_none


def test_a_running_plan_of_a_key_that_is_none_ends_as_that_peers_failure() -> None:
    world = World(A, B)
    state = world.serve()
    world.report(B, state, "linked", key="#" * 40)
    assert world.phases == {}
    assert "machine-b" in world.plans.why_none


def unsound(known: PlanState) -> dict[str, PlanState]:
    plan = known.plan

    def with_windows(*windows: PlanWindow) -> PlanState:
        split = replace(plan.split, windows=windows)
        return replace(known, plan=replace(plan, split=split))

    def with_id(term: int, number: int) -> PlanState:
        return replace(known, plan=replace(plan, id=PlanId(term, number)))

    first, second = plan.split.windows
    return {
        "no windows": with_windows(),
        "a gap": with_windows(first, replace(second, first=second.first + 1)),
        "no slots": replace(known, plan=replace(plan, split=replace(plan.split, slots=0))),
        "no links": replace(known, links=()),
        "a link too few": replace(known, links=known.links[:1]),
        "links of others": replace(known, links=known.links[::-1]),
        "no submit port": replace(
            known, links=(replace(known.links[0], submit_port=0), known.links[1])
        ),
        "its number at the bound": with_id(7, TERM_MAX),
        "an old number at the bound": with_id(3, TERM_MAX - 5),
        "its term at the bound": with_id(TERM_MAX, 1),
    }


def test_a_plan_that_is_not_sound_is_not_adopted_and_the_next_can_be_decoded() -> None:
    known = World(A, B).serve()
    for case, state in unsound(known).items():
        for phase in ("serving", "draining"):
            world = World(A, B)
            world.do(Elected(7, (replace(state, phase=phase),)))
            assert world.rollout.states == (), case
            world.wait(TIMING.settle_s)
            assert world.phases == {"7.1": "loading"}, case
            assert decode_control(encode(world.plans)) == world.plans, case
    world = World(A, B)
    world.do(Elected(7, (known,)))
    assert world.phases == {"3.1": "serving"}


def test_an_adopted_plan_whose_shape_is_a_lie_is_replaced() -> None:
    known = World(A, B).serve()
    lie = replace(known.plan.shape, context=99)
    world = World(A, B)
    world.do(Elected(7, (replace(known, plan=replace(known.plan, shape=lie)),)))
    world.wait(TIMING.settle_s)
    assert world.phases == {"3.1": "serving", "7.1": "loading"}
    world.obey()
    assert [s.plan.shape for s in world.plans.states if s.phase == "serving"] == [shape()]


def test_no_more_plans_drain_than_a_peer_has_stages_for() -> None:
    """A stage that may not start beside earlier ones would be held against its peer."""
    world = World(A, B)
    world.serve()
    for pulled in range(1, 7):
        world.active = {state.plan.id: 1 for state in world.plans.states}  # long answers
        model = shape(f"model-{pulled}", str(pulled))
        world.offers = {A: [*world.offers[A], offer(model, 1.0 + pulled)]}
        world.members()
        world.wait(2 * TIMING.settle_s)
        loading = [s for s in world.plans.states if s.phase == "loading"]
        assert [state.plan.shape for state in loading] == [model]
        assert len(world.plans.states) <= STAGES_MAX
        world.obey()


def test_of_many_plans_that_drain_no_more_are_adopted_than_a_message_holds() -> None:
    known = World(A, B).serve()
    states = tuple(
        replace(known, plan=replace(known.plan, id=PlanId(3, 1 + i)), phase="draining")
        for i in range(8)
    )
    world = World(A, B)
    world.do(Elected(7, states))
    world.wait(TIMING.settle_s)
    assert "7.1" in world.phases
    assert len(world.phases) == STAGES_MAX - 1
    assert decode_control(encode(world.plans)) == world.plans
