"""Whom a split chooses, by speed, wishes and room, and what it says of it."""

from __future__ import annotations

import re

import pytest
from msgspec.structs import replace

from peer.errors import NoPlan
from peer.planning.profile import Link, Profile, Speed
from peer.planning.split import Wishes, solve
from tests.unit.test_split import MIB, demand_good, peer, shape


def speedy(letter: str, decode_s: float, memory_mib: float = 4000, **changes: object) -> Profile:
    speed = Speed("0" * 64, "llama_cpp", "cpu", 4, (decode_s,), (decode_s * 50,), 512)
    return replace(peer(letter, memory_mib), speeds=(speed,), **changes)


def test_the_fastest_peer_runs_all_and_the_others_are_told_what_they_would_cost() -> None:
    split = solve([speedy("a", 2e-3), speedy("b", 1e-3)], shape())
    assert [w.peer_id[0] for w in split.windows] == ["b"]
    assert "machine-b runs all 30 layers" in split.why
    assert re.fullmatch(
        r"with machine-a a token would take \d+ ms instead of \d+ ms", split.left_out[0].why
    )


def test_two_machines_of_one_name_are_told_apart_in_every_reason() -> None:
    split = solve([speedy("a", 2e-3, name="vm"), speedy("b", 1e-3, name="vm")], shape())
    assert split.why.startswith("vm bbbb runs all")
    assert split.left_out[0].why.startswith("with vm aaaa a token")


def test_where_everyone_is_to_take_part_the_slow_get_fewer_layers() -> None:
    split = solve([speedy("a", 3e-3), speedy("b", 1e-3)], shape(12), Wishes(spread_all=True))
    layers = {w.peer_id[0]: w.last - w.first for w in split.windows}
    assert layers == {"a": 3, "b": 9}


def test_a_peer_that_cannot_hold_a_layer_does_not_keep_the_others_from_taking_part() -> None:
    profiles = [speedy("a", 1e-3), speedy("b", 1e-3), speedy("c", 1e-3, 2)]
    split = solve(profiles, shape(12), Wishes(spread_all=True))
    assert sorted(w.peer_id[0] for w in split.windows) == ["a", "b"]
    assert "machine-c has 2 MiB free" in split.left_out[0].why


def test_those_who_are_not_wanted_are_left_out_and_told_so() -> None:
    profiles = [speedy("a", 1e-3), speedy("b", 2e-3), speedy("c", 3e-3)]
    without = solve(profiles, shape(), Wishes(without=frozenset(["a" * 16])))
    assert [w.peer_id[0] for w in without.windows] == ["b"]
    assert "machine-a is to be done without" in [left.why for left in without.left_out]
    only = solve(profiles, shape(), Wishes(only=frozenset(["c" * 16])))
    assert [w.peer_id[0] for w in only.windows] == ["c"]
    assert len(only.left_out) == 2
    fixed = solve(profiles, shape(), Wishes(pinned={"c" * 16: (20, 30)}))
    assert [(w.peer_id[0], w.first, w.last) for w in fixed.windows] == [("a", 0, 20), ("c", 20, 30)]


def test_a_model_larger_than_one_peer_is_split_so_that_each_part_fits() -> None:
    profiles = [speedy("a", 1e-3, 90), speedy("b", 2e-3, 90)]
    split = solve(profiles, shape())
    assert len(split.windows) == 2
    demand_good(split, shape(), profiles)


def test_a_model_larger_than_all_memory_is_streamed_from_disk_and_says_so() -> None:
    model = shape(layer_bytes=(40 * MIB,) * 30)
    disks = {"disk_read_bytes_per_s": 1e9}
    profiles = [speedy("a", 1e-3, 500, **disks), speedy("b", 1e-3, 500, **disks)]
    split = solve(profiles, model)
    streamed = sum(w.streamed_bytes for w in split.windows)
    assert 200 * MIB < streamed < 500 * MIB
    assert "are read from disk for each token" in split.why
    assert f"{-(-streamed // MIB):,} MiB" in split.why
    slow = [replace(p, disk_read_bytes_per_s=0.0) for p in profiles]
    with pytest.raises(NoPlan, match=r"MiB are missing, and no peer's disk is known"):
        solve(slow, model)


def test_the_context_is_shortened_for_speed_only_down_to_what_is_good() -> None:
    """32,768 tokens fit beside the weights only on both peers, 8,192 on the fast one."""
    model = shape(context=65536, layer_kv_bytes=(4096,) * 30, hidden=1, vocabulary=1000)
    alone = solve([speedy("a", 1e-3, 5000)], model)
    assert alone.context == 32768
    cramped = [speedy("a", 1e-3, 1600), speedy("b", 9e-3, 5000)]
    split = solve(cramped, model)
    assert [w.peer_id[0] for w in split.windows] == ["a"]
    assert 8192 <= split.context < 32768
    asked = solve(cramped, model, Wishes(context=32768))
    assert asked.context == 32768
    assert len(asked.windows) == 2


def test_of_two_machines_that_are_nearly_equal_one_does_it_all() -> None:
    """Measured anew they differ by a percent or two, in the layers or in the output."""
    other = Speed("0" * 64, "llama_cpp", "cpu", 4, (2.05e-3,), (0.1,), 512, 0.0, 0.0)
    near = replace(other, decode_s=(2e-3,), output_s=2.5e-3)
    profiles = [speedy("a", 1), speedy("b", 1)]
    links = [(Link("b" * 16, 1e-4, 1e9),), ()]
    profiles = [
        replace(p, speeds=(s,), links=link)
        for p, s, link in zip(profiles, (near, other), links, strict=True)
    ]
    split = solve(profiles, shape())
    assert len(split.windows) == 1
    far = replace(profiles[0], speeds=(replace(near, output_s=20e-3),))
    assert len(solve([far, replace(profiles[1], speeds=(replace(other, decode_s=(4e-3,)),))],
                     shape()).windows) == 2  # fmt: skip


def test_a_model_whose_tokens_nobody_would_wait_for_is_no_plan() -> None:
    slow = [speedy("a", 100.0), speedy("b", 200.0)]
    with pytest.raises(NoPlan, match=r"a token of small would take [\d.]+ s here"):
        solve(slow, shape())


def test_rounds_that_do_not_divide_the_layers_are_called_that() -> None:
    with pytest.raises(NoPlan, match="7 rounds do not divide the 30 layers"):
        solve([speedy("a", 1e-3), speedy("b", 1e-3)], shape(), Wishes(rounds=7))
