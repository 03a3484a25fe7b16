"""Thousands of simulated homes under faults, and the proof that they would show a mistake."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from peer.cluster import membership as m
from peer.planning import duty as d
from peer.planning import rollout as r
from peer.planning.running import Running
from peer.ring import generation as g
from peer.ring import scheduler as schedule
from peer.ring.frames import Open, Trim
from peer.ring.lease import Lease, Look
from tests.simulated.home import Home
from tests.simulated.home_agent import Agent
from tests.simulated.home_entry import Entry
from tests.simulated.home_stage import Scheduler, Stage
from tests.simulated.house import Broken

SEEDS = 2000
BATCH = 100
TRIES = 1000  # seeds in which a planted mistake must show


@pytest.mark.parametrize("first", range(0, SEEDS, BATCH))
def test_every_answer_is_right_and_ends_whatever_happens(first: int) -> None:
    for seed in range(first, first + BATCH):
        Home(seed).run()


def test_a_seed_plays_the_same_story_in_every_process() -> None:
    """Also where strings have other hashes, so sets another order."""
    code = (
        "from tests.simulated.home import Home\n"
        "for seed in (3, 7, 11, 64):\n"
        "    home = Home(seed)\n"
        "    home.run()\n"
        "    print(seed, home.now, len(home.heap), *home.story, sep='\\n')\n"
    )
    stories = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "PYTHONHASHSEED": hashes},
            capture_output=True,
            check=True,
            timeout=60,
        ).stdout
        for hashes in ("0", "1", "77")
    }
    assert len(stories) == 1
    assert len(stories.pop()) > 1000


# Planted mistakes: in answers ---------------------------------------------------------------------


class TakesOldSubmissions(g.Generation):
    """What comes under an earlier name is taken for what was asked last."""

    def _arrived(self, message: Any, now: float) -> list[g.Action]:
        if self.plan is not None:
            message = replace(message, request=self.name, plan=self.plan)
        return super()._arrived(message, now)


class ForgetsDelivered(g.Generation):
    """Submits the prompt alone when it goes on."""

    def _submit(self, offer: g.Offer, now: float) -> list[g.Action]:
        actions = super()._submit(offer, now)
        ids = b"".join(i.to_bytes(4, "little") for i in self.prompt)
        return [
            g.Send(replace(a.message, ids=ids)) if isinstance(a, g.Send) else a for a in actions
        ]


class ForgetsTokensMax(g.Generation):
    """Asks for as many tokens as at the beginning when it goes on."""

    def _submit(self, offer: g.Offer, now: float) -> list[g.Action]:
        self.tokens_max += len(self.delivered)
        return super()._submit(offer, now)


class GivesTwice(g.Generation):
    """A position that was delivered is delivered again."""

    def _arrived(self, message: Any, now: float) -> list[g.Action]:
        expected = len(self.prompt) + len(self.delivered)
        if getattr(message, "position", expected) < expected and not self.done:
            return [g.Give(message.ids, "")]
        return super()._arrived(message, now)


class DropsPlanLost(g.Generation):
    def step(self, event: g.Event, now: float) -> list[g.Action]:
        return super().step(g.Tick() if isinstance(event, g.PlanLost) else event, now)


class NeverGivesUp(g.Generation):
    """Waits for ever for a plan that serves."""

    def _go_on(self, now: float) -> list[g.Action]:
        actions = super()._go_on(now)
        if self.plan is None and not self.done:
            self._give_up_at = math.inf
        return actions


# In stages ----------------------------------------------------------------------------------------


def without(actions: list[schedule.Action], mend: Any) -> list[schedule.Action]:
    """With every operation of every step made another one; None: left out."""
    return [
        dataclasses.replace(a, ops=tuple(new for op in a.ops if (new := mend(op)) is not None))
        if isinstance(a, schedule.Run)
        else a
        for a in actions
    ]


class NeverTrims(Scheduler):
    """A slot goes to the next answer with what the last one left in it."""

    def step(self, event: schedule.Event, now: float) -> list[schedule.Action]:
        return without(super().step(event, now), lambda o: None if isinstance(o, Trim) else o)


class KeepsGuesses(Scheduler):
    """What was guessed wrongly stays in its slot."""

    def step(self, event: schedule.Event, now: float) -> list[schedule.Action]:
        actions = super().step(event, now)
        return without(actions, lambda o: None if isinstance(o, Trim) and o.position else o)


class PutsBackHalf(Scheduler):
    """An answer that lost its slot is not read anew."""

    def _admit(self) -> None:
        super()._admit()
        for job in self.running.values():
            if job.turn > 1 and job.sent < len(job.ids) - 1:
                job.sent = len(job.ids) - 1


class ForgetsHistory(Scheduler):
    """The tail's penalties begin with the first token of a submission."""

    def step(self, event: schedule.Event, now: float) -> list[schedule.Action]:
        return without(
            super().step(event, now),
            lambda o: Open(o.slot, o.sampling) if isinstance(o, Open) else o,
        )


