"""Thousands of simulated houses, and the proof that they would show a mistake."""

from __future__ import annotations

import math
from typing import Any

import pytest

from peer.cluster import election as e
from peer.cluster import membership as m
from tests.simulated.house import Broken, House

SEEDS = 2000
BATCH = 125
TRIES = 400  # seeds in which a planted mistake must show


@pytest.mark.parametrize("first", range(0, SEEDS, BATCH))
def test_every_house_agrees_again_once_its_faults_stop(first: int) -> None:
    for seed in range(first, first + BATCH):
        House(seed).run()


def test_a_seed_plays_the_same_story_twice() -> None:
    stories = []
    for _ in range(2):
        house = House(7)
        house.run()
        stories.append((list(house.story), house.now))
    assert stories[0] == stories[1]


# Planted mistakes ---------------------------------------------------------------------------------


class ForgetsTerms(House):
    """The disk says yes and writes nothing."""

    disk_works = False


class ClaimsBeforeStoring(e.Election):
    def _defend(self) -> list[e.Action]:
        actions = super()._defend()
        for action in actions:
            if isinstance(action, e.StoreTerm):
                self._take_claim(action.term)
        return actions


class NewcomersDepose(e.Election):
    """The order of claims without `followed`."""

    def _rivals(self) -> list[e.Claim]:
        return sorted((True, term, who) for _, term, who in super()._rivals())


class NoTieBreak(e.Election):
    """Whoever has a claim in the same term keeps it."""

    def _decide_as_coordinator(self) -> list[e.Action]:
        above = [term for _, term, _ in self._rivals() if term > self.term]
        return super()._decide_as_coordinator() if above else []


class FollowsLowerTerms(e.Election):
    def _decide_alone(self) -> list[e.Action]:
        for _, term, rival in reversed(self._rivals()):
            return self._follow(rival, term)
        return super()._decide_alone()


class NeverClaimsAnew(e.Election):
    """A coordinator that wins by the order, and does not lift its term above the loser's."""

    def _defend(self) -> list[e.Action]:
        return [] if self.coordinator == self.me else super()._defend()


class NeverNoticesLoss(m.Membership):
    def _suspect_at(self, peer: Any) -> float:
        return math.inf


class BlamesOthers(m.Membership):
    """Its own sleep is held against the others."""

    def _forgive(self, now: float) -> None:
        pass


class NeverDialsAgain(m.Membership):
    def _wait(self, peer: Any, refused: bool = False) -> None:
        super()._wait(peer, refused)
        peer.dial_at = math.inf


class MissesRestarts(m.Membership):
    """A peer that was started anew is taken for the one that was here."""

    def _link(self, up: m.LinkUp) -> list[m.Action]:
        if (peer := self._peers.get(up.peer_id)) is not None and peer.member:
            peer.incarnation = up.incarnation
        return super()._link(up)


def house_with(**parts: Any) -> type[House]:
    return type("Planted", (House,), parts)


@pytest.mark.parametrize(
    "house",
    [
        pytest.param(ForgetsTerms, id="terms are not stored"),
        *(
            pytest.param(house_with(make_election=planted), id=planted.__name__)
            for planted in (
                ClaimsBeforeStoring,
                NewcomersDepose,
                NoTieBreak,
                FollowsLowerTerms,
                NeverClaimsAnew,
            )
        ),
        *(
            pytest.param(house_with(make_membership=planted), id=planted.__name__)
            for planted in (NeverNoticesLoss, BlamesOthers, NeverDialsAgain, MissesRestarts)
        ),
    ],
)
def test_a_planted_mistake_is_caught(house: type[House]) -> None:
    with pytest.raises(Broken, match=r"^seed \d+: "):
        play(house)


def play(house: type[House]) -> None:
    for seed in range(TRIES):
        house(seed).run()
