"""When a coordinator looks ahead, what it makes of the answer, and when it says nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from msgspec.structs import replace as with_

from peer.planning.foresight import (
    AGAIN,
    PATIENCE_S,
    QUIET_S,
    REST_S,
    REST_SHARE,
    Event,
    Foresee,
    Foreseen,
    Foresight,
    Heard,
    Publish,
    Seen,
    Tick,
)
from peer.planning.making import Members
from peer.planning.outlook import Standing
from peer.planning.plan import PlanId
from peer.planning.profile import ModelOffer, Profile
from peer.protocol import Loss, Outlook, Spare
from tests import plans
from tests.coordinator import A, B, C, profile

PUBLISH_S = 2.0
PLAN = plans.plan(6, 12)


def members(*present: str, **changes: Mapping[str, object]) -> Members:
    """present: a, b, c. changes: of profiles, and `parts`, by letter."""
    profiles: dict[str, Profile] = {}
    offers = {}
    for letter in present:
        peer_id, changed = letter * 16, dict(changes.get(letter, {}))
        offers[peer_id] = [ModelOffer(PLAN.shape, 1.0, tuple(changed.pop("parts", ())))]  # type: ignore[arg-type]
        profiles[peer_id] = profile(peer_id, **changed)  # type: ignore[arg-type]
    return Members(frozenset(profiles), profiles, offers)


def standing(of: Members | None = None, term: int = 3, number: int = 1) -> Standing:
    plan = with_(PLAN, id=PlanId(term, number))
    return Standing(term, A, of or members("a", "b"), plan, {}, {})


def told(term: int = 3, outcome: str = "fine") -> Outlook:
    spare = Spare(B, PLAN.shape.digest, ("layer-000",))
    return Outlook(term, (Loss(A, outcome), Loss(B, outcome)), (spare,))  # type: ignore[arg-type]


class World:
    """The machine and its clock."""

    def __init__(self) -> None:
        self.now = 50.0
        self.machine = Foresight(PUBLISH_S)
        self.published: list[tuple[float, Outlook]] = []
        self.asked: list[tuple[float, Foresee]] = []

    def do(self, event: Event) -> None:
        for action in self.machine.step(event, self.now):
            match action:
                case Publish(outlook):
                    self.published.append((self.now, outlook))
                case Foresee():
                    self.asked.append((self.now, action))

    def wait(self, seconds: float) -> None:
        """Let time pass, with a Tick whenever one is wanted."""
        end = self.now + seconds
        while (at := self.machine.deadline) is not None and at <= end:
            self.now = max(self.now, at)
            self.do(Tick())
            after = self.machine.deadline
            assert after is None or after > self.now, "it wants Ticks for ever"
        self.now = end

    def answer(self, outlook: Outlook, took_s: float = 0.1) -> None:
        self.do(Foreseen(self.asked[-1][1].number, outlook, took_s))

    def foresee(self, outlook: Outlook | None = None) -> None:
        """See, be quiet, ask and be answered."""
        self.do(Seen(standing()))
        self.wait(QUIET_S)
        self.answer(outlook or told())


def test_it_asks_once_all_has_been_quiet_and_publishes_the_answer_again_and_again() -> None:
    world = World()
    world.do(Seen(standing()))
    world.wait(QUIET_S - 0.1)
    assert world.asked == []
    world.wait(0.1)
    ((at, asked),) = world.asked
    assert (at, asked.standing.plan.id) == (50.0 + QUIET_S, PlanId(3, 1))
    world.answer(told())
    began = world.now
    assert world.published[-1] == (began, told())
    world.wait(3.5 * AGAIN * PUBLISH_S)
    again = [at - began for at, outlook in world.published if outlook == told()]
    assert again == [0.0, *(AGAIN * PUBLISH_S * i for i in (1, 2, 3))]
    assert len(world.asked) == 1


def test_what_does_not_change_an_outlook_is_no_reason_to_ask() -> None:
    world = World()
    world.foresee()
    for _ in range(3):
        world.do(Seen(standing()))  # told anew, and the same
        world.wait(1)
    world.do(Seen(standing(members("a", "b", a={"disk_free_bytes": 7}))))
    world.wait(60)
    assert len(world.asked) == 1


def test_parts_room_memory_leaving_and_doubts_are_reasons_to_ask() -> None:
    for changed in (
        standing(members("a", "b", b={"parts": ("layer-000",)})),
        standing(members("a", "b", b={"spare_bytes": 1 << 30})),
        standing(members("a", "b", b={"memory_mib": 100})),
        standing(members("a", "b", b={"leaving": True})),
        standing(members("a", "b", b={"unreachable": (C,)})),
        standing(members("a", "b", "c")),
        replace(standing(), barred={B: "it failed"}),
        replace(standing(), shaky={B: "it flaps"}),
    ):
        world = World()
        world.foresee()
        world.do(Seen(changed))
        world.wait(REST_S + 1)
        assert len(world.asked) == 2, changed
        assert replace(world.asked[-1][1].standing, asked=()) == changed


def test_while_parts_keep_arriving_it_asks_all_the_same() -> None:
    world = World()
    for count in range(20):
        arrived = tuple(f"layer-{i:03d}" for i in range(count))
        world.do(Seen(standing(members("a", "b", b={"parts": arrived}))))
        world.wait(1.0)
    assert world.asked[0][0] == 50.0 + PATIENCE_S
    assert len(world.asked) == 1  # nor a second time before the first is answered


def test_a_slow_outlook_is_followed_by_a_long_rest() -> None:
    world = World()
    world.do(Seen(standing()))
    world.wait(QUIET_S)
    world.answer(told(), took_s=3.0)
    began = world.now
    world.do(Seen(standing(members("a", "b", "c"))))
    world.wait(100)
    assert world.asked[1][0] == began + REST_SHARE * 3.0


def test_a_new_plan_or_a_loss_makes_what_was_foreseen_void_at_once() -> None:
    for changed in (standing(number=2), standing(members("a"))):
        world = World()
        world.foresee()
        world.do(Seen(changed))
        at, outlook = world.published[-1]
        assert at == world.now
        assert outlook == Outlook(3, (), told().spares)  # what is to be held stays so


def test_a_peer_that_joins_changes_nothing_until_more_is_known() -> None:
    world = World()
    world.foresee()
    world.do(Seen(standing(members("a", "b", "c"))))
    assert world.published[-1][1] == told()


def test_an_answer_about_a_plan_that_is_over_is_not_told() -> None:
    world = World()
    world.do(Seen(standing()))
    world.wait(QUIET_S)
    world.do(Seen(standing(number=2)))
    world.answer(told())
    assert all(outlook.losses == () for _, outlook in world.published)
    world.wait(QUIET_S)
    assert len(world.asked) == 2  # nor does a rest come after it
    assert world.asked[-1][1].standing.plan.id == PlanId(3, 2)


def test_an_answer_that_nobody_waits_for_is_dropped() -> None:
    world = World()
    world.foresee()
    before = list(world.published)
    world.do(Foreseen(1, told(outcome="none"), 0.1))
    world.do(Foreseen(99, told(outcome="none"), 0.1))
    assert world.published == before
    world.do(Seen(standing(members("a", "b", "c"))))
    world.wait(REST_S + 1)
    assert len(world.asked) == 2
    world.do(Foreseen(1, told(outcome="none"), 0.1))  # the first one's, once more
    assert world.published[-1][1] == told()
    world.answer(told(outcome="fetch"))
    assert world.published[-1][1] == told(outcome="fetch")


def test_who_does_not_coordinate_is_silent_and_goes_on_where_another_was() -> None:
    world = World()
    world.do(Heard(told(term=2)))
    world.wait(60)
    world.do(Seen(None))
    world.wait(60)
    assert (world.published, world.asked, world.machine.deadline) == ([], [], None)
    world.do(Seen(standing()))  # the coordinator has died
    assert world.published == [(world.now, Outlook(3, (), told().spares))]
    world.wait(QUIET_S)
    assert world.asked[-1][1].standing.asked == told().spares
    world.do(Seen(None))
    world.answer(told())
    world.wait(60)
    assert len(world.published) == 1


def test_what_another_says_is_not_heard_while_this_one_coordinates() -> None:
    world = World()
    world.foresee()
    world.do(Heard(told(term=9, outcome="none")))
    world.wait(AGAIN * PUBLISH_S)
    assert world.published[-1][1] == told()
