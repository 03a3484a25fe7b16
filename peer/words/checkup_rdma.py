"""What a Mac lacks for RDMA over Thunderbolt, from facts that were gathered before. Pure.

RDMA makes islands of Macs fast that compute each layer together. It needs macOS 26.2, Thunderbolt 5
and Apple silicon, has to be enabled by hand in macOS's recovery, a cable between each two Macs, and
a Thunderbolt Bridge that is off (Apple TN3205 and MLX's documentation of its JACCL backend).
Nothing else of halka needs any of it: hops go over whatever network is fastest.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from peer.planning import thunderbolt
from peer.planning.profile import Port, Profile
from peer.words.checkup import Check, Level

NEEDED = (26, 2)
BRIDGE_OFF = 'sudo networksetup -setnetworkserviceenabled "Thunderbolt Bridge" off'
RECOVERY = (
    "shut down, hold the power button until the options come, open Options, then Utilities, "
    "Terminal, type: rdma_ctl enable, and restart"
)


@dataclass(frozen=True, slots=True)
class RdmaFacts:
    """What a Mac's commands printed. version: of macOS; rdma: of `rdma_ctl status`; None: there is
    no such command, or it failed. bridged: interfaces in the Thunderbolt Bridge while it is up.

    me: this peer's id, and profiles: of all members, () where no agent runs. wanted: the setting
    `islands` is auto: what is lacking is wrong then, and otherwise worth knowing.
    """

    ports: Sequence[Port]
    version: str = ""
    rdma: str | None = None
    bridged: frozenset[str] = frozenset()
    me: str = ""
    profiles: Sequence[Profile] = ()
    wanted: bool = False


def checks(facts: RdmaFacts) -> list[Check]:
    """Lines about Thunderbolt, of a Mac."""
    kind = thunderbolt.generation(facts.ports)
    if kind == 0:
        return [Check("note", "macOS tells of no Thunderbolt port, so nothing is known of cables")]
    if kind == 4:
        return [_too_old(facts), *_cables(facts, "note")]
    lacks: Level = "wrong" if facts.wanted else "note"
    found = [
        *_version(facts, lacks),
        *_enabled(facts, lacks),
        *_bridge(facts, lacks),
        *_cables(facts, lacks),
    ]
    if all(check.level == "ok" for check in found) and facts.profiles and not facts.wanted:
        mend = 'islands = "auto" in config.toml on each of these Macs'
        what = "islands are off here, because their own transports are not encrypted"
        found.append(Check("note", what, mend))
    return found


def _too_old(facts: RdmaFacts) -> Check:
    devices = any(port.rdma for port in facts.ports)
    if _state(facts) == "enabled" and not devices:
        return Check(
            "note",
            "rdma_ctl says that RDMA is enabled, and there are no devices: there never will be, it "
            "needs Thunderbolt 5, and this Mac's ports do 40 Gb/s. Its cables serve hops all the "
            "same",
        )
    return Check(
        "note",
        "this Mac's Thunderbolt ports do 40 Gb/s at most: RDMA needs Thunderbolt 5. Its cables "
        "serve hops all the same",
    )


def _version(facts: RdmaFacts, lacks: Level) -> list[Check]:
    old = _old(facts)
    if old is None:
        return [Check("note", "macOS does not tell its version; RDMA needs 26.2 or later")]
    if not old:
        return [Check("ok", f"macOS {facts.version} knows RDMA over Thunderbolt")]
    what = f"macOS {facts.version} knows no RDMA over Thunderbolt: 26.2 or later does"
    return [Check(lacks, what, "sudo softwareupdate --install --all --restart")]


def _old(facts: RdmaFacts) -> bool | None:
    """Whether this macOS is older than RDMA; None: it does not tell."""
    told = re.fullmatch(r"([0-9]{1,4})(?:\.([0-9]{1,4}))?(?:\.[0-9]{1,4})?", facts.version)
    return (int(told[1]), int(told[2] or 0)) < NEEDED if told else None


def _state(facts: RdmaFacts) -> str:
    return (facts.rdma or "").strip().lower()


def _enabled(facts: RdmaFacts, lacks: Level) -> list[Check]:
    if facts.rdma is None:
        what = "rdma_ctl does not answer, so that nothing is known of RDMA"
        return [] if _old(facts) else [Check("note", what)]  # an old macOS has no such command
    if _state(facts) != "enabled":
        return [Check(lacks, "RDMA is not enabled (rdma_ctl status); only recovery can", RECOVERY)]
    devices = [port.rdma for port in facts.ports if port.rdma]
    if not devices:
        what = "RDMA is enabled, and ibv_devices lists no device of a port"
        return [Check(lacks, what, "restart this Mac; if that does not help, enable it once more")]
    return [Check("ok", f"RDMA is enabled, with {', '.join(devices)}")]


def _bridge(facts: RdmaFacts, lacks: Level) -> list[Check]:
    inside = [port.interface for port in facts.ports if port.interface in facts.bridged]
    if not inside:
        return [Check("ok", "no Thunderbolt port is in the Thunderbolt Bridge")]
    what = (
        f"the Thunderbolt Bridge is up, with {', '.join(inside)}: RDMA does not work through it. "
        "Without it each cable needs addresses of its own, such as 192.168.77.1 and .2"
    )
    return [Check(lacks, what, BRIDGE_OFF)]


def _cables(facts: RdmaFacts, lacks: Level) -> list[Check]:
    """Which of the cluster's Macs are cabled to this one, and whether all are to each other."""
    if not facts.profiles:
        plugged = sum(bool(port.peer_uuid) for port in facts.ports)
        cabled = f"{plugged} of its ports have a cable to another Mac"
        return [Check("note", f"{cabled}; to which is known while the agent runs")]
    names = {profile.peer_id: profile.name for profile in facts.profiles}
    macs = [p for p in facts.profiles if p.ports and p.peer_id != facts.me]
    if not macs:
        return [Check("note", "no other Mac with Thunderbolt is in the cluster")]
    cables = thunderbolt.cables(facts.profiles)
    near = {other: c for c in cables if facts.me in c.peers for other in c.peers}
    apart = [mac.name for mac in macs if mac.peer_id not in near]
    lines = [
        Check("ok", f"a cable to {names[mac.peer_id]}{_rate(near[mac.peer_id])}")
        for mac in macs
        if mac.peer_id in near
    ]
    if apart:
        what = f"no cable goes from this Mac to {', '.join(apart)}: an island needs one to each"
        mend = "a Thunderbolt 5 cable between each two of them, without a dock between"
        lines.append(Check("note" if lines else lacks, what, mend))
    elif len(macs) > 1 and not _all_to_all(facts):
        what = "these Macs are not all cabled to each other, which an island of them all needs"
        lines.append(Check("note", what, "run halka doctor on each of them"))
    return lines


def _all_to_all(facts: RdmaFacts) -> bool:
    all_of_them = {profile.peer_id for profile in facts.profiles if profile.ports}
    groups = thunderbolt.fully_cabled(facts.profiles)
    return any(set(group) >= all_of_them for group in groups)


def _rate(cable: thunderbolt.Cable) -> str:
    return f", at {cable.bits_per_s / 1e9:.0f} Gb/s" if cable.bits_per_s else ""
