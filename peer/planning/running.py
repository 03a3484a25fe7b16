"""One plan of the coordinator's and how far its peers are with it. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from msgspec.structs import replace

from peer.config import Timing
from peer.planning.plan import TERM_MAX, Phase, Plan, PlanState, Split, StageLink, check
from peer.planning.profile import ModelShape, is_key
from peer.protocol import Report

HURRY_S = 0.5  # for every entry peer to hear that its answers are to go over
NUMBER_MAX = TERM_MAX - 1_000_000  # of another's plan; so many of its own a coordinator can make


@dataclass(slots=True)
class Running:
    """A plan and what is known of its progress. since: when its phase began."""

    state: PlanState
    since: float
    reports: dict[str, Report] = field(default_factory=dict)
    moved: dict[str, float] = field(default_factory=dict)  # when each peer last came further

    @property
    def plan(self) -> Plan:
        """The plan itself."""
        return self.state.plan

    @property
    def serves(self) -> bool:
        """New answers go to it."""
        return self.state.phase == "serving"

    def enter(self, phase: Phase, now: float) -> None:
        """Begin a phase; linking tells where every stage listens."""
        links = self.state.links
        if phase == "linking":
            links = tuple(_link(p, self.reports[p]) for p in self.plan.peers)
        self.state, self.since = replace(self.state, phase=phase, links=links), now

    def hurry(self) -> None:
        """Its answers go over to the plan that serves: somebody in its ring wants to go away."""
        self.state = replace(self.state, hurry=True)

    def rests(self, timing: Timing, now: float) -> bool:
        """Whether it drains, every entry peer has heard so, and no answer is left."""
        heard_s = HURRY_S if self.state.hurry else timing.publish_s
        head = self.reports.get(self.plan.head)
        return (
            self.state.phase == "draining"
            and head is not None
            and head.active == 0
            and now - self.since >= heard_s
        )

    def take(self, peer_id: str, report: Report, now: float) -> None:
        """Note a report, and whether it shows progress."""
        before = self.reports.get(peer_id)
        self.reports[peer_id] = report
        if not before or before.phase != report.phase or before.done_bytes < report.done_bytes:
            self.moved[peer_id] = now

    def all_reached(self, *phases: str) -> bool:
        """Whether every peer that takes part is in one of these phases."""
        return all(self.reached(peer_id) in phases for peer_id in self.plan.peers)

    def reached(self, peer_id: str) -> str:
        """The phase that a peer last reported, "" before its first report."""
        report = self.reports.get(peer_id)
        return report.phase if report else ""

    def limits(self, timing: Timing) -> Iterator[tuple[float, str]]:
        """When patience ends with a peer ("": with all of them). Fetching may take long, but it
        has to go on: the time for a stage to load begins again with every bit of progress."""
        match self.state.phase:
            case "loading":
                for peer_id in self.plan.peers:
                    if self.reached(peer_id) not in ("ready", "linked"):
                        yield self.moved.get(peer_id, self.since) + timing.load_s, peer_id
            case "linking":
                islands = len(self.plan.peers) > len(self.plan.ring)  # they load when they met
                for peer_id in self.plan.peers:
                    if self.reached(peer_id) != "linked":
                        limit_s = timing.load_s if islands else timing.step_s
                        yield self.since + limit_s, peer_id
            case "draining":
                hurries = self.state.hurry and self.rests(timing, math.inf)
                yield self.since + (HURRY_S if hurries else timing.drain_s), ""

    def fault(self, peer_id: str, report: Report) -> str:
        """Why a report ends the plan, or ""."""
        if report.phase == "failed":
            return report.why or "it gave no reason"
        told = report.phase in ("ready", "linked")
        if told and not report.ring_port:
            return "it says that it is ready, and not where it listens"
        if told and not is_key(report.key):
            return "it says that it is ready, and the key that it tells is none"
        if told and peer_id == self.plan.head and not report.submit_port:
            return "it says that it is ready, and not where answers are submitted"
        if told and self.plan.island_of(peer_id) and not report.island_port:
            return "it says that it is ready, and not where its island is to meet it"
        if self.state.phase == "loading":
            return ""
        if not told or _link(peer_id, report) not in self.state.links:
            return "it had to start again"
        return ""


def adoptable(state: PlanState, term: int, present: frozenset[str]) -> bool:
    """Whether a coordinator of this term, with these peers here, can go on with another's plan:
    one that serves, is sound, and whose number leaves room for those to come."""
    plan = state.plan
    return (
        state.phase in ("serving", "draining")
        and plan.id.term <= min(term, NUMBER_MAX)
        and plan.id.number <= NUMBER_MAX
        and not check(plan)
        and present.issuperset(plan.peers)
        and tuple(link.peer_id for link in state.links) == plan.peers
        and state.links[0].submit_port > 0
    )


def is_same(plan: Plan, shape: ModelShape, split: Split) -> bool:
    """Whether this plan's windows and settings are the split's, for the same model, context and KV
    cache."""

    def windows(of: Split) -> list[object]:
        return [(w.peer_id, w.island, w.first, w.last, w.backend, w.gpu_layers) for w in of.windows]

    def settings(of: Split) -> tuple[str, ...]:
        return of.kv_type, of.flash, of.speculation

    return (
        plan.shape == shape
        and (plan.split.context, plan.split.kv_cells) == (split.context, split.kv_cells)
        and windows(plan.split) == windows(split)
        and plan.split.draft == split.draft
        and settings(plan.split) == settings(split)
    )


def _link(peer_id: str, report: Report) -> StageLink:
    return StageLink(peer_id, report.ring_port, report.key, report.submit_port, report.island_port)
