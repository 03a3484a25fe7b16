"""`halka status`: one screen. Am I running, who is here and who decides, what runs where, where my
API is, what is wrong and the one command that mends it.
"""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace

from peer.errors import CommandError
from peer.planning.profile import engine_name
from peer.words import ring
from peer.words.agent import Agent
from peer.words.screen import Screen, cells_of, count, duration, note, say, size
from peer.words.state import Answers, PeerState, Status

PEERS_SHOWN = 12  # more would push the ring off the screen; --json has all
LOSSES_SHOWN = 6
WATCH_S = 1.0


def command(args: Namespace) -> int:
    """Returns 0, or 4 where there are problems. Raises: CommandError (3: not running)."""
    if args.watch:
        return _watch(args)
    agent = Agent(args.home, args.http)
    data = agent.status_bytes()
    status = agent.read(data, Status)
    if args.json:
        say(json.dumps(json.loads(data), indent=2))
    else:
        say("\n".join(lines(status, Screen.of(sys.stdout))))
    return 4 if status.problems else 0


def lines(status: Status, screen: Screen) -> list[str]:
    """The screen, a line each."""
    return [
        *_heading(status, screen),
        *_model(status, screen),
        *_peers(status, screen),
        *_losses(status, screen),
        *_doors(status, screen),
        *_problems(status, screen),
    ]


def rows(status: Status) -> list[ring.Row]:
    """The ring's rows as the agent knows them now."""
    labels = status.labels()
    members = sorted(
        (peer for peer in status.peers if peer.layers),
        key=lambda peer: ring.in_ring_order(peer.layers),
    )
    return [
        ring.Row(
            name=labels[peer.peer_id],
            windows=peer.layers,
            phase="lost" if peer.state == "lost" else peer.phase,
            done=_done(peer),
            right=size(peer.memory_bytes) if peer.memory_bytes else "",
            why=peer.why,
        )
        for peer in members
    ]


def _done(peer: PeerState) -> float:
    if peer.phase == "fetching" and peer.total_bytes:
        # 100 % is what it says when it is no longer fetching.
        return min(peer.done_bytes / peer.total_bytes, 0.99)
    return 1.0


def _heading(status: Status, screen: Screen) -> list[str]:
    me, dot = status.me, screen.pick("●", "*")
    state, style = ("degraded", "yellow") if status.problems else ("running", "green")
    name = screen.clean(me.name)
    return [
        f"{screen.paint(f'{dot} halka is {state}', style, 'bold')} on {name} for "
        f"{duration(me.uptime_s)}",
        screen.paint(
            f"  version {screen.clean(status.version)}, peer {screen.clean(me.peer_id)}", "dim"
        ),
        "",
    ]


def _model(status: Status, screen: Screen) -> list[str]:
    model = status.model
    if not model.id:
        without = not model.why or model.why.startswith("no model yet")
        out = screen.wrap("none yet" if without else f"none yet: {model.why}", "Model    ")
        if without:
            out.append("         get one: " + screen.paint("halka pull smollm2", "bold"))
        return [*out, ""]
    dot = screen.pick(" · ", ", ")
    facts = [screen.clean(model.id), count(model.layers, "layer")]
    if model.context:
        facts.append(f"{model.context} tokens of context")
    plan = f" as plan {screen.clean(model.plan)}" if model.plan else ""
    phases = {
        "none": "not served",
        "loading": "loading",
        "linking": "linking",
        "serving": "serving",
    }
    phase = phases.get(model.phase, screen.clean(model.phase))
    style = "green" if model.phase == "serving" else "yellow"
    text = f"Model    {screen.paint(dot.join(facts), 'bold')}"
    out = [text, f"         {screen.paint(phase, style)}{plan}"]
    if model.why and model.phase != "serving":
        out += screen.wrap(model.why, "         ")
    if model.approximate:
        out += screen.wrap(model.approximate, "         ")
    return [*out, *ring.draw(screen, model.layers, rows(status)), ""]


