"""Which of this machine's addresses the cluster uses: those on a home network, and no others.

Private and unique-local addresses of interfaces that are up, without the ones that containers,
virtual machines and tunnels bring: peers there would be sighted and never reached, or the cluster
would listen where nobody expects it. The setting `interfaces` (names or addresses) overrides this.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import sys
from collections.abc import Iterable
from dataclasses import dataclass

import psutil

from peer.planning.thunderbolt import BRIDGE

log = logging.getLogger("halka.cluster")

# Beginnings of names. "veth" is the host's end of a container's cable; inside it is called eth0.
IGNORED = (
    "docker", "br-", "veth", "virbr", "vnet", "vmnet", "vboxnet", "lxc", "lxdbr", "cni", "podman",
    "flannel", "cali", "tun", "tap", "wg", "ppp", "tailscale", "zt", "nebula",
    "utun", "awdl", "llw", "bridge", "anpi", "ap", "gif", "stf", "ipsec",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Interface:
    """What the system says of one interface. addresses: literal IPs, without a zone."""

    name: str
    up: bool
    addresses: tuple[str, ...]


def survey() -> list[Interface]:
    """The machine's interfaces, now."""
    stats = psutil.net_if_stats()
    found = []
    for name, entries in psutil.net_if_addrs().items():
        ips = tuple(
            entry.address.partition("%")[0]
            for entry in entries
            if entry.family in (socket.AF_INET, socket.AF_INET6)
        )
        found.append(Interface(name, name in stats and stats[name].isup, ips))
    return found


def choose(
    interfaces: Iterable[Interface], wanted: Iterable[str] = (), system: str = sys.platform
) -> tuple[str, ...]:
    """The addresses to listen on and to announce, IPv4 first.

    wanted: the setting `interfaces`; names or addresses, () for every home network. On a Mac its
    Thunderbolt Bridge is one: what makes its ports one network, with cables to other Macs.
    """
    cables = (BRIDGE,) if system == "darwin" else ()
    wanted = frozenset(wanted)
    chosen: set[str] = set()
    for interface in interfaces:
        if not interface.up:
            continue
        for address in interface.addresses:
            ip = ipaddress.ip_address(address)
            if wanted:
                # A link-local IPv6 address means nothing without its zone, so a name skips it.
                named = interface.name in wanted and not (ip.version == 6 and ip.is_link_local)
                if named or address in wanted:
                    chosen.add(address)
            elif interface.name.startswith(IGNORED) and interface.name not in cables:
                continue
            elif _of_a_home(ip):
                chosen.add(address)
    return tuple(sorted(chosen, key=lambda text: (":" in text, text)))


def _of_a_home(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    if ip.is_loopback or ip.is_unspecified or ip.is_multicast:
        return False
    if ip.is_link_local:
        return ip.version == 4  # two machines on one cable, without a router
    return ip.is_private


def missing(chosen: Iterable[str], wanted: Iterable[str]) -> str:
    """A sentence for people where no address was found, else ""."""
    if any(True for _ in chosen):
        return ""
    if names := ", ".join(wanted):
        return f"none of the interfaces {names} is up; correct the setting `interfaces`"
    return (
        "no home network found (no interface that is up has a private address); "
        "where this is wrong, name the interface in the setting `interfaces`"
    )


def host_name() -> str:
    """This machine's name, for people. The system may keep any bytes as one."""
    return socket.gethostname().encode(errors="replace").decode()[:128]


class Hosts:
    """The addresses to use, as of the last look. wanted: the setting `interfaces`."""

    def __init__(self, wanted: tuple[str, ...]) -> None:
        self._wanted = wanted
        self.used: tuple[str, ...] = ()
        self.problem = ""  # for people

    async def look(self) -> bool:
        """Whether they have changed. Loopback stands in for none."""
        try:
            surveyed = await asyncio.to_thread(survey)
        except OSError as error:  # no more descriptors
            self.problem = f"this machine's interfaces cannot be looked at now ({error.strerror})"
            log.warning("interfaces=unknown because=%s", self.problem)
            found = self.used
        else:
            found = choose(surveyed, self._wanted)
            self.problem = missing(found, self._wanted)
        before, self.used = self.used, found or ("127.0.0.1",)
        return self.used != before
