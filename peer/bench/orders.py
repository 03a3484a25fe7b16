"""What is said to the process that runs a whole model, and what it answers: one JSON line each."""

from __future__ import annotations

from typing import Literal

import msgspec

from peer.planning.plan import Plan, PlanWindow
from peer.planning.profile import Profile
from peer.protocol import Sampling
from peer.wire import Message

GREEDY = Sampling(temperature=0.0)


class Open(Message, frozen=True, tag="open"):
    """Load the model in `folder`. plan: of one window, which holds all of its layers."""

    plan: Plan
    folder: str
    threads: int
    weights: Literal["auto", "exact", "small"] = "auto"  # see `backends.base.Weights`


class Ask(Message, frozen=True, tag="ask"):
    """Answer these prompts, texts or ids: read them one after another, then go on with all of them.

    tokens: of each answer, its first among them. chunk: ids of a prompt that are read at once.
    group: rows of a step at most; 0: all answers in one. limit_s: for the answers after reading.
    """

    prompts: tuple[str | tuple[int, ...], ...]
    tokens: int
    chunk: int
    group: int = 0
    sampling: Sampling = GREEDY
    limit_s: float = 60.0


class Opened(Message, frozen=True, tag="opened"):
    """It is loaded."""

    weights_bytes: int
    kv_bytes: int
    compute_bytes: int


class Took(Message, frozen=True, tag="took"):
    """What it took, by prompt: its ids, the seconds to its first token; then by step of all.

    answers: their ids.
    """

    prompt_tokens: tuple[int, ...]
    read_s: tuple[float, ...]
    steps_s: tuple[float, ...]
    answers: tuple[tuple[int, ...], ...]


class Failed(Message, frozen=True, tag="failed"):
    """It cannot be done."""

    why: str


Order = Open | Ask
Answer = Opened | Took | Failed


def engine_of(plan: Plan, peer_id: str, profile: Profile | None) -> str:
    """The backend that runs a peer's windows; of one that has none, what would run the model."""
    own = [window for window in plan.split.windows if window.peer_id == peer_id]
    would = profile.engine_for(plan.shape) if profile and not own else ""
    return would or (own or plan.split.windows)[0].backend


def whole(
    plan: Plan, peer_id: str, *, slots: int, kv_cells: int, gpu_layers: int, backend: str = ""
) -> Plan:
    """The plan with all layers in one window, the same settings otherwise. backend: "": the one
    that runs the peer's own windows."""
    split = plan.split
    backend = backend or engine_of(plan, peer_id, None)
    window = PlanWindow(peer_id, 0, plan.shape.layers, backend, gpu_layers=gpu_layers)
    return msgspec.structs.replace(
        plan,
        split=msgspec.structs.replace(
            split,
            windows=(window,),
            slots=slots,
            kv_cells=kv_cells,
            context=min(split.context, kv_cells),
            speculation="off",
            draft="",
        ),
    )
