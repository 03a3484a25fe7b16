"""What `GET /halka/status` says, as values. Every field has a default and unknown ones are skipped,
so that the words of one version read the agent of another.
"""

from __future__ import annotations

import msgspec


class Engine(msgspec.Struct, frozen=True):
    """A processor that a backend can use."""

    backend: str = ""
    device: str = ""
    kind: str = ""


class Me(msgspec.Struct, frozen=True):
    """The agent that answered."""

    peer_id: str = ""
    name: str = ""
    home: str = ""
    http: str = ""  # host:port
    port: int = 0
    uptime_s: float = 0.0
    backend: str = ""


class ClusterState(msgspec.Struct, frozen=True):
    """What it is part of. `coordinator`: a peer id or ""; `discovery`: what is wrong with mDNS."""

    name: str = ""
    term: int = 0
    coordinator: str = ""
    open: bool = True
    discovery: str = ""


class PeerState(msgspec.Struct, frozen=True):
    """One peer. `layers`: its windows, each [first, last) as everywhere inside."""

    peer_id: str = ""
    name: str = ""
    address: str = ""
    me: bool = False
    coordinator: bool = False
    os: str = ""
    cores: int = 0
    memory_total_bytes: int = 0
    memory_available_bytes: int = 0
    engines: tuple[Engine, ...] = ()
    state: str = "member"  # member | lost
    version: str = ""
    layers: tuple[tuple[int, int], ...] = ()
    phase: str = "idle"  # idle | fetching | loading | ready | linked | serving | failed
    done_bytes: int = 0
    total_bytes: int = 0
    weights_bytes: int = 0
    kv_bytes: int = 0
    compute_bytes: int = 0
    why: str = ""
    leaving: bool = False  # as soon as others have taken over
    backend: str = ""  # that runs its windows
    on_gpu: bool = False  # so far as there is one

    @property
    def memory_bytes(self) -> int:
        """What its stage really uses."""
        return self.weights_bytes + self.kv_bytes + self.compute_bytes


class ModelState(msgspec.Struct, frozen=True):
    """The model that is served, or will be. `id` is "" where there is none."""

    id: str = ""
    digest: str = ""
    layers: int = 0
    context: int = 0
    phase: str = "none"  # none | loading | linking | serving
    plan: str = ""
    why: str = ""
    approximate: str = ""  # whose engine computes with rounded weights


class Answers(msgspec.Struct, frozen=True):
    """Answers that this peer is the entry of. waiting: of those that run, for a ring that serves;
    continued: how often one went on on another ring."""

    running: int = 0
    served: int = 0
    failed: int = 0
    waiting: int = 0
    continued: int = 0


class Refusal(msgspec.Struct, frozen=True):
    """A peer that was not let in."""

    address: str = ""
    why: str = ""
    ago_s: float = 0.0


class Problem(msgspec.Struct, frozen=True):
    """What is wrong, and the one command or setting that mends it."""

    what: str = ""
    mend: str = ""


class LossState(msgspec.Struct, frozen=True):
    """What the loss of a peer would mean for the model that is served: fine | fetch | none."""

    peer_id: str = ""
    outcome: str = ""
    fetch_bytes: int = 0  # from peer to peer, before answers go on
    why: str = ""  # none: what ends them


class SpareState(msgspec.Struct, frozen=True):
    """How much of the spare parts that a peer is to hold is there."""

    peer_id: str = ""
    done_bytes: int = 0
    total_bytes: int = 0
    why: str = ""  # what could not be had last; told by the peer itself only


class Status(msgspec.Struct, frozen=True):
    """The whole answer."""

    version: str
    protocol: int
    me: Me
    cluster: ClusterState
    peers: tuple[PeerState, ...] = ()
    model: ModelState = ModelState()
    answers: Answers = Answers()
    refused: tuple[Refusal, ...] = ()
    problems: tuple[Problem, ...] = ()
    losses: tuple[LossState, ...] = ()  # () while nothing is foreseen
    spares: tuple[SpareState, ...] = ()
    unforeseen: bool = False  # what losses would mean is not known yet, and there are several peers

    def labels(self) -> dict[str, str]:
        """Each peer's name; where two share one, with the beginning of the peer id after it."""
        names = [peer.name or peer.peer_id[:8] for peer in self.peers]
        return {
            peer.peer_id: name if names.count(name) == 1 else f"{name[:9]} {peer.peer_id[:4]}"
            for peer, name in zip(self.peers, names, strict=True)
        }


class Going(msgspec.Struct, frozen=True):
    """An event of `POST /halka/leave`: how far this peer's going away is.

    phase: asking · loading · draining · answers · alone, as in `planning.leaving`; then gone (why:
    what was left behind) or stays. peers: the names of those who take over `model`; done_bytes of
    total_bytes: what they still fetch. running: answers that are waited for.
    """

    phase: str = ""
    model: str = ""
    peers: tuple[str, ...] = ()
    done_bytes: int = 0
    total_bytes: int = 0
    running: int = 0
    why: str = ""
