"""Which model is served: the one that a setting names, else the one pulled last. Pure.

Offers are what other peers say, and some may be wrong: a shape that contradicts the others' of the
same model, or that no plan can be made of, does not count, and its peer is named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace

from peer.planning.profile import ModelOffer, ModelShape
from peer.planning.split import unusable

NO_MODEL = "no model yet: halka pull smollm2"
PULLED_MAX_S = 4e9  # since 1970: the year 2096; what says to be later is taken for 0


@dataclass(frozen=True, slots=True)
class Choice:
    """The models that could be served, the one that is wanted first; or why there is none.

    passed_over: why the model pulled last is not among them, in words that follow its name, newest.
    ignored: by peer id, why an offer of it does not count.
    """

    shapes: tuple[ModelShape, ...] = ()
    why: str = ""
    newest: str = ""
    passed_over: str = ""
    ignored: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class _Known:
    """What all peers together hold of one model."""

    shape: ModelShape
    pulled_s: float = 0.0
    held: set[str] = field(default_factory=set)

    def take(self, offer: ModelOffer) -> None:
        """Count a peer's offer of it."""
        if 0 <= offer.pulled_s <= PULLED_MAX_S:
            self.pulled_s = max(self.pulled_s, offer.pulled_s)
        self.held.update(offer.parts)

    @property
    def missing(self) -> list[str]:
        return [p for p in self.shape.window_parts(0, self.shape.layers) if p not in self.held]


def choose(offers: Mapping[str, Sequence[ModelOffer]], model_wanted: str, me: str) -> Choice:
    """The models to serve, given the offers of all peers that are here. me: who chooses.

    Only a model whose parts all exist somewhere among them can be. Of two models of one name the
    later one counts; equal times are told apart by name and digest, so that all who ask agree.
    """
    ignored: dict[str, str] = {}
    known = _known(offers, me, ignored)
    models = sorted(known, key=lambda m: (m.pulled_s, m.shape.model, m.shape.digest), reverse=True)
    if model_wanted:
        models = [m for m in models if m.shape.model == model_wanted]
        if not models:
            return Choice(
                why=f"the setting `model` names {model_wanted}, which no peer here has: see halka "
                "models, then pull it or change the setting",
                ignored=ignored,
            )
    if not models:
        return Choice(why=NO_MODEL, ignored=ignored)
    first, missing = models[0].shape.model, models[0].missing
    whole = tuple(m.shape for m in models if not m.missing)
    if whole:
        why = "some of its parts are on no peer here" if missing else ""
        return Choice(whole, newest=first, passed_over=why, ignored=ignored)
    some = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
    return Choice(
        why=f"{len(missing)} parts of {first} are on no peer here ({some}): start the peer that it "
        "was pulled on, or pull it again",
        ignored=ignored,
    )


def _known(
    offers: Mapping[str, Sequence[ModelOffer]], me: str, ignored: dict[str, str]
) -> list[_Known]:
    """The models that are offered, each in the shape that counts; the rest goes to `ignored`."""
    by_digest: dict[str, dict[str, ModelOffer]] = {}
    for peer_id in sorted(offers):
        for offer in offers[peer_id]:
            model = offer.shape.model
            if why := unusable(offer.shape):
                ignored[peer_id] = f"its offer of {model} does not count: {why}"
            elif by_digest.setdefault(offer.shape.digest, {}).setdefault(peer_id, offer) != offer:
                ignored[peer_id] = f"its offer of {model} does not count: it makes two of them"
    known = []
    for of_model in by_digest.values():
        agreed = _Known(_agreed(of_model, me))
        for peer_id, offer in of_model.items():
            if _alike(offer.shape, agreed.shape):
                agreed.take(offer)
                continue
            who = "this peer does" if me in of_model else "others do"
            ignored[peer_id] = (
                f"its offer of {offer.shape.model} does not count: it describes the model "
                f"{offer.shape.digest[:12]}… otherwise than {who}"
            )
        known.append(agreed)
    return known


def _agreed(of_model: Mapping[str, ModelOffer], me: str) -> ModelShape:
    """The shape of one model that counts: this peer's own, else the one that most peers tell."""
    if me in of_model:
        return of_model[me].shape
    votes: list[tuple[ModelShape, int]] = []
    for offer in of_model.values():
        shape = offer.shape
        at = next((i for i, (told, _) in enumerate(votes) if _alike(told, shape)), len(votes))
        told, votes_before = votes[at] if at < len(votes) else (shape, 0)
        votes[at : at + 1] = [(told if told.fits else shape, votes_before + 1)]
    return max(votes, key=lambda vote: vote[1])[0]


def _alike(a: ModelShape, b: ModelShape) -> bool:
    """Whether two peers describe one model. What its engines can do with it is each one's own word:
    a release that knows another engine is no reason to ignore the parts that a peer holds."""
    return replace(a, fits=()) == replace(b, fits=())
