"""What a plan is made of: who is here, with what, and who is done without. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from peer.errors import NoPlan, ProtocolError
from peer.planning.plan import LeftOut, Plan, PlanId, PlanState, check
from peer.planning.profile import ModelOffer, ModelShape, Profile
from peer.planning.split import solve
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

    def nature(self, peer_id: str) -> tuple[object, frozenset[str]]:
        """What a peer is, and which models it has; what changes by itself (free memory, parts) is
        not in it."""
        profile = self.profiles.get(peer_id)
        if profile is None or peer_id not in self.present:
            return None, frozenset()
        engines = [(e.backend, e.device, e.kind, e.memory_total_bytes) for e in profile.engines]
        offered = frozenset(offer.shape.digest for offer in self.offers.get(peer_id, ()))
        lasting = replace(
            profile, memory_available_bytes=0, disk_free_bytes=0, engines=(), model_wanted=""
        )
        return (lasting, engines), offered

    def wishes(self, me: str) -> tuple[dict[str, Sequence[ModelOffer]], str]:
        """What a choice depends on: the offers of those who are here, and this peer's setting."""
        profile = self.profiles.get(me)
        offers = {p: offers for p, offers in self.offers.items() if p in self.present}
        return offers, profile.model_wanted if profile else ""


def basis(members: Members, barred: Mapping[str, str]) -> object:
    """What a plan is made of, but for the model and for what changes by itself."""
    return [members.nature(p.peer_id)[0] for p in members.here if p.peer_id not in barred]


def make(
    plan_id: PlanId,
    me: str,
    members: Members,
    shape: ModelShape,
    barred: Mapping[str, str],
    order: Sequence[str],
) -> Plan | str:
    """A plan for this model that every peer can decode, or why there can be none.

    barred: peers that it does without, each with the reason. order: see `solve`.
    """
    able = [profile for profile in members.here if profile.peer_id not in barred]
    excuses = "; ".join(barred.values())
    if barred and not able:
        return excuses
    mine = members.profiles.get(me)
    try:
        split = solve(
            able,
            shape,
            context_wanted=mine.context_wanted if mine else 0,
            spread_all=any(profile.spread_all for profile in able),
            order=order,
        )
    except NoPlan as error:
        return f"{error}" + (f". {excuses}" if excuses else "")
    out = tuple(LeftOut(p, why) for p, why in barred.items() if p in members.present)
    plan = Plan(plan_id, me, shape, replace(split, left_out=split.left_out + out))
    wrong = check(plan) or _untellable(plan)
    return f"no plan for {shape.model}: {wrong}" if wrong else plan


def _untellable(plan: Plan) -> str:
    """Why other peers could not decode a plan, or ""."""
    try:
        decode_control(encode(Plans(0, (PlanState(plan, "loading"),))))
    except ProtocolError as error:
        return str(error)
    return ""
