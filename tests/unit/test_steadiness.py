"""A peer that comes and goes is planned with again only once it has stayed."""

from __future__ import annotations

import math

from peer.planning.making import Members
from peer.planning.steadiness import FORGET_S, STEADY_S, Steadiness
from tests.coordinator import A, B, C, profile


def test_a_peer_that_was_never_lost_is_steady_from_its_first_moment() -> None:
    steadiness = Steadiness()
    steadiness.back(["a"], 10.0)
    assert steadiness.shaky(10.0) == {}
    assert steadiness.deadline(10.0) == math.inf


def test_one_that_came_back_has_to_stay_the_longer_the_oftener_it_was_lost() -> None:
    steadiness, now = Steadiness(), 0.0
    for losses, steady_s in enumerate((*STEADY_S, STEADY_S[-1]), start=1):
        steadiness.lost(["a"], now)
        assert steadiness.shaky(now + 0.5) == {}  # nobody plans with a peer that is not here
        steadiness.back(["a"], now + 1)
        assert str(losses if losses > 1 else "once") in steadiness.shaky(now + 1)["a"]
        assert steadiness.deadline(now + 1) == now + 1 + steady_s
        assert "a" in steadiness.shaky(now + 1 + steady_s - 0.1)
        assert steadiness.shaky(now + 1 + steady_s) == {}
        now += 1 + steady_s


def test_what_is_long_ago_is_forgotten() -> None:
    steadiness = Steadiness()
    for now in (0.0, 100.0):
        steadiness.lost(["a"], now)
        steadiness.back(["a"], now + 1)
    later = 100.0 + FORGET_S
    steadiness.lost(["a"], later)
    steadiness.back(["a"], later)
    assert steadiness.deadline(later) == later + STEADY_S[0]


def house(*peers: str, **unreachable: tuple[str, ...]) -> Members:
    ids = {name: name * 16 for name in "abc"}
    profiles = {
        ids[name]: profile(ids[name], unreachable=tuple(ids[x] for x in unreachable.get(name, ())))
        for name in peers
    }
    return Members(frozenset(profiles), profiles, {})


ALL = house("a", "b", "c")


def test_who_says_that_others_are_lost_is_believed_once_or_where_they_are_lost() -> None:
    steadiness, now = Steadiness(), 0.0
    for lost, rest in ((B, house("a", "c")), (C, house("a", "b"))):
        steadiness.cried(A, lost, now)
        assert steadiness.shaky(now) == {}
        steadiness.told(ALL, rest, now)
    steadiness.cried(A, B, now)
    for again, steady_s in enumerate((*STEADY_S, STEADY_S[-1]), start=2):
        steadiness.cried(A, B, now)
        assert steadiness.shaky(now)[A].startswith(f"{min(again, len(STEADY_S) + 1)} times")
        assert steadiness.deadline(now) == now + steady_s
        assert steadiness.shaky(now + steady_s) == {}
        now += steady_s
    steadiness.cried(A, B, now + FORGET_S)
    assert steadiness.shaky(now + FORGET_S) == {}
    steadiness.cried(A, B, now + FORGET_S)
    steadiness.told(ALL, house("b", "c"), now)  # it is gone itself
    assert steadiness.shaky(now + FORGET_S) == {}


def test_a_link_that_breaks_again_and_again_counts_once_each_time() -> None:
    steadiness, broken = Steadiness(), house("a", "b", "c", a=("b",), b=("a",))
    steadiness.told(ALL, broken, 0.0)
    steadiness.cried(A, B, 0.1)  # the end of its part of a plan: the same news
    steadiness.cried(B, A, 0.1)
    assert steadiness.shaky(0.1) == {}
    steadiness.told(broken, ALL, 1.0)
    assert steadiness.shaky(1.0) == {}
    steadiness.told(ALL, broken, 2.0)
    assert set(steadiness.shaky(2.0)) == {A, B}


def test_who_goes_away_and_stays_again_and_again_is_not_planned_with_at_once() -> None:
    steadiness = Steadiness()
    going = Members(ALL.present, {**ALL.profiles, B: profile(B, leaving=True)}, {})
    for again in range(2):
        assert steadiness.shaky(again) == {}
        steadiness.told(ALL, going, again)
        steadiness.told(going, ALL, again)
    assert set(steadiness.shaky(2.0)) == {B}
    gone = Steadiness()
    for again in range(3):  # who goes, comes back and is here: that is what leaving is for
        gone.told(ALL, going, again)
        gone.told(going, house("a", "c"), again)
        gone.told(house("a", "c"), ALL, again)
    assert gone.shaky(3.0) == {}
