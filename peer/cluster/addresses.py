"""Addresses as the cluster writes them: `tcp://10.0.0.5:42553`, `tcp://[fd00::5]:42553`.

Only literal IP addresses travel between peers: a name would have to be resolved, which takes time
and asks a server that may answer anything.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

IP = ipaddress.IPv4Address | ipaddress.IPv6Address


def write(host: str, port: int) -> str:
    """The address of a port on a host."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def read(address: str) -> tuple[IP, int]:
    """Host and port of an address. Raises ValueError where it is no place to dial."""
    scheme, _, place = address.partition("://")
    host, _, port = place.rpartition(":")
    if scheme != "tcp" or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"{address!r} is not tcp://host:port")
    ip = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    if ip.is_multicast or ip.is_unspecified or str(ip) == "255.255.255.255":
        raise ValueError(f"{address!r} is not the address of one machine")
    return ip, int(port)


def on_host(addresses: Iterable[str], host: str) -> str:
    """The first of these valid addresses that is on the host; "" where none is."""
    return next((address for address in addresses if str(read(address)[0]) == host), "")


def usable(addresses: Iterable[str], *, loopback: bool) -> tuple[str, ...]:
    """Those that can be dialled, in order and written alike. loopback: keep this machine's own."""
    good: dict[str, None] = {}
    for address in addresses:
        try:
            ip, port = read(address)
        except ValueError:
            continue
        if loopback or not ip.is_loopback:
            good[write(str(ip), port)] = None
    return tuple(good)
