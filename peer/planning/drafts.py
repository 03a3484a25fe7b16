"""Which model drafts for the one that is served, and whether the head has room for it. Pure.

A draft model guesses tokens that the ring then verifies. Peers wish for one by its id; the plan
names it by its digest, and the head alone holds it, whole. A wish that cannot be fulfilled is said
in the plan's reasons and changes nothing else: a draft never fails a plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec.structs import replace

from peer.models import tokenizers
from peer.planning import costs, reasons
from peer.planning.choice import choose
from peer.planning.costs import Size
from peer.planning.plan import Split
from peer.planning.profile import PLAIN_ENGINE, ModelOffer, ModelShape, Profile

SLOTS = 4  # answers that it follows at once; of more, those that were guessed for last
CELLS_MAX = 8192  # tokens of KV cache, for all of them
BATCH_TOKENS = 64  # rows of a step: it reads a little at a time, so that the ring never waits long

Offers = Mapping[str, Sequence[ModelOffer]]
"""By peer id, of the peers that are here."""


def cells(kv_cells: int, context: int) -> int:
    """Tokens of KV cache that a draft model gets. context: that it was trained for, 0: unknown."""
    return max(1, min(CELLS_MAX, kv_cells, context or CELLS_MAX))


def wishes(profiles: Sequence[Profile]) -> tuple[str, ...]:
    """The models that peers name by the setting `draft`."""
    return tuple(sorted({p.draft_wanted for p in profiles if p.draft_wanted}))


def not_first(offers: Offers, profiles: Sequence[Profile]) -> dict[str, Sequence[ModelOffer]]:
    """The offers, with the models that are to draft as if they were pulled long ago: pulling one
    after the model that it is to draft for does not make it the one that is served."""
    named = wishes(profiles)
    return {
        peer_id: [replace(o, pulled_s=0.0) if o.shape.model in named else o for o in offered]
        if named
        else offered
        for peer_id, offered in offers.items()
    }


def situation(profiles: Sequence[Profile], offers: Offers, lost: bool) -> object:
    """What a plan's draft depends on. lost: answers wait for a ring that broke."""
    if not (named := wishes(profiles)):
        return ()
    draft, why = _wished(named, offers)
    return named, draft.digest if draft else why, lost


def with_draft(
    split: Split, shape: ModelShape, profiles: Sequence[Profile], offers: Offers, lost: bool
) -> Split:
    """The split with the model that drafts, where one is wished for; why there is none is among
    its reasons. lost: answers wait, so nothing may be fetched before they go on."""
    named = wishes(profiles)
    if not named or split.speculation == "off":
        return split
    draft, why = _wished(named, offers)
    if draft is not None and not (why := _refusal(split, shape, draft, profiles, offers, lost)):
        return _because(replace(split, draft=draft.digest), f"{draft.model} drafts for it")
    return _because(split, why)


def gain(now: Split, made: Split, profiles: Sequence[Profile]) -> str:
    """Why a plan is replaced for the sake of its draft model, or "". What the one of now holds in
    memory is no longer free, so that another one has no room is no reason."""
    if made.draft and made.draft != now.draft:
        return "a model drafts for it" if not now.draft else "another model drafts for it"
    if now.draft and (not wishes(profiles) or made.speculation == "off"):
        return "no model is to draft for it any more"
    return ""


def _because(split: Split, why: str) -> Split:
    return replace(split, why=f"{split.why}; {why}"[:1000])


def _wished(named: Sequence[str], offers: Offers) -> tuple[ModelShape | None, str]:
    """The first of these models that is whole among the peers; or why there is none."""
    for model in named:
        if shapes := choose(offers, model, "").shapes:
            return shapes[0], ""
    known = {offer.shape.model for offered in offers.values() for offer in offered}
    if named[0] in known:
        return None, f"{named[0]} cannot draft: some of its parts are on no peer here"
    return None, (
        f"the setting `draft` names {named[0]}, which no peer here has: pull it, or choose one of "
        "halka models"
    )


def _refusal(
    split: Split,
    shape: ModelShape,
    draft: ModelShape,
    profiles: Sequence[Profile],
    offers: Offers,
    lost: bool,
) -> str:
    """Why the model does not draft, or ""."""
    if draft.digest == shape.digest:
        return f"{draft.model} cannot draft for itself: name a smaller model in the setting `draft`"
    if not tokenizers.same(shape.tokenizer, draft.tokenizer):
        return (
            f"{draft.model} cannot draft: its tokenizer is not that of {shape.model}; name a model "
            "of the same family in the setting `draft`"
        )
    head_id = split.windows[0].peer_id
    head = next((p for p in profiles if p.peer_id == head_id), None)
    if head is None:
        return f"{draft.model} does not draft: nothing is known of the head's memory"
    held = next((o for o in offers.get(head_id, ()) if o.shape.digest == draft.digest), None)
    if lost and (held is None or len(held.parts) < len(draft.window_parts(0, draft.layers))):
        return f"{draft.model} drafts once {head.name} has it: answers do not wait for that"
    free, needed = _free_bytes(split, shape, profiles, head), _bytes(draft, split, head)
    if needed > free:
        return (
            f"{draft.model} does not draft: it needs {reasons.mib(needed)}, and {head.name}, the "
            f"head, has {reasons.mib(free)} left beside its layers"
        )
    return ""


def _bytes(draft: ModelShape, split: Split, head: Profile) -> int:
    """What the whole model takes in the head's memory: weights, KV cache, scratch. On the stage's
    own engine, or the plain one where that cannot run it."""
    room = cells(split.kv_cells, draft.context)
    size = Size(room, room, BATCH_TOKENS)
    backend = draft.runner((split.windows[0].backend, PLAIN_ENGINE), head.weights)
    held = draft.in_memory(backend, head.weights)
    weights = draft.head_bytes + held.window_bytes(0, draft.layers)
    scratch = costs.compute_bytes(draft, size) + costs.logits_bytes(draft, size)
    return weights + room * sum(draft.layer_kv_bytes) + scratch


def _free_bytes(split: Split, shape: ModelShape, profiles: Sequence[Profile], head: Profile) -> int:
    """What the head has left beside its windows, where the draft model is to be: on the GPU with
    them, or in the machine's memory."""
    forecast = costs.forecast(profiles, shape, split)
    part = (
        next((p for p in forecast.peers if p.peer_id == head.peer_id), None) if forecast else None
    )
    if part is None or part.streamed_bytes:
        return 0
    able = costs.of_split(profiles, shape, split).peers
    has = next(each for each in able if each.peer_id == head.peer_id)
    ranks = 1 + len(split.windows[0].island)  # an island's is of all its peers together
    if split.windows[0].gpu_layers and has.gpu:
        left = has.gpu_bytes - part.gpu_bytes
        left = min(left, has.ram_bytes - part.memory_bytes) if has.unified else left
        return max(0, left // ranks)
    return max(0, (has.ram_bytes - part.memory_bytes) // ranks)
