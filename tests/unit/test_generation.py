"""One answer as its entry peer owns it: every token once, in order, whatever happens to plans."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from peer.planning.plan import PlanId
from peer.protocol import Cancel, Sampling, Submit, Tokens, Unanswered
from peer.ring import generation as g
from peer.ring.generation import (
    AGAIN_S,
    BUSY_AGAIN_S,
    STRIKES,
    Arrived,
    ClientGone,
    Continued,
    Fail,
    Generation,
    Give,
    GoOver,
    LinkBroke,
    Offer,
    Patience,
    PlanLost,
    Send,
    Serves,
    Tick,
    Underway,
)

PLAN, OTHER = PlanId(1, 1), PlanId(1, 2)
MODEL = "d" * 64
PATIENCE = Patience(silence_s=30.0, plan_s=10.0, plan_max_s=100.0)
SAMPLING = Sampling(temperature=0.8, seed=7, repeat_penalty=1.1)


def offer(plan: PlanId = PLAN, context: int = 100, digest: str = MODEL) -> Serves:
    return Serves(Offer(plan, digest, context))


def make() -> Generation:
    return Generation("r", (1, 2, 3), SAMPLING, 10, (9,), MODEL, PATIENCE)


def begun() -> Generation:
    machine = make()
    assert submitted(machine.step(offer(), 0.0)).request == "r.1"
    return machine


def submitted(actions: list[g.Action]) -> Submit:
    """The one submission among the actions."""
    (found,) = [a.message for a in actions if isinstance(a, Send) and isinstance(a.message, Submit)]
    return found


def ids(submit: Submit) -> list[int]:
    return np.frombuffer(submit.ids, np.int32).tolist()


def tokens(
    position: int, *ids: int, finish: str = "", plan: PlanId = PLAN, name: str = "r.1"
) -> Arrived:
    return Arrived(Tokens(name, plan, position, ids, finish))  # type: ignore[arg-type]


def unanswered(code: str, name: str = "r.1", plan: PlanId = PLAN) -> Arrived:
    return Arrived(Unanswered(name, plan, code, "because"))  # type: ignore[arg-type]


def test_tokens_are_given_once_and_in_order() -> None:
    machine = begun()
    assert machine.step(tokens(3, 7), 1.0) == [Give((7,), "")]
    assert machine.step(tokens(3, 7), 1.0) == []
    assert machine.step(tokens(4, 8, finish="length"), 1.0) == [Give((8,), "length")]
    assert machine.done
    assert machine.deadline is None
    assert machine.step(tokens(5, 9), 1.0) == []


def test_a_head_gives_no_more_than_was_asked_for() -> None:
    machine = begun()
    machine.step(Arrived(Tokens("r.1", PLAN, 3, tuple(range(8)))), 1.0)
    actions = machine.step(Arrived(Tokens("r.1", PLAN, 11, (8, 9, 10, 11))), 2.0)
    assert [a for a in actions if isinstance(a, Give)] == [Give((8, 9), "length")]
    assert Send(Cancel("r.1", PLAN)) in actions  # it would go on for ever
    assert machine.done
    assert machine.deadline is None


def test_a_lost_plan_makes_it_wait_and_the_next_one_goes_on_from_the_ids() -> None:
    machine = begun()
    machine.step(tokens(3, 7, 8), 1.0)
    assert machine.step(PlanLost(PLAN, "peer b was lost"), 2.0) == []
    assert machine.plan is None
    assert machine.deadline == 2.0 + PATIENCE.plan_s
    goes_on, send = machine.step(offer(OTHER), 3.0)
    assert goes_on == Continued(OTHER, 2, "peer b was lost")
    again = submitted([send])
    assert (again.plan, again.request, again.delivered) == (OTHER, "r.2", 2)
    assert ids(again) == [1, 2, 3, 7, 8]
    assert again.tokens_max == 8
    assert (again.sampling, again.ends) == (SAMPLING, (9,))
    assert machine.step(tokens(5, 4, plan=OTHER, name="r.2"), 4.0) == [Give((4,), "")]


def test_where_another_plan_serves_already_it_goes_on_at_once() -> None:
    machine = begun()
    machine.step(offer(OTHER), 1.0)  # the answer stays where it is: the first plan drains
    assert machine.plan == PLAN
    assert submitted(machine.step(PlanLost(PLAN, "over"), 2.0)).plan == OTHER


def test_what_comes_of_an_earlier_submission_is_not_taken() -> None:
    machine = begun()
    machine.step(PlanLost(PLAN, "over"), 1.0)
    assert machine.step(tokens(3, 7), 1.5) == []  # while it waits
    machine.step(offer(OTHER), 2.0)
    assert machine.step(tokens(3, 7), 3.0) == []
    assert machine.step(tokens(3, 7, plan=OTHER, name="r.1"), 3.0) == []
    assert machine.step(unanswered("failed"), 3.0) == []
    assert machine.delivered == []


def test_a_plan_of_another_model_is_not_taken() -> None:
    machine = begun()
    machine.step(PlanLost(PLAN, "over"), 1.0)
    assert machine.step(offer(OTHER, digest="e" * 64), 2.0) == []
    assert machine.plan is None


def test_the_end_of_a_plan_that_it_does_not_run_on_is_nothing_to_it() -> None:
    machine = begun()
    for event in (PlanLost(OTHER, "over"), LinkBroke(OTHER), GoOver(OTHER)):
        assert machine.step(event, 1.0) == []
    assert machine.plan == PLAN


def test_a_broken_link_asks_the_same_head_again_a_little_later() -> None:
    machine = begun()
    machine.step(tokens(3, 7), 1.0)
    assert machine.step(LinkBroke(PLAN), 2.0) == []
    assert machine.deadline == 2.0 + AGAIN_S
    assert machine.step(Tick(), 2.0 + AGAIN_S / 2) == []
    again = submitted(machine.step(Tick(), 2.0 + AGAIN_S))
    assert (again.plan, again.request) == (PLAN, "r.2")
    assert ids(again) == [1, 2, 3, 7]


def test_it_goes_over_from_a_plan_that_is_left_and_takes_leave_of_its_head() -> None:
    machine = begun()
    machine.step(tokens(3, 7), 1.0)
    assert machine.step(GoOver(PLAN), 1.5) == []  # nothing else serves
    machine.step(offer(OTHER), 2.0)
    cancel, _, send = machine.step(GoOver(PLAN), 2.5)
    assert cancel == Send(Cancel("r.1", PLAN))
    assert submitted([send]).plan == OTHER
    assert machine.step(tokens(4, 8), 3.0) == []  # it was on its way, and comes again


def test_without_a_plan_it_waits_for_a_while_and_then_says_why() -> None:
    machine = begun()
    machine.step(Serves(None), 1.0)
    machine.step(PlanLost(PLAN, "peer b was lost"), 2.0)
    assert machine.step(Tick(), 11.9) == []
    (fail,) = machine.step(Tick(), 12.0)
    assert isinstance(fail, Fail)
    assert fail.code == "failed"
    assert "peer b was lost" in fail.why
    assert "within 10 s" in fail.why


def test_a_plan_that_is_on_its_way_is_waited_for_longer_but_not_for_ever() -> None:
    machine = make()
    machine.step(Serves(None), 0.0)
    now = 0.0
    while not machine.done:
        now += 5.0
        machine.step(Underway("e" * 64), now)
        machine.step(Underway(MODEL), now)
    assert now == pytest.approx(100.0)


def test_a_plan_of_another_model_on_its_way_is_not_waited_for() -> None:
    machine = make()
    machine.step(Serves(None), 0.0)
    machine.step(Underway("e" * 64), 9.0)
    assert isinstance(machine.step(Tick(), 10.0)[0], Fail)


def test_a_head_that_does_not_want_it_is_not_asked_for_ever() -> None:
    machine, now, number = begun(), 0.0, 1
    machine.step(tokens(3, 7), now)
    while not machine.done:
        machine.step(unanswered("stale", f"r.{number}"), now)
        now, number = now + AGAIN_S, number + 1
        machine.step(Tick(), now)
    assert now <= PATIENCE.plan_s + AGAIN_S


def test_the_wait_begins_anew_with_every_loss() -> None:
    machine = begun()
    machine.step(PlanLost(PLAN, "over"), 50.0)
    machine.step(offer(OTHER), 59.0)
    machine.step(Serves(None), 60.0)
    machine.step(PlanLost(OTHER, "over, too"), 65.0)
    assert machine.step(Tick(), 74.0) == []
    assert not machine.done


def test_a_gap_is_asked_for_again() -> None:
    machine = begun()
    (cancel,) = machine.step(tokens(5, 7), 1.0)
    assert cancel == Send(Cancel("r.1", PLAN))
    again = submitted(machine.step(Tick(), 1.0 + AGAIN_S))
    assert ids(again) == [1, 2, 3]


def test_what_brings_no_token_time_and_again_is_given_up() -> None:
    machine, now = begun(), 0.0
    for number in range(1, STRIKES):
        assert not [a for a in machine.step(unanswered("failed", f"r.{number}"), now) if a is Fail]
        now += AGAIN_S
        submitted(machine.step(Tick(), now))
    *_, fail = machine.step(unanswered("failed", f"r.{STRIKES}"), now)
    assert isinstance(fail, Fail)
    assert "because" in fail.why
    assert str(STRIKES) in fail.why


def test_a_token_forgives_earlier_failures() -> None:
    machine, now = begun(), 0.0
    for number in range(1, 3 * STRIKES):
        machine.step(tokens(2 + number, 4, name=f"r.{number}"), now)
        if machine.done:
            break
        machine.step(unanswered("failed", f"r.{number}"), now)
        now += AGAIN_S
        machine.step(Tick(), now)
        assert not machine.done


def test_silence_of_a_head_that_has_it_asks_anew() -> None:
    machine = begun()
    machine.step(tokens(3, 7), 10.0)
    assert machine.deadline == 40.0
    assert machine.step(tokens(4), 30.0) == [Give((), "")]  # it waits its turn there
    assert machine.deadline == 60.0
    cancel, *_, send = machine.step(Tick(), 60.0)
    assert cancel == Send(Cancel("r.1", PLAN))
    assert ids(submitted([send])) == [1, 2, 3, 7]


def test_a_full_ring_refuses_a_new_answer_and_lets_one_that_goes_on_wait() -> None:
    assert begun().step(unanswered("busy"), 1.0) == [Fail("busy", "because")]
    machine = begun()
    machine.step(tokens(3, 7), 1.0)
    machine.step(PlanLost(PLAN, "over"), 2.0)
    machine.step(offer(OTHER), 2.0)
    assert machine.step(unanswered("busy", "r.2", OTHER), 3.0) == []
    assert submitted(machine.step(Tick(), 3.0 + BUSY_AGAIN_S)).request == "r.3"


def test_a_full_ring_is_waited_for_longer_than_none_but_not_for_ever() -> None:
    """Forty answers go over to a ring of four slots, and each takes a minute there."""
    machine, now, number = begun(), 0.0, 1
    machine.step(tokens(3, 7), now)
    machine.step(LinkBroke(PLAN), now)
    while not machine.done:
        now, number = now + BUSY_AGAIN_S, number + 1
        assert submitted(machine.step(Tick(), now)).request == f"r.{number}"
        actions = machine.step(unanswered("busy", f"r.{number}"), now)
    assert PATIENCE.plan_max_s <= now <= PATIENCE.plan_max_s + 2 * BUSY_AGAIN_S
    assert isinstance(actions[-1], Fail)


def test_a_head_of_another_plan_is_asked_again_by_the_next_one_only() -> None:
    machine = begun()
    assert machine.step(unanswered("stale"), 1.0) == []
    machine.step(Serves(None), 1.1)
    assert machine.step(Tick(), 5.0) == []
    assert submitted(machine.step(offer(OTHER), 6.0)).plan == OTHER


def test_a_wrong_request_is_told_at_once() -> None:
    assert begun().step(unanswered("invalid"), 1.0) == [Fail("invalid", "because")]


def test_a_ring_with_too_short_a_context_ends_it_as_if_it_had_begun_there() -> None:
    machine = begun()
    machine.step(tokens(3, 7, 8), 1.0)
    machine.step(PlanLost(PLAN, "over"), 2.0)
    assert machine.step(offer(OTHER, context=5), 3.0) == [Give((), "length")]
    assert machine.done
    fresh = make()
    (fail,) = fresh.step(offer(context=3), 0.0)
    assert isinstance(fail, Fail)
    assert fail.code == "invalid"


@pytest.mark.parametrize("waiting", [False, True])
def test_a_client_that_goes_frees_the_head_if_one_has_it(waiting: bool) -> None:
    machine = begun()
    if waiting:
        machine.step(PlanLost(PLAN, "over"), 1.0)
    expected: list[Any] = [] if waiting else [Send(Cancel("r.1", PLAN))]
    assert machine.step(ClientGone(), 2.0) == expected
    assert machine.done
    assert machine.step(offer(OTHER), 3.0) == []
