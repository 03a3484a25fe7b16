"""Which plan there is to be: who is here, with what, and whether it is worth a change. Pure.

The coordinator asks a `Question` and goes on with its work; `answer` takes up to a second of a
core in a large cluster, so it is called where nothing waits for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from msgspec.structs import replace

from peer.errors import NoPlan, ProtocolError
from peer.planning import costs, drafts, reasons, together, trust
from peer.planning.plan import Forecast, LeftOut, Plan, PlanId, PlanState, Split, check
from peer.planning.profile import ModelOffer, ModelShape, Profile
from peer.planning.wishes import Wishes
from peer.protocol import Plans, decode_control, encode


@dataclass(frozen=True, slots=True)
class Members:
    """Who is here (this peer among them), and what they told of themselves so far."""

    present: frozenset[str]
    profiles: Mapping[str, Profile]
    offers: Mapping[str, Sequence[ModelOffer]]

    @property
    def here(self) -> list[Profile]:
        """The profiles of those who are here, by peer id."""
        return [self.profiles[p] for p in sorted(self.present) if p in self.profiles]

    @property
    def leaving(self) -> frozenset[str]:
        """Those who are here and go away as soon as others have taken over."""
        return frozenset(profile.peer_id for profile in self.here if profile.leaving)

    def nature(self, peer_id: str) -> tuple[object, frozenset[str]]:
        """What a peer is, and which models it has; what changes by itself (free memory, parts) is
        not in it."""
        profile = self.profiles.get(peer_id)
        if profile is None or peer_id not in self.present:
            return None, frozenset()
        engines = [(e.backend, e.device, e.kind, e.memory_total_bytes) for e in profile.engines]
        offered = frozenset(offer.shape.digest for offer in self.offers.get(peer_id, ()))
        lasting = replace(
            profile,
            memory_available_bytes=0,
            disk_free_bytes=0,
            engines=(),
            model_wanted="",
            draft_wanted="",
            speeds=(),
            unmeasured=(),
            links=(),
            disk_read_bytes_per_s=0.0,
            leaving=False,
            unreachable=(),
            spare_bytes=0,
        )
        return (lasting, engines), offered

    def wishes(self, me: str) -> tuple[dict[str, Sequence[ModelOffer]], str]:
        """What a choice depends on: the offers of those who are here, and this peer's setting."""
        profile = self.profiles.get(me)
        offers = drafts.not_first(self.offers_here, self.here)
        return offers, profile.model_wanted if profile else ""

    @property
    def offers_here(self) -> dict[str, Sequence[ModelOffer]]:
        """The offers of those who are here."""
        return {p: offers for p, offers in self.offers.items() if p in self.present}


def measured(profile: Profile, shape: ModelShape) -> bool:
    """Whether a peer knows how fast its engine runs a model, or that it cannot be known."""
    cannot = shape.digest in profile.unmeasured or not profile.engine_for(shape)
    return cannot or profile.has_speed(shape)


def pace(profile: Profile, digest: str) -> object:
    """How fast a peer and its links are, so coarsely that only a change that could be worth another
    plan changes it: speeds to a quarter, links to a half."""
    speeds = [
        (s.backend, s.kind, _coarse(sum(s.decode_s) * s.correction, 3))
        for s in profile.speeds
        if s.digest == digest
    ]
    links = [(x.peer_id, _coarse(x.rtt_s, 1), _coarse(x.bytes_per_s, 1)) for x in profile.links]
    return sorted(speeds), sorted(links), digest in profile.unmeasured


def _coarse(value: float, steps: int) -> int:
    """The number of steps of doubling, so many to each."""
    return round(math.log2(value) * steps) if value > 0 else -1000


WORTH = 0.15  # a plan that serves is replaced by one whose tokens take so much less time


@dataclass(frozen=True, slots=True)
class Question:
    """What a plan depends on. number: of the question, to know its answer by. shapes: the models to
    try, in order. barred: by digest, peers that a plan does without, each with the reason. current:
    plans of now, the newest first. shaky: peers that a plan does without where it can, each with
    the reason; one of them that is in a plan of now is no reason to give that up. before: the plan
    that served until one of its peers was lost: of it, as much as can stays where it is, and with
    the same context where there is room for it. It counts for the first of the shapes only.

    Peers whose profiles say that they are leaving are in no new plan.
    """

    number: int
    plan_id: PlanId
    me: str
    members: Members
    shapes: tuple[ModelShape, ...]
    barred: Mapping[str, Mapping[str, str]]
    current: tuple[Plan, ...]
    shaky: Mapping[str, str] = field(default_factory=dict)
    before: Plan | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """plan: the one to serve, None: there can be none. kept: it is one of now. whys: by digest,
    why models before it cannot be served; of the plan's own model, why there is no plan without a
    peer of its ring that is leaving, as long as that one stays. gain: why it replaces another one,
    in words."""

    number: int
    plan: Plan | None
    kept: bool = False
    whys: Mapping[str, str] = field(default_factory=dict)
    gain: str = ""


