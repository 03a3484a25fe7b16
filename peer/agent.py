"""The agent between its machines and its shells: events in, actions out, in one order.

What comes from the cluster, the stages, the store and the clock becomes an event of the two pure
machines, `duty` (this peer's part in plans) and `rollout` (the coordinator's plans); what they ask
for is done here. It decides nothing: who is asked what is in the machines.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from peer.clockwork import Alarm, Lull, Turns
from peer.cluster.driver import Cluster
from peer.cluster.identity import Identity
from peer.config import Config, Timing
from peer.fetching import Fetching
from peer.hops import Hops
from peer.measuring import Measuring
from peer.models import transfer
from peer.models.store import Store
from peer.planning import duty as d
from peer.planning import rollout as r
from peer.planning.making import Question, answer, measured
from peer.planning.plan import Plan, PlanId
from peer.planning.profile import PEERS_MAX, Link, ModelOffer, ModelShape, Profile
from peer.protocol import (
    Announce,
    ChunkWanted,
    Control,
    ManifestWanted,
    Outlook,
    Plans,
    Report,
    StageNews,
)
from peer.ring.entry import Entry
from peer.ring.generation import Offer, Patience
from peer.ring.supervisor import Supervisor, physical_cores
from peer.serving import Serving, Spawn
from peer.sparing import Host, Sparing

log = logging.getLogger("halka.agent")

# After a stage's last step, before anything is measured: more than the time between its news.
QUIET_S, QUIET_MAX_S = 1.5, 30.0
ANNOUNCE_S = 10.0  # between repetitions: what is told while a link breaks and is back may be lost


class Agent:
    """Everything that this peer is. `spawn` starts a task in the daemon's TaskGroup."""

    def __init__(
        self,
        config: Config,
        identity: Identity,
        store: Store,
        profile: Profile,
        spawn: Spawn,
    ) -> None:
        self.config, self.store, self._spawn = config, store, spawn
        self.me = identity.peer_id
        self.cluster = Cluster(config, identity, self)
        self.profiles: dict[str, Profile] = {self.me: profile}
        self.offers: dict[str, Sequence[ModelOffer]] = {self.me: ()}
        self.reports: dict[tuple[str, PlanId], Report] = {}  # as heard, or told by the coordinator
        self.lost_peers: dict[str, tuple[str, str, float]] = {}  # name, why, when
        self.duty = d.Duty(self.me, config.timing.publish_s, config.islands == "auto")
        self.rollout = r.Rollout(self.me, config.timing)
        self.heard: Plans | None = None
        self.store_trouble = ""  # why the store cannot be read, while it cannot
        self.unusable: dict[str, str] = {}  # why a model of the store cannot be offered, by digest
        self.refused_engines: dict[str, str] = {}  # why engines are not used, by backend
        self.supervisor = Supervisor(self._stage_told, self._stage_exited)
        self.entry = Entry(
            identity.public.encode(), identity.secret.encode(), _patience(config.timing)
        )
        self.serving = Serving(
            self.duty, self.entry, store, self._present_offers, self._waiting, spawn
        )
        self.measuring = Measuring(config, self, profile, lambda: self.supervisor.holds)
        self._announced = -math.inf  # when everybody was last told what is here
        self._steps, self._stepping = 0, Lull(QUIET_S, QUIET_MAX_S)  # of this peer's stages
        self._questions: asyncio.Queue[Question] = asyncio.Queue()
        self._turns = Turns()
        self._duty_alarm = Alarm(lambda: self._duty(d.Tick()))
        self._rollout_alarm = Alarm(lambda: self._rollout(r.Tick()))
        self.fetching = Fetching(config, store, self.cluster, self.offers, self._fetched, spawn)
        self.hops = Hops(self.cluster, self.supervisor, self._stage_exited)
        self.sparing = Sparing(config, store, Host(
            self.me, self._occupied, self.duty.serving, lambda: self.profiles[self.me],
            self.measuring.change, self.offers, self.cluster.broadcast, self.fetching.parts,
        ))  # fmt: skip

    # From the cluster -------------------------------------------------------------------------

    def joined(self, peer_id: str) -> None:
        """A peer is a member now."""
        self.lost_peers.pop(peer_id, None)
        self.hops.met(peer_id)
        self._out_of_reach(*(p for p in self.profiles[self.me].unreachable if p != peer_id))
        self.cluster.send(peer_id, self._announcement())
        self._admit()
        self._duty(d.MemberJoined(peer_id))
        self._members()

    def lost(self, peer_id: str, why: str, heard_by: str = "") -> None:
        """A peer is a member no longer. heard_by: one that still hears it, "" where none does."""
        # What it told is kept: should it come back without having noticed, it will not tell again.
        profile = self.profiles.get(peer_id)
        self.lost_peers[peer_id] = (profile.name if profile else peer_id, why, time.monotonic())
        for forgotten in list(self.lost_peers)[:-PEERS_MAX]:
            del self.lost_peers[forgotten]
            self.profiles.pop(forgotten, None)
            self.offers.pop(forgotten, None)
        self._admit()
        if heard_by:  # told before anything that follows from it
            self._out_of_reach(*self.profiles[self.me].unreachable, peer_id)
        self._duty(d.MemberLost(peer_id, why, heard_by))
        self._members()

    def _out_of_reach(self, *peers: str) -> None:
        """Tell the coordinator which peers others hear and this one does not."""
        self.measuring.change(unreachable=tuple(sorted(set(peers)))[-PEERS_MAX:])

    def elected(self, coordinator: str, term: int) -> None:
        """Another peer, or this one, coordinates."""
        if coordinator == self.me:
            self._members()
            known = self.heard.states if self.heard else ()
            self._rollout(r.Elected(term, known))
        else:
            self._rollout(r.Deposed())
            for part in self.duty.parts.values():
                if part.mine:  # the new one has not heard of it
                    self._tell(part.report)

    def received(self, peer_id: str, message: Control) -> None:
        """A message from a member."""
        match message:
            case Announce(profile, models):
                known = self.profiles.get(peer_id), self.offers.get(peer_id)
                if profile.peer_id == peer_id and known != (profile, models):
                    self.profiles[peer_id], self.offers[peer_id] = profile, models
                    self._members()
            case Plans():
                if peer_id == self.cluster.coordinator:
                    self.reports = {(t.peer_id, t.report.plan): t.report for t in message.reports}
                    self._hear(message)
            case Report():
                self._reported(peer_id, message)
            case Outlook():
                if peer_id == self.cluster.coordinator:
                    self.sparing.heard(message)
            case ManifestWanted() | ChunkWanted():
                self._spawn(self._answer(peer_id, message), f"answer to {peer_id}")
            case _:
                log.debug("dropped=%s from=%s", type(message).__name__, peer_id)

    def busy(self) -> bool:
        """Whether this peer computes or loads, or serves an answer: nothing is measured then."""
        loads = any(
            part.report.phase in ("fetching", "loading") or part.report.active
            for part in self.duty.parts.values()
            if part.mine and not part.dead
        )
        return loads or not self._stepping.is_over(time.monotonic()) or self.entry.running > 0

    def _occupied(self) -> bool:
        """Whether this peer, or the ring as was told last, has something to do that cannot wait."""
        answers = any(report.active for report in self.reports.values())
        return answers or self.fetching.running or self.busy()

    def linked(self, link: Link) -> None:
        """A link was measured."""
        self.measuring.linked(link)

    def wanted(self) -> Sequence[ModelShape]:
        """The models whose speeds the coordinator wants, or will."""
        digests = set(self.heard.measure) if self.heard else set()
        offered = {offer.shape.digest: offer.shape for offer in self._present_offers()}
        wanted = {mine.digest: mine for mine in [self.rollout.wanted] if mine}
        return [*(wanted | {d: s for d, s in offered.items() if d in digests}).values()]

    def _waiting(self) -> str:
        """For whom a first plan waits, in words, or ""."""
        if (model := self.rollout.wanted) is None:
            return ""
        here = (self.profiles.get(peer_id) for peer_id in (self.me, *self.cluster.members))
        late = {p.name: 0 for p in here if p and p.engines and not measured(p, model)}
        return f"{', '.join(late)}: measuring how fast {model.model} runs there" if late else ""

    async def header(self, shape: ModelShape) -> Path:
        """The folder of a model of the cluster, once head.gguf is in it."""
        return await self.fetching.header(shape)

    def _announcement(self) -> Announce:
        return Announce(self.profiles[self.me], tuple(self.offers[self.me])[:64])

    def announce(self, offers: Sequence[ModelOffer]) -> None:
        """The store was looked at: tell everybody what is in it, and again from time to time."""
        if list(offers) != list(self.offers[self.me]):
            self.offers[self.me] = tuple(offers)
            self._announced = -math.inf
            self._members()
        if (now := time.monotonic()) >= self._announced + ANNOUNCE_S:
            self._announced = now
            self.cluster.broadcast(self._announcement())

    def introduce(self, profile: Profile) -> None:
        """This machine can do something else than before: tell everybody."""
        self.profiles[self.me] = self.measuring.profile = profile
        self.cluster.broadcast(self._announcement())
        self._members()

    def _present_offers(self) -> Iterable[ModelOffer]:
        for peer_id in (self.me, *self.cluster.members):
            yield from self.offers.get(peer_id, ())

    def _members(self) -> None:
        present = frozenset({self.me, *self.cluster.members})
        self._rollout(r.Members(present, dict(self.profiles), dict(self.offers)))

    def _admit(self) -> None:
        self.supervisor.admit(self._keys())

    def _keys(self) -> tuple[str, ...]:
        """Keys of all agents that may submit answers to a stage of this peer."""
        keys = (self.cluster.key_of(peer_id) for peer_id in (self.me, *self.cluster.members))
        return tuple(key for key in keys if key)

    async def _answer(self, peer_id: str, message: ManifestWanted | ChunkWanted) -> None:
        self.cluster.send(peer_id, await asyncio.to_thread(transfer.answer, self.store, message))

    # The machines -----------------------------------------------------------------------------

    def _duty(self, event: d.Event) -> None:
        def turn() -> None:
            for action in self.duty.step(event, time.monotonic()):
                self._perform(action)
            self._duty_alarm.set(self.duty.deadline)

        self._turns.take(turn)

    def _rollout(self, event: r.Event) -> None:
        def turn() -> None:
            for action in self.rollout.step(event, time.monotonic()):
                match action:
                    case r.Publish(plans):
                        self.cluster.broadcast(plans)
                        self._hear(plans)
                    case r.Note(text):
                        log.info("role=coordinator term=%d %s", self.cluster.term, text)
                    case r.Solve(question):
                        self._questions.put_nowait(question)
                        self.sparing.planned(question)
            self._rollout_alarm.set(self.rollout.deadline)
            self.sparing.watch(event, self.rollout.states)

        self._turns.take(turn)

    def _hear(self, plans: Plans) -> None:
        self.heard = plans
        self._duty(d.Heard(plans))

    def _tell(self, report: Report) -> None:
        if self.cluster.coordinator == self.me:
            self._reported(self.me, report)
        elif self.cluster.coordinator:
            self.cluster.send(self.cluster.coordinator, report)

    def _reported(self, peer_id: str, report: Report) -> None:
        live = {state.plan.id for state in self.rollout.states}
        self.reports = {k: v for k, v in self.reports.items() if k[1] in live}
        self.reports[peer_id, report.plan] = report
        self._rollout(r.Reported(peer_id, report))

    def _perform(self, action: d.Action) -> None:
        match action:
            case d.Fetch(plan, parts):
                self.fetching.begin(plan, parts)
            case d.StartStage(state):
                self._spawn(self._start(state.plan), f"start of plan {state.plan.id}")
            case d.ConnectStage(plan_id):
                self._spawn(self.hops.connect(action), f"links of plan {plan_id}")
            case d.StopStage(plan_id):
                self.hops.over(plan_id)
                self.fetching.end(plan_id)
                self.supervisor.stop(plan_id)
            case d.Tell(report):
                self._tell(report)
            case d.Serve(None):
                self.entry.serve(None)
                self.serving.serve(None)
            case d.Serve(plan, link) if plan and link:
                host = self.hops.host_of(plan.head)
                self.entry.open(plan.id, f"tcp://{host}:{link.submit_port}", link.key)
                self.entry.serve(Offer(plan.id, plan.shape.digest, plan.split.context))
                self.serving.serve(plan)
                log.info("serving=%s plan=%s head=%s", plan.shape.model, plan.id, plan.head)
            case d.EndPlan(plan_id, why):
                log.info("ended=plan plan=%s because=%s", plan_id, why)
                self.entry.end(plan_id, self.named(why))
            case d.GoOver(plan_id):
                self.entry.go_over(plan_id)
            case d.Underway(digest):
                self.entry.underway(digest)

    def named(self, text: str) -> str:
        """Peer ids in a reason, replaced by names that people know."""
        for peer_id, profile in self.profiles.items():
            text = text.replace(f"peer {peer_id}", f"peer {profile.name}")
        for peer_id, (name, _, _) in self.lost_peers.items():
            text = text.replace(f"peer {peer_id}", f"peer {name}")
        return text

    # Parts and stages -------------------------------------------------------------------------

    def _fetched(self, event: d.Event) -> None:
        self._duty(event)
        if isinstance(event, d.Fetched) and not event.why and event.plan in self.duty.parts:
            self.serving.learn(self.duty.parts[event.plan].state.plan)

    async def _start(self, plan: Plan) -> None:
        await self.supervisor.cleared()
        part = self.duty.parts.get(plan.id)
        if part is None or part.dead:
            return
        try:
            await self.supervisor.start(
                part.state,
                self.me,
                self.store.folder(plan.shape.digest),
                threads=self.config.threads or physical_cores(),
                step_s=self.config.timing.step_s,
                bind="127.0.0.1" if set(self.config.interfaces) == {"127.0.0.1"} else "*",
                admitted=self._keys(),
                draft=self.fetching.draft_of(plan.id),
                weights=self.config.weights,
            )
        except OSError as error:
            self._duty(d.Exited(plan.id, f"its process could not be started: {error.strerror}"))
            return
        part = self.duty.parts.get(plan.id)
        if part is None or part.dead:  # it ended while its process began
            self.supervisor.stop(plan.id)
        self._admit()  # whoever joined meanwhile

    def _stage_told(self, plan: PlanId, news: StageNews) -> None:
        if news.steps != self._steps:
            self._steps = news.steps
            self._stepping.goes_on(time.monotonic())
        self._duty(d.Told(plan, news))
        part = self.duty.parts.get(plan)
        if news.timed and part and not part.dead:
            self.measuring.corrected(part.state.plan, news.timed)

    async def plan(self) -> None:
        """Answer the coordinator's questions in a thread, the last one only, until cancelled."""
        while True:
            question = await self._questions.get()
            while not self._questions.empty():
                question = self._questions.get_nowait()
            self._rollout(r.Solved(await asyncio.to_thread(answer, question)))

    def _stage_exited(self, plan: PlanId, why: str) -> None:
        self._duty(d.Exited(plan, why))

    async def close(self, why: str) -> None:
        """Leave the cluster, end stages, answers and words."""
        self.fetching.close()
        self.sparing.close()
        self._duty_alarm.set(None)
        self._rollout_alarm.set(None)
        await self.cluster.close(why)
        await self.entry.close()
        await self.supervisor.close()
        await self.serving.close()


def _patience(timing: Timing) -> Patience:
    """How long answers wait for heads and plans."""
    return Patience(timing.step_s + 10, timing.wait_s, timing.load_s)
