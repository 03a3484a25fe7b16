"""Sightings: who may be out there, where, with which key. Hints, never proofs.

Sources: mDNS, peers remembered from before, the setting `peers`, and what members tell each other
(that one is the driver's). mDNS is never the failure detector: a peer that was killed stays
announced for minutes, so the end of a record means nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Sequence

from peer.cluster import addresses, keydoor
from peer.cluster.mdns import Announced, Mdns, cluster_mark
from peer.config import Config
from peer.protocol import Sighted

log = logging.getLogger("halka.cluster")

ASK_AGAIN_MIN_S = 0.3  # a static peer that did not answer its key query
RESOLVE_S = 5.0  # for a static peer's host name


class Discovery:
    """Looks for peers until cancelled.

    me: this peer's record of now. seen: takes every sighting, checked as far as one can be.
    other_cluster: takes a peer of another cluster; it is not dialled.
    """

    def __init__(
        self,
        config: Config,
        *,
        me: Callable[[], Announced],
        seen: Callable[[Sighted], None],
        other_cluster: Callable[[Announced], None],
        clock: Callable[[], float],
    ) -> None:
        self._config, self._me, self._clock = config, me, clock
        self._seen, self._other_cluster = seen, other_cluster
        self._mark = cluster_mark(config.cluster)
        self._mdns = Mdns(me, self._announced) if config.mdns else None
        self._doors: dict[str, asyncio.DatagramTransport] = {}
        self._door_problem = ""
        self._loopback = False

    @property
    def problem(self) -> str:
        """What keeps peers from being found, for people; "" where nothing does."""
        mdns = self._mdns.problem if self._mdns is not None else ""
        return "; ".join(text for text in (mdns, self._door_problem) if text)

    @property
    def complete(self) -> bool:
        """Whether every address that was given to `follow` is answered on."""
        return not self._door_problem

    async def follow(self, hosts: Sequence[str], port: int) -> None:
        """Listen and announce on these addresses from now on. A failure is told in `problem`."""
        self._loopback = any(addresses.read(addresses.write(h, port))[0].is_loopback for h in hosts)
        for host in set(self._doors) - set(hosts):
            self._doors.pop(host).close()
        self._door_problem = ""
        me = self._me()
        answer = keydoor.Answer(me.protocol, me.peer_id, me.key)
        for host in hosts:
            if host in self._doors:
                continue
            try:
                self._doors[host] = await keydoor.open_door(host, port, answer, self._clock)
            except OSError as error:
                self._door_problem = (
                    f"UDP port {port} of {host} is taken ({error.strerror}), so peers that name "
                    "this one in their setting `peers` cannot ask for its key; choose another port"
                )
                log.warning("key_door=closed because=%s", self._door_problem)
        if self._mdns is not None:
            self._mdns.follow(hosts)

    async def run(self) -> None:
        """Look for peers."""
        try:
            async with asyncio.TaskGroup() as tasks:
                if self._mdns is not None:
                    tasks.create_task(self._mdns.run())
                for place in self._config.peers:
                    tasks.create_task(self._ask_static(place))
                await asyncio.Event().wait()  # the doors stay open, also with nothing to look for
        finally:
            self.close()

    def close(self) -> None:
        """Close the key doors. Nobody is answered any more."""
        for door in self._doors.values():
            door.close()
        self._doors.clear()

    def usable(self, sighted: Sighted) -> Sighted:
        """The sighting with the addresses that this machine may dial on another's word."""
        places = addresses.usable(sighted.addresses, loopback=self._loopback)
        return Sighted(peer_id=sighted.peer_id, key=sighted.key, addresses=places)

    def _announced(self, record: Announced) -> None:
        if record.cluster_mark != self._mark:
            self._other_cluster(record)
            return
        self._seen(self.usable(Sighted(record.peer_id, record.key, record.addresses)))

    async def _ask_static(self, place: str) -> None:
        host, _, port_text = place.rpartition(":")
        host, port = host.removeprefix("[").removesuffix("]"), int(port_text)
        again_s, said = ASK_AGAIN_MIN_S, ""
        while True:
            why = ""
            try:
                for ip in await self._resolve(host):
                    with contextlib.suppress(OSError, TimeoutError):
                        answer = await keydoor.ask(ip, port)
                        break
                else:
                    raise TimeoutError("no halka answers there")
                self._seen(Sighted(answer.peer_id, answer.key, (addresses.write(ip, port),)))
                again_s = self._config.timing.dial_again_max_s
            except (OSError, TimeoutError, ValueError) as error:
                why = str(error) or "its name is not resolved"
                again_s = min(again_s * 2, self._config.timing.dial_again_max_s)
            if why and why != said:
                log.warning("static_peer=%s not_found because=%s", place, why)
            said = why
            await asyncio.sleep(again_s)

    async def _resolve(self, host: str) -> list[str]:
        """Literal addresses of a host, a few. Raises OSError or TimeoutError."""
        loop = asyncio.get_running_loop()
        found = await asyncio.wait_for(
            loop.getaddrinfo(host, None, type=socket.SOCK_DGRAM), RESOLVE_S
        )
        ips = dict.fromkeys(str(entry[4][0]).partition("%")[0] for entry in found)
        return list(ips)[:4]