def answer(question: Question) -> Answer:
    """Serve the first model that can be; by the plan of now, unless another is worth a change."""
    whys: dict[str, str] = {}
    for shape in question.shapes:
        made = make(question, shape)
        now = next((plan for plan in question.current if plan.shape == shape), None)
        if isinstance(made, str):
            whys[shape.digest] = made
            if now and (leaving := _only_leaves(question, now)):
                whys[shape.digest] = f"{shape.model} cannot be served without {leaving}: {made}"
                return Answer(question.number, now, True, whys)
            continue
        if now is None:
            return Answer(question.number, made, False, whys)
        if gain := _gain(question, now, made):
            return Answer(question.number, made, False, whys, gain)
        return Answer(question.number, now, True, whys)
    return Answer(question.number, None, False, whys)


def without(question: Question, shape: ModelShape) -> dict[str, str]:
    """Peers that a plan for this model is made without, each with the reason."""
    here = question.members.here
    leaving = {p.peer_id: f"{p.name} is going away" for p in here if p.leaving}
    return leaving | dict(question.barred.get(shape.digest, {}))


def able(question: Question, shape: ModelShape) -> list[Profile]:
    """Those that a plan for this model may be made with."""
    barred = without(question, shape)
    return [profile for profile in question.members.here if profile.peer_id not in barred]


def make(question: Question, shape: ModelShape) -> Plan | str:
    """The best plan for this model that every peer can decode, or why there can be none. Without
    shaky peers, if that can be."""
    barred = without(question, shape)
    profiles = question.members.profiles
    shaky = {  # a reason that stays is told before one that goes by
        p: (p in profiles and profiles[p].why_not(shape)) or why
        for p, why in question.shaky.items()
        if p in question.members.present
    }
    made = _make(question, shape, shaky | barred)
    return _make(question, shape, barred) if isinstance(made, str) and shaky else made


def _make(question: Question, shape: ModelShape, barred: Mapping[str, str]) -> Plan | str:
    members, excuses = question.members, "; ".join(barred.values())
    profiles = [profile for profile in members.here if profile.peer_id not in barred]
    if barred and not profiles:
        return excuses
    try:
        split = together.solve(profiles, shape, _wishes(question, profiles, shape))
    except NoPlan as error:
        return f"{error}" + (f". {excuses}" if excuses else "")
    out = tuple(LeftOut(p, why) for p, why in barred.items() if p in members.present)
    split = replace(split, left_out=split.left_out + out)
    lost = question.before is not None
    split = drafts.with_draft(split, shape, members.here, members.offers_here, lost)
    plan = Plan(question.plan_id, question.me, shape, split)
    wrong = check(plan) or _untellable(plan)
    return f"no plan for {shape.model}: {wrong}" if wrong else plan


def _wishes(question: Question, profiles: Sequence[Profile], shape: ModelShape) -> Wishes:
    """This peer's settings, and what is here already."""
    mine, before = question.members.profiles.get(question.me), _before(question, shape)
    held = {
        peer_id: frozenset(offer.parts)
        for peer_id, offers in question.members.offers.items()
        for offer in offers
        if offer.shape.digest == shape.digest
    }
    return Wishes(
        context=mine.context_wanted if mine else 0,
        spread_all=any(profile.spread_all for profile in profiles),
        objective=mine.objective if mine else "latency",
        kv_type=mine.kv_type if mine else "f16",
        flash=mine.flash if mine else "auto",
        speculation=mine.speculation if mine else "auto",
        order=question.current[0].ring if question.current else before.ring if before else (),
        held=held,
        before=before.split if before else None,
        unheard=_unheard(question.members),
    )


def _before(question: Question, shape: ModelShape) -> Plan | None:
    """The plan that a new one for this model is to be like: one that lost a peer, or has to."""
    lost = question.before
    if lost and question.shapes[0] == shape == lost.shape:
        return lost
    now = next((plan for plan in question.current if plan.shape == shape), None)
    profiles = able(question, shape)
    here = {profile.peer_id for profile in profiles}
    ends = now is not None and (not here.issuperset(now.peers) or _broken(profiles, now))
    return now if ends else None


def _unheard(members: Members) -> dict[str, int]:
    """How many of those who are here do not reach each peer, or it them; nobody else is in it."""
    here = members.here
    counts = {a.peer_id: sum(a is not b and costs.cut_off(a, b) for b in here) for a in here}
    return {peer_id: count for peer_id, count in counts.items() if count}


