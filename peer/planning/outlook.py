"""What each peer's loss would mean for the model that is served, and which spare parts prevent the
worst of it. Pure.

For each peer of the ring, the plan is made that the coordinator would make without it: the same
planner, the same wishes, as near to the plan that serves. What that plan's peers lack would have to
be fetched before an answer goes on; what nobody else holds is the end of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from peer.planning import costs, reasons
from peer.planning.kv import sized
from peer.planning.making import Members, Question, able, make
from peer.planning.plan import Plan
from peer.planning.profile import PEERS_MAX, ModelOffer, ModelShape
from peer.planning.spares import Assigned, Holding, assign, own_parts, total_bytes
from peer.planning.split import BATCH_TOKENS, CONTEXT_LEAST
from peer.planning.wishes import Wishes
from peer.protocol import Loss, Outlook, Spare

PEERS_SOLVED = 9  # with more to plan with, once for each of a ring takes too long


@dataclass(frozen=True, slots=True)
class Standing:
    """What a coordinator knows when it looks ahead.

    plan: the one that serves. barred, shaky: peers that plans for its model do without, or where
    they can, each with the reason. asked: who was to hold which spare parts until now.
    """

    term: int
    me: str
    members: Members
    plan: Plan
    barred: Mapping[str, str]
    shaky: Mapping[str, str]
    asked: tuple[Spare, ...] = ()


def outlook(standing: Standing) -> Outlook:
    """What is foreseen for each loss, and who is to hold what. Takes up to a second."""
    return _Outlook(standing).told()


@dataclass(frozen=True, slots=True)
class _Fallback:
    """What goes on without a peer: the parts that each of the others needs, or why nothing can."""

    needs: Mapping[str, frozenset[str]]
    why: str = ""


class _Outlook:
    """One call of `outlook`."""

    def __init__(self, standing: Standing) -> None:
        self._of, self._plan = standing, standing.plan
        members, digest = standing.members, standing.plan.shape.digest
        self._present = sorted(members.present)[:PEERS_MAX]
        told = {
            peer_id: frozenset(part for offer in members.offers.get(peer_id, ())
                               if offer.shape.digest == digest for part in offer.parts)
            for peer_id in self._present
        }  # fmt: skip
        # What serves is there, whether its owner has told so yet or not.
        self._held = {p: parts | own_parts(self._plan, p) for p, parts in told.items()}
        asked = standing.asked
        self._asked = {s.peer_id: frozenset(s.parts) for s in asked if s.digest == digest}
        going = {*standing.shaky, *members.leaving}
        self._steady = [p for p in self._present if p not in going]

    def told(self) -> Outlook:
        """The answer."""
        ring = [peer_id for peer_id in self._plan.peers if peer_id in self._held]
        fallbacks = {peer_id: self._without(peer_id) for peer_id in ring}
        assigned = self._assigned(fallbacks)
        losses = []
        for peer_id in self._present:
            fallback = fallbacks.get(peer_id)
            # One that is not in the ring disturbs nobody: all that serves is elsewhere.
            losses.append(
                self._loss(peer_id, fallback, assigned) if fallback else Loss(peer_id, "fine")
            )
        digest = self._plan.shape.digest
        spares = tuple(Spare(p, digest, parts) for p, parts in sorted(assigned.parts.items()))
        return Outlook(self._of.term, tuple(losses), spares)

    def _without(self, lost: str) -> _Fallback:
        """What the coordinator of then would do."""
        rest = frozenset(self._present) - {lost}
        if not rest:
            return _Fallback({}, "no other peer is here")
        question = self._question(lost, rest)
        if len(able(question, self._plan.shape)) > PEERS_SOLVED:
            return self._neighbours(question, lost)
        made = make(question, self._plan.shape)
        if isinstance(made, str):
            return _Fallback({}, made)
        return _Fallback({p: own_parts(made, p) for p in made.peers})

    def _question(self, lost: str, rest: frozenset[str]) -> Question:
        of, members, digest = self._of, self._of.members, self._plan.shape.digest

        def kept(reasons: Mapping[str, str]) -> dict[str, str]:
            return {peer_id: why for peer_id, why in reasons.items() if peer_id in rest}

        return Question(
            number=0,
            plan_id=self._plan.id,
            me=of.me if of.me in rest else max(rest),  # as an election would have it
            members=Members(
                rest,
                {p: profile for p, profile in members.profiles.items() if p in rest},
                {p: self._offers(p) for p in members.offers if p in rest},
            ),
            shapes=(self._plan.shape,),
            barred={digest: kept(of.barred)},
            current=(),
            shaky=kept(of.shaky),
            before=self._plan,
        )

    def _offers(self, peer_id: str) -> Sequence[ModelOffer]:
        """With the spare parts that are on their way: a plan that reckons with them does not change
        with each that arrives, and with it what everybody is to hold."""
        asked = self._asked.get(peer_id, frozenset())
        return [
            replace(offer, parts=tuple(sorted(asked.union(offer.parts))))
            if offer.shape.digest == self._plan.shape.digest
            else offer
            for offer in self._of.members.offers[peer_id]
        ]

    def _neighbours(self, question: Question, lost: str) -> _Fallback:
        """In a large home: each window of the lost one goes to those before and after it, half and
        half; whether there is memory for that is only reckoned for all of them together."""
        windows = self._plan.split.windows
        shape = sized(self._plan.shape, self._plan.split.kv_type)
        profiles = able(question, shape)
        of = costs.problem(profiles, shape, costs.Size(CONTEXT_LEAST, CONTEXT_LEAST, BATCH_TOKENS))
        rooms = [max(0, peer.memory_bytes - of.compute_bytes) for peer in of.peers]
        kv = CONTEXT_LEAST * sum(shape.layer_kv_bytes)
        if sum(rooms) < shape.window_bytes(0, shape.layers) + of.logits_bytes + kv:
            return _Fallback({}, reasons.missing(profiles, shape, of.size, Wishes()))
        needs = {p: set(own_parts(self._plan, p)) for p in self._plan.peers if p != lost}
        others = sorted(needs) or [max(of.peers, key=lambda a: (a.memory_bytes, a.peer_id)).peer_id]
        for at, window in enumerate(windows):
            if window.peer_id != lost:
                continue
            before = next((w.peer_id for w in windows[at::-1] if w.peer_id != lost), "")
            after = next((w.peer_id for w in windows[at:] if w.peer_id != lost), "")
            middle = (window.first + window.last) // 2
            first_half, second_half = before or after or others[0], after or before or others[0]
            for peer_id, a, b in (
                (first_half, window.first, middle),
                (second_half, middle, window.last),
            ):
                if a < b:
                    needs.setdefault(peer_id, set()).update(shape.window_parts(a, b))
        return _Fallback({p: frozenset(parts) for p, parts in needs.items()})

    def _assigned(self, fallbacks: Mapping[str, _Fallback]) -> Assigned:
        profiles = self._of.members.profiles
        return assign(
            Holding(
                plan=self._plan,
                peers=self._steady,
                held=self._held,
                spare_bytes={p: profiles[p].spare_bytes for p in self._steady if p in profiles},
                asked=self._asked,
                needed={
                    lost: {p: parts - own_parts(self._plan, p) for p, parts in f.needs.items()}
                    for lost, f in fallbacks.items()
                    if not f.why
                },
            )
        )

    def _loss(self, lost: str, fallback: _Fallback, assigned: Assigned) -> Loss:
        if fallback.why:
            return Loss(lost, "none", why=fallback.why[:1000])
        givers = [p for p in self._steady if p != lost]
        elsewhere = frozenset().union(*(self._held[p] for p in givers))
        lacking = {p: parts - self._held[p] for p, parts in fallback.needs.items()}
        nowhere = frozenset().union(*lacking.values()) - elsewhere
        shape = self._plan.shape
        if nowhere:
            why = _nowhere(shape, nowhere, nowhere & assigned.single)
            return Loss(lost, "none", why=why[:1000])
        fetched = sum(total_bytes(shape, parts) for parts in lacking.values())
        if any(lacking.values()):
            return Loss(lost, "fetch", fetch_bytes=fetched)
        return Loss(lost, "fine")


def _nowhere(shape: ModelShape, parts: Collection[str], homeless: Collection[str]) -> str:
    """Parts that would be gone, in words; of those that no other peer offers room for, how to."""
    text = f"{reasons.count(len(parts), 'part')} of {shape.model} "
    text += f"({reasons.mib(total_bytes(shape, parts))}) {'is' if len(parts) == 1 else 'are'}"
    text += " nowhere else"
    if not homeless:
        return text
    room = reasons.mib(total_bytes(shape, homeless))
    return (
        f"{text}, and no other peer has room to spare for {room} of that: free some of its disk, "
        "or set `spare` there"
    )
