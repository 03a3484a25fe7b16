"""A peer that comes and goes is planned with again only once it has stayed."""

from __future__ import annotations

import math

from peer.planning.steadiness import FORGET_S, STEADY_S, Steadiness


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


def test_who_says_that_others_are_lost_is_believed_once_or_where_they_are_lost() -> None:
    steadiness, now = Steadiness(), 0.0
    for lost in ("b", "c"):
        steadiness.cried("a", lost, now)
        assert steadiness.shaky(now) == {}
        steadiness.proven([lost])
    steadiness.cried("a", "b", now)
    for again, steady_s in enumerate((*STEADY_S, STEADY_S[-1]), start=2):
        steadiness.cried("a", "b", now)
        assert f"{min(again, len(STEADY_S) + 1)} times" in steadiness.shaky(now)["a"]
        assert steadiness.deadline(now) == now + steady_s
        assert steadiness.shaky(now + steady_s) == {}
        now += steady_s
    steadiness.cried("a", "b", now + FORGET_S)
    assert steadiness.shaky(now + FORGET_S) == {}
    steadiness.cried("a", "b", now + FORGET_S)
    steadiness.proven(["a"])  # it is gone itself
    assert steadiness.shaky(now + FORGET_S) == {}