def _peers(status: Status, screen: Screen) -> list[str]:
    cluster, labels = status.cluster, status.labels()
    members = sum(peer.state != "lost" for peer in status.peers)
    decides = next((labels[p.peer_id] for p in status.peers if p.coordinator), "")
    who = f"coordinator {screen.clean(decides)}, term {cluster.term}"
    out = [
        f'Peers    {members} in cluster "{screen.clean(cluster.name)}", '
        + (who if decides else "no coordinator yet")
    ]
    for peer in status.peers[:PEERS_SHOWN]:
        out.append(
            f"  {screen.paint(screen.fit(screen.clean(labels[peer.peer_id]), 14), 'bold')} "
            + screen.fit(_about(peer, screen), screen.width - 17).rstrip()
        )
        if peer.why and not peer.layers:
            out += screen.wrap(peer.why, " " * 17)
    if (more := len(status.peers) - PEERS_SHOWN) > 0:
        out.append(f"  and {more} more: halka status --json")
    return [*out, ""]


def _about(peer: PeerState, screen: Screen) -> str:
    facts = ["gone"] if peer.state == "lost" else []  # it may have left, which the reason says
    facts += ["here"] if peer.me else []
    facts += ["going away"] if peer.leaving else []
    if not peer.layers and peer.state != "lost":
        facts.append("no layers")
    facts += [peer.os, count(peer.cores, "core") if peer.cores else ""]
    if peer.memory_total_bytes:
        free, total = size(peer.memory_available_bytes), size(peer.memory_total_bytes)
        free = free.removesuffix(total[-4:])  # 9.0 of 16.0 GiB
        facts.append(f"{free} of {total} free")
    facts += _engines(peer)
    facts.append(peer.address.removeprefix("tcp://"))
    return ", ".join(screen.clean(fact) for fact in facts if fact)


def _engines(peer: PeerState) -> list[str]:
    """The engine of its layers and the GPU that it uses; without layers, its GPUs."""
    cards = [e for e in peer.engines if e.kind not in ("cpu", "")]
    if not peer.backend:
        return [*dict.fromkeys(card.device for card in cards)]
    used = [card.device for card in cards if card.backend == peer.backend and peer.on_gpu]
    name = engine_name(peer.backend)
    return [f"{name} on {device}" for device in dict.fromkeys(used)] or [name]


def _losses(status: Status, screen: Screen) -> list[str]:
    """Whether answers would go on without each of the peers; nothing where one is alone."""
    known = {peer.peer_id for peer in status.peers if peer.state != "lost"}
    losses = [loss for loss in status.losses if loss.peer_id in known]
    if status.unforeseen:
        return ["Survives not known yet; it is looked at when the ring is quiet", ""]
    if len(losses) < 2:
        return []
    bad = [loss for loss in losses if loss.outcome != "fine"]
    safe, every = sum(loss.outcome != "none" for loss in losses), len(losses)
    if safe == every:
        text = f"the loss of any one of its {every} peers"
    else:
        text = f"the loss of {safe} of its {every} peers" if safe else "no peer's loss"
    if fetching := _fetching(status):
        text += f" ({fetching})"
    style = "yellow" if bad else "green"
    wrapped = screen.wrap(text, "Survives ")
    out = [line[:9] + screen.paint(line[9:], style) for line in wrapped]
    labels = status.labels()
    for loss in bad[:LOSSES_SHOWN]:
        name = screen.paint(screen.fit(screen.clean(labels[loss.peer_id]), 14), "bold")
        if loss.outcome == "fetch":
            what = f"answers go on after {size(loss.fetch_bytes)} were fetched from other peers"
        else:
            what = f"answers end: {loss.why}"
        first, *more = screen.wrap(what, " " * 17)
        out += [f"  {name} {first[17:]}", *more]
    if (more_of := len(bad) - LOSSES_SHOWN) > 0:
        out.append(f"  and {more_of} more: halka status --json")
    mine = next((s.why for peer in status.peers for s in status.spares
                 if peer.me and s.peer_id == peer.peer_id and s.why), "")  # fmt: skip
    return [*out, *(screen.wrap(f"spare parts: {mine}", "  ", "    ") if mine else []), ""]


