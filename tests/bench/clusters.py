"""The clusters on which plans are tried out: each uneven in a way of its own."""

from __future__ import annotations

from dataclasses import dataclass

from tests.bench.uneven import Peer

MIB = 1 << 20


@dataclass(frozen=True)
class Cluster:
    """Peers, and what is wanted of them. everyone: no peer may be left out (HALKA_SPREAD=all).

    tried: every other split is tried out as well, where that is asked for.
    """

    what: str
    peers: tuple[Peer, ...]
    everyone: bool = False
    tried: bool = False


CLUSTERS = (
    Cluster("one, whole core", (Peer("desk"),)),
    Cluster("one, half a core", (Peer("desk", quota=0.5),)),
    Cluster("two alike", (Peer("desk"), Peer("attic")), tried=True),
    Cluster("two alike, both must", (Peer("desk"), Peer("attic")), everyone=True, tried=True),
    Cluster("one fast, one slow", (Peer("desk", quota=0.3), Peer("attic")), tried=True),
    Cluster(
        "one fast, one slow, both must",
        (Peer("desk", quota=0.3), Peer("attic")),
        everyone=True,
        tried=True,
    ),
    Cluster("two slow ones", (Peer("desk", quota=0.4), Peer("attic", quota=0.4)), tried=True),
    Cluster(
        "three unequal, all must",
        (Peer("desk"), Peer("attic", quota=0.6), Peer("porch", quota=0.25)),
        everyone=True,
        tried=True,
    ),
    Cluster(
        "100 Mbit/s, all must",
        tuple(Peer(name, link_mbit=100) for name in ("desk", "attic", "porch")),
        everyone=True,
    ),
    Cluster(
        "1 Gbit/s, half cores",
        (Peer("desk", quota=0.5, link_mbit=1000), Peer("attic", quota=0.5, link_mbit=1000)),
    ),
    Cluster(
        "no room for all on one",
        (Peer("desk", memory_bytes=190 * MIB), Peer("attic", memory_bytes=190 * MIB)),
        tried=True,
    ),
    Cluster(
        "much room and slow, little and fast",
        (Peer("desk", quota=0.3), Peer("attic", memory_bytes=80 * MIB)),
        tried=True,
    ),
    Cluster(
        "slow and near, fast and far",
        (
            Peer("desk", quota=0.4, memory_bytes=190 * MIB),
            Peer("attic", quota=0.4, memory_bytes=190 * MIB),
            Peer("porch", link_mbit=100, memory_bytes=190 * MIB),
        ),
    ),
    Cluster(
        "three small ones",
        (
            Peer("desk", memory_bytes=170 * MIB),
            Peer("attic", core=1, quota=0.7, memory_bytes=75 * MIB, link_mbit=1000),
            Peer("porch", memory_bytes=75 * MIB, link_mbit=1000),
        ),
    ),
)
