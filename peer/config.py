"""Settings: `config.toml` in HALKA_HOME, then HALKA_* in the environment, then flags.

Zero settings are needed on a home network: an empty file is a good file. Every value is checked
once, at start; the rest of the program trusts it.
"""

from __future__ import annotations

import difflib
import os
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from peer.errors import ConfigError

HTTP_DEFAULT = "127.0.0.1:42552"  # H-A-L-K-A on a phone keypad
SPARE_AUTO = -1  # of `spare`: half of what is free, see `planning.survey.spare_bytes`


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds that the cluster's machines live by."""

    beat_s: float = 1.0  # between heartbeats on a quiet link
    silence_s: float = 3.8  # without a beat a member is lost; > 3 beats, < the 5 s we promise
    regret_s: float = 1.0  # after a link broke, time for it to come back before the member is lost
    doubt_s: float = 4.0  # more, where another peer hears the member still: it may be our own link
    dial_s: float = 3.0  # for a connection and its hello to succeed
    dial_again_max_s: float = 15.0  # between attempts to reach an address that does not answer
    listen_s: float = 1.5  # at start, listen for a coordinator before claiming; > beat_s
    claim_spread_s: float = 0.6  # claims after a loss are spread over this, by rank of peer id
    settle_s: float = 0.7  # members and profiles must be quiet this long before a plan is made
    measure_s: float = 25.0  # for a peer to measure a model before it is planned without numbers
    publish_s: float = 2.0  # between repetitions of plans and reports
    load_s: float = 600.0  # for a stage to load and report ready, after its parts are there
    step_s: float = 120.0  # for one step to come around the ring
    request_s: float = 8.0  # for a peer to answer a control request
    drain_s: float = 600.0  # for the answers on an old plan to finish; the rest goes over
    wait_s: float = 30.0  # for an answer to go on, while nobody makes a plan that it could go on on
    leave_s: float = 20.0  # for others to take over before an agent that is stopped ends
    leave_quiet_s: float = 3.0  # for them to begin to; > settle_s and what a planner takes
    sleep_s: float = 4.5  # for the same before sleep; < logind's InhibitDelayMaxSec, 5 s
    probe_soon_s: float = 0.5  # after a peer joined, at most, its link is measured
    probe_s: float = 60.0  # between measurements of a link
    probe_again_s: float = 5.0  # before trying again, where a measurement was put off or failed
    probe_wait_max_s: float = 600.0  # it is put off; then the round trip is taken among answers


@dataclass(frozen=True, slots=True)
class Config:
    """What this agent was told. Every field works as it is on a home network."""

    home: Path = field(default_factory=lambda: default_home())  # everything that halka stores
    http_host: str = "127.0.0.1"  # loopback until a key can be set
    http_port: int = 42552  # 0: chosen by the system (tests)
    port: int = 0  # of the control transport; 0: chosen by the system and announced
    cluster: str = "home"  # only peers of the same name meet
    backend: Literal["auto", "llama_cpp", "mlx", "fake"] = "auto"
    spread: Literal["auto", "all"] = "auto"  # all: every joined peer gets at least one layer
    objective: Literal["latency", "throughput"] = "latency"  # of one answer, or of many at once
    kv_type: Literal["f16", "q8_0"] = "f16"  # of the KV cache; q8_0: half the memory, not as exact
    flash: Literal["auto", "on", "off"] = "auto"  # flash attention; auto: the engine's choice
    speculation: Literal["auto", "off"] = "auto"  # guess tokens and verify them, where that pays
    weights: Literal["auto", "exact", "small"] = "auto"  # see `backends.base.Weights`
    islands: Literal["off", "auto"] = "off"  # compute layers together with Macs on its own cables
    draft: str = ""  # the model that guesses, by its id, beside looking into the text so far
    threads: int = 0  # of a stage; 0: one for each physical core
    context: int = 0  # tokens of one request at most; 0: what the model and the memory allow
    memory: int = 0  # bytes that stages may use; 0: what is free, less a headroom
    model: str = ""  # the model to serve; "": the one pulled last
    spare: int = SPARE_AUTO  # bytes of disk for spare parts of models, so that a loss is survived
    peers: tuple[str, ...] = ()  # host:port of peers that mDNS cannot see
    interfaces: tuple[str, ...] = ()  # addresses or names to use; (): every home-network interface
    mdns: bool = True  # announce and look for peers by multicast
    log: Literal["debug", "info", "warning", "error"] = "info"
    timing: Timing = Timing()

    @classmethod
    def loopback(cls, **changes: Any) -> Config:
        """Several peers on one machine that nothing outside it can see."""
        return replace(cls(interfaces=("127.0.0.1",), http_port=0), **changes)

    @classmethod
    def fast_test(cls, **changes: Any) -> Config:
        """Loopback, with waits as short as a busy test machine allows, and no multicast."""
        timing = Timing(
            beat_s=0.2, silence_s=2.5, regret_s=0.4, doubt_s=1.5, dial_s=2.0, dial_again_max_s=1.0,
            listen_s=0.5, claim_spread_s=0.2, settle_s=0.2, publish_s=0.4, load_s=60.0,
            step_s=20.0, request_s=4.0, drain_s=20.0, wait_s=15.0, probe_soon_s=0.3, probe_s=30.0,
            probe_again_s=0.3, probe_wait_max_s=10.0, leave_s=5.0, leave_quiet_s=0.8, sleep_s=1.0,
        )  # fmt: skip
        return cls.loopback(timing=timing, mdns=False, **changes)


