"""planning.trials: which windows are tried, and what their times say of layers."""

from __future__ import annotations

import pytest

from peer.planning import trials
from peer.planning.trials import (
    Sample,
    around_s,
    by_kind,
    choose,
    chunk_rows,
    is_free,
    quick_s,
    tail,
)
from tests.plans import shape

MIB = 1 << 20


def alike(layers: int) -> tuple[int, ...]:
    return (0,) * layers


def test_layers_that_are_all_alike_are_tried_once_short_and_once_long() -> None:
    model = shape(30, layer_bytes=(2 * MIB,) * 30)
    plan = choose(model, alike(30), 1 << 30, 20 * MIB)
    assert plan.kinds == (0,)
    assert plan.short[0].layers == 1
    assert plan.long[0].layers == 10, "as many as are wanted, no more"
    assert plan.middle[0].layers == 3
    assert plan.long[0].first > 0, "without the token embedding"
    assert plan.single
    assert plan.several
    assert (plan.single.layers, plan.several.layers, plan.times) == (1, 2, 2)


def test_a_small_model_is_tried_with_nearly_all_of_its_layers() -> None:
    plan = choose(shape(30), alike(30), 1 << 30, 64 * MIB)
    assert plan.long[0].layers == 29
    assert plan.long[0].last < 30, "the output head is timed apart"


def test_trials_stay_within_the_memory() -> None:
    model = shape(30, layer_bytes=(100 * MIB,) * 30)
    plan = choose(model, alike(30), 250 * MIB, 1 << 30)
    assert plan.long[0].layers == 2
    assert choose(model, alike(30), 99 * MIB, 1 << 30).long == {}
    assert tail(model, 99 * MIB) is None
    found = tail(model, 101 * MIB)
    assert found
    assert (found.first, found.last) == (29, 30)


def test_kinds_that_differ_in_types_are_tried_in_each_others_place() -> None:
    kinds = (0, 1, 1) * 8
    model = shape(24, layer_kinds=kinds, layer_bytes=tuple(MIB * (2 - k) for k in kinds))
    plan = choose(model, alike(24), 1 << 30, 10 * MIB)
    assert plan.kinds == (1, 0)
    for kind, layers in ((0, 5), (1, 10)):
        trial = plan.long[kind]
        assert trial.layers == trial.counts[kind] == layers
        assert {kinds[source] for source in trial.sources} == {kind}


def test_kinds_of_other_tensors_stay_where_they_are() -> None:
    kinds = (0, *(1,) * 11)  # a dense layer before those with experts
    plan = choose(shape(12, layer_kinds=kinds), kinds, 1 << 30, 64 * MIB)
    assert (plan.long[0].first, plan.long[0].last, plan.long[0].sources) == (0, 1, (0,))
    assert plan.long[1].counts == (0, 10)


def test_windows_that_must_hold_two_kinds_hold_both() -> None:
    kinds = (0, 0, 0, 1) * 6
    groups = tuple(tuple(i for i, k in enumerate(kinds) if k == kind) for kind in (0, 1))
    model = shape(24, layer_kinds=kinds, cut_groups=groups)
    plan = choose(model, kinds, 1 << 30, 3000)
    assert all(all(trial.counts) for trial in (*plan.long.values(), *plan.short.values()))
    ratios = [trial.counts[0] / trial.counts[1] for trial in plan.long.values()]
    assert ratios[0] != ratios[1], "two mixtures tell the two kinds apart"
    assert plan.single
    assert plan.several
    assert plan.several.counts == tuple(plan.times * n for n in plan.single.counts)


def test_cuts_are_respected_and_a_whole_model_has_no_trials() -> None:
    model = shape(12, cut_starts=(0, 4, 8))
    plan = choose(model, alike(12), 1 << 30, 64 * MIB)
    for trial in (*plan.short.values(), *plan.long.values()):
        assert not model.refusal(trial.first, trial.last)
    whole = shape(12, whole_why="nobody knows how")
    assert choose(whole, alike(12), 1 << 30, 64 * MIB).short == {}
    assert trials.itself(whole, 0, 12).counts == (12,)


def test_the_quick_time_forgets_what_was_held_up() -> None:
    assert quick_s([Sample(s) for s in (3.0, 2.6, 2.0, 100.0, 90.0, 2.5)]) == 2.55
    assert quick_s([Sample(7.0)]) == 7.0
    held = [Sample(s, held=True) for s in (30.0, 20.0, 1.0)]
    assert quick_s([*held, Sample(9.0)]) == 9.0, "one that was not held up tells more"
    assert quick_s(held[:2]) == 20.0
    assert not is_free(held)
    assert is_free([*held, Sample(9.0)])
    with pytest.raises(ValueError, match="no step"):
        quick_s([])


def test_what_surrounds_the_layers_is_what_does_not_grow_with_them() -> None:
    assert around_s(0.5 + 1.0, 0.5 + 2.0, 2) == pytest.approx(0.5)
    assert around_s(0.5 + 1.0, 0.5 + 3.0, 3) == pytest.approx(0.5)
    assert around_s(1.0, 2.5, 2) == 0, "never below nothing"
    assert around_s(1.0, 0.1, 2) == 1.0, "never more than all"


def test_kinds_are_told_apart_where_the_windows_allow_it() -> None:
    rows = [((6, 2), 6 * 0.1 + 2 * 0.7), ((2, 2), 2 * 0.1 + 2 * 0.7)]
    assert by_kind(rows, (1, 1)) == pytest.approx((0.1, 0.7))
    assert by_kind([((5, 0), 0.5), ((0, 3), 0.9)], (9, 1)) == pytest.approx((0.1, 0.3))


def test_kinds_that_cannot_be_told_apart_share_by_their_bytes() -> None:
    assert by_kind([((3, 1), 5.0)], (1, 2)) == pytest.approx((1.0, 2.0))
    assert by_kind([((4, 0, 0), 4.0)], (10, 20, 5)) == pytest.approx((1.0, 2.0, 0.5))
    twice = [((3, 1), 5.0), ((6, 2), 10.1)]
    assert by_kind(twice, (1, 2)) == pytest.approx((1.0, 2.0), rel=0.02), "one mixture, twice"
    absurd = by_kind([((2, 2), 1.0), ((3, 2), 0.9)], (1, 1))
    assert min(absurd) > 0, "noise makes no layer free"
    with pytest.raises(ValueError, match="no window"):
        by_kind([], (1,))


def test_a_chunk_has_fewer_rows_where_it_would_take_too_long() -> None:
    assert chunk_rows(16, 0.001, 1.5, 512) == 512
    assert chunk_rows(16, 0.1, 1.5, 512) == 128
    assert chunk_rows(16, 60.0, 1.5, 512) == 16
    assert chunk_rows(16, 0.01, float("inf"), 512) == 512
