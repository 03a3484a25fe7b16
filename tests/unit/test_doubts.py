"""Second opinions, event by event: who is asked, who is believed, and how long it takes."""

from __future__ import annotations

import pytest

from peer.cluster.doubts import ANSWER_S
from peer.cluster.membership import (
    Answer,
    Asked,
    Heard,
    Left,
    LinkDown,
    LinkUp,
    Lost,
    Opined,
    Tick,
)
from tests.clocked import TIMING, Clocked

GONE_S = TIMING.silence_s + 0.7  # the bound for a peer that nobody hears


@pytest.fixture
def four() -> Clocked:
    """a with b, c, d."""
    return Clocked("b", "c", "d")


def test_a_silent_peer_that_nobody_hears_is_lost_once_all_have_said_so(four: Clocked) -> None:
    began = four.silence("b")
    four.answers = {"c": (False, 3.0), "d": (False, 0.0)}
    four.until(began + TIMING.silence_s + 0.01)
    assert [asked[1:] for asked in four.asked] == [("b", ("c", "d"))]
    _, lost = four.lost["b"]
    assert lost.why == "silent for 3.8 s, and 2 other peers do not hear it either"
    assert lost.heard_by == ""
    assert four.machine.members == {"c", "d"}


def test_a_silent_peer_about_which_nobody_answers_is_lost_within_the_bound(four: Clocked) -> None:
    began = four.silence("b")
    four.until(began + TIMING.silence_s + ANSWER_S - 0.05)
    assert "b" in four.machine.members
    four.until(began + GONE_S)
    at, lost = four.lost["b"]
    assert at - began < GONE_S
    assert lost == Lost("b", "silent for 4.3 s, and no other peer answered whether it hears it")


def test_some_who_do_not_hear_it_and_some_who_do_not_answer_are_not_waited_for_long(
    four: Clocked,
) -> None:
    began = four.silence("b")
    four.answers = {"d": (False, 0.0)}
    four.until(began + GONE_S)
    assert four.lost["b"][1].why.endswith(", and another peer does not hear it either")


def test_with_no_other_peer_to_ask_silence_alone_decides() -> None:
    two = Clocked("b")
    began = two.silence("b")
    two.until(began + TIMING.silence_s + 0.01)
    assert two.lost["b"][1] == Lost("b", "silent for 3.8 s")
    assert not two.asked


def test_a_silent_peer_that_another_hears_gets_more_time_and_is_then_out_of_reach(
    four: Clocked,
) -> None:
    began = four.silence("b")
    four.answers = {"c": (False, 0.0), "d": (True, 0.4)}
    four.until(began + TIMING.silence_s + TIMING.doubt_s - 0.1)
    assert "b" in four.machine.members
    times = [at - began for at, _, _ in four.asked]
    assert times == pytest.approx([3.8, 4.8, 5.8, 6.8], abs=0.01)  # once a second
    four.until(began + TIMING.silence_s + TIMING.doubt_s + 0.1)
    _, lost = four.lost["b"]
    assert lost == Lost("b", "silent for 7.8 s, though another peer still hears it", "d")


def test_it_is_out_of_reach_for_the_one_that_heard_it_last_to_tell(four: Clocked) -> None:
    began = four.silence("b")
    four.answers = {"c": (True, 0.2), "d": (True, 0.9)}
    four.until(began + 9.0)
    _, lost = four.lost["b"]
    assert lost.heard_by == "c"
    assert "2 other peers still hear it" in lost.why


def test_a_link_that_recovers_in_the_given_time_was_never_lost(four: Clocked) -> None:
    began = four.silence("b")
    four.answers = {"d": (True, 0.1)}
    four.until(began + 6.0)
    four.heard.add("b")
    four.until(began + 30.0)
    assert not four.lost
    asked = len(four.asked)
    four.silence("b")  # a new doubt, with its own time
    four.until(four.now + TIMING.silence_s + TIMING.doubt_s - 0.1)
    assert not four.lost
    assert len(four.asked) == asked + 4


def test_a_peer_that_dies_while_another_still_hears_it_is_lost_when_that_one_hears_it_no_more(
    four: Clocked,
) -> None:
    began = four.silence("b")
    four.answers = {"c": (False, 0.0), "d": (True, 0.1)}
    four.until(began + 5.0)
    four.answers["d"] = (False, 2.0)
    four.until(began + 6.0)
    at, lost = four.lost["b"]
    assert at - began == pytest.approx(TIMING.silence_s + 2.0, abs=0.01)
    assert lost.heard_by == ""
    assert "2 other peers do not" in lost.why


