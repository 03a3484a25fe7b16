"""An agent in the simulated home: what `cluster/driver.py` and `agent.py` do, no more.

The machines are the real ones; this turns what comes into events and does what they ask for.
"""

from __future__ import annotations

import math
from typing import Any

from msgspec.structs import replace

from peer.agent import ANNOUNCE_S
from peer.clockwork import Turns
from peer.cluster import election as e
from peer.cluster import membership as m
from peer.planning import duty as d
from peer.planning import rollout as r
from peer.planning.leaving import Leaving, Over, Saw, Wished, scene
from peer.planning.leaving import Tell as TellLeaving
from peer.planning.plan import PlanId
from peer.planning.profile import ModelOffer, Profile
from peer.protocol import Announce, Plans, Report, StageNews
from peer.ring.generation import Offer
from peer.ring.lease import Hung, Lease, Look, Ping, Pong
from tests.simulated.home_fetching import Fetching
from tests.simulated.home_membership import Members
from tests.simulated.home_stage import PIPE_S, STEP_S, Stage
from tests.simulated.home_wires import Machine, Wire


class Agent(Members, Fetching):
    """One run of one peer's agent."""

    make_duty: type[d.Duty] = d.Duty
    make_rollout: type[r.Rollout] = r.Rollout
    make_lease: type[Lease] = Lease
    tells_exits = True

    def __init__(self, home: Any, machine: Machine, profile: Profile) -> None:
        super().__init__(home, machine)
        self.profiles: dict[str, Profile] = {self.me: profile}
        self.offers: dict[str, tuple[ModelOffer, ...]] = {self.me: ()}
        self.heard: Plans | None = None
        self.reports: dict[tuple[str, PlanId], Report] = {}
        self.duty = self.make_duty(self.me, home.timing.publish_s)
        self.rollout = self.make_rollout(self.me, home.timing)
        self.entry = home.make_entry(self)
        self.stages: dict[PlanId, Stage] = {}
        self.fetches: dict[PlanId, object] = {}
        self.turns = Turns()
        self.alarms = {"duty": math.inf, "rollout": math.inf}
        self.leaving: Leaving | None = None
        self.coordinates: int | None = None
        self.offer_parts()
        home.at(ANNOUNCE_S, self.do, self.announce_again)

    # From the cluster -----------------------------------------------------------------------------

    def joined(self, peer: str) -> None:
        self.out_of_reach(set(self.profiles[self.me].unreachable) - {peer})
        self.send(peer, Announce(self.profiles[self.me], self.offers[self.me]))
        self.admit()
        self.do_duty(d.MemberJoined(peer))
        self.members_changed()

    def lost(self, peer: str, why: str, heard_by: str) -> None:
        self.admit()
        if heard_by:
            self.out_of_reach({*self.profiles[self.me].unreachable, peer})
        self.do_duty(d.MemberLost(peer, why, heard_by))
        self.members_changed()

    def out_of_reach(self, peers: set[str]) -> None:
        """Tell the coordinator which peers others hear and this one does not."""
        if (told := tuple(sorted(peers))) != self.profiles[self.me].unreachable:
            self.introduce(replace(self.profiles[self.me], unreachable=told))

    def elected(self, coordinator: str, term: int) -> None:
        if coordinator == self.me:
            self.members_changed()
            self.turns.take(lambda: self.coordinate_in(term))
            known = self.heard.states if self.heard else ()
            self.do_rollout(r.Elected(term, known))
        else:
            self.turns.take(lambda: self.coordinate_in(None))
            self.do_rollout(r.Deposed())
            for part in self.duty.parts.values():
                if part.mine:
                    self.tell_coordinator(part.report)

    def coordinate_in(self, term: int | None) -> None:
        """What its machine for plans is told of the election."""
        self.coordinates = term

    def received(self, peer: str, message: Any) -> None:
        match message:
            case Announce(profile, models):
                if (self.profiles.get(peer), self.offers.get(peer)) != (profile, models):
                    self.profiles[peer], self.offers[peer] = profile, models
                    self.members_changed()
            case Plans():
                if peer == self.election.coordinator:
                    self.reports = {(t.peer_id, t.report.plan): t.report for t in message.reports}
                    self.hear_plans(message)
            case Report():
                self.reported(peer, message)

    def members_changed(self) -> None:
        present = frozenset({self.me, *self.membership.members})
        self.do_rollout(r.Members(present, dict(self.profiles), dict(self.offers)))

    def introduce(self, profile: Profile) -> None:
        """This peer is something else than before."""
        self.profiles[self.me] = profile
        self.announce()

    def announce(self) -> None:
        """What this peer is and has is something else now."""
        self.broadcast(Announce(self.profiles[self.me], self.offers[self.me]))
        self.members_changed()

    def announce_again(self) -> None:
        """What was told while a link broke and came back may have been lost."""
        if self.alive:
            self.broadcast(Announce(self.profiles[self.me], self.offers[self.me]))
            self.home.at(ANNOUNCE_S, self.do, self.announce_again)

    def admit(self) -> None:
        admitted = {self.me, *self.membership.members}
        for stage in self.stages.values():
            self.home.at(PIPE_S, stage.do, stage.admit, admitted)

    # The machines ---------------------------------------------------------------------------------

    def do_duty(self, event: d.Event) -> None:
        def turn() -> None:
            for action in self.duty.step(event, self.home.now):
                self.perform_duty(action)
            self.set_alarm("duty", self.duty.deadline)

        self.turns.take(turn)

    def do_rollout(self, event: r.Event) -> None:
        def turn() -> None:
            for action in self.rollout.step(event, self.home.now):
                match action:
                    case r.Publish(plans):
                        self.home.published(self, plans)
                        self.broadcast(plans)
                        self.hear_plans(plans)
                    case r.Note(text):
                        self.home.tell(self.machine.short, "coordinates:", text[:150])
                    case r.Solve(question):
                        found = r.Solved(self.home.plan(question))
                        wait_s = 0.003 + self.home.rng.random() * 0.1
                        self.home.at(wait_s, self.do, self.do_rollout, found)
            self.set_alarm("rollout", self.rollout.deadline)

        self.turns.take(turn)

    def set_alarm(self, kind: str, at: float | None) -> None:
        if at is not None and at < self.alarms[kind]:
            self.alarms[kind] = at
            self.home.at(max(0.0, at - self.home.now) + 1e-6, self.do, self.ring, kind)

    def ring(self, kind: str) -> None:
        self.alarms[kind] = math.inf
        at = self.duty.deadline if kind == "duty" else self.rollout.deadline
        if at is None or at > self.home.now:
            return self.set_alarm(kind, at)  # it was put off
        if kind == "duty":
            self.do_duty(d.Tick())
        else:
            self.do_rollout(r.Tick())

    def hear_plans(self, plans: Plans) -> None:
        self.heard = plans
        self.do_duty(d.Heard(plans))

    def tell_coordinator(self, report: Report) -> None:
        coordinator = self.election.coordinator
        if coordinator == self.me:
            self.reported(self.me, report)
        elif coordinator:
            self.send(coordinator, report)

    def reported(self, peer: str, report: Report) -> None:
        live = {state.plan.id for state in self.rollout.states}
        self.reports = {k: v for k, v in self.reports.items() if k[1] in live}
        self.reports[peer, report.plan] = report
        self.do_rollout(r.Reported(peer, report))

    def perform_duty(self, action: d.Action) -> None:
        match action:
            case d.Fetch(plan, parts):
                self.fetch(plan, parts)
            case d.StartStage(state):
                self.start_stage(state.plan)
            case d.ConnectStage(plan_id, link):
                if stage := self.stages.get(plan_id):
                    previous = stage.plan.before(self.me)
                    self.home.at(PIPE_S, stage.do, stage.connect, link, previous)
            case d.StopStage(plan_id):
                self.fetches.pop(plan_id, None)
                self.stop_stage(plan_id)
            case d.Tell(report):
                self.tell_coordinator(report)
            case d.Serve(None):
                self.home.serves(self, None)
                self.entry.serve(None)
            case d.Serve(plan, link) if plan and link:
                self.home.serves(self, plan)
                self.entry.open(plan, link)
                self.entry.serve(Offer(plan.id, plan.shape.digest, plan.split.context))
            case d.EndPlan(plan_id, why):
                self.home.tell(self.machine.short, "ends plan", plan_id, "because", why)
                self.entry.end(plan_id, why)
            case d.GoOver(plan_id):
                self.entry.go_over(plan_id)
            case d.Underway(digest):
                self.entry.underway(digest)

    # Stages ---------------------------------------------------------------------------------------

    def start_stage(self, plan: Any) -> None:
        part = self.duty.parts.get(plan.id)
        if part is None or part.dead:
            return
        cost_s = self.home.costs[self.me]
        admitted = {self.me, *self.membership.members}
        stage = self.stages[plan.id] = self.home.make_stage(self, plan, admitted, cost_s)
        self.home.tell(self.machine.short, "starts a stage of plan", plan.id)
        self.home.at(self.home.load_time(), stage.do, stage.loaded)

    def stop_stage(self, plan_id: PlanId) -> None:
        if stage := self.stages.pop(plan_id, None):
            wait_s = 3.0 if stage.stopped else self.home.rng.random() * 0.05
            self.home.at(wait_s, self.home.over, stage)

    def mind(self, stage: Stage, lease: Lease) -> None:
        """Look at it and ask it, until it ends or has to be ended."""
        if not stage.alive or self.stages.get(stage.plan.id) is not stage:
            return
        look = Look(stage.worked_s, 0, "stopped" if stage.stopped else "runs")
        for action in lease.step(look, self.home.now):
            match action:
                case Ping(number):
                    self.home.at(PIPE_S, stage.do, self.asked, stage, lease, number)
                case Hung(why):
                    # Its answer may be on its way still, where it went on a moment ago.
                    if not stage.stopped and self.home.now > stage.woke + 2 * PIPE_S:
                        self.home.fail(f"{self.me} takes a stage for hung that is not: {why}")
                    return stage.exit(why)
        wait_s = max(0.01, lease.deadline - self.home.now)
        self.home.at(wait_s, self.do, self.mind, stage, lease)

    def asked(self, stage: Stage, lease: Lease, number: int) -> None:
        """In the stage, once it runs: it answers."""
        self.home.at(PIPE_S, self.do, self.answered, lease, number)

    def answered(self, lease: Lease, number: int) -> None:
        lease.step(Pong(number), self.home.now)

    def stage_told(self, stage: Stage, news: StageNews) -> None:
        if self.stages.get(stage.plan.id) is stage:
            if not stage.leased and news.phase != "loading":
                stage.leased = True
                rows_max = stage.plan.split.batch_tokens
                self.mind(stage, self.make_lease(self.home.now, rows_max, STEP_S))
            self.do_duty(d.Told(stage.plan.id, news))

    def stage_exited(self, stage: Stage, why: str, lost: str) -> None:
        if self.stages.get(stage.plan.id) is stage:
            del self.stages[stage.plan.id]
            if self.tells_exits:
                self.do_duty(self.exited(stage.plan.id, why, lost))

    @staticmethod
    def exited(plan: PlanId, why: str, lost: str) -> d.Exited:
        return d.Exited(plan, why)

    # Ends -----------------------------------------------------------------------------------------

    def leave(self) -> None:
        """SIGTERM: hand over first, then go."""
        if self.leaving is None:
            self.home.tell(self.machine.short, "wishes to go")
            self.leaving = Leaving(self.home.timing)
            self.do_leaving(Wished("stop"))
            self.see_leaving()

    def see_leaving(self) -> None:
        """How things are, four times a second."""
        if self.leaving is None or not self.alive:
            return
        over = {p.state.plan.id for p in self.duty.parts.values() if p.dead}
        plans = self.heard
        states = [s for s in (plans.states if plans else ()) if s.plan.id not in over]
        members = sorted(self.membership.members)
        stays = [p for p in members if p in self.profiles and not self.profiles[p].leaving]
        running = len(self.entry.answers)
        report_of = lambda peer, plan: self.reports.get((peer, plan))  # noqa: E731
        why = plans.why_none if plans else ""
        self.do_leaving(Saw(scene(self.me, states, report_of, stays, running, why)))
        self.home.at(0.25, self.do, self.see_leaving)

    def do_leaving(self, event: Any) -> None:
        assert self.leaving
        for action in self.leaving.step(event, self.home.now):
            match action:
                case TellLeaving(leaving):
                    self.introduce(replace(self.profiles[self.me], leaving=leaving))
                case Over(_, why):
                    self.home.tell(self.machine.short, "goes", why)
                    self.broadcast(("bye", "it was stopped"))
                    self.home.at(0.1, self.do, self.home.gone, self.machine)

    def broke(self, wire: Wire) -> None:
        if link := self.links.pop(wire, None):
            link.broke()
        else:
            self.link_broke(wire)

    def hear(self, wire: Wire, body: Any) -> None:
        if wire in self.links:
            self.entry.hear(body)
        else:
            self.hear_peer(wire, body)

    def go_on(self) -> None:
        """Whether the timer or the sockets are served first."""
        first = self.home.rng.random() < 0.5
        if first:
            self.stopped = False
            self.feed(m.Tick(), e.Tick())
        super().go_on()
        if self.alive and not self.stopped:
            self.feed(m.Tick(), e.Tick())
