"""A coordinator in a test: its clock, and peers that do as they are told."""

from __future__ import annotations

from peer.config import Timing
from peer.planning.making import answer
from peer.planning.plan import PlanId, PlanState
from peer.planning.profile import EngineProfile, ModelOffer, ModelShape, Profile
from peer.planning.rollout import (
    Elected,
    Event,
    Members,
    Note,
    Publish,
    Reported,
    Rollout,
    Solve,
    Solved,
    Tick,
)
from peer.protocol import Plans, Report

MIB = 1 << 20
A, B, C, D = (letter * 16 for letter in "abcd")
TIMING = Timing()
KEY = "k" * 39


def profile(peer_id: str, memory_mib: int = 4000, **changes: object) -> Profile:
    facts: dict[str, object] = {
        "peer_id": peer_id,
        "name": f"machine-{peer_id[0]}",
        "os": "linux",
        "cores": 4,
        "memory_total_bytes": 1 << 36,
        "memory_available_bytes": memory_mib * MIB,
        "engines": (EngineProfile("fake", "CPU", "cpu"),),
        "unmeasured": tuple(digit * 64 for digit in "0123456789"),
        "spread_all": True,
    }
    return Profile(**{**facts, **changes})  # type: ignore[arg-type]


def shape(model: str = "small", digest: str = "0", layers: int = 12) -> ModelShape:
    return ModelShape(
        model=model,
        digest=digest * 64,
        architecture="fake",
        layers=layers,
        hidden=8,
        context=512,
        layer_bytes=(MIB,) * layers,
        layer_kv_bytes=(64,) * layers,
        head_bytes=10,
        embed_bytes=10,
        output_bytes=10,
        tied=False,
        cut_starts=tuple(range(layers)),
    )


def offer(of: ModelShape, pulled_s: float = 1.0, without: tuple[str, ...] = ()) -> ModelOffer:
    parts = tuple(p for p in of.window_parts(0, of.layers) if p not in without)
    return ModelOffer(of, pulled_s, parts)


class World:
    """A coordinator, its clock, and peers that do as they are told."""

    def __init__(self, *peers: str, offers: dict[str, list[ModelOffer]] | None = None) -> None:
        self.now = 100.0
        self.rollout = Rollout(A, TIMING)
        self.profiles = {peer: profile(peer) for peer in peers}
        self.offers = {A: [offer(shape())]} if offers is None else offers
        self.published: list[tuple[float, Plans]] = []
        self.notes: list[str] = []
        self.active: dict[PlanId, int] = {}
        self.members()

    def do(self, event: Event) -> None:
        for action in self.rollout.step(event, self.now):
            match action:
                case Publish(plans):
                    self.published.append((self.now, plans))
                case Note(text):
                    self.notes.append(text)
                case Solve(question):
                    self.do(Solved(answer(question)))

    def members(self) -> None:
        self.do(Members(frozenset(self.profiles), dict(self.profiles), dict(self.offers)))

    def join(self, *peers: str) -> None:
        self.profiles.update({peer: profile(peer) for peer in peers})
        self.members()

    def lose(self, *peers: str) -> None:
        for peer in peers:
            del self.profiles[peer]
        self.members()

    def wait(self, seconds: float) -> None:
        """Let time pass, with a Tick whenever one is wanted."""
        end = self.now + seconds
        while (at := self.rollout.deadline) is not None and at <= end:
            assert at > self.now - 1e-9, "a deadline that is over wants Ticks for ever"
            before, self.now = self.now, max(self.now, at)
            self.do(Tick())
            assert self.rollout.deadline is None or self.rollout.deadline > before
        self.now = end

    @property
    def plans(self) -> Plans:
        return self.published[-1][1]

    @property
    def phases(self) -> dict[str, str]:
        """What peers were last told: plan number → phase."""
        return {str(state.plan.id): state.phase for state in self.plans.states}

    def report(self, peer: str, state: PlanState, phase: str, **changes: object) -> None:
        told = {"ring_port": 1000 + ord(peer[0]), "submit_port": 2000, "key": KEY + peer[0]}
        facts = {**(told if phase in ("ready", "linked") else {}), **changes}
        facts.setdefault("active", self.active.get(state.plan.id, 0))
        self.do(Reported(peer, Report(state.plan.id, phase, **facts)))  # type: ignore[arg-type]

    def obey(self, *but: str) -> None:
        """All peers do what the plans last published ask of them, except some."""
        for _ in range(3):
            for state in self.rollout.states:
                phase = {"loading": "ready", "linking": "linked"}.get(state.phase, "linked")
                for peer in state.plan.ring:
                    if peer in self.profiles and peer not in but:
                        self.report(peer, state, phase)

    def serve(self) -> PlanState:
        """Elect, settle, obey; the plan that serves then."""
        self.do(Elected(3))
        self.wait(TIMING.settle_s)
        self.obey()
        assert [state.phase for state in self.plans.states] == ["serving"]
        return self.plans.states[0]
