"""Where a stage meets the others of its ring and island, as this machine reaches them."""

from __future__ import annotations

import socket
from collections.abc import Callable

from peer.planning.duty_events import ConnectStage
from peer.protocol import Follower, StageConnect

_LOOPBACK = ("127.0.0.1", "[::1]")


def connecting(
    action: ConnectStage, me: str, host_of: Callable[[str], str], meet_at: Callable[[str], str]
) -> StageConnect:
    """The order to this peer's stage. host_of: another peer's host as in a URL; meet_at: the same
    for islands."""
    link = action.next
    first, *others = action.island or (link,)
    leads = first.peer_id == me and bool(others)
    hosts = {each.peer_id: meet_at(each.peer_id) for each in others} if leads else {}
    if leads:
        hosts[me] = _own_host(hosts[others[0].peer_id])
    return StageConnect(
        f"tcp://{host_of(link.peer_id)}:{link.ring_port}",
        link.key,
        action.previous_key,
        tuple(f"{hosts[p.peer_id]}:{p.island_port}" for p in (first, *others) if leads),
        tuple(
            Follower(f"tcp://{host_of(each.peer_id)}:{each.ring_port}", each.key)
            for each in (others if leads else ())
        ),
    )


def _own_host(other: str) -> str:
    """The address of this machine that the other host sees. Nothing is sent."""
    if other in _LOOPBACK:
        return other
    host = other.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))
            own = str(probe.getsockname()[0])
    except OSError:  # no way goes there now: the stage cannot listen at that address, and says so
        return other
    return f"[{own}]" if ":" in own else own
