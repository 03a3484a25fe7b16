"""What engines that do not run every model say of one, for the planner of any peer.

The question is about the header alone and needs none of their libraries, so that a peer that has a
model can tell what another one, of another system, may run it with. It must not lose the model to
the rest of the cluster: an engine that cannot answer is one that does not run it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from msgspec.structs import replace

from backends.base import BackendFault, Engine, Header
from peer.planning.profile import Fit, engine_name

ASKED = ("mlx",)  # backends; all others run every model, as it is
_WHY_MAX = 300


def of(header: Header, load: Callable[[str], Engine]) -> tuple[Fit, ...]:
    """For each backend how it runs the model, and how it does with weights as small as can be, if
    that is something else. load: gives the engine of a name."""
    found: list[Fit] = []
    for backend in ASKED:
        usual, small = (_fit(header, load, backend, weights) for weights in ("auto", "small"))
        found.append(usual)
        if replace(small, weights="auto") != usual:
            found.append(small)
    return tuple(found)


def _fit(
    header: Header,
    load: Callable[[str], Engine],
    backend: str,
    weights: Literal["auto", "small"],
) -> Fit:
    name = engine_name(backend)
    try:
        able = load(backend).can_run(header, weights)
    except (
        BackendFault, ImportError, OSError, LookupError, ArithmeticError, TypeError, ValueError,
        AttributeError, RuntimeError,
    ) as error:  # fmt: skip
        why = f"{name} fails at its header: {str(error) or type(error).__name__}"
        return Fit(backend, weights, "no", why[:_WHY_MAX])
    if len(able.layer_bytes) not in (0, header.layers):
        why = f"{name} speaks of {len(able.layer_bytes)} of its {header.layers} layers"
        return Fit(backend, weights, "no", why)
    if able.how == "no":
        return Fit(backend, weights, "no", able.why[:_WHY_MAX])
    return Fit(
        backend, weights, able.how, able.why[:_WHY_MAX],
        able.layer_bytes, able.embed_bytes, able.output_bytes, able.ranks,
    )  # fmt: skip
