"""Announcing this peer and hearing of others by mDNS, on explicit interfaces, without the system's.

Whatever goes wrong here (port 5353 taken for itself by another program, an interface that vanished,
a name conflict) is said once, kept in `problem`, and tried again later: the cluster works without
mDNS, through remembered and static peers. Names hold the peer id, so that two machines of one host
name stay two. What is heard is bounded: names that are not ours are ignored, a few are looked up at
once, the rest wait in a short queue or are heard again.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import ipaddress
import logging
import re
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from zeroconf import Error as ZeroconfError
from zeroconf import IPVersion, ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from peer.cluster import addresses
from peer.cluster.identity import peer_id_of

log = logging.getLogger("halka.cluster")

GROUP = "224.0.0.251"
TYPE = "_halka._tcp.local."
NAME = re.compile(r"halka-([a-z2-7]{16})\._halka\._tcp\.local\.", re.IGNORECASE)
LOOKUPS_MAX = 4  # at once
WAITING_MAX = 64  # names that wait for a lookup
LOOKUP_S = 3.0
AGAIN_MIN_S, AGAIN_MAX_S = 2.0, 60.0


@dataclass(frozen=True, slots=True)
class Announced:
    """A peer's record: protocol version, peer id, key, its cluster's mark, where it listens."""

    protocol: int
    peer_id: str
    key: str
    cluster_mark: str
    addresses: tuple[str, ...]


def cluster_mark(name: str) -> str:
    """A short hash of the cluster's name; the name itself is nobody's business."""
    return hashlib.blake2b(name.encode(), digest_size=8, person=b"halka-cluster").hexdigest()


def record_of(me: Announced) -> AsyncServiceInfo:
    """What is announced. No host name, model or memory: only what is needed to dial."""
    places = [addresses.read(address) for address in me.addresses]
    return AsyncServiceInfo(
        TYPE,
        f"halka-{me.peer_id}.{TYPE}",
        port=places[0][1] if places else 0,
        addresses=[ip.packed for ip, _ in places],
        server=f"halka-{me.peer_id}.local.",
        properties={
            "v": str(me.protocol),
            "id": me.peer_id,
            "key": me.key,
            "c": me.cluster_mark,
        },
    )


def read_record(info: AsyncServiceInfo) -> Announced:
    """What a record says, checked. Raises ValueError."""
    text = {}
    for name in (b"v", b"id", b"key", b"c"):
        value = info.properties.get(name)
        if not isinstance(value, bytes) or len(value) > 64:
            raise ValueError(f"the record has no good {name.decode()}")
        text[name.decode()] = value.decode("ascii")
    if not text["v"].isdecimal() or len(text["v"]) > 5:
        raise ValueError("the record's protocol version is no number")
    if peer_id_of(text["key"]) != text["id"]:
        raise ValueError("the record's peer id does not belong to its key")
    ips = (ipaddress.ip_address(raw) for raw in info.addresses_by_version(IPVersion.All)[:8])
    places = tuple(
        addresses.write(str(ip), info.port or 0)
        for ip in ips
        if not (ip.version == 6 and ip.is_link_local)  # means nothing without its zone
    )
    found = addresses.usable(places, loopback=True)
    return Announced(int(text["v"]), text["id"], text["key"], text["c"], found)


class Mdns:
    """Announces `me()` and tells `heard` of others, until cancelled."""

    def __init__(self, me: Callable[[], Announced], heard: Callable[[Announced], None]) -> None:
        self._me, self._heard = me, heard
        self._hosts: tuple[str, ...] = ()
        self._changed = asyncio.Event()
        self._names: asyncio.Queue[tuple[Zeroconf, str]] = asyncio.Queue(WAITING_MAX)
        self.problem = ""

    def follow(self, hosts: Sequence[str]) -> None:
        """Use these addresses' interfaces from now on, and announce anew."""
        if self._hosts != tuple(hosts):
            self._hosts = tuple(hosts)
            self._changed.set()

    async def run(self) -> None:
        """Keep at it."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(LOOKUPS_MAX):
                tasks.create_task(self._look_up())
            again_s = AGAIN_MIN_S
            while True:
                if not self._hosts:
                    await self._changed.wait()
                self._changed.clear()
                try:
                    await self._serve()
                except (OSError, ZeroconfError, RuntimeError, TimeoutError, ValueError) as error:
                    self._complain(error)
                try:
                    await asyncio.wait_for(self._changed.wait(), again_s)
                    again_s = AGAIN_MIN_S
                except TimeoutError:
                    again_s = min(AGAIN_MAX_S, again_s * 2)

    async def _serve(self) -> None:
        """Announce and listen; returns when it has to begin anew."""
        version = _version_of(self._hosts)
        zeroconf = AsyncZeroconf(interfaces=_of_version(self._hosts, version), ip_version=version)
        browser: AsyncServiceBrowser | None = None
        try:
            browser = AsyncServiceBrowser(zeroconf.zeroconf, TYPE, handlers=[self._on_change])
            await (await zeroconf.async_register_service(record_of(self._me())))
            self._mended()
            while self._hosts and _version_of(self._hosts) == version:
                await self._changed.wait()
                self._changed.clear()
                if not self._hosts or _version_of(self._hosts) != version:
                    break
                await zeroconf.async_update_interfaces(_of_version(self._hosts, version))
                await (await zeroconf.async_update_service(record_of(self._me())))
                self._mended()
            self._changed.set()
        finally:
            if browser is not None:
                await browser.async_cancel()
            await zeroconf.async_close()

    def _mended(self) -> None:
        if self.problem:
            log.info("mdns=works_again")
        self.problem = ""

    def _complain(self, error: Exception) -> None:
        why = str(error) or type(error).__name__
        hint = ""
        if isinstance(error, OSError) and "in use" in why.lower():
            hint = ": another program keeps UDP port 5353 (avahi with disallow-other-stacks?)"
        problem = (
            f"mDNS does not work ({why}){hint}; peers are found only through remembered "
            'addresses and the setting `peers = ["host:port"]`'
        )
        if problem != self.problem:
            log.warning("mdns=broken because=%s", problem)
        self.problem = problem

    # What others announce -------------------------------------------------------------------------

    def _on_change(
        self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange
    ) -> None:
        # A record that ends says nothing: the links know better who is alive.
        if state_change is ServiceStateChange.Removed or not NAME.fullmatch(name):
            return
        if self._me().peer_id in name.lower() or self._names.full():
            return
        self._names.put_nowait((zeroconf, name))

    async def _look_up(self) -> None:
        while True:
            zeroconf, name = await self._names.get()
            try:
                # Also the name is a stranger's: zeroconf raises where it does not end in our TYPE.
                info = AsyncServiceInfo(TYPE, name)
                if info.load_from_cache(zeroconf) or await info.async_request(
                    zeroconf, LOOKUP_S * 1000
                ):
                    self._heard(read_record(info))
            except (OSError, ZeroconfError, ValueError) as error:
                log.debug("< mdns name=%s ignored because=%s", name, error)


def _version_of(hosts: Sequence[str]) -> IPVersion:
    return IPVersion.V6Only if all(":" in host for host in hosts) else IPVersion.V4Only


def _of_version(hosts: Sequence[str], version: IPVersion) -> list[str]:
    """Those of the version that can multicast now; one that vanished must not stop the others.

    Raises: OSError where none can.
    """
    wanted = [host for host in hosts if (":" in host) == (version is IPVersion.V6Only)]
    good = [host for host in wanted if ":" in host or multicasts(host)]
    if not good:
        raise OSError(errno.ENODEV, f"no multicast on {', '.join(wanted)}")
    return good


def multicasts(host: str) -> bool:
    """Whether multicast can be listened to now on an IPv4 address of this machine."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        member = socket.inet_aton(GROUP) + socket.inet_aton(host)
        try:
            probe.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, member)
        except OSError:
            return False
    return True
