"""One answer as its entry peer owns it: every token once, in order, or a reason."""

from __future__ import annotations

import numpy as np

from peer.planning.plan import PlanId
from peer.protocol import Cancel, Sampling, Submit, Tokens, Unanswered
from peer.ring.generation import (
    Arrived,
    Begin,
    ClientGone,
    Fail,
    Generation,
    Give,
    PlanLost,
    Send,
    Tick,
)

PLAN, OTHER = PlanId(1, 1), PlanId(1, 2)


def begun() -> Generation:
    machine = Generation("r", (1, 2, 3), Sampling(), 10, (9,), silence_s=30.0)
    (send,) = machine.step(Begin(PLAN), 0.0)
    assert isinstance(send, Send)
    assert isinstance(send.message, Submit)
    assert np.frombuffer(send.message.ids, np.int32).tolist() == [1, 2, 3]
    return machine


def tokens(position: int, *ids: int, finish: str = "", plan: PlanId = PLAN) -> Arrived:
    return Arrived(Tokens("r", plan, position, ids, finish))  # type: ignore[arg-type]


def test_tokens_are_given_once_and_in_order() -> None:
    machine = begun()
    assert machine.step(tokens(3, 7), 1.0) == [Give((7,), "")]
    assert machine.step(tokens(3, 7), 1.0) == []
    assert machine.step(tokens(4, 8, finish="length"), 1.0) == [Give((8,), "length")]
    assert machine.done


def test_a_gap_ends_the_answer_instead_of_hiding_it() -> None:
    machine = begun()
    cancel, fail = machine.step(tokens(5, 7), 1.0)
    assert cancel == Send(Cancel("r", PLAN))
    assert isinstance(fail, Fail)


def test_tokens_of_another_plan_are_dropped() -> None:
    assert begun().step(tokens(3, 7, plan=OTHER), 1.0) == []


def test_a_lost_plan_ends_the_answer_with_its_reason() -> None:
    machine = begun()
    assert machine.step(PlanLost(OTHER, "not mine"), 1.0) == []
    assert machine.step(PlanLost(PLAN, "peer x was lost"), 1.0) == [
        Fail("failed", "peer x was lost")
    ]
    assert machine.step(tokens(3, 7), 1.0) == []


def test_a_client_that_is_gone_cancels_at_the_head_once() -> None:
    machine = begun()
    assert machine.step(ClientGone(), 1.0) == [Send(Cancel("r", PLAN))]
    assert machine.step(ClientGone(), 1.0) == []


def test_a_finished_answer_is_not_cancelled() -> None:
    machine = begun()
    machine.step(tokens(3, finish="stop"), 1.0)
    assert machine.step(ClientGone(), 1.0) == []


def test_silence_ends_the_answer_and_each_token_puts_the_end_off() -> None:
    machine = begun()
    machine.step(tokens(3, 7), 20.0)
    assert machine.step(Tick(), 31.0) == []
    cancel, fail = machine.step(Tick(), 50.0)
    assert cancel == Send(Cancel("r", PLAN))
    assert isinstance(fail, Fail)


def test_the_heads_refusal_reaches_the_client_with_its_code() -> None:
    machine = begun()
    assert machine.step(Arrived(Unanswered("r", PLAN, "busy", "full")), 1.0) == [
        Fail("busy", "full")
    ]


def test_a_new_plan_is_asked_to_go_on_from_the_ids() -> None:
    machine = begun()
    machine.step(tokens(3, 7, 8), 1.0)
    (send,) = machine.step(Begin(OTHER), 2.0)
    assert isinstance(send, Send)
    assert isinstance(send.message, Submit)
    assert np.frombuffer(send.message.ids, np.int32).tolist() == [1, 2, 3, 7, 8]
    assert (send.message.tokens_max, send.message.delivered) == (8, 2)
