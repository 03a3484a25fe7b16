"""Membership, event by event, with a clock made of numbers."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from peer.cluster.membership import (
    ADDRESSES_MAX,
    DIALS_MAX,
    Dial,
    DialFailed,
    GiveUp,
    HangUp,
    Heard,
    Joined,
    Left,
    LinkDown,
    LinkUp,
    Lost,
    Membership,
    Seen,
    SendBeats,
    Tick,
)
from peer.config import Timing
from peer.planning.profile import PEERS_MAX

TIMING = Timing()
SEEN = Seen("b", "key of b", ("tcp://10.0.0.2:1",))
UP = LinkUp("b", "key of b", 1, ("tcp://10.0.0.2:1",))


class Clocked:
    """A membership that is ticked whenever it asks for it."""

    def __init__(self) -> None:
        self.machine = Membership("a", TIMING, 0.0)
        self.now = 0.0

    def feed(self, *events: Any) -> list[Any]:
        return [
            action
            for event in events
            for action in self.machine.step(event, self.now)
            if not isinstance(action, SendBeats)
        ]

    def until(self, then: float, heard: str = "") -> list[Any]:
        """Let time pass; `heard` is heard of every half second."""
        actions = []
        while self.now < then:
            self.now = min(then, self.machine.deadline, self.now + 0.5)
            actions += self.feed(*([Heard(heard)] if heard else []), Tick())
        return actions


@pytest.fixture
def alone() -> Clocked:
    return Clocked()


@pytest.fixture
def two(alone: Clocked) -> Clocked:
    assert alone.feed(UP) == [Joined("b")]
    return alone


def test_a_sighting_is_dialled_and_a_link_makes_a_member(alone: Clocked) -> None:
    assert alone.feed(SEEN) == [Dial("b", "key of b", "tcp://10.0.0.2:1")]
    assert alone.machine.members == frozenset()
    assert alone.feed(LinkUp("b", "key of b", 1, (), "tcp://10.0.0.2:1")) == [Joined("b")]
    assert alone.machine.members == {"b"}
    assert alone.feed(SEEN) == []


def test_its_own_sighting_is_nothing(alone: Clocked) -> None:
    assert alone.feed(Seen("a", "key of a", ("tcp://10.0.0.1:1",))) == []


def test_an_address_that_does_not_answer_is_tried_ever_less_often(alone: Clocked) -> None:
    alone.feed(SEEN)
    times = [0.0]
    while alone.now < 120:
        actions = alone.feed(DialFailed("b"))
        while not actions:
            actions = alone.until(alone.machine.deadline)
        assert actions == [Dial("b", "key of b", SEEN.addresses[0])]
        times.append(alone.now)
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert gaps[0] < 1.0
    assert sorted(gaps) == gaps
    assert gaps[-1] == TIMING.dial_again_max_s


def test_a_dial_without_an_answer_is_given_up_and_the_next_address_tried(alone: Clocked) -> None:
    both = Seen("b", "key of b", ("tcp://10.0.0.2:1", "tcp://10.0.0.3:1"))
    assert alone.feed(both) == [Dial("b", "key of b", "tcp://10.0.0.2:1")]
    actions = alone.until(TIMING.dial_s + 1.0)
    assert actions == [GiveUp("b"), Dial("b", "key of b", "tcp://10.0.0.3:1")]


def test_who_refuses_us_is_asked_rarely(alone: Clocked) -> None:
    alone.feed(SEEN)
    alone.feed(DialFailed("b", refused=True))
    assert alone.until(3.9 * TIMING.dial_again_max_s) == []
    assert alone.until(4.1 * TIMING.dial_again_max_s) == [Dial("b", "key of b", SEEN.addresses[0])]


def test_a_silent_member_is_lost_within_five_seconds(two: Clocked) -> None:
    assert two.until(10.0, heard="b") == []
    actions = two.until(20.0)
    assert actions[:2] == [HangUp("b"), Lost("b", "silent for 3.8 s")]
    assert isinstance(actions[2], Dial)  # it may come back


def test_a_broken_link_is_dialled_again_at_once_and_regretted_for_a_while(two: Clocked) -> None:
    two.until(10.0, heard="b")
    assert two.feed(LinkDown("b", "reset")) == [Dial("b", "key of b", "tcp://10.0.0.2:1")]
    two.now += 0.9
    assert two.feed(Tick()) == []
    two.now += 0.2
    assert two.feed(Tick()) == [HangUp("b"), Lost("b", "reset")]


def test_a_link_that_comes_back_in_time_was_never_lost(two: Clocked) -> None:
    two.until(10.0, heard="b")
    two.feed(LinkDown("b", "reset"))
    two.now += 0.5
    assert two.feed(UP) == []  # b's dial; its own comes to nothing, which harms nobody
    assert two.until(20.0, heard="b") == [GiveUp("b")]


def test_a_peer_started_anew_is_lost_and_joined(two: Clocked) -> None:
    again = LinkUp("b", "key of b", 2)
    assert two.feed(again) == [Lost("b", "it was started anew"), Joined("b")]


def test_a_late_hello_of_an_earlier_run_changes_nothing(two: Clocked) -> None:
    two.feed(LinkUp("b", "key of b", 2))
    assert two.feed(UP) == []
    assert two.machine.incarnation_of("b") == 2


def test_a_goodbye_is_a_loss_at_once(two: Clocked) -> None:
    assert two.feed(Left("b", "shutdown")) == [HangUp("b"), Lost("b", "shutdown")]
    assert two.machine.members == frozenset()


@pytest.mark.parametrize("asleep_s", [2.5, 30.0, 3600.0])
def test_who_slept_does_not_accuse_the_others(two: Clocked, asleep_s: float) -> None:
    two.until(10.0, heard="b")
    two.now += asleep_s
    assert two.feed(Tick()) == []
    assert two.until(two.now + 1.0) == []
    two.feed(Heard("b"))
    assert two.until(two.now + 5.0, heard="b") == []


def test_who_slept_gives_broken_links_time_to_come_back(two: Clocked) -> None:
    two.until(10.0, heard="b")
    two.now += 60.0
    two.feed(Tick(), LinkDown("b", "reset"))
    assert two.until(two.now + 2.0) == []
    assert two.feed(UP) == []


def test_who_slept_still_notices_who_really_is_gone(two: Clocked) -> None:
    two.until(10.0, heard="b")
    two.now += 60.0
    lost = [action for action in two.until(two.now + 8.0) if isinstance(action, Lost)]
    assert [action.peer_id for action in lost] == ["b"]


def test_being_a_little_late_again_and_again_makes_nobody_immortal(two: Clocked) -> None:
    for _ in range(100):
        two.now = two.machine.deadline + 0.2
        if any(isinstance(action, Lost) for action in two.feed(Tick())):
            assert two.now < 6.0
            return
    pytest.fail("a starved machine never notices a loss")


def test_beats_are_asked_for_every_second_of_a_quiet_life(two: Clocked) -> None:
    beats = 0
    while two.now < 10.0:
        two.now = min(two.machine.deadline, 10.0)
        actions = two.machine.step(Tick(), two.now)
        beats += sum(isinstance(action, SendBeats) for action in actions)
        two.feed(Heard("b"))
    assert beats in (9, 10)


def test_a_flood_of_sightings_takes_no_memory_and_makes_no_storm(two: Clocked) -> None:
    dials = 0
    for number in range(10_000):
        two.now += 0.001
        ghost = Seen(f"ghost {number}", "key", (f"tcp://10.1.0.1:{number + 1}",))
        actions = two.feed(ghost, Heard("b"))
        dials += sum(isinstance(action, Dial) for action in actions)
    assert len(two.machine._peers) <= PEERS_MAX
    assert dials <= DIALS_MAX * (10 / TIMING.dial_s + 1)
    assert two.machine.members == {"b"}


def test_a_peer_seen_during_a_flood_is_dialled_in_the_end(two: Clocked) -> None:
    for number in range(100_000):
        two.now += 0.01
        ghost = Seen(f"ghost {number}", "key", (f"tcp://10.1.0.1:{number % 60000 + 1}",))
        real = [Seen("c", "key of c", ("tcp://10.0.0.3:1",))] if number % 500 == 0 else []
        for action in two.feed(ghost, Heard("b"), *real):
            if isinstance(action, Dial) and action.peer_id == "c":
                return
    pytest.fail("ghosts kept a real peer out")


def test_who_cannot_be_dialled_takes_no_place(alone: Clocked) -> None:
    for number in range(2 * PEERS_MAX):
        alone.feed(Seen(f"ghost {number}", "key", ()))
    assert not alone.machine._peers
    assert not alone.machine.crowded
    assert isinstance(alone.feed(SEEN)[0], Dial)


def test_a_proven_link_displaces_any_who_is_only_told_of(alone: Clocked) -> None:
    for number in range(PEERS_MAX):
        alone.feed(Seen(f"ghost {number}", "key", (f"tcp://10.1.0.1:{number + 1}",)))
    assert not alone.machine.crowded
    alone.feed(Seen("one more", "key", ("tcp://10.1.0.2:1",)))
    assert alone.machine.crowded  # none was dialled in vain yet
    for number in range(PEERS_MAX - 1):
        actions = alone.feed(LinkUp(f"real {number}", "key", 1))
        assert Joined(f"real {number}") in actions
        assert not [action for action in actions if isinstance(action, HangUp)]
    given_up = [dial for dial in alone.machine._peers.values() if dial.dialling]
    assert len(given_up) <= 1
    assert len(alone.machine._peers) == PEERS_MAX


def test_a_member_that_left_and_cannot_be_dialled_makes_room(alone: Clocked) -> None:
    for number in range(PEERS_MAX):
        who = f"gone {number}"
        alone.feed(LinkUp(who, "key", 1))
        alone.now += 2.0
        alone.feed(Left(who, ""))
    assert isinstance(alone.feed(SEEN)[0], Dial)


@pytest.mark.parametrize("end", [LinkDown("b", "this link is over"), Left("b", "")])
def test_who_hangs_up_at_once_is_dialled_ever_less_often(alone: Clocked, end: Any) -> None:
    dials = sum(isinstance(action, Dial) for action in alone.feed(SEEN))
    while alone.now < 60:
        alone.feed(UP)
        alone.now += 0.001
        actions = alone.feed(end)
        while not any(isinstance(action, Dial) for action in actions):
            actions = alone.until(alone.machine.deadline)
        dials += 1
    assert dials < 15


def test_forged_addresses_do_not_push_out_the_one_that_worked(two: Clocked) -> None:
    for number in range(1000):
        two.feed(Seen("b", "key of b", (f"tcp://10.6.6.6:{number + 1}",)), Heard("b"))
    places = two.machine.addresses_of("b")
    assert places[0] == "tcp://10.0.0.2:1"
    assert len(places) == ADDRESSES_MAX


def test_a_full_cluster_has_room_for_its_members_only(alone: Clocked) -> None:
    for number in range(PEERS_MAX - 1):
        assert alone.machine.has_room(f"peer {number}")
        alone.feed(LinkUp(f"peer {number}", "key", 1))
    assert not alone.machine.has_room("one more")
    assert alone.machine.has_room("peer 3")
