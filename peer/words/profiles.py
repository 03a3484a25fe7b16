"""Profiles from a file: TOML that a person wrote, or JSON that `halka plan --save` wrote.

    [[peer]]
    name = "desk"
    memory = "12GiB"           # that stages may use
    os = "linux"               # linux, macos; linux where left out, as all that follows may be
    cores = 8
    cpu_bandwidth = "40GB/s"   # of memory, as reading weights gets it: half of what is on the box
    cpu_flops = "500G"         # operations a second, for prompts
    gpu = "cuda"               # cuda, rocm, vulkan, metal
    gpu_memory = "8GiB"        # that is free there; needed unless the GPU uses the machine's
    gpu_bandwidth = "200GB/s"
    gpu_flops = "8T"
    unified = false            # the GPU uses the machine's memory; metal does
    disk = "2GB/s"             # reading; without it, nothing is read from disk for each token
    link = "1gbit"             # its cable or radio, and the round trip through it to any other peer
    rtt = "0.4ms"

    [[link]]                   # between two peers, instead of what their cables allow
    from = "desk"
    to = "attic"
    bandwidth = "100mbit"
    rtt = "4ms"

Bare numbers are bytes, bytes a second, operations a second and seconds.
"""

from __future__ import annotations

import base64
import difflib
import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from peer.errors import CommandError
from peer.planning import trust
from peer.planning.plan import check
from peer.planning.profile import PEERS_MAX, EngineProfile, Profile
from peer.planning.split import unusable
from peer.words import cables
from peer.words.basis import Basis
from peer.words.cables import Cable
from peer.words.paces import Pace
from peer.words.quantities import BANDWIDTH, OPERATIONS, RATE, SIZE, SPAN, Quantity

FILE_BYTES_MAX = 16 << 20
BACKEND = "llama_cpp"
GPUS = ("cuda", "rocm", "vulkan", "metal")
_PEER = ("name", "os", "cores", "memory", "cpu_bandwidth", "cpu_flops", "gpu", "gpu_memory",
         "gpu_bandwidth", "gpu_flops", "unified", "disk", "link", "rtt")  # fmt: skip
_LINK = ("from", "to", "bandwidth", "rtt")


@dataclass(frozen=True, slots=True)
class Source:
    """What a file holds. paces: by peer id and kind of processor, where they were written down."""

    basis: Basis
    paces: Mapping[str, Mapping[str, Pace]] = field(default_factory=dict)
    cables: Mapping[str, Cable] = field(default_factory=dict)


def read(path: Path) -> Source:
    """A file's profiles, every one checked. Raises: CommandError (2), naming the peer and field."""
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror}", exit_code=2) from None
    if len(data) > FILE_BYTES_MAX:
        raise CommandError(f"{path} is no file of profiles: it is too large", exit_code=2)
    try:
        if path.suffix == ".json":
            return _from_json(data)
        return _from_toml(data)
    except _Wrong as error:
        raise CommandError(f"{path}: {error}", exit_code=2) from None


class _Wrong(Exception):
    """What in the file cannot be used."""


# JSON ------------------------------------------------------------------------------------------


def _from_json(data: bytes) -> Source:
    try:
        told = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _Wrong(f"not JSON: {error}") from None
    listed = told.get("profiles") if isinstance(told, dict) else None
    if not isinstance(listed, list):
        raise _Wrong("it has no list of `profiles`; write one with: halka plan --save home.json")
    for number, each in enumerate(listed, 1):
        name = each.get("name") if isinstance(each, dict) else None
        peer = f"peer {name}" if isinstance(name, str) and name else f"profile {number}"
        try:
            profile = msgspec.convert(each, Profile)
        except msgspec.ValidationError as error:
            raise _Wrong(f"{peer}: {error}") from None
        if wrong := trust.fault(profile):
            raise _Wrong(wrong)
    try:
        basis = msgspec.convert(told, Basis)
    except msgspec.ValidationError as error:
        raise _Wrong(str(error)) from None
    if not listed or len({profile.peer_id for profile in basis.profiles}) != len(listed):
        raise _Wrong("a peer is there twice" if listed else "it has no profiles")
    known = [model.shape for model in basis.models] + ([basis.shape] if basis.shape else [])
    if wrong := next(filter(None, map(unusable, known)), "") or _not_a_plan(basis):
        raise _Wrong(f"{wrong}; write it again with: halka plan --save home.json")
    return Source(basis)


def _not_a_plan(basis: Basis) -> str:
    wrong = check(basis.plan) if basis.plan else ""
    return f"its plan cannot be: {wrong}" if wrong else ""


# TOML ------------------------------------------------------------------------------------------


