"""What the coordinator's machine hears and what it asks for. Values; see `rollout`."""

from __future__ import annotations

from dataclasses import dataclass

from peer.planning.making import Answer, Members, Question
from peer.planning.plan import PlanState
from peer.protocol import Plans, Report


@dataclass(frozen=True, slots=True)
class Reported:
    """A peer's report on its part of a plan."""

    peer_id: str
    report: Report


@dataclass(frozen=True, slots=True)
class Elected:
    """This peer coordinates now. known: the plans last heard from whoever did before."""

    term: int
    known: tuple[PlanState, ...] = ()


@dataclass(frozen=True, slots=True)
class Deposed:
    """Another peer coordinates."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed."""


@dataclass(frozen=True, slots=True)
class Solved:
    """What the planner answered to a Solve."""

    answer: Answer


Event = Members | Reported | Elected | Deposed | Solved | Tick


@dataclass(frozen=True, slots=True)
class Publish:
    """Tell every peer, this one too."""

    plans: Plans


@dataclass(frozen=True, slots=True)
class Note:
    """A line for the log: what was decided, and why."""

    text: str


@dataclass(frozen=True, slots=True)
class Solve:
    """Ask the planner, where nothing waits for it, and bring its answer. Only the last counts."""

    question: Question


Action = Publish | Note | Solve