def _fetching(status: Status) -> str:
    """How far spare parts are, "" where all of them are there."""
    total = sum(spare.total_bytes for spare in status.spares)
    done = sum(spare.done_bytes for spare in status.spares)
    return f"fetching spare parts: {min(99, 100 * done // total)} %" if done < total else ""


def _doors(status: Status, screen: Screen) -> list[str]:
    answers, http = status.answers, screen.clean(status.me.http)
    out = [
        f"API      {screen.paint(f'http://{http}/v1', 'bold')}  (OpenAI's base_url; any api_key)",
        '         try it: halka chat "Why is the sky blue?"',
        _answers(answers),
    ]
    if status.cluster.open:
        out += screen.wrap(
            "any peer on this network that speaks halka's protocol may join, for now", "Trust    "
        )
    for refusal in status.refused[-3:]:
        text = f"{refusal.address}: {refusal.why} ({duration(refusal.ago_s)} ago)"
        out += screen.wrap(text, "Refused  ")
    return out


def _answers(answers: Answers) -> str:
    waits = f" ({answers.waiting} waiting for a ring)" if answers.waiting else ""
    times = count(answers.continued, "time")
    went = f"; {times} one went on in another ring" if answers.continued else ""
    return (
        f"Answers  {answers.running} running{waits}, {answers.served} served, "
        f"{answers.failed} failed{went}"
    )


def _problems(status: Status, screen: Screen) -> list[str]:
    texts = [problem.what for problem in status.problems]
    out: list[str] = []
    if status.cluster.discovery and status.cluster.discovery not in texts:
        out += ["", *screen.wrap(status.cluster.discovery, "Finding  ")]
    if not status.problems:
        return out
    out += ["", screen.paint("Problems", "red", "bold")]
    for problem in status.problems:
        out += screen.wrap(problem.what, f"  {screen.pick('✗', '!')} ", "    ")
        if problem.mend:
            mend = screen.clean(problem.mend)
            lead = "    mend it: "
            # A command is to be copied: never broken into lines where it fits.
            fits = cells_of(lead + mend) <= screen.width
            out += [lead + screen.paint(mend, "bold")] if fits else screen.wrap(mend, lead)
    return out


def _watch(args: Namespace) -> int:
    """Draw again and again until Ctrl-C, also while the agent is away."""
    try:
        if args.json or not sys.stdout.isatty():
            _follow(args)
        else:
            _redraw(args)
    except KeyboardInterrupt:
        pass
    return 0


def _redraw(args: Namespace) -> None:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(highlight=False, markup=False)
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            shown = "\n".join(_now(args, Screen.of(sys.stdout)))
            live.update(Text.from_ansi(shown, no_wrap=True), refresh=True)
            time.sleep(WATCH_S)


def _now(args: Namespace, screen: Screen) -> list[str]:
    # A new Agent each time: after a restart it may answer at another address.
    try:
        return lines(Agent(args.home, args.http).status(), screen)
    except CommandError as error:
        mend = screen.wrap(error.mend, "  mend it: ") if error.mend else []
        return [*screen.wrap(str(error), ""), *mend]


def _follow(args: Namespace) -> None:
    """The same where no terminal is: a screen, or one line of JSON, a second."""
    while True:
        try:
            if args.json:
                say(json.dumps(json.loads(Agent(args.home, args.http).status_bytes())))
            else:
                say("\n".join(lines(Agent(args.home, args.http).status(), Screen.of(sys.stdout))))
                say()
        except CommandError as error:
            note(f"halka: {error}")
        time.sleep(WATCH_S)