def test_one_answer_that_is_lost_decides_nothing_two_do(four: Clocked) -> None:
    began = four.silence("b")
    four.answers = {"d": (True, 0.1)}
    four.until(began + 4.0)
    four.answers.clear()  # the question at 4.8 s
    four.until(began + 5.7)
    assert "b" in four.machine.members
    four.answers = {"d": (True, 0.1)}
    four.until(began + 6.0)
    four.answers.clear()  # those at 6.8 s; no time is left for a second
    four.until(began + 7.7)
    assert "b" in four.machine.members

    again = Clocked("b", "c", "d")
    began = again.silence("b")
    again.answers = {"d": (True, 0.1)}
    again.until(began + 4.0)
    again.answers.clear()
    again.until(began + 9.0)
    at, lost = again.lost["b"]
    assert at - began == pytest.approx(TIMING.silence_s + 2.0 + ANSWER_S, abs=0.01)
    assert lost.heard_by == ""


def test_who_heard_it_and_is_lost_itself_has_no_opinion(four: Clocked) -> None:
    began = four.silence("b")
    four.answers = {"c": (False, 0.0), "d": (True, 0.1)}
    four.until(began + 4.0)
    four.feed(Left("d", ""))
    four.until(began + 4.6)
    assert four.lost["b"][1].heard_by == ""


def test_peers_that_fall_silent_together_are_not_asked_about_each_other_for_long() -> None:
    home = Clocked("b", "c", "d", "e")
    began = home.silence("b", "c", "d", "e")  # this peer's own cable
    home.until(began + GONE_S)
    assert set(home.lost) == {"b", "c", "d", "e"}
    assert not home.machine.members


def test_a_broken_link_that_does_not_come_back_is_asked_about_too(four: Clocked) -> None:
    four.silence("b")
    four.answers = {"c": (True, 0.3), "d": (True, 0.4)}
    began = four.now
    four.feed(LinkDown("b", "the connection broke"))
    four.until(began + TIMING.regret_s + TIMING.doubt_s - 0.1)
    assert "b" in four.machine.members
    four.feed(LinkUp("b", "key of b", 1))
    four.heard.add("b")
    four.until(four.now + 10.0)
    assert not four.lost

    four.silence("b")
    began = four.now
    four.feed(LinkDown("b", "the connection broke"))
    four.until(began + TIMING.regret_s + TIMING.doubt_s + 0.1)
    assert four.lost["b"][1] == Lost(
        "b", "the connection broke, though 2 other peers still hear it", "c"
    )


# Who is believed ----------------------------------------------------------------------------------


def test_opinions_that_nobody_asked_for_change_nothing(four: Clocked) -> None:
    four.feed(Opined("d", "b", False, 0.0), Opined("d", "b", True, 0.0), Opined("d", "a", False, 0))
    four.feed(Opined("stranger", "b", False, 0.0), Opined("d", "nobody", True, 0.0))
    four.until(20.0)
    assert not four.lost
    began = four.silence("b")
    four.until(began + 4.0)
    four.feed(Opined("stranger", "b", True, 0.0), Opined("b", "b", True, 0.0))
    four.until(began + GONE_S)
    assert four.lost["b"][1].heard_by == ""


def test_what_was_heard_long_ago_is_not_heard(four: Clocked) -> None:
    began = four.silence("b")
    four.answers = {"c": (True, 1.6), "d": (True, 3600.0)}
    four.until(began + GONE_S)
    assert four.lost["b"][1].heard_by == ""


def test_a_liar_delays_a_loss_by_no_more_than_the_bound(four: Clocked) -> None:
    began = four.silence("b")
    four.answers = {"c": (False, 0.0), "d": (True, 0.0)}
    while "b" in four.machine.members:
        four.until(four.now + 0.05)
        for _ in range(50):
            four.feed(Opined("d", "b", True, 0.0))
    assert four.lost["b"][0] - began <= TIMING.silence_s + TIMING.doubt_s + 0.1
    assert len(four.asked) <= 5


def test_a_liar_cannot_make_a_loss_of_a_peer_that_another_hears(four: Clocked) -> None:
    began = four.silence("b")
    four.answers = {"c": (False, 0.0), "d": (True, 0.2)}
    four.until(began + TIMING.silence_s + 0.1)
    for _ in range(100):
        four.until(four.now + 0.02)
        four.feed(Opined("c", "b", False, 0.0))
    assert not four.lost


# What this peer says ------------------------------------------------------------------------------


