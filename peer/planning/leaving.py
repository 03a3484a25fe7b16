"""When a peer that wishes to go away may go. Pure.

It tells everybody that it is leaving; the coordinator then plans without it, and the answers on the
old plan go over to the new one. The peer waits for that, for as long as its reason to go allows,
and does not wait in vain: where nobody can take over, only answers that run are waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from peer.config import Timing
from peer.planning.plan import PlanId, PlanState
from peer.protocol import Report

Reason = Literal["stop", "leave", "sleep"]
"""stop: a signal ended the agent · leave: `halka leave` · sleep: the machine is about to sleep."""

Phase = Literal["asking", "loading", "draining", "answers", "alone"]
"""asking: nobody has begun to take over · loading: others load a plan without this peer · draining:
the answers on its plan go over · answers: its own clients' answers end · alone: nobody takes over,
and what runs is waited for."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """How long a reason to go may wait.

    within_s: in all; where `moves`, since others last came further. patience_s: for anybody to
    begin to take over. answers: whether answers of its own clients are waited for, and new ones
    refused; they need not be before sleep: whoever asks here sleeps, too, and the answers go on
    afterwards.
    """

    within_s: float
    patience_s: float
    answers: bool = True
    moves: bool = False


def bounds(timing: Timing) -> Mapping[Reason, Bounds]:
    """Of each reason to go."""
    return {
        "stop": Bounds(timing.leave_s, timing.leave_quiet_s),
        # A planner of 64 peers takes five seconds, and whoever typed this is not in that hurry.
        "leave": Bounds(timing.load_s, 4 * timing.leave_quiet_s, moves=True),
        "sleep": Bounds(timing.sleep_s, timing.leave_quiet_s, answers=False),
    }


@dataclass(frozen=True, slots=True)
class Scene:
    """What a peer that goes away would leave behind.

    stays: peers that could take over. held: plans that serve or drain with a stage of this peer;
    taking: the newest one without it that loads, links or serves. running: answers of its own
    clients. passing: answers that its ring computes, whoever asked. moved: changes whenever those
    who take over come further. why_none: the coordinator's word on why there is no other plan.
    """

    stays: bool = False
    held: tuple[PlanId, ...] = ()
    taking: PlanState | None = None
    running: int = 0
    passing: int = 0
    moved: object = None
    why_none: str = ""


def scene(
    peer_id: str,
    states: Iterable[PlanState],
    report_of: Callable[[str, PlanId], Report | None],
    stays: Collection[str],
    running: int,
    why_none: str,
) -> Scene:
    """What there is to leave. states: the plans of now, less those that are over for this peer.
    report_of: what a peer last said of a plan. stays: the others that are not leaving."""
    held, others = [], []
    for state in states:
        if peer_id not in state.plan.peers and state.phase != "draining":
            others.append(state)
        elif peer_id in state.plan.peers and state.phase in ("serving", "draining"):
            held.append(state)
    taking = max(others, key=lambda state: state.plan.id, default=None)
    heads = [report_of(state.plan.head, state.plan.id) for state in held]
    theirs = [report_of(p, taking.plan.id) for p in taking.plan.peers] if taking else []
    moved = (
        (taking.plan.id, taking.phase, sum(r.done_bytes for r in theirs if r)) if taking else None
    )
    return Scene(
        bool(stays),
        tuple(state.plan.id for state in held),
        taking,
        running,
        sum(report.active for report in heads if report),
        (moved, len(held)),
        why_none,
    )


@dataclass(frozen=True, slots=True)
class Wished:
    """There is a reason to go."""

    reason: Reason


@dataclass(frozen=True, slots=True)
class Stayed:
    """The reason is gone: taken back, or the machine woke up."""

    reason: Reason


@dataclass(frozen=True, slots=True)
class Saw:
    """How things are."""

    scene: Scene


Event = Wished | Stayed | Saw


@dataclass(frozen=True, slots=True)
class Tell:
    """Everybody is to know whether this peer is leaving."""

    leaving: bool


@dataclass(frozen=True, slots=True)
class Over:
    """For this reason nothing is waited for any more. why: what is left behind, "" nothing."""

    reason: Reason
    why: str = ""


Action = Tell | Over


@dataclass(slots=True)
class _Way:
    """How far one reason to go is."""

    since: float  # it began, or others last came further
    alone_at: float  # nobody has begun to take over until then: nobody does
    why_before: str  # what the coordinator said before it was told
    over: bool = False


class Leaving:
    """The machine. One for a peer's lifetime."""

    def __init__(self, timing: Timing) -> None:
        self._bounds = bounds(timing)
        self._ways: dict[Reason, _Way] = {}
        self.scene = Scene()  # as last seen

    @property
    def wishes(self) -> tuple[Reason, ...]:
        """The reasons to go that there are."""
        return tuple(self._ways)

    @property
    def refuses(self) -> bool:
        """Whether new answers have to be asked for elsewhere."""
        return any(self._bounds[reason].answers for reason in self._ways)

    def step(self, event: Event, now: float) -> list[Action]:
        """Take one event in; what is to be done comes out."""
        actions: list[Action] = []
        match event:
            case Wished(reason) if reason not in self._ways:
                actions = [] if self._ways else [Tell(True)]
                alone_at = now + self._bounds[reason].patience_s
                self._ways[reason] = _Way(now, alone_at, self.scene.why_none)
            case Wished():
                pass
            case Stayed(reason):
                known = self._ways.pop(reason, None)
                return [Tell(False)] if known and not self._ways else []
            case Saw(scene):
                self._see(scene, now)
        for reason, way in self._ways.items():
            if not way.over and (over := self._judged(reason, way, now)):
                way.over = True
                actions.append(over)
        return actions

    def phase(self, reason: Reason, now: float) -> Phase:
        """What is waited for."""
        scene = self.scene
        if not scene.held:
            return "answers"
        if scene.taking:
            return "draining" if scene.taking.phase == "serving" else "loading"
        way = self._ways.get(reason)
        return "alone" if way and self._is_alone(way, now) else "asking"

    def _see(self, scene: Scene, now: float) -> None:
        for reason, way in self._ways.items():
            if scene.taking or not scene.held:
                way.alone_at = now + self._bounds[reason].patience_s
            if self._bounds[reason].moves and scene.moved != self.scene.moved:
                way.since = now
        self.scene = scene

    def _is_alone(self, way: _Way, now: float) -> bool:
        """Whether nobody is going to take over what this peer holds."""
        scene = self.scene
        answered = scene.why_none not in ("", way.why_before)
        return not scene.taking and (not scene.stays or answered or now >= way.alone_at)

    def _judged(self, reason: Reason, way: _Way, now: float) -> Over | None:
        scene, allowed = self.scene, self._bounds[reason]
        alone = bool(scene.held) and self._is_alone(way, now)
        running = scene.running if allowed.answers else 0
        if alone and allowed.answers:
            running = max(running, scene.passing)
        if not running and (alone or not scene.held):
            return Over(reason, self._why_alone() if alone and scene.stays else "")
        if now < way.since + allowed.within_s:
            return None
        return Over(reason, f"after {allowed.within_s:g} s {self._left(running)}")

    def _why_alone(self) -> str:
        why = self.scene.why_none
        return f"nobody can take over: {why}" if why else "nobody takes over"

    def _left(self, running: int) -> str:
        """What is left behind when time is up."""
        if self.scene.held and self.scene.taking and self.scene.taking.phase != "serving":
            return "the others were not ready yet to take over"
        if running:
            return f"{running} answer{'s' * (running != 1)} still ran"
        return "the answers had not all gone over yet"
