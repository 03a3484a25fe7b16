"""A peer's own part in the plans that the coordinator publishes. Pure.

Plans come whole and again and again; what is to be done is the difference to what was heard
before. The same machine runs on every peer, in the ring or not: every peer wants head.gguf, a link
to the head of the plan that serves, and to know at once when a plan is over.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from peer.planning.duty_events import Action as Action
from peer.planning.duty_events import ConnectStage as ConnectStage
from peer.planning.duty_events import EndPlan as EndPlan
from peer.planning.duty_events import Event as Event
from peer.planning.duty_events import Exited as Exited
from peer.planning.duty_events import Fetch as Fetch
from peer.planning.duty_events import Fetched as Fetched
from peer.planning.duty_events import Fetching as Fetching
from peer.planning.duty_events import GoOver as GoOver
from peer.planning.duty_events import Heard as Heard
from peer.planning.duty_events import MemberJoined as MemberJoined
from peer.planning.duty_events import MemberLost as MemberLost
from peer.planning.duty_events import Serve as Serve
from peer.planning.duty_events import StartStage as StartStage
from peer.planning.duty_events import StopStage as StopStage
from peer.planning.duty_events import Tell as Tell
from peer.planning.duty_events import Tick as Tick
from peer.planning.duty_events import Told as Told
from peer.planning.duty_events import Underway as Underway
from peer.planning.plan import STAGES_MAX, Plan, PlanId, PlanState, StagePhase, check
from peer.protocol import Plans, Report, StageNews


@dataclass(slots=True)
class Part:
    """What this peer does for one plan. fetched: its parts are here."""

    state: PlanState
    mine: bool
    report: Report
    fetched: bool = False
    started: bool = False
    connected: bool = False
    again: bool = False  # head.gguf could not be had; ask again
    dead: str = ""  # why it is over for this peer, though the coordinator still lists it
    of_another: bool = False  # dead because a peer of the ring was lost, and this one is not in it


@dataclass(slots=True)
class Duty:
    """The machine. peer_id: this peer's. islands: whether it computes layers together with others,
    by its own setting: what they send each other is not encrypted."""

    peer_id: str
    publish_s: float
    islands: bool = False
    parts: dict[PlanId, Part] = field(default_factory=dict)
    why_none: str = ""  # the coordinator's word on why nothing is served
    trouble: str = ""  # why this peer's own part of a plan failed last, until one succeeds
    deadline: float | None = None
    _serving: PlanId | None = None
    _here: set[str] = field(default_factory=set)  # peers in reach; the coordinator may reach more
    _gone: dict[str, str] = field(default_factory=dict)  # why peers were lost, for plans' ends

    def step(self, event: Event, now: float) -> list[Action]:
        """Take one event in; what is to be done comes out."""
        match event:
            case Heard(plans):
                actions = self._heard(plans)
            case Fetching(plan, done, total):
                return self._fetching(plan, done, total)
            case Fetched(plan, why):
                actions = self._fetched(plan, why)
            case Told(plan, news):
                actions = self._told(plan, news)
            case Exited(plan, why):
                actions = self._failed(plan, why)
            case MemberJoined(peer_id):
                actions = self._joined(peer_id)
            case MemberLost(peer_id, why, heard_by):
                actions = self._lost(peer_id, why, heard_by)
            case Tick():
                actions = []
                if self.deadline is not None and now >= self.deadline:
                    self.deadline = None
                    actions = self._repeat()
        if self.deadline is None and any(p.mine or p.again for p in self.parts.values()):
            self.deadline = now + self.publish_s
        return actions

    def serving(self) -> PlanState | None:
        """The plan that new answers go to."""
        part = self.parts.get(self._serving) if self._serving else None
        return part.state if part else None

    def _repeat(self) -> list[Action]:
        actions: list[Action] = []
        for part in self.parts.values():
            if part.mine:
                actions.append(Tell(part.report))
            elif part.again:
                part.again = False
                actions.append(Fetch(part.state.plan, ("head",)))
        return actions

    def _heard(self, plans: Plans) -> list[Action]:
        self.why_none = plans.why_none
        actions: list[Action] = []
        listed = {state.plan.id: state for state in plans.states}
        for plan_id, part in list(self.parts.items()):
            # Two coordinators that could not hear each other may have used the same number: what
            # was heard of the one is not the other's plan.
            if plan_id in listed and listed[plan_id].plan == part.state.plan:
                continue
            del self.parts[plan_id]
            if not part.dead:
                actions += [EndPlan(plan_id, self._end_of(part, plans)), StopStage(plan_id)]
            if plan_id in listed and plan_id == self._serving:
                self._serving = None
                actions.append(Serve(None))
        for plan_id, state in listed.items():
            known = self.parts.get(plan_id)
            if known is None:
                actions += self._begin(state)
            else:
                known.state = state
        for part in self.parts.values():
            actions += self._link(part)
        return actions + self._serve() + self._ways(plans)

    def _ways(self, plans: Plans) -> list[Action]:
        """Where answers that wait, or that run on a plan that others want to leave, may go."""
        coming = [state for state in plans.states if state.phase in ("loading", "linking")]
        digests = dict.fromkeys(state.plan.shape.digest for state in coming)
        return [
            *(Underway(digest) for digest in digests),
            *(GoOver(s.plan.id) for s in plans.states if s.phase == "draining" and s.hurry),
        ]

    def _begin(self, state: PlanState) -> list[Action]:
        plan = state.plan
        mine = self.peer_id in plan.peers
        part = self.parts[plan.id] = Part(state, mine, Report(plan.id, "fetching"))
        if wrong := check(plan) or self._unwanted(plan):
            part.dead = f"the plan cannot be: {wrong}"
            return self._failed(plan.id, part.dead)
        for peer_id in plan.peers:
            self._gone.pop(peer_id, None)  # it is back
        wanted = {"head": None}
        for index in plan.windows_of(self.peer_id):
            window = plan.split.windows[index]
            wanted.update(dict.fromkeys(plan.shape.window_parts(window.first, window.last)))
        return [Fetch(plan, tuple(wanted))]

    def _unwanted(self, plan: Plan) -> str:
        """What this peer's owner has not allowed, whoever made the plan, or ""."""
        if self.islands or not plan.island_of(self.peer_id):
            return ""
        return "it has this peer in an island, and the setting `islands` is off here"

    def _fetching(self, plan: PlanId, done: int, total: int) -> list[Action]:
        part = self.parts.get(plan)
        if part and part.mine and not part.fetched:
            part.report = msgspec.structs.replace(part.report, done_bytes=done, total_bytes=total)
        return []

    def _fetched(self, plan: PlanId, why: str) -> list[Action]:
        part = self.parts.get(plan)
        if part is None or part.dead:
            return []
        if why and not part.mine:
            part.again = True  # an entry peer loses nothing by waiting
            return []
        if why:
            return self._failed(plan, why)
        part.fetched = True
        if not part.mine or part.started:
            return []
        if sum(p.started and not p.dead for p in self.parts.values()) >= STAGES_MAX:
            return self._failed(plan, f"{STAGES_MAX} stages of earlier plans still run here")
        part.started = True
        return [self._report(part, "loading"), StartStage(part.state)]

    def _told(self, plan: PlanId, news: StageNews) -> list[Action]:
        part = self.parts.get(plan)
        if part is None or not part.started or part.dead:
            return []
        if news.phase == "failed":
            return self._failed(plan, news.why)
        before = part.report
        if news.phase == "linked" and before.phase != "linked":
            self.trouble = ""
        part.report = msgspec.structs.replace(
            part.report,
            phase=news.phase,
            ring_port=news.ring_port,
            submit_port=news.submit_port,
            key=news.key,
            weights_bytes=news.weights_bytes,
            kv_bytes=news.kv_bytes,
            compute_bytes=news.compute_bytes,
            active=news.active,
            timed=news.timed,
            blamed=news.blamed[:16],
            island_port=news.island_port,
        )
        # Counts are told with the next repetition, except the end of the last answer: a plan that
        # drains may go then.
        urgent = (
            before.phase != news.phase
            or (before.active > 0) != (news.active > 0)
            or before.blamed != news.blamed
        )
        return [*([Tell(part.report)] if urgent else []), *self._link(part)]

    def _failed(self, plan: PlanId, why: str, lost: str = "") -> list[Action]:
        """The plan is over for this peer. lost: the peer that was lost, where that is why."""
        part = self.parts.get(plan)
        if part is None:
            return []
        part.dead = part.dead or why
        if part.mine and not lost:
            self.trouble = why
        part.of_another = bool(lost) and not part.mine
        part.report = msgspec.structs.replace(part.report, lost=lost)
        actions: list[Action] = [self._report(part, "failed", why)] if part.mine else []
        return [*actions, EndPlan(plan, why), StopStage(plan), *self._serve()]

    def _joined(self, peer_id: str) -> list[Action]:
        self._here.add(peer_id)
        # A plan that was over only because this peer was out of reach from here begins anew when
        # it is heard of again; had the others lost it, too, the coordinator would not list it.
        for plan_id, part in list(self.parts.items()):
            if part.of_another and part.state.plan.head == peer_id:
                del self.parts[plan_id]
        return [action for part in self.parts.values() for action in self._link(part)] + (
            self._serve()
        )

    def _lost(self, peer_id: str, why: str, heard_by: str) -> list[Action]:
        self._here.discard(peer_id)
        self._gone[peer_id] = why
        actions: list[Action] = []
        for plan_id, part in self.parts.items():
            if not part.dead and self._needs(part, peer_id, alive=bool(heard_by)):
                lost = f"peer {peer_id} was lost: {why}"
                actions += self._failed(plan_id, lost, peer_id)
        return actions

    def _needs(self, part: Part, peer_id: str, *, alive: bool) -> bool:
        """Whether this peer's part of a plan is over without the other one. alive: it is out of
        reach from here only, so what matters is whether this peer itself speaks to it."""
        plan = part.state.plan
        if peer_id not in plan.peers:
            return False
        if not part.mine:
            return peer_id == plan.head  # of the others, the coordinator knows better
        return not alive or peer_id in (
            plan.head,
            plan.before(self.peer_id),
            plan.after(self.peer_id),
            *plan.island_of(self.peer_id),
        )

    def _report(self, part: Part, phase: StagePhase, why: str = "") -> Tell:
        part.report = msgspec.structs.replace(part.report, phase=phase, why=why[:1000])
        return Tell(part.report)

    def _reaches(self, peer_id: str) -> bool:
        return peer_id == self.peer_id or peer_id in self._here

    def _link(self, part: Part) -> list[Action]:
        """Connect the stage once the coordinator has gathered all links and the next peer is in
        reach: the coordinator may have met it earlier than this peer."""
        plan, links = part.state.plan, {link.peer_id: link for link in part.state.links}
        if (
            not part.mine
            or part.dead
            or part.connected
            or part.report.phase not in ("ready", "linked")
            or set(links) != set(plan.peers)
            or not self._reaches(plan.after(self.peer_id))
            or not all(self._reaches(peer_id) for peer_id in plan.island_of(self.peer_id))
        ):
            return []
        part.connected = True
        previous = links[plan.before(self.peer_id)]
        island = tuple(links[peer_id] for peer_id in plan.island_of(self.peer_id))
        return [ConnectStage(plan.id, links[plan.after(self.peer_id)], previous.key, island)]

    def _serve(self) -> list[Action]:
        """Follow the newest plan that serves; open it for answers when it changes."""
        candidates = [
            part
            for part in self.parts.values()
            if part.state.phase == "serving"
            and not part.dead
            and {link.peer_id for link in part.state.links}.issuperset(part.state.plan.peers)
            and self._reaches(part.state.plan.head)
        ]
        chosen = max(candidates, key=lambda part: part.state.plan.id, default=None)
        chosen_id = chosen.state.plan.id if chosen else None
        if chosen_id == self._serving:
            return []
        self._serving = chosen_id
        if chosen is None:
            return [Serve(None)]
        plan = chosen.state.plan
        link = next(link for link in chosen.state.links if link.peer_id == plan.head)
        return [Serve(plan, link)]

    def _end_of(self, part: Part, plans: Plans) -> str:
        """Why a plan that is no longer listed is over, in words for the one who waits."""
        for peer_id in part.state.plan.peers:
            if peer_id in self._gone:
                return f"peer {peer_id} was lost: {self._gone[peer_id]}"
        if part.state.phase == "draining":
            return "the plan was replaced"
        newer = [state.why for state in plans.states if state.plan.id > part.state.plan.id]
        return next((why for why in newer if why), "") or plans.why_none or "the plan was replaced"