def _only_leaves(question: Question, now: Plan) -> str:
    """The peers that go away from the ring of a plan with which nothing else is wrong, or ""."""
    members = question.members
    barred = question.barred.get(now.shape.digest, {})
    here = members.present & members.profiles.keys()
    ring = [members.profiles[p] for p in now.peers if p in here]
    leaving = [profile.name for profile in ring if profile.leaving]
    wrong = any(trust.fault(p) or p.peer_id in barred for p in ring) or _broken(ring, now)
    if not leaving or wrong or len(ring) < len(now.peers):
        return ""
    return (
        " and ".join(leaving)
        + (", which is" if len(leaving) == 1 else ", which are")
        + (" going away")
    )


def _broken(profiles: Sequence[Profile], plan: Plan) -> str:
    """Which neighbours of its ring, or island, do not reach each other, in words, or ""."""
    named = {profile.peer_id: profile for profile in reasons.told_apart(profiles)}
    meet = [(w.peer_id, each) for w in plan.split.windows for each in w.island]
    for a, b in (*pairwise((*plan.ring, plan.head)), *meet):
        if a in named and b in named and costs.cut_off(named[a], named[b]):
            return f"{named[a].name} and {named[b].name} do not reach each other any more"
    return ""


def _gain(question: Question, now: Plan, made: Plan) -> str:
    """Why a plan is worth to replace the one of now, or ""."""
    profiles = able(question, now.shape)
    here = {profile.peer_id for profile in profiles}
    if gone := [peer_id for peer_id in now.peers if peer_id not in here]:
        away = next((p.name for p in question.members.here if p.leaving and p.peer_id in gone), "")
        return f"{away} goes away" if away else f"peer {gone[0]} is done without"
    if wrong := next((p for p in profiles if p.peer_id in now.peers and trust.fault(p)), None):
        return trust.fault(wrong)
    if apart := _broken(profiles, now):
        return apart
    if any(profile.spread_all for profile in profiles) and set(made.peers) > set(now.peers):
        return "every peer takes part"
    mine = question.members.profiles.get(question.me)
    wanted = min(mine.context_wanted if mine else 0, now.shape.context or math.inf)
    if wanted and made.split.context == wanted != now.split.context:
        return f"{wanted} tokens of context, as is set"
    if asked := _as_set(now.split, made.split):
        return asked
    if drafted := drafts.gain(now.split, made.split, question.members.here):
        return drafted
    before, after = as_it_runs(profiles, now), costs.forecast(profiles, made.shape, made.split)
    if before is None:
        return "the plan of now does not fit any more"
    if after is None:
        return ""
    objective = mine.objective if mine else "latency"
    old_s, new_s = (f.cost_s(objective) for f in (before, after))
    if new_s <= old_s * (1 - WORTH):
        what = "a token of many answers" if objective == "throughput" else "a token"
        return f"{what} in {new_s * 1e3:.3g} ms instead of {old_s * 1e3:.3g} ms"
    if made.split.context >= 2 * now.split.context and new_s <= old_s * (1 + WORTH):
        return f"room for {made.split.context} tokens of context"
    return ""


def _as_set(now: Split, made: Split) -> str:
    """Which setting of this peer a plan follows that the one of now does not, in words, or ""."""
    if made.kv_type != now.kv_type:
        return f"a KV cache of {made.kv_type}, as is set"
    if made.flash != now.flash:
        return f"flash attention {made.flash}, as is set"
    if made.speculation != now.speculation:
        return f"speculation {made.speculation}, as is set"
    return ""


def as_it_runs(profiles: Sequence[Profile], plan: Plan) -> Forecast | None:
    """The forecast of a plan that is loaded already: what its peers have free now is what they have
    besides, so their memory is not asked for; only what is read from disk depends on it."""
    if not any(window.streamed_bytes for window in plan.split.windows):
        profiles = [_roomy(p) if p.peer_id in plan.peers else p for p in profiles]
    return costs.forecast(profiles, plan.shape, plan.split)


def _roomy(profile: Profile) -> Profile:
    engines = tuple(
        replace(e, memory_free_bytes=_PLENTY) if e.memory_free_bytes else e for e in profile.engines
    )
    return replace(profile, memory_available_bytes=_PLENTY, engines=engines)


_PLENTY = 1 << 50  # bytes: more than any plan needs


def _untellable(plan: Plan) -> str:
    """Why other peers could not decode a plan, or ""."""
    try:
        decode_control(encode(Plans(0, (PlanState(plan, "loading"),))))
    except ProtocolError as error:
        return str(error)
    return ""
