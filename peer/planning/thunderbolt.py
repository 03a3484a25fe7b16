"""Thunderbolt: which ports a Mac has, and which Macs are cabled to each other. Pure.

Three read-only commands of macOS tell of a machine's ports. `system_profiler` lists a bus for each
port, with an identity of its own (domain_uuid_key) and that of the Mac at the cable's other end;
`networksetup` tells which network interface "Thunderbolt 2" is; `ibv_devices` which RDMA devices
there are. What two Macs tell is put together by those identities, and only where both tell the
same: the word of one peer alone makes no cable. A Mac behind a dock is no cable either, because
RDMA needs a direct one.

What the commands print is read with suspicion: whatever is odd is passed over, nothing is believed
beyond what a `Port` may hold.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from peer.errors import HalkaError
from peer.planning.profile import Port, Profile

TEXT_BYTES_MAX = 1 << 20  # of one command's output
PORTS_MAX = 16
BUSES_MAX = 64  # looked at
LINES_MAX = 4096
ADDRESSES_MAX = 8
THUNDERBOLT_5 = 80e9  # bits a second; a port of the fourth kind never tells more than 40e9
BRIDGE = "bridge0"  # macOS's Thunderbolt Bridge; others are of virtual machines

_UUID = re.compile(r"[0-9A-F][0-9A-F-]{7,63}")
_RECEPTACLE = re.compile(r"[0-9]{1,3}")
_INTERFACE = re.compile(r"en[0-9]{1,4}")
_RDMA = re.compile(r"rdma_[a-z]{2,12}[0-9]{1,4}")
_SPEED = re.compile(r"(?:Up to )?([0-9]{1,4})(?:\.[0-9]{1,3})? ?Gb/s(?: x[0-9]{1,2})?")
_HARDWARE = re.compile(r"Hardware Port: Thunderbolt ([0-9]{1,3})")


class Unread(HalkaError):
    """A command printed something else than what it prints. Its machine has no ports then."""


@dataclass(frozen=True, slots=True)
class Cable:
    """A Thunderbolt cable between two peers, in order of their ids, and its two ends.

    bits_per_s: what both ends tell, the smaller; 0: neither does.
    """

    peers: tuple[str, str]
    ports: tuple[Port, Port]
    bits_per_s: float

    @property
    def rdma(self) -> bool:
        """Whether both ends have an RDMA device."""
        return all(port.rdma for port in self.ports)

    def end(self, peer_id: str) -> Port:
        """The port of one of the two peers."""
        return self.ports[self.peers.index(peer_id)]


# What the commands print ----------------------------------------------------------------------


def ports(
    profiler: str,
    hardware: str,
    devices: str = "",
    addresses: Mapping[str, Sequence[str]] | None = None,
) -> tuple[Port, ...]:
    """A machine's Thunderbolt ports, by receptacle.

    profiler, hardware, devices: what `system_profiler SPThunderboltDataType -json`, `networksetup
    -listallhardwareports` and `ibv_devices` printed. addresses: of every interface, by its name; a
    port that is a member of the Thunderbolt Bridge has none of its own, and is given the bridge's.
    Raises: Unread, where the first one is not what it should be.
    """
    addresses = addresses or {}
    names, rdma = interfaces(hardware), rdma_devices(devices)
    found: dict[str, Port] = {}
    for bus in _buses(profiler):
        tag = bus.get("receptacle_1_tag")
        uuid = _uuid(bus.get("domain_uuid_key"))
        if not uuid or not isinstance(tag, dict) or uuid in found:
            continue
        receptacle = _matching(_RECEPTACLE, tag.get("receptacle_id_key"))
        interface = names.get(receptacle, "")
        own = addresses.get(interface, ()) or (addresses.get(BRIDGE, ()) if interface else ())
        found[uuid] = Port(
            uuid,
            _other_end(bus.get("_items"), uuid),
            receptacle,
            interface,
            _bits_per_s(tag.get("current_speed_key")),
            tuple(own)[:ADDRESSES_MAX],
            device if (device := f"rdma_{interface}") in rdma else "",
        )
    ordered = sorted(found.values(), key=lambda port: (int(port.receptacle or 999), port.uuid))
    return tuple(ordered[:PORTS_MAX])


def interfaces(hardware: str) -> dict[str, str]:
    """Interfaces by receptacle, from what `networksetup -listallhardwareports` printed."""
    found: dict[str, str] = {}
    receptacle = ""
    for line in _lines(hardware):
        if line.startswith("Hardware Port:"):
            told = _HARDWARE.fullmatch(line)
            receptacle = told[1] if told else ""  # also for the Thunderbolt Bridge
        elif receptacle and line.startswith("Device:"):
            name = line.removeprefix("Device:").strip()
            if _INTERFACE.fullmatch(name) and name not in found.values():
                found.setdefault(receptacle, name)
            receptacle = ""
    return dict(list(found.items())[:PORTS_MAX])


def rdma_devices(devices: str) -> frozenset[str]:
    """Names of the RDMA devices that `ibv_devices` printed; two lines of heading are none."""
    words = (line.split() for line in _lines(devices))
    names = [first for first, *_ in filter(None, words) if _RDMA.fullmatch(first)]
    return frozenset(names[:PORTS_MAX])


def bridged(ifconfig: str) -> frozenset[str]:
    """Interfaces that are members of a bridge that is up, from what `ifconfig bridge0` printed;
    () where it is down, or there is none."""
    lines = list(_lines(ifconfig))
    flags = re.search(r"flags=[0-9a-f]+<([A-Z0-9,_]*)>", lines[0]) if lines else None
    if flags is None or "UP" not in flags[1].split(","):
        return frozenset()
    members = (line.removeprefix("member:").split() for line in lines if line.startswith("member:"))
    return frozenset(first for first, *_ in filter(None, members) if _INTERFACE.fullmatch(first))


def _buses(profiler: str) -> list[dict[str, object]]:
    if len(profiler) > TEXT_BYTES_MAX:
        raise Unread("system_profiler printed more than a megabyte about Thunderbolt")
    try:
        told = json.loads(profiler)
    except (ValueError, RecursionError):
        raise Unread("system_profiler printed no JSON about Thunderbolt") from None
    buses = told.get("SPThunderboltDataType") if isinstance(told, dict) else None
    if not isinstance(buses, list):
        raise Unread("system_profiler's JSON has no list SPThunderboltDataType")
    return [bus for bus in buses[:BUSES_MAX] if isinstance(bus, dict)]


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text[:TEXT_BYTES_MAX].splitlines()[:LINES_MAX]]


def _matching(pattern: re.Pattern[str], value: object) -> str:
    return value if isinstance(value, str) and pattern.fullmatch(value) else ""


def _uuid(value: object) -> str:
    return _matching(_UUID, value.upper()) if isinstance(value, str) else ""


def _other_end(items: object, uuid: str) -> str:
    """Identity of the Mac that is plugged in. Docks and displays have none; what hangs on them
    is not at this cable's end."""
    told = items[:BUSES_MAX] if isinstance(items, list) else []
    ids = (_uuid(item.get("domain_uuid_key")) for item in told if isinstance(item, dict))
    return next((other for other in ids if other not in ("", uuid)), "")


