"""What if: changes to the profiles of a cluster and to what is wished of its plan. Pure.

--with desk:memory=+8GiB       memory, gpu_memory, disk: +, - or the whole; speed=x2
--with desk:memory=16GiB,disk=2GB/s
--link attic=1gbit,5ms         its own cable: a rate, a round trip, or both
--window desk=0-11             layers as people count them, both ends included
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from peer.errors import CommandError
from peer.planning import trust
from peer.planning.abilities import OWN_MEMORY
from peer.planning.plan import KvType
from peer.planning.profile import EngineProfile, ModelShape, Profile
from peer.planning.wishes import Objective, Wishes
from peer.words import cables, paces
from peer.words.basis import Basis, KnownModel, find, labels
from peer.words.cables import Cable
from peer.words.quantities import RATE, SIZE, SPAN

FIELDS = "memory=+8GiB, gpu_memory=8GiB, disk=2GB/s, speed=x2"


@dataclass(frozen=True, slots=True)
class Edit:
    """One field of one peer. sign: + or - by so much, "" to so much, x times so much."""

    name: str
    field: str
    sign: str
    value: float


@dataclass(frozen=True, slots=True)
class WhatIf:
    """What was typed, read but not yet looked up. joins: names of peers to add."""

    edits: tuple[Edit, ...] = ()
    joins: tuple[str, ...] = ()
    cables: tuple[tuple[str, Cable], ...] = ()
    without: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    windows: tuple[tuple[str, int, int], ...] = ()
    rounds: int = 0
    context: int = 0
    objective: Objective | None = None
    kv_type: KvType | None = None

    @property
    def nothing(self) -> bool:
        """Whether all is to stay as it is."""
        return self == WhatIf()


def _usage(why: str, mend: str = "") -> CommandError:
    return CommandError(why, mend, 2)


def read(args: Namespace) -> WhatIf:
    """The flags of `halka plan`. Raises: CommandError (2)."""
    edits: list[Edit] = []
    joins: list[str] = []
    for text in args.with_ or ():
        name, colon, changes = text.partition(":")
        if not name or (colon and not changes):
            raise _usage(f"--with {text}: it is NAME, or NAME:{FIELDS}")
        if colon:
            edits += [_edit(name, change, text) for change in changes.split(",")]
        else:
            joins.append(name)
    return WhatIf(
        tuple(edits),
        tuple(joins),
        tuple(_cable(text) for text in args.link or ()),
        tuple(args.without or ()),
        tuple(name.strip() for text in args.only or () for name in text.split(",")),
        tuple(_window(text) for text in args.window or ()),
        _number("--rounds", args.rounds, 1, 64),
        _number("--context", args.context, 1, 1 << 31),
        args.objective,
        args.kv,
    )


def _number(flag: str, given: int | None, least: int, most: int) -> int:
    if given is not None and not least <= given <= most:
        raise _usage(f"{flag} {given}: it is a number from {least} to {most:,}")
    return given or 0


def _edit(name: str, change: str, text: str) -> Edit:
    key, equals, value = change.strip().partition("=")
    value = value.removeprefix("=").strip()
    if key == "speed" and equals:
        if not re.fullmatch(r"x?[0-9]*\.?[0-9]+", value) or not 0.01 <= (
            factor := float(value.removeprefix("x"))
        ) <= 100:  # fmt: skip
            raise _usage(f"--with {text}: speed is a factor from x0.01 to x100, such as x2")
        return Edit(name, key, "x", factor)
    kind = {"memory": SIZE, "gpu_memory": SIZE, "disk": RATE}.get(key)
    if kind is None or not equals:
        raise _usage(f"--with {text}: `{change}` is not understood", f"it is one of: {FIELDS}")
    sign = value[:1] if value[:1] in ("+", "-") else ""
    try:
        return Edit(name, key, sign, kind.read(value.removeprefix(sign)))
    except ValueError as error:
        raise _usage(f"--with {text}: {key} {error}") from None


def _cable(text: str) -> tuple[str, Cable]:
    name, _, rest = text.partition("=")
    rate = rtt_s = 0.0
    for piece in rest.split(",") if name and rest else ():
        try:
            if re.search(r"[0-9]\s*(s|ms|us|µs)$", piece):
                rtt_s = SPAN.read(piece)
            else:
                rate = RATE.read(piece)
        except ValueError as error:
            raise _usage(f"--link {text}: it {error}") from None
    if not rate and not rtt_s:
        raise _usage(f"--link {text}: it is NAME=1gbit, NAME=5ms or NAME=100mbit,5ms")
    return name, Cable(rate, rtt_s)


def _window(text: str) -> tuple[str, int, int]:
    found = re.fullmatch(r"(.+)=([0-9]{1,4})(?:[-–]([0-9]{1,4}))?", text)
    if not found or int(found[3] or found[2]) < int(found[2]):
        raise _usage(f"--window {text}: it is NAME=FIRST-LAST, such as desk=0-11")
    return found[1], int(found[2]), int(found[3] or found[2]) + 1


# Done to profiles ------------------------------------------------------------------------------


def profiles(
    known: Sequence[Profile], change: WhatIf, shape: ModelShape, added: Sequence[Profile] = ()
) -> list[Profile]:
    """The profiles as they would be. added: those of `joins`. Raises: CommandError (2)."""
    out = [*known, *added]
    names = labels(out)
    for edit in change.edits:
        peer_id = find(edit.name, names, "--with")
        out = [_edited(p, edit, shape) if p.peer_id == peer_id else p for p in out]
    for name, cable in change.cables:
        out = cables.recabled(out, find(name, names, "--link"), cable)
    for profile in out:
        if any(profile == old for old in known):
            continue
        if wrong := trust.fault(profile):
            raise _usage(f"what would be cannot be: {wrong}")
    return out


def _edited(profile: Profile, edit: Edit, shape: ModelShape) -> Profile:
    match edit.field:
        case "memory":
            return _with_memory(profile, edit)
        case "gpu_memory":
            return _with_gpu_memory(profile, edit)
        case "disk":
            rate = _new(profile.disk_read_bytes_per_s, edit, profile.name)
            return replace(profile, disk_read_bytes_per_s=rate)
        case _:
            return paces.faster(profile, shape, edit.value)


def _new(old: float, edit: Edit, name: str) -> float:
    value = {"+": old + edit.value, "-": old - edit.value, "": edit.value}[edit.sign]
    if value <= 0:
        raise _usage(f"--with {name}:{edit.field}: nothing would be left")
    return value


def _with_memory(profile: Profile, edit: Edit) -> Profile:
    """More or less of the machine's memory; a GPU that uses it gets its share of the change."""
    old = profile.memory_available_bytes
    new = int(_new(old, edit, profile.name))
    engines = tuple(
        replace(e, memory_free_bytes=e.memory_free_bytes * new // old)
        if old and e.kind != "cpu" and not _own(profile, e)
        else e
        for e in profile.engines
    )
    total = max(profile.memory_total_bytes + new - old, new)
    return replace(profile, memory_available_bytes=new, memory_total_bytes=total, engines=engines)


def _with_gpu_memory(profile: Profile, edit: Edit) -> Profile:
    cards = {}  # of several engines, the same one again
    for at, engine in reversed([*enumerate(profile.engines)]):
        if engine.kind != "cpu":
            cards[engine.backend] = at
    if not cards:
        raise _usage(f"--with {profile.name}:gpu_memory: {profile.name} has no GPU")
    engines = [*profile.engines]
    for at in cards.values():
        free = int(_new(engines[at].memory_free_bytes, edit, profile.name))
        total = max(free, engines[at].memory_total_bytes)
        engines[at] = replace(engines[at], memory_free_bytes=free, memory_total_bytes=total)
    return replace(profile, engines=tuple(engines))


def _own(profile: Profile, engine: EngineProfile) -> bool:
    return engine.kind in OWN_MEMORY and not profile.unified_memory


# Done to wishes --------------------------------------------------------------------------------


def wishes(basis: Basis, model: KnownModel, change: WhatIf, names: Mapping[str, str]) -> Wishes:
    """What is wished of the plan: as the cluster's coordinator does, but for what was typed.

    names: labels of all that could take part, by peer id. Raises: CommandError (2).
    """
    mine = next((p for p in basis.profiles if p.peer_id == basis.coordinator), None)
    pinned = {find(name, names, "--window"): (a, b) for name, a, b in change.windows}
    if len(pinned) != len(change.windows):
        raise _usage("--window: one peer is given two windows", "give each peer one")
    for name, first, last in change.windows:
        if last > model.shape.layers:
            raise _usage(
                f"--window {name}={first}-{last - 1}: {model.shape.model} has the layers 0 to "
                f"{model.shape.layers - 1}"
            )
    return Wishes(
        context=change.context or (mine.context_wanted if mine else 0),
        spread_all=any(profile.spread_all for profile in basis.profiles),
        objective=change.objective or (mine.objective if mine else "latency"),
        kv_type=change.kv_type or (mine.kv_type if mine else "f16"),
        flash=mine.flash if mine else "auto",
        speculation=mine.speculation if mine else "auto",
        order=basis.plan.ring if basis.plan else (),
        held={peer_id: frozenset(parts) for peer_id, parts in model.held.items()},
        without=frozenset(find(name, names, "--without") for name in change.without),
        only=frozenset(find(name, names, "--only") for name in change.only),
        pinned=pinned,
        rounds=change.rounds,
    )
