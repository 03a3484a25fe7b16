"""Plans and shapes for tests, small and valid."""

from __future__ import annotations

import itertools

from peer.planning.plan import Plan, PlanId, PlanState, PlanWindow, Split, StageLink
from peer.planning.profile import ModelShape

PEERS = ("a" * 16, "b" * 16, "c" * 16, "d" * 16, "e" * 16)


def shape(layers: int = 12, hidden: int = 8, **changes: object) -> ModelShape:
    """A model that may be cut anywhere."""
    values: dict[str, object] = {
        "model": "tiny",
        "digest": "0" * 64,
        "architecture": "fake",
        "layers": layers,
        "hidden": hidden,
        "context": 4096,
        "layer_bytes": (1000,) * layers,
        "layer_kv_bytes": (32,) * layers,
        "head_bytes": 500,
        "embed_bytes": 2000,
        "output_bytes": 2000,
        "tied": False,
        "cut_starts": tuple(range(layers)),
    }
    return ModelShape(**(values | changes))  # type: ignore[arg-type]


def plan(
    *bounds: int, term: int = 1, number: int = 1, model: ModelShape | None = None, **changes: object
) -> Plan:
    """A plan with windows between the bounds, one for each of PEERS in order."""
    model = model or shape(layers=bounds[-1] if bounds else 12)
    edges = (0, *bounds) if bounds else (0, model.layers)
    windows = tuple(
        PlanWindow(PEERS[i % len(PEERS)], first, last, "fake")
        for i, (first, last) in enumerate(itertools.pairwise(edges))
    )
    values: dict[str, object] = {
        "context": 1024,
        "kv_cells": 4096,
        "slots": 8,
        "batch_tokens": 64,
    }
    split = Split(windows, **(values | changes))  # type: ignore[arg-type]
    return Plan(PlanId(term, number), PEERS[0], model, split)


def links(of: Plan) -> tuple[StageLink, ...]:
    """A link for every stage of the plan."""
    return tuple(
        StageLink(peer, 4000 + i, peer[0] * 40, 5000 if peer == of.head else 0)
        for i, peer in enumerate(of.ring)
    )


def state(of: Plan, phase: str = "loading", why: str = "") -> PlanState:
    """The plan's state; with links from linking on."""
    return PlanState(of, phase, () if phase == "loading" else links(of), why)  # type: ignore[arg-type]