def _bits_per_s(value: object) -> float:
    """Of "80 Gb/s" (a cable) or "Up to 120 Gb/s" (what an empty port can do); 0: not told."""
    told = _SPEED.fullmatch(value) if isinstance(value, str) else None
    return float(told[1]) * 1e9 if told else 0.0


# What it means --------------------------------------------------------------------------------


def generation(found: Iterable[Port]) -> int:
    """5 for a Mac with Thunderbolt 5, 4 for one with an earlier kind, 0 where nothing is told.

    An empty port tells what it can do, a used one what its cable does: a Mac all of whose ports
    have slower cables looks like the earlier kind.
    """
    most = max((port.bits_per_s for port in found), default=0.0)
    if any(port.rdma for port in found) or most >= THUNDERBOLT_5:
        return 5
    return 4 if most else 0


def cables(profiles: Iterable[Profile]) -> tuple[Cable, ...]:
    """The cables between these peers, each once, as both of their ends tell of it."""
    ends: dict[str, list[tuple[str, Port]]] = {}
    for profile in profiles:
        for port in profile.ports:
            ends.setdefault(port.uuid, []).append((profile.peer_id, port))
    # Two peers that claim one identity (a disk that was copied, or worse): it is nobody's.
    known = {uuid: claims[0] for uuid, claims in ends.items() if len(claims) == 1}
    found = []
    for uuid, (peer_id, port) in known.items():
        other_id, other = known.get(port.peer_uuid, ("", port))
        if other_id > peer_id and other.peer_uuid == uuid:
            told = [end.bits_per_s for end in (port, other) if end.bits_per_s]
            found.append(Cable((peer_id, other_id), (port, other), min(told, default=0.0)))
    return tuple(sorted(found, key=lambda c: (c.peers, c.ports[0].receptacle, c.ports[0].uuid)))


def fully_cabled(profiles: Iterable[Profile], *, rdma: bool = False) -> tuple[tuple[str, ...], ...]:
    """Groups of two or more peers each of which is cabled to each other one, the largest first.

    Peer ids in order. No group is part of another one, but a peer may be in several.
    rdma: only cables with RDMA devices at both ends count.
    """
    near: dict[str, set[str]] = {}
    for cable in cables(profiles):
        if cable.rdma or not rdma:
            one, other = cable.peers
            near.setdefault(one, set()).add(other)
            near.setdefault(other, set()).add(one)
    groups: list[tuple[str, ...]] = []

    def grow(group: frozenset[str], may: set[str], done: set[str]) -> None:
        """Bron and Kerbosch's: a peer has few ports, so that there are few groups."""
        if not may and not done:
            groups.append(tuple(sorted(group)))
        for peer_id in sorted(may):
            grow(group | {peer_id}, may & near[peer_id], done & near[peer_id])
            may, done = may - {peer_id}, done | {peer_id}

    if near:
        grow(frozenset(), set(near), set())
    return tuple(sorted(groups, key=lambda group: (-len(group), group)))


def device_matrix(group: Sequence[str], profiles: Iterable[Profile]) -> tuple[tuple[str, ...], ...]:
    """RDMA device of each peer of the group towards each other one, in the group's order, "" on the
    diagonal; () where any is missing: then they meet over TCP. Of several cables the first counts.
    """
    devices: dict[tuple[str, str], str] = {}
    for cable in cables(profiles):
        if cable.rdma:
            one, other = cable.peers
            devices.setdefault((one, other), cable.ports[0].rdma)
            devices.setdefault((other, one), cable.ports[1].rdma)
    rows = tuple(
        tuple("" if one == other else devices.get((one, other), "?") for other in group)
        for one in group
    )
    return () if any("?" in row for row in rows) else rows
