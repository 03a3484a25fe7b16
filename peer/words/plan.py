"""`halka plan`: who runs which layers with what memory, how fast, and why the other peers do not.

Without flags it shows the plan that runs. With "what if" flags, or with saved profiles, it plans
in this process: `words.planning` has that, and is loaded only then.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace

import msgspec

from peer.errors import CommandError
from peer.planning.plan import Forecast, Plan
from peer.words import forecast
from peer.words.agent import Agent
from peer.words.basis import TimedRing
from peer.words.forecast import Seen
from peer.words.screen import Screen, say, size
from peer.words.state import PeerState, Status

PLANNED = (
    "with_", "without", "only", "link", "window", "rounds", "objective", "context", "kv", "model",
    "profiles", "save",
)  # fmt: skip
"""Flags that ask for more than the plan that runs."""


class Shown(msgspec.Struct, frozen=True):
    """What the agent adds to the plan's own fields."""

    phase: str = ""
    forecast: Forecast | None = None
    timed: TimedRing = TimedRing()


def command(args: Namespace) -> int:
    """Returns 0, or 4 where there is no plan. Raises: CommandError."""
    if any(getattr(args, flag, None) not in (None, []) for flag in PLANNED):
        from peer.words import planning

        return planning.command(args)
    agent = Agent(args.home, args.http)
    code, data = agent.get("/halka/plan")
    if code != 200:
        raise CommandError(
            f"the agent at {agent.address} has no /halka/plan (HTTP {code})",
            "look at it: halka status",
        )
    plan = agent.read(data, Plan | None)  # type: ignore[arg-type]
    if args.json:
        say(json.dumps(json.loads(data), indent=2))
        return 4 if plan is None else 0
    screen, status = Screen.of(sys.stdout), agent.status()
    if plan is None:
        say("\n".join(none(status, screen)))
        return 4
    say("\n".join(lines(plan, agent.read(data, Shown), status, screen)))
    return 0


def none(status: Status, screen: Screen) -> list[str]:
    """Why there is no plan, and what mends that."""
    model = status.model
    if not model.id and (not model.why or model.why.startswith("no model yet")):
        return ["There is no plan: the cluster has no model yet.", "Get one: halka pull smollm2"]
    if not model.id:  # one was lost, or is not made yet
        return [*screen.wrap(f"There is no plan now: {model.why}", ""), "See: halka status --watch"]
    why = model.why or "the peers are still finding each other"
    return [*screen.wrap(f"There is no plan for {model.id}: {why}", ""), "See: halka status"]


def lines(plan: Plan, shown: Shown, status: Status, screen: Screen) -> list[str]:
    """The plan in words, with the ring drawn."""
    seen = Seen(
        plan.shape,
        plan.split,
        shown.forecast,
        shown.timed,
        labels=status.labels(),
        gpus=_gpus(plan, status),
        usage={p: _usage(p, status) for p in plan.ring},
    )
    out = [
        screen.paint(f"Plan {plan.id} for {screen.clean(plan.shape.model)}", "bold")
        + f", {screen.clean(shown.phase or 'not served')}",
        *screen.wrap(forecast.facts(seen, screen), "  "),
        f"  made by {screen.clean(seen.name(plan.coordinator))}",
    ]
    if plan.split.why:
        out += screen.wrap(f"when it was made: {plan.split.why}", "  ")
    return [*out, *body(seen, screen)]


def body(seen: Seen, screen: Screen) -> list[str]:
    """Times, picture and peers of a split."""
    times = forecast.times(seen, screen)
    return [
        *(["", *times] if times else []),
        "", *forecast.picture(seen, screen), "", *forecast.peers(seen, screen),
    ]  # fmt: skip


def _gpus(plan: Plan, status: Status) -> dict[str, tuple[str, str]]:
    """(device, kind) of the GPU that a peer's windows can use."""
    engines = {window.peer_id: window.backend for window in plan.split.windows}
    return {
        peer.peer_id: (engine.device, engine.kind)
        for peer in status.peers
        for engine in reversed(peer.engines)
        if engine.kind not in ("cpu", "") and engine.backend == engines.get(peer.peer_id)
    }


def _usage(peer_id: str, status: Status) -> str:
    """What a stage really uses, and what there is."""
    state: PeerState | None = next((p for p in status.peers if p.peer_id == peer_id), None)
    if state is None:
        return ", not seen now"
    text = ""
    if state.memory_bytes:
        text += (
            f", used {size(state.memory_bytes)} (weights {size(state.weights_bytes)}, "
            f"KV {size(state.kv_bytes)}, compute {size(state.compute_bytes)})"
        )
    if state.memory_available_bytes:
        text += f", usable {size(state.memory_available_bytes)}"
    return text
