"""Which model is served: the one that a setting names, else the one pulled last. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from peer.planning.profile import ModelOffer, ModelShape

NO_MODEL = "no model yet: halka pull smollm2"


@dataclass(frozen=True, slots=True)
class Choice:
    """The model to serve, or why there is none."""

    shape: ModelShape | None
    why: str = ""


@dataclass(slots=True)
class _Known:
    """What all peers together hold of one model."""

    shape: ModelShape
    pulled_s: float
    held: set[str]

    @property
    def missing(self) -> list[str]:
        return [p for p in self.shape.window_parts(0, self.shape.layers) if p not in self.held]


def choose(offers: Mapping[str, Sequence[ModelOffer]], model_wanted: str) -> Choice:
    """The model to serve, given the offers of all peers that are here.

    Only a model whose parts all exist somewhere among them can be. Of two models of one name the
    later one counts; equal times are told apart by name and digest, so that all who ask agree.
    """
    known: dict[str, _Known] = {}
    for peer_id in sorted(offers):
        for offer in offers[peer_id]:
            shape = offer.shape
            if not shape.layers or {len(shape.layer_bytes), len(shape.layer_kv_bytes)} != {
                shape.layers
            }:
                continue  # contradicts itself; its peer cannot have it from a whole header
            model = known.setdefault(shape.digest, _Known(shape, offer.pulled_s, set()))
            model.pulled_s = max(model.pulled_s, offer.pulled_s)
            model.held.update(offer.parts)
    models = sorted(
        known.values(), key=lambda m: (m.pulled_s, m.shape.model, m.shape.digest), reverse=True
    )
    if model_wanted:
        models = [m for m in models if m.shape.model == model_wanted]
        if not models:
            return Choice(
                None,
                f"the setting `model` names {model_wanted}, which no peer here has: see halka "
                "models, then pull it or change the setting",
            )
    if not models:
        return Choice(None, NO_MODEL)
    whole = next((m for m in models if not m.missing), None)
    if whole is not None:
        return Choice(whole.shape)
    first = models[0]
    some = ", ".join(first.missing[:3]) + (", …" if len(first.missing) > 3 else "")
    return Choice(
        None,
        f"{len(first.missing)} parts of {first.shape.model} are on no peer here ({some}): start "
        "the peer that it was pulled on, or pull it again",
    )
