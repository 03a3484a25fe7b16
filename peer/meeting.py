"""Where a stage meets the others of its ring and island, as this machine reaches them."""

from __future__ import annotations

import socket
from collections.abc import Callable

from peer.planning.duty_events import ConnectStage
from peer.protocol import Follower, StageConnect

_LOOPBACK = ("127.0.0.1", "[::1]")


def connecting(action: ConnectStage, me: str, host_of: Callable[[str], str]) -> StageConnect:
    """The order to this peer's stage. host_of: another peer's host as in a URL."""
    link = action.next
    island = action.island
    others = [each for each in island if each.peer_id != me]
    mine = _own_host(host_of(others[0].peer_id)) if others else ""
    hosts = {each.peer_id: host_of(each.peer_id) for each in others} | {me: mine}
    leads = bool(island) and island[0].peer_id == me
    return StageConnect(
        f"tcp://{host_of(link.peer_id)}:{link.ring_port}",
        link.key,
        action.previous_key,
        tuple(f"{hosts[each.peer_id]}:{each.island_port}" for each in island),
        tuple(
            Follower(f"tcp://{hosts[each.peer_id]}:{each.ring_port}", each.key)
            for each in (others if leads else ())
        ),
    )


def _own_host(other: str) -> str:
    """The address of this machine that the other host sees. Nothing is sent."""
    if other in _LOOPBACK:
        return other
    host = other.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))
        own = str(probe.getsockname()[0])
    return f"[{own}]" if ":" in own else own