class Overtakes(Stage):
    """A step that comes while another one is computed is computed at once."""

    def take_up(self) -> None:
        self.busy = False
        super().take_up()


class NeverHung(Lease):
    """A stage that does not come back is waited for."""

    def _verdict(self, look: Look, now: float) -> str:
        return ""


# In plans -----------------------------------------------------------------------------------------


class KeepsEndedPlans(d.Duty):
    """Answers are not told that their plan is over."""

    def step(self, event: d.Event, now: float) -> list[d.Action]:
        return [a for a in super().step(event, now) if not isinstance(a, d.EndPlan)]


class ServesDeadPlans(d.Duty):
    """New answers go on to be sent to a plan that is over here."""

    def _serve(self) -> list[d.Action]:
        before = self._serving
        actions = super()._serve()
        if actions == [d.Serve(None)]:
            self._serving = before
            return []
        return actions


class HidesExits(d.Duty):
    """The coordinator is not told that a stage has ended."""

    def step(self, event: d.Event, now: float) -> list[d.Action]:
        return super().step(d.Tick() if isinstance(event, d.Exited) else event, now)


class NeverReplans(r.Rollout):
    """One plan for a term is enough."""

    def _decide(self, now: float) -> list[r.Action]:
        if not self._served:
            return super()._decide(now)
        self._quiet_at = math.inf
        return []


class PublishesOldTerms(r.Rollout):
    """Under the term in which it first coordinated."""

    first: int | None = None

    def _publish(self, now: float) -> list[r.Publish]:
        self.first = self.first or self._term
        return [r.Publish(replace(p.plans, term=self.first)) for p in super()._publish(now)]


class NeverDeposed(r.Rollout):
    """Goes on to publish when another one coordinates."""

    def step(self, event: r.Event, now: float) -> list[r.Action]:
        return super().step(r.Tick() if isinstance(event, r.Deposed) else event, now)


class LetsAllServe(r.Rollout):
    """The plan that was served is not retired by the next one."""

    def _retire(self, now: float, newest: Running | None) -> None:
        pass


class NeverDeclaresLoss(m.Membership):
    def _check(self) -> list[m.Action]:
        return [a for a in super()._check() if not isinstance(a, m.Lost)]


def agent(**parts: Any) -> type[Home]:
    planted = type("Planted", (Agent,), parts)
    return type("Home", (Home,), {"make_agent": planted})


def entry(**parts: Any) -> type[Home]:
    return type("Home", (Home,), {"make_entry": type("Planted", (Entry,), parts)})


def stage(**parts: Any) -> type[Home]:
    return type("Home", (Home,), {"make_stage": type("Planted", (Stage,), parts)})


PLANTED: dict[str, type[Home]] = {
    "an answer takes tokens of an earlier submission": entry(make_generation=TakesOldSubmissions),
    "it goes on without the tokens delivered": entry(make_generation=ForgetsDelivered),
    "it goes on and forgets tokens_max": entry(make_generation=ForgetsTokensMax),
    "it delivers a position twice": entry(make_generation=GivesTwice),
    "it does not hear that its plan is lost": entry(make_generation=DropsPlanLost),
    "it never gives up": entry(make_generation=NeverGivesUp),
    "the entry does not say that a link broke": entry(tells_breaks=False),
    "a slot is not trimmed": stage(make_scheduler=NeverTrims),
    "an answer that was put back is not read anew": stage(make_scheduler=PutsBackHalf),
    "a wrong guess is not trimmed": stage(make_scheduler=KeepsGuesses),
    "steps overtake each other": type("Home", (Home,), {"make_stage": Overtakes}),
    "penalties do not look back": stage(make_scheduler=ForgetsHistory),
    "a stage goes on when its link broke": stage(heeds_breaks=False),
    "a stage runs frames of another plan": stage(heeds_plans=False),
    "a stage runs a frame twice": stage(heeds_repeats=False),
    "a peer does not end plans": agent(make_duty=KeepsEndedPlans),
    "a peer serves a plan that is over": agent(make_duty=ServesDeadPlans),
    "a peer does not report its stage's end": agent(make_duty=HidesExits),
    "its agent does not notice it": agent(tells_exits=False),
    "a stage that hangs is waited for": agent(make_lease=NeverHung),
    "the coordinator does not plan anew": agent(make_rollout=NeverReplans),
    "it publishes in an old term": agent(make_rollout=PublishesOldTerms),
    "it goes on when it is deposed": agent(make_rollout=NeverDeposed),
    "it lets two plans serve": agent(make_rollout=LetsAllServe),
    "nobody is ever lost": agent(make_membership=NeverDeclaresLoss),
}


@pytest.mark.parametrize("mistake", PLANTED)
def test_a_planted_mistake_is_caught(mistake: str) -> None:
    with pytest.raises(Broken, match=r"^seed \d+: "):
        play(PLANTED[mistake])


def play(home: type[Home]) -> None:
    for seed in range(TRIES):
        home(seed).run()
