"""By which ways this peer's stages reach the others: the measured ones, for as long as they last.

A stage connects once for its plan. So before it is told where the next stage is, the ways to that
peer are given a moment to be measured; and when a way breaks that a stage goes by, its plan is over
at once, as the stage itself would find only after many seconds of silence: the peers still hear
each other by another way, so that nobody else would notice.
"""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import ip_address

from peer.cluster.driver import Cluster
from peer.meeting import connecting
from peer.planning.duty_events import ConnectStage
from peer.planning.plan import PlanId
from peer.ring.supervisor import Supervisor

WAYS_S = 3.0  # for the ways to one peer to be measured, before the link's own way is taken


class Hops:
    """Of one agent. broke: told of a plan whose stage has lost its way, and why, for people."""

    def __init__(
        self, cluster: Cluster, supervisor: Supervisor, broke: Callable[[PlanId, str], None]
    ) -> None:
        self._cluster, self._supervisor, self._broke = cluster, supervisor, broke
        self._hosts: dict[str, str] = {}  # by which members were reached last
        self._by: dict[PlanId, set[tuple[str, str]]] = {}  # peer and host of each hop
        cluster.ways.lost = self._lost

    def met(self, peer_id: str) -> None:
        """The peer is a member now."""
        self._hosts[peer_id] = self._cluster.address_of(peer_id) or "127.0.0.1"

    def host_of(self, peer_id: str) -> str:
        """The host by which this peer is linked with another (or itself), as in a URL."""
        if peer_id == self._cluster.me:
            return "127.0.0.1"
        return _in_url(self._bare_host_of(peer_id))

    def _bare_host_of(self, peer_id: str) -> str:
        host = self._hosts[peer_id] = self._cluster.address_of(peer_id) or self._hosts[peer_id]
        return host

    async def connect(self, action: ConnectStage) -> None:
        """Tell the plan's stage where it meets the others."""
        for peer_id in {action.next.peer_id, *(each.peer_id for each in action.island)}:
            await self._cluster.ways.settled(peer_id, WAYS_S)
        used: set[tuple[str, str]] = set()

        def by_way(peer_id: str) -> str:
            if peer_id == self._cluster.me:
                return self.host_of(peer_id)
            host = self._cluster.ways.way_to(peer_id) or self._bare_host_of(peer_id)
            used.add((peer_id, host))
            return _in_url(host)

        meet = self._meeting_host if len(action.island) < 3 else self._common_host
        order = connecting(action, self._cluster.me, by_way, meet)
        if used and action.plan in self._supervisor.pids():  # it may have ended meanwhile
            self._by[action.plan] = used
        self._supervisor.send(action.plan, order)

    def _meeting_host(self, peer_id: str) -> str:
        """By which an island meets: MLX knows IPv4 only. Where the peer is known by no such address
        its stage says so."""
        chosen = self._cluster.ways.way_to(peer_id)
        others = self._cluster.ways.hosts_of(peer_id)
        known = (chosen, self._bare_host_of(peer_id), *others)
        return next((host for host in known if host and ":" not in host), _in_url(known[1] or ""))

    def _common_host(self, peer_id: str) -> str:
        """The same for an island of three or more, all of which have to reach it there: not by the
        cable to this one. Addresses of cables without a router are link-local."""
        hosts = (self._bare_host_of(peer_id), *self._cluster.ways.hosts_of(peer_id))
        known = [host for host in hosts if ":" not in host]
        common = (host for host in known if not ip_address(host).is_link_local)
        return next(common, "") or self._meeting_host(peer_id)

    def over(self, plan: PlanId) -> None:
        """The plan's stage is told to stop."""
        self._by.pop(plan, None)

    def _lost(self, peer_id: str, host: str) -> None:
        for plan in [plan for plan, used in self._by.items() if (peer_id, host) in used]:
            self.over(plan)
            self._broke(plan, f"the link to peer {peer_id} broke")


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
