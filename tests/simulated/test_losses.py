"""Calm houses in which one thing goes wrong, and the proof that they would show a mistake."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from peer.cluster import election as e
from peer.cluster import membership as m
from peer.cluster.doubts import Doubt
from tests.simulated.calm import Calm
from tests.simulated.house import Broken

SEEDS = 40
TIMING = Calm.timing
GONE_S = TIMING.silence_s + 0.7  # for everybody: the promise
CUT_OFF_S = TIMING.silence_s + TIMING.doubt_s  # from here only
SHORT_S = CUT_OFF_S - 2 * TIMING.beat_s - 0.3  # a beat before it and one after it count
HOLD_S = 60.0

Story = Callable[[Calm], None]


def a_peer_dies_without_a_word(house: Calm) -> None:
    """Power, or a frozen kernel: nobody hears it any more."""
    victim, *others = house.names
    house.crash(victim, powered=False)
    house.play(CUT_OFF_S + 2.0)
    for by in others:
        house.within(by, victim, GONE_S)
    house.expect({(by, victim) for by in others})
    if any(lost.heard_by for _, _, lost in house.losses):
        house.fail("somebody is said to hear the dead")


def an_agent_is_killed(house: Calm) -> None:
    """kill -9: its system closes its connections, and refuses new ones."""
    victim, *others = house.names
    house.crash(victim, powered=True)
    house.play(5.0)
    for by in others:
        house.within(by, victim, 0.05)
    house.expect({(by, victim) for by in others})
    if {lost.why for _, _, lost in house.losses} != {m.ENDED}:
        house.fail("it is not said why")


def an_agent_is_stopped(house: Calm) -> None:
    """SIGSTOP: its connections stand, and are silent."""
    victim, *others = house.names
    house.stop(victim, 20.0)
    house.play(15.0)
    for by in others:
        house.within(by, victim, GONE_S)
    house.expect({(by, victim) for by in others})
    house.play(5.5)
    house.settle("after it went on")
    house.expect({(by, victim) for by in others})  # it accuses nobody


def a_cable_is_pulled(house: Calm) -> None:
    victim, *others = house.names
    house.pull(victim)
    house.play(CUT_OFF_S + 2.0)
    for by in others:
        house.within(by, victim, GONE_S)
        house.within(victim, by, GONE_S)
    house.expect({(by, victim) for by in others} | {(victim, by) for by in others})
    house.blocked.clear()
    house.settle("after it was plugged in")


def nothing_reaches_a_peer(house: Calm) -> None:
    """One way: it is heard, and hears nobody."""
    victim, *others = house.names
    house.blocked |= {(other, victim) for other in others}
    house.play(CUT_OFF_S + 4.0)
    for by in others:
        house.within(victim, by, GONE_S)
        house.within(by, victim, GONE_S + TIMING.regret_s + 0.7)  # it hung up on them
    house.expect({(by, victim) for by in others} | {(victim, by) for by in others})
    house.blocked.clear()
    house.settle("after it healed")


def a_wire_between_two_is_dead_for_a_while(house: Calm) -> None:
    """The others hear both: they get the time to find together again."""
    a, b, *_ = house.names
    house.cut(a, b)
    house.play(SHORT_S)
    house.blocked.clear()
    house.play(15.0)
    house.expect(set())
    if house.changes:
        house.fail(f"roles changed: {house.changes}")


def a_wire_between_two_stays_dead(house: Calm) -> None:
    """One coordinator at most is lost by this, and nobody goes back and forth."""
    a, b, *others = house.names
    before = {name: house.peers[name].election.coordinator for name in house.names}
    house.cut(a, b)
    house.play(HOLD_S)
    for by, whom in ((a, b), (b, a)):
        house.within(by, whom, CUT_OFF_S)
        if house.took(by, whom) < TIMING.silence_s + TIMING.doubt_s - 1.1:
            house.fail(f"{by} gave {whom} no time")
    house.expect({(a, b), (b, a)})
    if not all(lost.heard_by in others for _, _, lost in house.losses):
        house.fail("it is not said who hears them")
    for name in house.names:
        followed = [coordinator for who, coordinator in house.changes if who == name]
        if followed and name in others:
            house.fail(f"{name} hears everybody, and follows {followed} after {before[name]}")
        if len([coordinator for coordinator in followed if coordinator]) > 1:
            house.fail(f"{name} goes from {before[name]} to {followed}")
    house.blocked.clear()
    house.settle("after it healed")


def a_wire_between_two_comes_and_goes(house: Calm) -> None:
    """1 s up, 1 s down, a minute long. What was sent meanwhile arrives late, or never."""
    a, b, *_ = house.names
    pairs = {(a, b), (b, a)}
    for second in range(int(HOLD_S)):
        if second % 2:
            house.blocked.clear()
            house.release()
        elif house.seed % 2:
            house.held |= pairs
        else:
            house.blocked |= pairs
        house.play(1.0)
    house.release()
    house.blocked.clear()
    house.play(5.0)
    house.expect(set())
    if house.changes:
        house.fail(f"roles changed: {house.changes}")


def a_liar_hears_the_dead(house: Calm) -> None:
    """It delays a loss, by a bounded time."""
    victim, liar, *others = house.names
    house.liars[liar] = True
    house.crash(victim, powered=False)
    house.play(CUT_OFF_S + 2.0)
    for by in others:
        house.within(by, victim, CUT_OFF_S)
    house.expect({(by, victim) for by in (liar, *others)})


def a_liar_hears_nobody(house: Calm) -> None:
    """It makes no loss of a peer that an honest one hears."""
    a, b, liar, honest, *_ = house.names
    house.liars[liar] = False
    house.cut(a, b)
    house.play(SHORT_S)
    house.blocked.clear()
    house.play(10.0)
    house.expect(set())
    assert honest not in house.liars


STORIES: dict[Story, int] = {
    a_peer_dies_without_a_word: 2,
    an_agent_is_killed: 2,
    an_agent_is_stopped: 2,
    a_cable_is_pulled: 2,
    nothing_reaches_a_peer: 2,
    a_wire_between_two_is_dead_for_a_while: 3,
    a_wire_between_two_stays_dead: 3,
    a_wire_between_two_comes_and_goes: 2,
    a_liar_hears_the_dead: 3,
    a_liar_hears_nobody: 4,
}  # → the least number of peers


def play(story: Story, house: type[Calm] = Calm) -> None:
    least = STORIES[story]
    for seed in range(SEEDS):
        story(house(seed, least + seed % (6 - least)))


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.__name__.replace("_", " "))
def test_what_happens_is_noticed_in_time_and_nothing_else(story: Story) -> None:
    play(story)


# Planted mistakes ---------------------------------------------------------------------------------


class NeverAsks(m.Membership):
    def _ask(self, peer_id: str, doubt: Doubt) -> list[m.Action]:
        doubt.ask((), self.now)
        return []


class BelievesForEver(m.Membership):
    def _doubt(self, peer_id: str, peer: Any) -> list[m.Action]:
        if peer.doubt is not None:
            peer.doubt.until = math.inf
        return super()._doubt(peer_id, peer)


class BelievesAnybody(m.Membership):
    """One who does not hear it is enough."""

    def _hear_out(self, told: m.Opined) -> None:
        super()._hear_out(told)
        peer = self._peers.get(told.peer_id)
        if peer is not None and peer.doubt is not None and not told.heard:
            peer.doubt.hearing.clear()


class WaitsForAllAnswers(m.Membership):
    def _ask(self, peer_id: str, doubt: Doubt) -> list[m.Action]:
        actions = super()._ask(peer_id, doubt)
        doubt.asked_at += 3.0 if doubt.asked else 0.0
        return actions


class HearsTheDead(m.Membership):
    """Whoever is a member is said to be heard."""

    def _answer(self, by: str, peer_id: str) -> list[m.Action]:
        return [m.Answer(by, peer_id, peer_id in self.members, 0.0)]


class AsksOnce(m.Membership):
    def _ask(self, peer_id: str, doubt: Doubt) -> list[m.Action]:
        if doubt.asked_at:
            doubt.ask((), self.now)
            return []
        return super()._ask(peer_id, doubt)


class IgnoresRefusals(m.Membership):
    def _fail(self, peer_id: str, **told: bool) -> list[m.Action]:
        return super()._fail(peer_id)


class Impatient(m.Membership):
    def _suspect_at(self, peer: Any) -> float:
        return super()._suspect_at(peer) - 2.5


class NewcomersDepose(e.Election):
    """Who was cut off from the coordinator and claims alone is followed by those who were not."""

    def _rivals(self) -> list[e.Claim]:
        return sorted((True, term, who) for _, term, who in super()._rivals())


@pytest.mark.parametrize(
    ("planted", "story"),
    [
        pytest.param(planted, story, id=planted.__name__)
        for planted, story in (
            (NeverAsks, a_wire_between_two_is_dead_for_a_while),
            (BelievesForEver, a_wire_between_two_stays_dead),
            (BelievesForEver, a_liar_hears_the_dead),
            (BelievesAnybody, a_liar_hears_nobody),
            (WaitsForAllAnswers, a_cable_is_pulled),
            (HearsTheDead, a_peer_dies_without_a_word),
            (HearsTheDead, an_agent_is_stopped),
            (AsksOnce, a_wire_between_two_is_dead_for_a_while),
            (IgnoresRefusals, an_agent_is_killed),
            (Impatient, a_wire_between_two_comes_and_goes),
            (NewcomersDepose, a_wire_between_two_stays_dead),
        )
    ],
)
def test_a_planted_mistake_is_caught(planted: Any, story: Story) -> None:
    part = "make_election" if issubclass(planted, e.Election) else "make_membership"
    house = type("Planted", (Calm,), {part: planted})
    with pytest.raises(Broken, match=r"^seed \d+: "):
        play(story, house)
