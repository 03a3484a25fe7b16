"""What `halka doctor` says of a machine, from facts that were gathered before. Pure.

A `Check` is one line: all is well (ok), worth knowing (note), or keeps halka from working (wrong),
and the one command or setting that mends it. Nothing is ever mended by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

DISK_LOW_BYTES = 4 << 30  # a small model and its copies
DISK_LEAST_BYTES = 1 << 30
Level = Literal["ok", "note", "wrong"]


@dataclass(frozen=True, slots=True)
class Check:
    """One line, and what mends it."""

    level: Level
    what: str
    mend: str = ""


@dataclass(frozen=True, slots=True)
class Facts:
    """What was found. settings_error, agent_error: "" where there is none.

    engines: backends that are installed, best first; wanted: the setting `backend`. free_bytes: on
    the disk of `home`. port_error: why HTTP's port cannot be had, where no agent has it. networks:
    addresses on home networks; deaf: those on which no multicast can be heard. problems: what the
    agent that runs says is wrong, each with what mends it.
    """

    system: str  # as sys.platform
    home: str
    settings_error: str = ""
    warnings: Sequence[str] = ()
    engines: Sequence[str] = ()
    wanted: str = "auto"
    install: str = ""  # the command that installs what this system should have
    writable: bool = True
    free_bytes: int = 0
    agent: str = ""  # host:port of the one that answers
    agent_error: str = ""
    agent_mend: str = ""
    http: str = ""
    port_error: str = ""
    networks: Sequence[str] = ()
    network_error: str = ""
    deaf: Sequence[str] = ()
    mdns: bool = True
    problems: Sequence[tuple[str, str]] = ()


def checks(facts: Facts) -> list[Check]:
    """A line for each thing that is looked at, in an order in which they are best mended."""
    return [
        *_settings(facts),
        _engines(facts),
        _disk(facts),
        *_network(facts),
        *_agent(facts),
        *(Check("wrong", what, mend) for what, mend in facts.problems),
    ]


def _settings(facts: Facts) -> list[Check]:
    if facts.settings_error:
        return [Check("wrong", f"the settings cannot be used: {facts.settings_error}")]
    odd = [Check("note", f"a setting is ignored: {warning}") for warning in facts.warnings]
    return odd or [Check("ok", f"the settings are good, and halka's files are in {facts.home}")]


def _engines(facts: Facts) -> Check:
    if not facts.engines:
        if facts.wanted == "auto":
            return Check("wrong", "no engine is installed here", facts.install)
        what = f"the engine that the setting `backend` asks for, {facts.wanted}, is not installed"
        return Check("wrong", what, f"{facts.install}, or backend = auto")
    names = " and ".join(facts.engines)
    if facts.system == "darwin" and facts.wanted == "auto" and "mlx" not in facts.engines:
        return Check("note", f"this Mac runs models on {names} only, not on MLX", facts.install)
    return Check("ok", f"engines: {names}")


def _disk(facts: Facts) -> Check:
    free = f"{facts.free_bytes / (1 << 30):.1f} GiB"
    if not facts.writable:
        owner = f'sudo chown -R "$(id -un)" {_quoted(facts.home)}'
        return Check("wrong", f"this user cannot write in {facts.home}, where models go", owner)
    if facts.free_bytes < DISK_LEAST_BYTES:
        mend = f"free some disk space, or set HALKA_HOME: {facts.home} is on a full disk"
        return Check("wrong", f"the disk for models has {free} left", mend)
    if facts.free_bytes < DISK_LOW_BYTES:
        return Check("note", f"the disk for models has {free} left: few models fit")
    return Check("ok", f"the disk for models has {free} left")


def _network(facts: Facts) -> list[Check]:
    if facts.network_error:
        return [Check("wrong", facts.network_error, 'interfaces = ["…"] in config.toml')]
    used = ", ".join(facts.networks)
    if not facts.mdns:
        return [Check("note", f"on {used}; other peers are not looked for by multicast (`mdns`)")]
    if facts.deaf and set(facts.deaf) == set(facts.networks):
        what = f"no multicast can be heard on {used}: peers do not find each other by themselves"
        return [Check("wrong", what, 'peers = ["10.0.0.5:42553"] in config.toml, and port = 42553')]
    return [Check("ok", f"the home network is there: {used}")]


def _agent(facts: Facts) -> list[Check]:
    if facts.agent:
        return [Check("ok", f"the agent runs, and answers at {facts.agent}")]
    lines = []
    if facts.port_error:
        what = f"the API's address {facts.http} cannot be had: {facts.port_error}"
        lines.append(Check("wrong", what, "end what uses it, or HALKA_HTTP=127.0.0.1:42553"))
    return [*lines, Check("note", facts.agent_error, facts.agent_mend)]


def _quoted(path: str) -> str:
    return "'" + path.replace("'", "'\\''") + "'"
