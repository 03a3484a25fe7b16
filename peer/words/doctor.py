"""`halka doctor`: looks at this machine and says what keeps halka from working well on it, each
with the one command that mends it. It changes nothing, here or anywhere.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from importlib.util import find_spec
from pathlib import Path

import msgspec

from peer import config as settings
from peer.cluster import interfaces, mdns, thunderbolt_shell
from peer.config import Config
from peer.errors import CommandError, ConfigError
from peer.planning import survey, thunderbolt
from peer.planning.profile import Port, Profile
from peer.words import checkup, checkup_rdma
from peer.words.agent import Agent
from peer.words.basis import Basis
from peer.words.checkup import Check
from peer.words.screen import Screen, cells_of, say
from peer.words.state import Status

DEGRADED = 4


def command(args: Namespace) -> int:
    """Returns 0, or 4 where something is wrong."""
    found = examine(args)
    if args.json:
        say(json.dumps({"checks": [msgspec.to_builtins(check) for check in found]}, indent=2))
    else:
        say("\n".join(lines(found, Screen.of(sys.stdout))))
    return DEGRADED if any(check.level == "wrong" for check in found) else 0


def lines(found: Sequence[Check], screen: Screen) -> list[str]:
    """The screen, a line or two for each check."""
    marks = {
        "ok": (screen.pick("✓", "+"), "green"),
        "note": (screen.pick("•", "-"), "yellow"),
        "wrong": (screen.pick("✗", "!"), "red"),
    }
    out = []
    for check in found:
        mark, style = marks[check.level]
        text = screen.wrap(check.what, f"{mark} ", "  ")
        out += [screen.paint(text[0][:1], style, "bold") + text[0][1:], *text[1:]]
        if check.mend:
            mend, lead = screen.clean(check.mend), "  mend it: "
            fits = cells_of(lead + mend) <= screen.width  # a command is to be copied
            out += [lead + mend] if fits else screen.wrap(mend, lead)
    wrong = sum(check.level == "wrong" for check in found)
    out += ["", "nothing is wrong" if not wrong else f"wrong: {wrong} of {len(found)} checks"]
    return out


def examine(
    args: Namespace,
    system: str = sys.platform,
    commands: Mapping[str, Sequence[str]] = thunderbolt_shell.COMMANDS,
) -> list[Check]:
    """All checks of this machine. commands: macOS's, by name."""
    given = {"home": args.home, "http": args.http}
    try:
        config, warnings = settings.load(flags=given)
        error = ""
    except ConfigError as wrong:
        config, warnings, error = Config(), [], str(wrong)
    status, basis = None, None
    why, mend = "the agent was not asked, as the settings cannot be used", ""
    if not error:
        agent = Agent(args.home, args.http)
        try:
            status = agent.status()
            basis = agent.question("/halka/profiles", Basis)
            why = agent.address
        except CommandError as absent:
            why, mend = str(absent), absent.mend.removeprefix("start it: ")
    found = checkup.checks(_facts(config, warnings, error, status, (why, mend), system))
    if system == "darwin":
        me = status.me.peer_id if status else ""
        profiles = basis.profiles if basis else ()
        facts = asyncio.run(_rdma_facts(commands, me, profiles, config.islands == "auto"))
        found += checkup_rdma.checks(facts)
    return found


def _facts(
    config: Config,
    warnings: Sequence[str],
    error: str,
    status: Status | None,
    agent: tuple[str, str],
    system: str,
) -> checkup.Facts:
    try:
        networks = interfaces.choose(interfaces.survey(), config.interfaces)
    except OSError:
        networks = ()
    old = [host for host in networks if ":" not in host]
    return checkup.Facts(
        system=system,
        home=str(config.home),
        settings_error=error,
        warnings=warnings,
        engines=_installed(config, system),
        wanted=config.backend,
        install=survey.with_engines(system, config.backend),
        writable=_writable(config.home),
        free_bytes=survey.disk_free_bytes(config.home),
        agent=agent[0] if status else "",
        agent_error="" if status else agent[0],
        agent_mend="" if status else agent[1],
        http=f"{config.http_host}:{config.http_port}",
        port_error="" if status or error else _port_error(config),
        networks=networks,
        network_error=interfaces.missing(networks, config.interfaces),
        deaf=[host for host in old if not mdns.multicasts(host)],
        mdns=config.mdns,
        problems=[(each.what, each.mend) for each in status.problems] if status else (),
    )


def _installed(config: Config, system: str) -> tuple[str, ...]:
    """Those of the backends that the settings allow whose libraries are here."""
    names = survey.backends_of(config, system)
    needed = {"mlx": ("mlx", "mlx_lm"), "llama_cpp": ("llama_cpp",)}
    return tuple(name for name in names if all(map(find_spec, needed.get(name, ()))))


def _writable(home: Path) -> bool:
    """Whether models can be put there; the folder need not be there yet."""
    for folder in (home / "models", home, *home.parents):
        if folder.exists():
            return os.access(folder, os.W_OK | os.X_OK)
    return False


def _port_error(config: Config) -> str:
    """Why nobody could listen on HTTP's port now, "" where an agent could."""
    family = socket.AF_INET6 if ":" in config.http_host else socket.AF_INET
    with closing(socket.socket(family, socket.SOCK_STREAM)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.http_host, config.http_port))
        except OSError as error:
            return error.strerror or str(error)
    return ""


async def _rdma_facts(
    commands: Mapping[str, Sequence[str]], me: str, profiles: Sequence[Profile], wanted: bool
) -> checkup_rdma.RdmaFacts:
    """What macOS's read-only commands print."""
    names = ("version", "rdma", "bridge")
    told = await asyncio.gather(*(thunderbolt_shell.output(commands[name]) for name in names))
    version, rdma, bridge = told
    ports: tuple[Port, ...] = ()
    with suppress(thunderbolt.Unread):
        ports = await thunderbolt_shell.look(commands=commands)
    return checkup_rdma.RdmaFacts(
        ports, (version or "").strip(), rdma, thunderbolt.bridged(bridge or ""), me, profiles,
        wanted,
    )  # fmt: skip
