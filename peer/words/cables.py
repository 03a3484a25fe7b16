"""Links between peers from what is known of each one's own cable or radio. Pure.

A way from one peer to another is as fast as the slower of its two ends, and its round trip is the
longer one: what a home's switch or router adds is in them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from peer.planning import costs
from peer.planning.profile import Link, Profile


@dataclass(frozen=True, slots=True)
class Cable:
    """One peer's end. 0: not told."""

    bytes_per_s: float = 0.0
    rtt_s: float = 0.0


def link(a: Profile, b: Profile) -> Link | None:
    """The way from a to b, as either of them measured it."""
    there = next((x for x in a.links if x.peer_id == b.peer_id), None)
    if there is not None and there.bytes_per_s:
        return there
    back = next((x for x in b.links if x.peer_id == a.peer_id), None)
    if back is None:
        return there
    return Link(b.peer_id, there.rtt_s if there else back.rtt_s, back.bytes_per_s)


def with_link(profile: Profile, new: Link) -> Profile:
    """The profile with this link in the place of the one that it had to the same peer."""
    others = tuple(x for x in profile.links if x.peer_id != new.peer_id)
    return replace(profile, links=(*others, new))


def overridden(a: Profile, b: Profile, way: Cable) -> Link:
    """The way from a to b, with what is told of it in the place of what was known."""
    old = link(a, b)
    return Link(
        b.peer_id,
        way.rtt_s or (old.rtt_s if old else costs.RTT_S),
        way.bytes_per_s or (old.bytes_per_s if old else 0.0),
    )


def linked(profiles: Sequence[Profile], ends: Mapping[str, Cable]) -> list[Profile]:
    """The profiles with links between all whose ends are known, by peer id."""
    out = []
    for a in profiles:
        for b in profiles:
            if a is not b and (a.peer_id in ends or b.peer_id in ends):
                mine, other = ends.get(a.peer_id, Cable()), ends.get(b.peer_id, Cable())
                rates = [end.bytes_per_s for end in (mine, other) if end.bytes_per_s]
                rtt_s = max(mine.rtt_s, other.rtt_s) or costs.RTT_S
                a = with_link(a, Link(b.peer_id, rtt_s, min(rates, default=0.0)))
        out.append(a)
    return out


def recabled(profiles: Sequence[Profile], peer_id: str, cable: Cable) -> list[Profile]:
    """The profiles if one peer had this cable: its links are then as fast as that and the other
    ends allow, of which is known how fast they are with others."""
    at = next(p for p in profiles if p.peer_id == peer_id)
    changed = {p.peer_id: p for p in profiles}
    for other in profiles:
        if other is at:
            continue
        rate = cable.bytes_per_s
        if rate and (best := _best(other, profiles, peer_id)):
            rate = min(rate, best)
        way = Cable(rate, cable.rtt_s)
        there, back = overridden(at, other, way), overridden(other, at, way)
        changed[peer_id] = with_link(changed[peer_id], there)
        changed[other.peer_id] = with_link(other, back)
    return [changed[p.peer_id] for p in profiles]


def _best(of: Profile, profiles: Sequence[Profile], without: str) -> float:
    """The fastest that a peer is known to send to anybody else; 0: not known."""
    others = [p for p in profiles if p.peer_id not in (of.peer_id, without)]
    found = [found.bytes_per_s for other in others if (found := link(of, other))]
    return max(found, default=0.0)