def default_home() -> Path:
    """The platform's folder for a user's (or, as root on Linux, the system's) service data."""
    if given := os.environ.get("HALKA_HOME"):
        return Path(given)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "halka"
    if os.geteuid() == 0:
        return Path("/var/lib/halka")
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "halka"


def load(
    environment: Mapping[str, str] | None = None, flags: Mapping[str, Any] | None = None
) -> tuple[Config, list[str]]:
    """Settings of this start, and warnings about what was not understood.

    Raises: ConfigError, naming the setting, where it came from and what would be right.
    """
    environment = os.environ if environment is None else environment
    given = {k: v for k, v in (flags or {}).items() if v is not None}
    home = Path(given.pop("home", None) or environment.get("HALKA_HOME") or default_home())
    warnings: list[str] = []
    merged: dict[str, Any] = {}
    file = home / "config.toml"
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: {error}. Mend or empty it; an empty file is good") from None
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}. Run halka as the user who owns it") from None
    for key, value in table.items():
        _take(merged, key, value, str(file), warnings)
    for variable, text in environment.items():
        if variable.startswith("HALKA_") and variable not in ("HALKA_HOME",) and text != "":
            _take(merged, variable[6:].lower(), text, variable, warnings)
    for key, value in given.items():
        _take(merged, key, value, f"--{key}", warnings)
    return replace(Config(home=home), **merged), warnings


_NAMES = {f.name for f in fields(Config)} - {"home", "timing", "http_host", "http_port"} | {"http"}


def _take(into: dict[str, Any], key: str, value: Any, source: str, warnings: list[str]) -> None:
    if key not in _NAMES:
        near = difflib.get_close_matches(key, _NAMES, 1)
        warnings.append(
            f"{source}: there is no setting `{key}`" + (f"; is it `{near[0]}`?" if near else "")
        )
        return
    into.update(_checked(key, value, source))


def _checked(key: str, value: Any, source: str) -> dict[str, Any]:
    """The setting's value, typed. Raises ConfigError."""
    if key == "http":
        host, port = _host_port(str(value), source)
        return {"http_host": host, "http_port": port}
    if key in ("port", "threads", "context"):
        number = _number(value, key, source)
        if key == "port" and number > 65535:
            raise ConfigError(f"{source}: {number} is not a port (0 to 65535)")
        return {key: number}
    if key == "memory":
        return {key: _bytes(value, key, source)}
    if key == "spare":
        words = {"auto": SPARE_AUTO, "off": 0}
        known = isinstance(value, str) and value.lower() in words
        return {key: words[value.lower()] if known else _bytes(value, key, source)}
    if key in ("peers", "interfaces"):
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, list | tuple) or not all(isinstance(i, str) for i in items):
            raise ConfigError(f'{source}: `{key}` is a list of strings, as in ["10.0.0.5:42553"]')
        items = tuple(i.strip() for i in items if i.strip())
        if key == "peers":
            for item in items:
                _host_port(item, source)
        return {key: items}
    if key == "mdns":
        if isinstance(value, str) and value.lower() in ("true", "false", "1", "0", "yes", "no"):
            value = value.lower() in ("true", "1", "yes")
        if not isinstance(value, bool):
            raise ConfigError(f"{source}: `mdns` is true or false")
        return {key: value}
    choices = {
        "backend": ("auto", "llama_cpp", "mlx", "fake"),
        "spread": ("auto", "all"),
        "objective": ("latency", "throughput"),
        "kv_type": ("f16", "q8_0"),
        "flash": ("auto", "on", "off"),
        "speculation": ("auto", "off"),
        "weights": ("auto", "exact", "small"),
        "islands": ("off", "auto"),
        "log": ("debug", "info", "warning", "error"),
    }.get(key)
    if choices and value not in choices:
        raise ConfigError(f"{source}: `{key}` is one of {', '.join(choices)}, not {value!r}")
    if not isinstance(value, str) or len(value) > 64 or not value.isprintable():
        raise ConfigError(f"{source}: `{key}` is a short text")
    if key == "cluster" and not value:
        raise ConfigError(f"{source}: `cluster` needs a name, such as home")
    return {key: value}


def _number(value: Any, key: str, source: str) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = -1
    if isinstance(value, bool) or number < 0 or number > 1 << 40:
        raise ConfigError(f"{source}: `{key}` is a whole number from 0 on, not {value!r}")
    return number


def _bytes(value: Any, key: str, source: str) -> int:
    """Bytes from 12345, "512MiB" or "8GiB"."""
    text = str(value).strip()
    for suffix, scale in (("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30)):
        if text.endswith(suffix):
            try:
                return int(float(text[: -len(suffix)]) * scale)
            except (ValueError, OverflowError):
                break
    if text.isdecimal():
        return int(text)
    what = "auto, off or a size" if key == "spare" else "a size"
    raise ConfigError(f"{source}: `{key}` is {what} such as 8GiB, not {value!r}")


def _host_port(text: str, source: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"{source}: {text!r} is not host:port, as in 127.0.0.1:42552")
    return host, int(port)
