"""A peer's own part in the plans that the coordinator publishes. Pure.

Plans come whole and again and again; what is to be done is the difference to what was heard
before. The same machine runs on every peer, in the ring or not: every peer wants head.gguf, a link
to the head of the plan that serves, and to know at once when a plan is over.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from peer.planning.plan import Plan, PlanId, PlanState, StageLink, StagePhase, check
from peer.protocol import Plans, Report, StageNews

STAGES_MAX = 4  # at once on a peer: one that serves, one that is to come, two that drain


@dataclass(frozen=True, slots=True)
class Heard:
    """The coordinator's state."""

    plans: Plans


@dataclass(frozen=True, slots=True)
class Fetching:
    """Parts are on their way."""

    plan: PlanId
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Fetched:
    """All parts that were asked for are here; or, with a reason, they cannot be had."""

    plan: PlanId
    why: str = ""


@dataclass(frozen=True, slots=True)
class Told:
    """News from this peer's stage of the plan."""

    plan: PlanId
    news: StageNews


@dataclass(frozen=True, slots=True)
class Exited:
    """This peer's stage of the plan has ended by itself."""

    plan: PlanId
    why: str


@dataclass(frozen=True, slots=True)
class MemberJoined:
    """A peer is in reach from here."""

    peer_id: str


@dataclass(frozen=True, slots=True)
class MemberLost:
    """A peer is out of reach from here. heard_by: one that still hears it, "" where none does."""

    peer_id: str
    why: str
    heard_by: str = ""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed."""


Event = Heard | Fetching | Fetched | Told | Exited | MemberJoined | MemberLost | Tick


@dataclass(frozen=True, slots=True)
class Fetch:
    """Get these parts of the plan's model."""

    plan: Plan
    parts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StartStage:
    """Start this peer's stage."""

    state: PlanState


@dataclass(frozen=True, slots=True)
class ConnectStage:
    """Tell the stage where the next one is, and by which key the previous one comes."""

    plan: PlanId
    next: StageLink
    previous_key: str


@dataclass(frozen=True, slots=True)
class StopStage:
    """End this peer's fetching and its stage of the plan, as far as they exist."""

    plan: PlanId


@dataclass(frozen=True, slots=True)
class Tell:
    """To the coordinator."""

    report: Report


@dataclass(frozen=True, slots=True)
class Serve:
    """New answers go to this plan's head; link None: to nobody."""

    plan: Plan | None
    link: StageLink | None = None


@dataclass(frozen=True, slots=True)
class EndPlan:
    """Answers on this plan end here, with this reason, where any are left."""

    plan: PlanId
    why: str


Action = Fetch | StartStage | ConnectStage | StopStage | Tell | Serve | EndPlan


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
    """The machine. peer_id: this peer's."""

    peer_id: str
    publish_s: float
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
            case MemberLost(peer_id, why):
                actions = self._lost(peer_id, why)
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
        for plan_id in [p for p in self.parts if p not in listed]:
            part = self.parts.pop(plan_id)
            if not part.dead:
                actions += [EndPlan(plan_id, self._end_of(part, plans)), StopStage(plan_id)]
        for plan_id, state in listed.items():
            part_or_none = self.parts.get(plan_id)
            if part_or_none is None:
                actions += self._begin(state)
            elif part_or_none.state.plan == state.plan:
                part_or_none.state = state
        for part in self.parts.values():
            actions += self._link(part)
        return actions + self._serve()

    def _begin(self, state: PlanState) -> list[Action]:
        plan = state.plan
        mine = self.peer_id in plan.ring
        part = self.parts[plan.id] = Part(state, mine, Report(plan.id, "fetching"))
        if wrong := check(plan):
            part.dead = f"the plan cannot be: {wrong}"
            return self._failed(plan.id, part.dead)
        for peer_id in plan.ring:
            self._gone.pop(peer_id, None)  # it is back
        wanted = {"head": None}
        for index in plan.windows_of(self.peer_id):
            window = plan.split.windows[index]
            wanted.update(dict.fromkeys(plan.shape.window_parts(window.first, window.last)))
        return [Fetch(plan, tuple(wanted))]

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
        )
        # Counts are told with the next repetition, except the end of the last answer: a plan that
        # drains may go then.
        urgent = before.phase != news.phase or (before.active > 0) != (news.active > 0)
        return [*([Tell(part.report)] if urgent else []), *self._link(part)]

    def _failed(self, plan: PlanId, why: str, of_another: bool = False) -> list[Action]:
        part = self.parts.get(plan)
        if part is None:
            return []
        part.dead = part.dead or why
        if part.mine and not of_another:
            self.trouble = why
        part.of_another = of_another and not part.mine
        actions: list[Action] = [self._report(part, "failed", why)] if part.mine else []
        return [*actions, EndPlan(plan, why), StopStage(plan), *self._serve()]

    def _joined(self, peer_id: str) -> list[Action]:
        self._here.add(peer_id)
        # A plan that was over only because this peer was out of reach from here begins anew when
        # it is heard of again; had the others lost it, too, the coordinator would not list it.
        for plan_id, part in list(self.parts.items()):
            if part.of_another and self._here.issuperset(part.state.plan.ring):
                del self.parts[plan_id]
        return [action for part in self.parts.values() for action in self._link(part)] + (
            self._serve()
        )

    def _lost(self, peer_id: str, why: str) -> list[Action]:
        self._here.discard(peer_id)
        self._gone[peer_id] = why
        actions: list[Action] = []
        for plan_id, part in self.parts.items():
            if peer_id in part.state.plan.ring and not part.dead:
                lost = f"peer {peer_id} was lost: {why}"
                actions += self._failed(plan_id, lost, of_another=True)
        return actions

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
            or set(links) != set(plan.ring)
            or not self._reaches(plan.after(self.peer_id))
        ):
            return []
        part.connected = True
        ring = plan.ring
        previous = ring[ring.index(self.peer_id) - 1]
        return [ConnectStage(plan.id, links[plan.after(self.peer_id)], links[previous].key)]

    def _serve(self) -> list[Action]:
        """Follow the newest plan that serves; open it for answers when it changes."""
        candidates = [
            part
            for part in self.parts.values()
            if part.state.phase == "serving"
            and not part.dead
            and {link.peer_id for link in part.state.links}.issuperset(part.state.plan.ring)
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
        for peer_id in part.state.plan.ring:
            if peer_id in self._gone:
                return f"peer {peer_id} was lost: {self._gone[peer_id]}"
        if part.state.phase == "draining":
            return "the plan was replaced, and this answer did not end in the time that was left"
        newer = [state.why for state in plans.states if state.plan.id > part.state.plan.id]
        return next((why for why in newer if why), "") or plans.why_none or "the plan was replaced"
