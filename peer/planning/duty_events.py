"""What a peer's own part in plans hears of and what it asks for. Values; see `duty`."""

from __future__ import annotations

from dataclasses import dataclass

from peer.planning.plan import Plan, PlanId, PlanState, StageLink
from peer.protocol import Plans, Report, StageNews


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
    """Tell the stage where the next one is, and by which key the previous one comes. island: the
    stages that compute each layer together with it, by rank, itself among them."""

    plan: PlanId
    next: StageLink
    previous_key: str
    island: tuple[StageLink, ...] = ()


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
    """The plan is over, for this reason: answers on it wait for another one."""

    plan: PlanId
    why: str


@dataclass(frozen=True, slots=True)
class GoOver:
    """Answers on this plan are to go on on the one that serves, before this one ends."""

    plan: PlanId


@dataclass(frozen=True, slots=True)
class Underway:
    """A plan that will serve this model is being made ready."""

    digest: str


Action = Fetch | StartStage | ConnectStage | StopStage | Tell | Serve | EndPlan | GoOver | Underway
