"""Who may join: the one place where that is decided.

For now any peer that speaks our protocol and names our cluster may join; `NOTICE` says so to
people. A key still proves who it is that joins, and a link whose key is another's is refused.
"""

from __future__ import annotations

from peer.cluster.identity import peer_id_of
from peer.config import Config
from peer.protocol import PROTOCOL, Hello, Refused, Welcome

NOTICE = "any peer on the local network that speaks halka's protocol may join this cluster"


def may_connect(key: str, own_key: str) -> bool:
    """Whether a CURVE key may open a link at all. Our own may not: that would be this peer."""
    return key != own_key


def genuine(peer_id: str, key: str) -> bool:
    """Whether the peer id belongs to the key. Both may be anything."""
    try:
        return peer_id_of(key) == peer_id
    except ValueError:
        return False


def admit(
    hello: Hello | Welcome, key: str, config: Config, protocol: int = PROTOCOL
) -> Refused | None:
    """None where the peer may be a member, else the refusal that it is sent.

    key: the CURVE key that the link proved, Z85.
    """
    if hello.protocol != protocol:
        return Refused(
            code="protocol",
            why=f"{hello.name} speaks version {hello.protocol} of halka's protocol, the peer that "
            f"it met version {protocol}; update halka on the machine with the lower one",
            protocol=protocol,
        )
    if hello.cluster != config.cluster:
        return Refused(
            code="cluster",
            why=f"{hello.name} belongs to the cluster {hello.cluster!r}, the peer that it met to "
            f"{config.cluster!r}; set HALKA_CLUSTER to the same name on both to join them",
            protocol=protocol,
        )
    if hello.peer_id != peer_id_of(key):
        return Refused(
            code="identity",
            why=f"the peer id {hello.peer_id} does not belong to the key of this link",
            protocol=protocol,
        )
    return None
