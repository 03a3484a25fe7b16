"""`halka leave`: this peer goes away once others have taken over what it runs; Ctrl-C: it stays."""

from __future__ import annotations

import sys
from argparse import Namespace
from contextlib import closing

import msgspec

from peer.errors import CommandError
from peer.words.agent import Agent, start_command
from peer.words.screen import Screen, count, note, say, size
from peer.words.state import Going


def command(args: Namespace) -> int:
    """Returns 0. Raises: CommandError, ConfigError; KeyboardInterrupt, once the peer stays."""
    agent, screen = Agent(args.home, args.http), Screen.of(sys.stderr)
    try:
        last, taken = _followed(agent, screen)
    except KeyboardInterrupt:
        agent.post("/halka/stay")
        note("")
        note("this peer stays")
        raise
    if last.phase == "stays":
        raise CommandError("somebody else has taken it back: this peer stays", "halka leave")
    screen = Screen.of(sys.stdout)
    if last.why:
        say(f"The agent has ended, but not everything was handed over: {screen.clean(last.why)}.")
    elif taken:
        say(f"{screen.clean(_names(taken))} took over, and the agent has ended.")
    else:
        say("Nobody needed this peer, and the agent has ended.")
    say(f"To come back: {start_command()}")
    return 0


def _followed(agent: Agent, screen: Screen) -> tuple[Going, tuple[str, ...]]:
    """The last word of the agent, and who took over; shows what comes before it."""
    shown = ""
    taken: tuple[str, ...] = ()
    with closing(agent.events("/halka/leave", {})) as events:
        for event in events:
            going = _read(event)
            if going.phase in ("gone", "stays"):
                return going, taken
            taken = going.peers or taken
            if (line := progress(going)) != shown:
                shown = line
                note(screen.clean(line))
    raise CommandError(
        "the agent ended before it said that others have taken over",
        "halka status, on another peer",
    )


def _read(event: dict[str, object]) -> Going:
    """Raises CommandError."""
    try:
        return msgspec.convert(event, Going)
    except msgspec.ValidationError as error:
        raise CommandError(
            f"the agent tells its progress in a way that this `halka` does not understand: {error}",
            "update both to one version, then restart the agent",
        ) from None


def progress(going: Going) -> str:
    """One line: what is waited for. Percents in tens, so that few lines say it."""
    who = _names(going.peers)
    answers = count(going.running, "answer")
    match going.phase:
        case "loading" if going.total_bytes:
            percent = going.done_bytes * 10 // going.total_bytes * 10
            return f"{who}: fetching {going.model}, {percent} % of {size(going.total_bytes)}"
        case "loading":
            return f"{who}: loading {going.model}"
        case "draining":
            return f"{who} took over; the answers go over to the new ring"
        case "answers":
            return f"finishing {answers} of this peer's own clients"
        case "alone":
            why = f": {going.why}" if going.why else ""
            return f"nobody can take over{why}; finishing {answers}"
        case _:
            return "asking the others to take over"


def _names(peers: tuple[str, ...]) -> str:
    """a · a and b · a, b and c"""
    return " and ".join([", ".join(peers[:-1]), peers[-1]] if len(peers) > 1 else peers)
