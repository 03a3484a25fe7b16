"""The election, event by event, with a clock made of numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest

from peer.cluster.election import (
    CHANGES_A_SECOND,
    CHANGES_MAX,
    TERM_FREE_MAX,
    TERM_JUMP_MAX,
    Beat,
    Doubt,
    Elected,
    Election,
    PeerDown,
    PeerUp,
    Publish,
    Stored,
    StoreFailed,
    StoreTerm,
    Tick,
)
from peer.config import Timing
from peer.planning.plan import TERM_MAX

TIMING = Timing()


class Voter:
    """An election with a disk that answers at once (unless told otherwise)."""

    def __init__(self, me: str = "m", term: int = 0) -> None:
        self.machine = Election(me, TIMING, 0.0, term=term)
        self.now = 0.0
        self.disk = True

    def feed(self, *events: Any) -> list[Any]:
        done = []
        waiting = list(events)
        while waiting:
            actions = self.machine.step(waiting.pop(0), self.now)
            done += actions
            if self.disk:
                waiting += [Stored(a.term) for a in actions if isinstance(a, StoreTerm)]
        return done

    def until(self, then: float) -> list[Any]:
        done = []
        while self.machine.deadline <= then:
            self.now = max(self.now, self.machine.deadline)
            done += self.feed(Tick())
        self.now = then
        return done

    @property
    def follows(self) -> tuple[str, int]:
        return (self.machine.coordinator, self.machine.term)


def claim(who: str, term: int, followed: bool = False) -> Beat:
    return Beat(who, term, who, followed)


@pytest.fixture
def voter() -> Voter:
    """The peer m, with members b (below it) and z (above it)."""
    made = Voter()
    made.feed(PeerUp("b"), PeerUp("z"))
    return made


def leads(voter: Voter, followed: bool = True) -> int:
    """Make it the coordinator; its term."""
    voter.until(20.0)
    assert voter.machine.coordinator == voter.machine.me
    if followed:
        voter.feed(Beat("b", voter.machine.term, voter.machine.me, False))
    return voter.machine.term


def test_a_peer_alone_listens_then_claims_what_it_stored_first() -> None:
    alone = Voter(term=4)
    assert alone.until(TIMING.listen_s - 0.01) == []
    assert alone.until(TIMING.listen_s) == [
        StoreTerm(5),
        Elected("m", 5),
        Publish(5, "m", False),
    ]
    assert alone.machine.deadline == math.inf


def test_nothing_is_claimed_before_it_is_stored() -> None:
    alone = Voter()
    alone.disk = False
    assert alone.until(5.0) == [StoreTerm(1)]
    assert alone.follows == ("", 0)
    assert alone.machine.claim == Publish(0, "", False)
    assert alone.feed(Stored(1)) == [Elected("m", 1), Publish(1, "m", False)]


def test_a_term_that_could_not_be_stored_is_never_claimed_and_the_next_one_tried_later() -> None:
    alone = Voter()
    alone.disk = False
    assert alone.until(2.0) == [StoreTerm(1)]
    assert alone.feed(StoreFailed(1)) == []
    assert alone.feed(Stored(1)) == []
    assert alone.until(2.0 + TIMING.dial_again_max_s) == [StoreTerm(2)]


def test_a_coordinator_that_is_heard_while_listening_is_followed(voter: Voter) -> None:
    actions = voter.feed(claim("b", 3, True))
    assert actions == [StoreTerm(3), Elected("b", 3), Publish(3, "b", False)]
    assert voter.until(60.0) == []


def test_the_one_with_the_highest_id_claims_first(voter: Voter) -> None:
    low = Voter("b")
    low.feed(PeerUp("m"), PeerUp("z"))
    high = Voter("z")
    high.feed(PeerUp("b"), PeerUp("m"))
    assert high.machine.deadline == TIMING.listen_s
    assert high.machine.deadline < voter.machine.deadline < low.machine.deadline
    assert low.machine.deadline <= TIMING.listen_s + TIMING.claim_spread_s


def test_a_follower_makes_the_claim_followed_and_the_coordinator_says_so(voter: Voter) -> None:
    term = leads(voter, followed=False)
    assert voter.machine.followers == frozenset()
    assert voter.feed(Beat("b", term, "m", False)) == [Publish(term, "m", True)]
    assert voter.machine.followers == {"b"}
    assert voter.feed(Beat("b", term, "", False)) == []
    assert voter.machine.followers == frozenset()


def test_a_newcomer_with_a_higher_term_does_not_depose_a_followed_coordinator(
    voter: Voter,
) -> None:
    term = leads(voter)
    actions = voter.feed(PeerUp("x"), claim("x", term + 40))
    assert voter.follows == ("m", term + 41)
    assert Publish(term + 41, "m", True) in actions


def test_a_follower_does_not_leave_its_coordinator_for_a_newcomer(voter: Voter) -> None:
    voter.feed(claim("b", 3, True))
    voter.feed(claim("z", 50, False))
    assert voter.follows == ("b", 3)
    voter.feed(claim("b", 51, True))  # it defended itself
    assert voter.follows == ("b", 51)


def test_of_two_followed_claims_the_higher_term_wins_on_both_sides(voter: Voter) -> None:
    term = leads(voter)
    voter.feed(claim("z", term + 2, True))
    assert voter.follows == ("z", term + 2)
    other = Voter("z", term=term + 1)
    other.feed(PeerUp("m"))
    assert leads(other, followed=False) == term + 2
    other.feed(Beat("m", term + 2, "z", False), claim("m", term + 2, True))
    assert other.machine.coordinator == "z"


def test_a_tie_is_broken_by_a_new_term_of_the_higher_id_so_that_no_term_has_two(
    voter: Voter,
) -> None:
    term = leads(voter, followed=False)
    assert voter.feed(claim("z", term)) == []  # z is higher: it will claim again
    assert voter.follows == ("m", term)
    voter.feed(claim("z", term + 1))
    assert voter.follows == ("z", term + 1)
    other = Voter("z")
    other.feed(PeerUp("m"))
    assert leads(other, followed=False) == term
    other.feed(claim("m", term))
    assert other.follows == ("z", term + 1)


def test_within_a_term_only_one_is_ever_followed(voter: Voter) -> None:
    voter.feed(claim("b", 5, True), PeerDown("b"))
    assert voter.follows == ("", 5)
    voter.feed(claim("z", 5, True))
    assert voter.follows == ("", 5)
    voter.feed(claim("z", 6, True))
    assert voter.follows == ("z", 6)


def test_the_same_one_may_be_followed_again_in_its_term(voter: Voter) -> None:
    voter.feed(claim("b", 5, True), PeerDown("b"), PeerUp("b"), claim("b", 5, True))
    assert voter.follows == ("b", 5)


def test_a_coordinator_lifts_its_term_for_a_member_that_could_not_follow_it(voter: Voter) -> None:
    term = leads(voter)
    voter.feed(PeerUp("x"), Beat("x", term + 7, "", False))
    assert voter.follows == ("m", term + 8)


def test_hearsay_of_another_coordinator_starts_no_war_of_terms(voter: Voter) -> None:
    """Somebody in the middle of a partial partition follows one whom m cannot hear."""
    term = leads(voter)
    assert voter.feed(Beat("b", term + 3, "hidden", False)) == []
    assert voter.follows == ("m", term)


def test_after_a_loss_the_next_claim_is_above_all_that_was_heard(voter: Voter) -> None:
    voter.feed(claim("b", 5, True), Beat("z", 9, "hidden", False), PeerDown("z"))
    actions = voter.feed(PeerDown("b")) + voter.until(voter.now + 0.01)
    assert Elected("", 5) in actions
    assert Elected("m", 10) in actions  # at once: nobody here ranks higher


def test_while_others_still_hear_a_coordinator_nobody_hurries_to_claim(voter: Voter) -> None:
    voter.feed(claim("b", 5, True), Beat("z", 5, "b", False), PeerDown("b"))
    began = voter.now
    voter.until(began + TIMING.listen_s)
    assert voter.machine.coordinator == ""
    voter.until(began + TIMING.listen_s + TIMING.claim_spread_s)
    assert voter.machine.coordinator == "m"


def test_a_beat_that_was_overtaken_on_its_way_changes_nothing(voter: Voter) -> None:
    voter.feed(claim("b", 5, True))
    assert voter.feed(claim("b", 4, True), Beat("b", 4, "z", False)) == []
    assert voter.follows == ("b", 5)


def test_a_coordinator_that_follows_somebody_else_is_left(voter: Voter) -> None:
    voter.feed(claim("b", 5, True), Beat("b", 7, "z", False))
    assert voter.follows == ("", 5)
    voter.feed(claim("z", 7, True))
    assert voter.follows == ("z", 7)


@pytest.mark.parametrize("term", [TERM_MAX, TERM_FREE_MAX + 1, 1 << 62])
def test_one_message_cannot_use_up_the_terms(voter: Voter, term: int) -> None:
    assert voter.feed(claim("z", term, True)) == [Doubt("z", "term far above all others")]
    assert voter.follows == ("", 0)
    assert leads(voter, followed=False) == 1


def test_many_messages_cannot_use_up_the_terms(voter: Voter) -> None:
    """Each a little higher than the last, as fast as they come, for ten minutes."""
    seconds, term = 600, TERM_FREE_MAX
    for _ in range(100 * seconds):
        voter.now += 0.01
        voter.feed(claim("z", term, True))
        if voter.follows == ("z", term):
            term += TERM_JUMP_MAX
    years = (TERM_MAX // 2 - TERM_FREE_MAX) / ((term - TERM_FREE_MAX) / seconds) / (365 * 86400)
    assert years > 3


def test_a_claim_that_flickers_is_told_on_a_few_times_a_second(voter: Voter) -> None:
    told = []
    for number in range(1000):
        voter.now += 0.001
        told += voter.feed(Beat("z", 7, "z" if number % 2 else "", True))
    assert sum(isinstance(action, Publish) for action in told) <= CHANGES_MAX + CHANGES_A_SECOND
    voter.now += 1.0
    voter.feed(claim("z", 7, True))  # what it says at last is heard
    assert voter.follows == ("z", 7)


@pytest.mark.parametrize("alone_s", [0.0, 60.0])
@pytest.mark.parametrize("followed", [False, True])
def test_who_was_lied_to_steps_down_to_those_who_cannot_believe_it(
    alone_s: float, followed: bool
) -> None:
    far = Voter(term=TERM_FREE_MAX + 50_000)
    far.until(alone_s)
    far.feed(PeerUp("b"))
    actions = far.feed(claim("b", 5, followed))
    assert StoreTerm(5, lower=True) in actions
    assert Elected("b", 5) in actions
    assert StoreTerm(6) in far.feed(PeerDown("b"))  # and its own claims are near again
    assert far.follows == ("m", 6)


def test_a_follower_steps_down_with_its_coordinator_whether_or_not_it_knows_to_whom() -> None:
    """Else both follow the same peer for ever and never agree on the term: seen once in some
    twenty thousand simulated houses."""
    far = Voter(term=TERM_FREE_MAX + 50_000)
    far.feed(PeerUp("b"), claim("b", TERM_FREE_MAX + 50_500, True))
    assert far.follows == ("b", TERM_FREE_MAX + 50_500)
    far.now += 1.0
    actions = far.feed(claim("b", 7, True))
    assert StoreTerm(7, lower=True) in actions
    assert far.follows == ("b", 7)


def test_nobody_steps_down_into_a_term_in_which_it_followed_somebody(voter: Voter) -> None:
    voter.feed(claim("b", 5, True), claim("z", TERM_FREE_MAX, True))
    voter.now += 10.0
    far = TERM_FREE_MAX + TERM_JUMP_MAX
    voter.feed(claim("z", far, True), PeerDown("z"), claim("b", 5, True))
    assert voter.follows == ("", far)


def test_those_behind_catch_up_with_a_claim_that_is_far_above_them(voter: Voter) -> None:
    far = TERM_FREE_MAX + 5 * TERM_JUMP_MAX
    for _ in range(6):
        assert voter.follows == ("", 0)
        voter.now += 0.2
        voter.feed(claim("z", far, True))
    assert voter.follows == ("z", far)


def test_strangers_are_not_heard(voter: Voter) -> None:
    assert voter.feed(claim("stranger", 9, True)) == []
    assert voter.follows == ("", 0)


def test_a_claim_that_somebody_overtook_while_it_was_being_stored_is_dropped(
    voter: Voter,
) -> None:
    voter.disk = False
    assert voter.until(10.0) == [StoreTerm(1)]
    voter.feed(claim("b", 4, True))
    assert voter.feed(Stored(1)) == []
    assert voter.follows == ("b", 4)
