"""The coordinator's plans, from the first idea to the last answer. Pure.

Profiles and offers come in, a plan is made when they have been quiet for a while, and it goes
through its phases as its peers report: loading, linking, serving, draining. What was served goes on
serving until the next plan can. A plan that one of its own peers left or failed is over at once.
Nothing here is stored: a new coordinator adopts the plan that it last heard of.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from msgspec.structs import replace

from peer.config import Timing
from peer.planning.choice import choose
from peer.planning.failures import ILL_S, NONSENSE, RETRY_S, Failures
from peer.planning.making import Answer, Question, measured
from peer.planning.making import Members as Members
from peer.planning.patience import Patience
from peer.planning.plan import STAGES_MAX, Plan, PlanId, PlanState, check
from peer.planning.profile import PEERS_MAX, ModelShape
from peer.planning.rollout_events import Action as Action
from peer.planning.rollout_events import Deposed as Deposed
from peer.planning.rollout_events import Elected as Elected
from peer.planning.rollout_events import Event as Event
from peer.planning.rollout_events import Note as Note
from peer.planning.rollout_events import Publish as Publish
from peer.planning.rollout_events import Reported as Reported
from peer.planning.rollout_events import Solve as Solve
from peer.planning.rollout_events import Solved as Solved
from peer.planning.rollout_events import Tick as Tick
from peer.planning.running import NUMBER_MAX, Running, adoptable, is_same
from peer.planning.situation import news, ranked, situation
from peer.planning.steadiness import Steadiness
from peer.protocol import PeerReport, Plans, Report

_DRAINING_MAX = STAGES_MAX - 2  # plans that wait for their last answers, beside two others
_NEVER = math.inf
_HASTE_S = 0.05  # instead of settling, where answers wait: for a loss of several peers at once


class Rollout:
    """The machine. One for a peer's lifetime; it works while this peer coordinates."""

    def __init__(self, me: str, timing: Timing) -> None:
        self._me, self._timing = me, timing
        self._members = Members(frozenset(), {}, {})
        self._choice = choose({}, "", me)
        self._failures = Failures(doubt_s=2 * timing.silence_s)
        self._steadiness = Steadiness()
        self._asked = 0  # questions to the planner, ever
        self._patience = Patience(timing)
        self._begin(None, ())

    @property
    def wanted(self) -> ModelShape | None:
        """The model that is to be served, if any can be: whose speeds peers should know."""
        return self._choice.shapes[0] if self._choice.shapes else None

    def _begin(self, term: int | None, known: tuple[PlanState, ...]) -> None:
        self._term = term
        self._known = known  # plans that may still be adopted
        numbers = [s.plan.id.number for s in known if s.plan.id.term == term]
        self._number = max((n for n in numbers if n <= NUMBER_MAX), default=0)
        self._running: dict[PlanId, Running] = {}
        self._decided = False  # nothing is published before the first decision of a term
        # What served in this term, or before, until its ring broke; of it, what can be kept is.
        served = [s.plan for s in known if s.phase == "serving" and not check(s.plan)]
        self._before: Plan | None = max(served, key=lambda plan: plan.id, default=None)
        self._served = self._before is not None
        # Who else is missing may just not have been seen here yet.
        gone = set(self._before.peers) - self._members.present if self._before else set()
        self._haste = bool(self._before and gone == {self._before.coordinator})
        self._patience.begin()
        self._why_none = ""
        self._ignored: Mapping[str, str] = {}  # as last told
        self._cause = "a new coordinator"
        self._seen: object = None  # what a plan depends on
        self._planned: object = None  # the same when the last plan was made
        self._shaky: Mapping[str, str] = {}
        self._steady = _NEVER
        self._quiet_at = self._publish_at = _NEVER
        self._published: Plans | None = None

    @property
    def deadline(self) -> float | None:
        """When a Tick is wanted, None: whenever."""
        if self._term is None:
            return None
        limits = [
            at for running in self._running.values() for at, _ in running.limits(self._timing)
        ]
        at = min([self._quiet_at, self._publish_at, self._failures.deadline, self._steady, *limits])
        return at if at < _NEVER else None

    @property
    def states(self) -> tuple[PlanState, ...]:
        """The plans of now, oldest first; () where this peer does not coordinate."""
        return tuple(self._running[plan_id].state for plan_id in sorted(self._running))

    def step(self, event: Event, now: float) -> list[Action]:
        """Take one event in; what is to be done comes out."""
        notes: list[Action] = []
        match event:
            case Elected(term, known):
                self._begin(term, known)
                notes += self._adopt(now)
            case Deposed():
                self._begin(None, ())
            case Members():
                notes += self._take_members(event, now)
            case Reported(peer_id, report):
                notes += self._take_report(peer_id, report, now)
            case Solved(answer) if self._term is not None:
                notes += self._take_answer(answer, now)
            case Solved() | Tick():
                pass
        if self._term is None:
            return []
        notes += self._expire(now)
        notes += self._tell_ignored()
        self._shaky = self._steadiness.shaky(now)
        self._steady = self._steadiness.deadline(now)
        self._watch(now)
        if now >= self._quiet_at:
            notes += self._decide(now)
        return [*notes, *self._publish(now)]

    # Members ----------------------------------------------------------------------------------

    def _take_members(self, members: Members, now: float) -> list[Note]:
        before, self._members = self._members, members
        if (wishes := members.wishes(self._me)) != before.wishes(self._me):
            self._choice = choose(*wishes, self._me)
        for peer_id in before.present:
            if before.nature(peer_id) != members.nature(peer_id):
                self._failures.forget(peer_id)
        if lost := before.present - members.present:
            self._failures.forgive(lost, now)
        self._steadiness.told(before, members, now)
        if self._before or any(r.serves for r in self._running.values()):  # else none is disturbed
            self._steadiness.lost(lost - before.leaving, now)
        self._steadiness.back(members.present - before.present, now)
        if members.leaving - before.leaving:
            self._haste = True
        notes = []
        for running in list(self._running.values()):
            if gone := [p for p in running.plan.peers if p not in members.present]:
                notes.append(self._drop(running, f"{self._name(gone[0], before)} was lost"))
        self._hurry()
        return notes if self._decided or self._term is None else notes + self._adopt(now)

    def _adopt(self, now: float) -> list[Note]:
        """Take over what was served before this term, where all of its peers are here."""
        notes, term, here = [], self._term or 0, self._members.present
        for state in sorted(self._known, key=lambda state: state.plan.id):
            plan_id = state.plan.id
            if plan_id in self._running or not adoptable(state, term, here):
                continue
            running = self._running[plan_id] = Running(state, now)
            if state.phase == "serving":
                self._retire(now, running)
                self._decided, self._before = True, None  # nothing of it was lost
                notes = [Note(f"plan {plan_id} goes on under this coordinator")]
        self._retire(now, None)
        return notes

    def _tell_ignored(self) -> list[Note]:
        before, self._ignored = self._ignored, (now := self._choice.ignored)
        return [Note(f"{self._name(p)}: {why}") for p, why in now.items() if before.get(p) != why]

    def _name(self, peer_id: str, members: Members | None = None) -> str:
        profile = (members or self._members).profiles.get(peer_id)
        return f"{profile.name} ({peer_id})" if profile else peer_id

    # Deciding ---------------------------------------------------------------------------------

    def _current(self) -> list[Running]:
        """Plans that are not on their way out, the newest first."""
        live = [r for r in self._running.values() if r.state.phase != "draining"]
        return sorted(live, key=lambda r: r.plan.id, reverse=True)

    def _ranked(self) -> list[ModelShape]:
        serves = any(running.serves for running in self._running.values())
        return ranked(self._choice, self._failures, self._current(), serves)

    def _situation(self) -> object:
        known = self._members, self._choice, self._ranked(), self._failures, self._shaky
        return situation(*known, memory=not self._current(), lost=self._before is not None)

    def _watch(self, now: float) -> None:
        """Wait for quiet after every change; there is nothing to do where all is as planned."""
        situation = self._situation()
        if situation != self._seen:
            self._seen = situation
            # Without its own profile this peer would plan without itself.
            if situation == self._planned or self._me not in self._members.profiles:
                self._quiet_at = _NEVER
                self._patience.begin()
                return
            settled_at = self._patience.quiet_at(now)
            self._quiet_at = min(settled_at, now + _HASTE_S) if self._haste else settled_at
            # After a first failure it is worth a second's wait not to plan without the peer.
            retry_at = self._failures.deadline
            if retry_at <= now + RETRY_S[0]:
                self._quiet_at = max(self._quiet_at, retry_at)

    def _decide(self, now: float) -> list[Action]:
        """Ask for the plan that there should be, once those who measure are done or overdue."""
        wait_until = self._measuring_until(now)
        if wait_until > now:
            self._quiet_at = wait_until
            return []
        self._quiet_at, self._haste = _NEVER, False
        self._patience.begin()
        self._seen = self._planned = self._situation()
        shapes = tuple(self._ranked())
        self._asked += 1
        question = Question(
            self._asked,
            PlanId(self._term or 0, self._number + 1),
            self._me,
            self._members,
            shapes,
            {shape.digest: self._failures.barred(shape.digest) for shape in shapes},
            tuple(running.plan for running in self._current()),
            self._shaky,
            self._before,
        )
        return [Solve(question)]

    def _take_answer(self, answer: Answer, now: float) -> list[Note]:
        """What the planner says, unless something else was asked since."""
        if answer.number != self._asked or self._planned is None:
            return []
        plan, known = answer.plan, self._choice.shapes
        if plan and not (self._members.present.issuperset(plan.peers) and plan.shape in known):
            self._seen = self._planned = None  # who is in it, or has it, was lost: think again
            return []
        self._decided, self._known = True, ()
        if answer.plan is None:
            self._failures.shorten(now)
            return self._without(". ".join([*answer.whys.values()][:3]) or self._choice.why)
        current = self._current()
        if answer.kept and all(r.plan.id != answer.plan.id for r in current):
            self._seen = self._planned = None  # it ended meanwhile: think again
            return []
        notes = self._roll_out(answer.plan, current, now, answer.gain)
        if answer.kept and (why := answer.whys.get(answer.plan.shape.digest)):
            return [*notes, *self._without(why)]  # nobody can take over from who wants to go
        return [*notes, *self._say_instead(answer.plan.shape, answer.whys)]

    def _measuring_until(self, now: float) -> float:
        """Until when plans wait for peers that have not measured the wanted model yet. One that
        could be used alone waits for nobody: there is nothing to choose. Nor does anybody where
        what served was lost: its answers wait to go on."""
        shape = self.wanted
        lost = self._served and not any(r.serves for r in self._running.values())
        if shape is None or lost:
            return now
        barred = self._failures.barred(shape.digest)
        able = [p for p in self._members.here if p.engine_for(shape) and p.peer_id not in barred]
        late = [p.peer_id for p in able if not measured(p, shape)]
        until = self._patience.measured_at(late, shape.digest, now)
        return until if len(able) > 1 else now

    def _roll_out(
        self, plan: Plan, current: list[Running], now: float, gain: str = ""
    ) -> list[Note]:
        """Make it the next plan, unless it is what runs already."""
        same = next((r for r in current if is_same(r.plan, plan.shape, plan.split)), None)
        notes = [
            self._drop(r, "it was overtaken", keep_cause=True)
            for r in current
            if r is not same and not r.serves
        ]
        cause, self._cause = self._cause or news(current, plan.split, gain, self._name), ""
        if same is not None:
            return notes
        self._number += 1
        state = PlanState(plan, "loading", why=f"{cause}; {plan.split.why}"[:1000])
        self._running[plan.id] = Running(state, now)
        return [*notes, Note(f"plan {plan.id} for {plan.shape.model}: {state.why}")]

    def _say_instead(self, shape: ModelShape, whys: Mapping[str, str]) -> list[Note]:
        """Why this model is served and not the one that was pulled last."""
        first, newest = self._choice.shapes[0], self._choice.newest
        why = self._choice.passed_over
        if shape.digest != first.digest and not why:
            why = whys.get(first.digest) or "; ".join(self._failures.reasons(first.digest))
        if not why:
            self._why_none = ""
            return []
        earlier = "an earlier " if shape.model == newest else ""
        return self._without(
            f"{newest} was pulled last, but {why[:700]}: serving {earlier}{shape.model}"
        )

    def _without(self, why: str) -> list[Note]:
        before, self._why_none = self._why_none, why[:1000]
        self._cause = ""  # the next plan comes of what ends this want
        return [] if before == self._why_none else [Note(f"no new plan: {self._why_none}")]

    # Progress ---------------------------------------------------------------------------------

    def _take_report(self, peer_id: str, report: Report, now: float) -> list[Note]:
        running = self._running.get(report.plan)
        if running is None or peer_id not in running.plan.peers:
            return []
        running.take(peer_id, report, now)
        if peer_id == running.plan.head and report.blamed in running.plan.ring:
            return [self._fail(running, report.blamed, NONSENSE, now)]
        if report.phase == "failed" and report.lost in running.plan.peers:
            self._steadiness.cried(peer_id, report.lost, now)
            lost = self._name(report.lost)
            return [self._drop(running, f"{self._name(peer_id)} does not reach {lost} any more")]
        if fault := running.fault(peer_id, report):
            return [self._fail(running, peer_id, fault, now)]
        phase = running.state.phase
        if phase == "loading" and running.all_reached("ready", "linked"):
            running.enter("linking", now)
        elif phase == "linking" and running.all_reached("linked"):
            running.enter("serving", now)
            self._served, self._before = True, None
            self._retire(now, running)
            return [Note(f"plan {running.plan.id} serves on {len(running.plan.peers)} peers")]
        elif running.rests(self._timing, now):
            return [self._drop(running, "its last answer ended", keep_cause=True)]
        return []

    def _retire(self, now: float, newest: Running | None) -> None:
        """All others that serve go on for their answers only, and not too many of them."""
        for other in self._running.values():
            if newest and other is not newest and other.serves:
                other.enter("draining", now)
        draining = sorted(r.plan.id for r in self._running.values() if r.state.phase == "draining")
        for plan_id in draining[:-_DRAINING_MAX]:
            del self._running[plan_id]
        self._hurry()

    def _hurry(self) -> None:
        """Answers on plans that drain go over where a peer of the ring wants to go away."""
        for of in self._running.values():
            if of.state.phase == "draining" and self._members.leaving & set(of.plan.peers):
                of.hurry()

    def _fail(self, running: Running, peer_id: str, why: str, now: float) -> Note:
        name = self._name(peer_id)
        if running.state.phase != "draining":
            digest, ring = running.plan.shape.digest, running.plan.peers
            text = f"the stage on {name} failed: {why}"[:900]
            # What is noticed late costs answers a long pause each time that it is tried.
            least_s = ILL_S if why.startswith(("hung", NONSENSE)) else 0.0
            self._failures.blame(peer_id, digest, ring, text, now, least_s)
        return self._drop(running, f"the stage on {name} failed: {why}")

    def _drop(self, running: Running, why: str, keep_cause: bool = False) -> Note:
        del self._running[running.plan.id]
        self._before = running.plan if running.serves else self._before
        if not keep_cause and running.state.phase != "draining":
            self._haste |= self._before is not None  # answers wait
            self._cause = why
            self._seen = self._planned = None  # think again, though all may soon be as it was
        return Note(f"plan {running.plan.id} ({running.state.phase}) is over: {why}")

    def _expire(self, now: float) -> list[Note]:
        self._failures.expire(now)
        notes = []
        for running in list(self._running.values()):
            over = next((peer for at, peer in running.limits(self._timing) if at <= now), None)
            if over:
                why = f"nothing was heard of its progress while {running.state.phase}"
                notes.append(self._fail(running, over, why, now))
            elif over == "":
                rests = running.rests(self._timing, now)
                why = "its last answer ended" if rests else "its answers took too long"
                notes.append(self._drop(running, why, keep_cause=True))
        return notes

    def _publish(self, now: float) -> list[Publish]:
        if not self._decided:
            return []
        # Said, too, while an earlier plan goes on: why the model that is wanted is not served.
        why_none = self._why_none
        if not why_none and not self._current():
            why_none = f"{self._cause}; planning again"
        measure = (self.wanted.digest,) if self.wanted else ()
        plans = Plans(self._term or 0, self.states, why_none[:1000], measure)
        if plans == self._published and now < self._publish_at:
            return []
        self._published, self._publish_at = plans, now + self._timing.publish_s
        # Told along, never the reason to tell: they change with every answer.
        reports = tuple(
            PeerReport(peer_id, report)
            for running in self._running.values()
            for peer_id, report in running.reports.items()
        )
        return [Publish(replace(plans, reports=reports[-8 * PEERS_MAX :]))]
