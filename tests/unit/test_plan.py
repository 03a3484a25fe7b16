"""A plan's check: whatever a peer receives must be a plan before it acts on it."""

from __future__ import annotations

import msgspec
import pytest

from peer.planning.plan import LeftOut, Plan, PlanId, PlanWindow, Split, check
from peer.planning.profile import ModelShape

A, B, C = "a" * 16, "b" * 16, "c" * 16

SHAPE = ModelShape(
    model="small",
    digest="0" * 64,
    architecture="llama",
    layers=12,
    hidden=8,
    context=512,
    layer_bytes=(10,) * 12,
    layer_kv_bytes=(1,) * 12,
    head_bytes=1,
    embed_bytes=100,
    output_bytes=200,
    tied=False,
    cut_starts=(0, 3, 6, 9),
    cut_groups=((2, 5, 8, 11),),
)


def plan_of(*windows: tuple[str, int, int], shape: ModelShape = SHAPE, **changes: int) -> Plan:
    numbers = {"context": 512, "kv_cells": 4096, "slots": 8, "batch_tokens": 512, **changes}
    split = Split(windows=tuple(PlanWindow(*window) for window in windows), **numbers)
    return Plan(PlanId(3, 1), A, shape, split)


GOOD = plan_of((A, 0, 3), (B, 3, 9), (C, 9, 12))
ROUNDS = plan_of((A, 0, 3), (B, 3, 6), (A, 6, 9), (B, 9, 12))


def test_good_plans_pass() -> None:
    assert check(GOOD) == ""
    assert check(ROUNDS) == ""
    assert check(plan_of((A, 0, 12))) == ""


@pytest.mark.parametrize(
    ("plan", "why"),
    [
        (plan_of(), "no windows"),
        (plan_of((A, 0, 3), (B, 6, 12)), "layer 3 is not"),
        (plan_of((A, 0, 6), (B, 3, 12)), "layer 6 is not"),
        (plan_of((A, 0, 3), (B, 3, 9)), "belong to nobody"),
        (plan_of((A, 3, 12)), "layer 0 is not"),
        (plan_of((A, 0, 0), (A, 0, 12)), "not layers"),
        (plan_of((A, 0, 13)), "not layers"),
        (plan_of((A, 0, 4), (B, 4, 12)), "cannot be cut before layer 4"),
        (plan_of((A, 0, 3), (B, 3, 6), (B, 6, 9), (A, 9, 12)), "one order"),
        (plan_of((A, 0, 3), (B, 3, 6), (A, 6, 12)), "one order"),
        (plan_of((A, 0, 12), context=0), "one context"),
        (plan_of((A, 0, 12), kv_cells=511), "one context"),
        (plan_of((A, 0, 12), kv_cells=1 << 31), "more than any machine"),
        (plan_of((A, 0, 12), slots=0), "out of range"),
        (plan_of((A, 0, 12), slots=257), "out of range"),
        (plan_of((A, 0, 12), batch_tokens=0), "out of range"),
    ],
)
def test_what_is_wrong_with_a_plan_is_said(plan: Plan, why: str) -> None:
    assert why in check(plan)


def test_windows_without_a_layer_of_a_group_and_cuts_of_whole_models_are_wrong() -> None:
    grouped = msgspec.structs.replace(SHAPE, cut_groups=((0, 1, 2),))
    assert "needs one of the layers" in check(plan_of((A, 0, 3), (B, 3, 12), shape=grouped))
    whole = msgspec.structs.replace(SHAPE, whole_why="it is a knot")
    assert check(plan_of((A, 0, 3), (B, 3, 12), shape=whole)) == "it is a knot"
    assert check(plan_of((A, 0, 12), shape=whole)) == ""


def test_a_shape_with_too_few_layers_of_facts_is_wrong() -> None:
    short = msgspec.structs.replace(SHAPE, layer_bytes=(1,))
    assert "contradicts itself" in check(plan_of((A, 0, 12), shape=short))


@pytest.mark.parametrize(
    "lie",
    [
        {"layer_kinds": (0,) * 13},
        {"layer_active_bytes": (0,) * 11},
        {"layer_active_bytes": (1 << 60,) * 12},
    ],
)
def test_a_shape_that_tells_of_other_layers_than_it_has_is_wrong(lie: dict[str, object]) -> None:
    told = msgspec.structs.replace(SHAPE, **lie)
    assert "contradicts itself" in check(plan_of((A, 0, 12), shape=told))


def test_a_ring_has_a_head_a_tail_and_goes_round() -> None:
    assert (GOOD.head, GOOD.tail, GOOD.ring) == (A, C, (A, B, C))
    assert [GOOD.after(peer) for peer in (A, B, C)] == [B, C, A]
    assert ROUNDS.ring == (A, B)
    assert ROUNDS.windows_of(B) == (1, 3)
    assert plan_of((A, 0, 12)).after(A) == A


def test_later_plans_are_greater_and_later_terms_greater_still() -> None:
    ids = [PlanId(2, 9), PlanId(1, 30), PlanId(2, 10), PlanId(1, 4)]
    assert sorted(ids) == [PlanId(1, 4), PlanId(1, 30), PlanId(2, 9), PlanId(2, 10)]
    assert str(PlanId(2, 10)) == "2.10"


def test_a_plan_comes_back_from_json_as_it_was() -> None:
    split = msgspec.structs.replace(
        GOOD.split, left_out=(LeftOut("d" * 16, "too small"),), why="so"
    )
    plan = msgspec.structs.replace(GOOD, split=split)
    assert msgspec.json.decode(msgspec.json.encode(plan), type=Plan) == plan


def test_the_ends_belong_to_the_windows_that_need_them() -> None:
    assert [SHAPE.window_bytes(a, b) for a, b in ((0, 3), (3, 9), (9, 12), (0, 12))] == [
        130,
        60,
        230,
        420,
    ]
    assert SHAPE.window_parts(9, 12) == ("head", "layer-009", "layer-010", "layer-011", "output")
    tied = msgspec.structs.replace(SHAPE, tied=True, output_bytes=0)
    assert tied.window_bytes(9, 12) == 130
    assert tied.window_bytes(0, 12) == 220
    assert tied.window_parts(9, 12)[:2] == ("head", "embed")