def test_a_member_is_told_what_is_really_known(four: Clocked) -> None:
    four.feed(Asked("c", "b"), Asked("c", "nobody"))
    assert [(a.to, a.peer_id, a.heard) for a in four.answered] == [
        ("c", "b", True), ("c", "nobody", False),
    ]  # fmt: skip
    assert four.answered[0].ago_s < 0.2
    four.silence("b")
    four.until(four.now + 1.4)
    four.feed(Asked("c", "b"))
    four.until(four.now + 0.2)
    four.feed(Asked("c", "b"))
    assert [a.heard for a in four.answered[2:]] == [True, False]
    assert four.answered[-1].ago_s == pytest.approx(1.6, abs=0.15)


def test_a_peer_whose_link_broke_is_not_heard(four: Clocked) -> None:
    four.feed(LinkDown("b", "the connection broke"), Asked("c", "b"))
    assert not four.answered[0].heard


def test_who_is_no_member_gets_no_answer_nor_who_asks_about_itself(four: Clocked) -> None:
    four.feed(Asked("stranger", "b"), Asked("b", "b"))
    assert not four.answered


@pytest.mark.parametrize("asleep_s", [0.5, 1.4])
def test_who_was_starved_says_nothing_of_those_it_may_have_heard_meanwhile(
    four: Clocked, asleep_s: float
) -> None:
    four.until(four.machine.deadline)
    four.now += 0.9 + asleep_s
    four.feed(Asked("c", "b"))
    told = [answer.heard for answer in four.answered]
    assert told == ([True] if 0.9 + asleep_s <= 1.5 else [])
    assert all(answer.ago_s >= 0.9 + asleep_s for answer in four.answered)  # honest
    four.feed(Heard("b"), Asked("c", "b"))
    assert four.answered[-1] == Answer("c", "b", True, 0.0)


def test_who_just_woke_has_no_opinion_at_all(four: Clocked) -> None:
    four.now += 3600.0
    four.feed(Asked("c", "b"), LinkDown("b", "the connection broke"), Asked("c", "b"))
    four.until(four.now + TIMING.dial_s - 0.1)
    four.feed(Asked("c", "b"), Asked("d", "c"))
    assert not four.answered
    four.until(four.now + 0.2)
    four.feed(Asked("c", "d"))
    assert four.answered == [Answer("c", "d", True, 0.0)]


@pytest.mark.parametrize("heard", [True, False])
@pytest.mark.parametrize("asleep_s", [1.0, 1.8])
def test_answers_that_waited_while_this_process_did_not_run_are_read_first(
    four: Clocked, asleep_s: float, heard: bool
) -> None:
    began = four.silence("b")
    if heard:
        four.answers = {"d": (True, 0.1)}
        four.until(began + 7.7)  # just before the bound
        four.answers.clear()
    else:
        four.until(began + 3.9)  # just after the question
    asked = len(four.asked)
    four.now += asleep_s
    four.feed(Tick())
    assert "b" in four.machine.members
    four.feed(Opined("d", "b", True, 0.1))
    four.until(four.now + 0.4)
    assert not four.lost
    assert len(four.asked) <= asked + 1


def test_who_starves_again_and_again_in_doubt_loses_the_dead_in_the_end(four: Clocked) -> None:
    began = four.silence("b")
    four.until(began + 3.9)
    for _ in range(20):
        four.now = four.machine.deadline + 0.3
        four.feed(Heard("c"), Heard("d"), Tick())
    assert set(four.lost) == {"b"}


def test_who_heard_it_not_a_moment_ago_may_hear_it_now(four: Clocked) -> None:
    began = four.silence("b")
    four.answers = {"c": (False, 0.0), "d": (True, 0.1)}
    four.until(began + 4.5)
    four.answers = {"d": (False, 2.0)}
    four.until(began + 5.0)
    assert not four.lost  # c has not answered this question yet
    four.feed(Opined("c", "b", True, 0.0))
    four.until(began + 5.6)
    assert not four.lost


@pytest.mark.parametrize("asleep_s", [0.6, 1.5, 5.0, 3600.0])
def test_who_sleeps_in_doubt_blames_itself_first(four: Clocked, asleep_s: float) -> None:
    began = four.silence("b")
    four.answers = {"d": (True, 0.1)}
    four.until(began + 4.0)
    four.now += asleep_s
    four.answers.clear()
    four.feed(Tick())
    assert not four.lost  # neither the bound nor the answer's time ran on while it slept
    four.until(four.now + 0.3)
    assert not four.lost
    four.until(four.now + 12.0)
    assert "b" in four.lost