def _from_toml(data: bytes) -> Source:
    try:
        told = tomllib.loads(data.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _Wrong(f"not TOML: {error}") from None
    if unknown := [key for key in told if key not in ("peer", "link")]:
        raise _Wrong(f"`{unknown[0]}` is not understood: there are [[peer]] and [[link]]")
    peers = [_Fields(each, f"peer {n}", _PEER) for n, each in enumerate(_tables(told, "peer"), 1)]
    if not 1 <= len(peers) <= PEERS_MAX:
        raise _Wrong(f"it has {len(peers)} peers; [[peer]] with name and memory, 1 to {PEERS_MAX}")
    profiles = [_profile(fields) for fields in peers]
    by_name = {profile.name: profile.peer_id for profile in profiles}
    if len(by_name) != len(profiles):
        names = [profile.name for profile in profiles]
        twice = next(name for name in names if names.count(name) > 1)
        raise _Wrong(f"peer {twice}: name: two peers have it")
    ways = {p.peer_id: f.cable() for p, f in zip(profiles, peers, strict=True)}
    linked = cables.linked(profiles, {p: way for p, way in ways.items() if way})
    for number, each in enumerate(_tables(told, "link"), 1):
        linked = _between(linked, by_name, _Fields(each, f"link {number}", _LINK))
    for profile in linked:
        if wrong := trust.fault(profile):
            raise _Wrong(wrong)
    paces = {p.peer_id: f.paces(p) for p, f in zip(profiles, peers, strict=True)}
    return Source(Basis(tuple(linked)), paces, {p: way for p, way in ways.items() if way})


def _tables(told: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    listed = told.get(key, [])
    if not isinstance(listed, list) or not all(isinstance(each, dict) for each in listed):
        raise _Wrong(f"`{key}` is a list of tables: write [[{key}]] above each")
    return listed


class _Fields:
    """One table, its fields checked as they are asked for. what: for the reason of a refusal."""

    def __init__(self, table: dict[str, Any], what: str, known: Sequence[str]) -> None:
        self.table, self.what = table, what
        name = table.get("name")
        if isinstance(name, str) and name:
            self.what = f"peer {name}"
        for key in table:
            if key not in known:
                near = difflib.get_close_matches(key, known, 1)
                hint = f"; is it `{near[0]}`?" if near else f": it is one of {', '.join(known)}"
                raise self.wrong(key, f"there is no such field{hint}")

    def wrong(self, key: str, why: str) -> _Wrong:
        return _Wrong(f"{self.what}: {key}: {why}")

    def number(self, key: str, kind: Quantity, *, required: bool = False) -> float:
        """The field's value; 0 where it is left out."""
        if key not in self.table:
            if required:
                raise self.wrong(key, f"is missing: it is {kind.what}")
            return 0.0
        try:
            return kind.read(self.table[key])
        except ValueError as error:
            raise self.wrong(key, str(error)) from None

    def text(self, key: str, *, default: str | None = None, of: Sequence[str] = ()) -> str:
        given = self.table.get(key, default)
        if given is None:
            raise self.wrong(key, "is missing")
        if not isinstance(given, str) or not 1 <= len(given) <= 64 or not given.isprintable():
            raise self.wrong(key, f"is a short text, not {given!r}"[:100])
        if of and given not in of:
            raise self.wrong(key, f"is one of {', '.join(of)}, not {given}")
        return given

    def cable(self) -> Cable | None:
        """What `link` and `rtt` say of the peer's own cable."""
        rate, rtt_s = self.number("link", RATE), self.number("rtt", SPAN)
        return Cable(rate, rtt_s) if rate or rtt_s else None

    def paces(self, profile: Profile) -> dict[str, Pace]:
        """By kind of processor, where a bandwidth or operations were written down."""
        gpu = next((e.kind for e in profile.engines if e.kind != "cpu"), "")
        found = {
            kind: Pace(
                self.number(f"{prefix}_bandwidth", BANDWIDTH),
                self.number(f"{prefix}_flops", OPERATIONS),
            )
            for prefix, kind in (("cpu", "cpu"), ("gpu", gpu))
            if kind
        }
        return {kind: pace for kind, pace in found.items() if pace != Pace()}


def _profile(fields: _Fields) -> Profile:
    """A peer without its speeds and links."""
    name = fields.text("name")
    memory = int(fields.number("memory", SIZE, required=True))
    cores = fields.table.get("cores", 4)
    if not isinstance(cores, int) or isinstance(cores, bool) or not 1 <= cores <= 4096:
        raise fields.wrong("cores", f"is a whole number from 1 on, not {cores!r}"[:100])
    unified = fields.table.get("unified", fields.table.get("gpu") == "metal")
    if not isinstance(unified, bool):
        raise fields.wrong("unified", "is true or false")
    engines = [EngineProfile(BACKEND, "CPU", "cpu")]
    if "gpu" in fields.table:
        kind = fields.text("gpu", of=GPUS)
        room = int(fields.number("gpu_memory", SIZE, required=not unified)) or memory
        engines.insert(0, EngineProfile(BACKEND, f"{kind} GPU", kind, room, room))
    elif lost := next((key for key in fields.table if key.startswith("gpu_")), ""):
        raise fields.wrong("gpu", f"is missing, but {lost} is there: it is one of {GPUS}")
    return Profile(
        peer_id=peer_id(name),
        name=name,
        os=fields.text("os", default="linux"),
        cores=cores,
        memory_total_bytes=memory,
        memory_available_bytes=memory,
        engines=tuple(engines),
        unified_memory=unified,
        threads=cores,
        disk_read_bytes_per_s=fields.number("disk", RATE),
    )


def peer_id(name: str) -> str:
    """A peer id for a peer that has none: always the same for the same name."""
    return base64.b32encode(hashlib.sha256(name.encode()).digest()[:10]).decode().lower()


def _between(
    profiles: Sequence[Profile], by_name: Mapping[str, str], fields: _Fields
) -> list[Profile]:
    """The profiles with what one [[link]] says."""
    ends = []
    for key in ("from", "to"):
        name = fields.text(key)
        if name not in by_name:
            raise fields.wrong(key, f"there is no peer {name}: it is one of {', '.join(by_name)}")
        ends.append(by_name[name])
    if ends[0] == ends[1]:
        raise fields.wrong("to", "is the same peer as `from`")
    way = Cable(fields.number("bandwidth", RATE), fields.number("rtt", SPAN))
    if not way.bytes_per_s and not way.rtt_s:
        raise fields.wrong("bandwidth", "is missing, and so is rtt: the link says nothing")
    a, b = (next(p for p in profiles if p.peer_id == end) for end in ends)
    changed = {
        a.peer_id: cables.with_link(a, cables.overridden(a, b, way)),
        b.peer_id: cables.with_link(b, cables.overridden(b, a, way)),
    }
    return [changed.get(p.peer_id, p) for p in profiles]
