"""`halka plan`: who runs which layers with what memory, and why the other peers do not."""

from __future__ import annotations

import json
import sys
from argparse import Namespace

import msgspec

from peer.errors import CommandError
from peer.planning.plan import Plan
from peer.words import ring
from peer.words.agent import Agent
from peer.words.screen import Screen, count, say, size
from peer.words.state import PeerState, Status


class Phase(msgspec.Struct, frozen=True):
    """What the agent adds to the plan's own fields."""

    phase: str = ""


def command(args: Namespace) -> int:
    """Returns 0, or 4 where there is no plan. Raises: CommandError."""
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
    say("\n".join(lines(plan, agent.read(data, Phase).phase, status, screen)))
    return 0


def none(status: Status, screen: Screen) -> list[str]:
    """Why there is no plan, and what mends that."""
    model = status.model
    if not model.id:
        return ["There is no plan: the cluster has no model yet.", "Get one: halka pull smollm2"]
    why = model.why or "the peers are still finding each other"
    return [*screen.wrap(f"There is no plan for {model.id}: {why}", ""), "See: halka status"]


def lines(plan: Plan, phase: str, status: Status, screen: Screen) -> list[str]:
    """The plan in words, with the ring drawn."""
    split, shape = plan.split, plan.shape
    labels = status.labels()
    states = {peer.peer_id: peer for peer in status.peers}

    def name(peer_id: str) -> str:
        return labels.get(peer_id, peer_id[:8])

    dot = screen.pick(" · ", ", ")
    rounds = len(split.windows) // len(plan.ring)
    facts = [
        count(shape.layers, "layer"), count(len(plan.ring), "peer"), count(rounds, "round"),
        f"{split.context} tokens of context", count(split.slots, "slot"),
    ]  # fmt: skip
    out = [
        screen.paint(f"Plan {plan.id} for {screen.clean(shape.model)}", "bold")
        + f", {screen.clean(phase or 'not served')}",
        f"  {dot.join(facts)}",
        f"  made by {screen.clean(name(plan.coordinator))}",
    ]
    if split.why:
        out += screen.wrap(split.why, "  ")
    rows = [
        ring.Row(
            name=name(peer_id),
            windows=tuple((w.first, w.last) for w in split.windows if w.peer_id == peer_id),
            phase=_role(plan, peer_id),
            right=size(_memory(plan, peer_id)),
        )
        for peer_id in plan.ring
    ]
    out += ["", *ring.draw(screen, shape.layers, rows), ""]
    for peer_id in plan.ring:
        out += screen.wrap(_peer(plan, peer_id, name(peer_id), states), "  ", "    ")
    if split.left_out:
        out += ["", "Without layers"]
        for left in split.left_out:
            out += screen.wrap(f"{name(left.peer_id)}: {left.why}", "  ", "    ")
    return out


def _role(plan: Plan, peer_id: str) -> str:
    head, tail = peer_id == plan.head, peer_id == plan.tail
    return "head and tail" if head and tail else "head" if head else "tail" if tail else ""


def _memory(plan: Plan, peer_id: str) -> int:
    """Bytes that the planner predicts; where it does not, the weights alone."""
    mine = [w for w in plan.split.windows if w.peer_id == peer_id]
    predicted = sum(w.memory_bytes for w in mine)
    return predicted or sum(plan.shape.window_bytes(w.first, w.last) for w in mine)


def _peer(plan: Plan, peer_id: str, name: str, states: dict[str, PeerState]) -> str:
    engines = dict.fromkeys(w.backend for w in plan.split.windows if w.peer_id == peer_id)
    text = f"{name}: {'+'.join(engines)}, planned {size(_memory(plan, peer_id))}"
    state = states.get(peer_id)
    if state is None:
        return f"{text}, not seen now"
    if state.memory_bytes:
        text += (
            f", used {size(state.memory_bytes)} (weights {size(state.weights_bytes)}, "
            f"KV {size(state.kv_bytes)}, compute {size(state.compute_bytes)})"
        )
    if state.memory_available_bytes:
        text += f", usable {size(state.memory_available_bytes)}"
    return text
