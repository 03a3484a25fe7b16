"""What `halka status` says of this agent: a picture of its state, made on demand. Reads only."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import msgspec

from peer import VERSION
from peer.agent import Agent
from peer.planning import making, split, survey
from peer.planning.plan import Forecast, Plan, PlanState
from peer.planning.profile import engine_name
from peer.planning.spares import total_bytes
from peer.protocol import PROTOCOL, Report
from peer.words.basis import Basis, KnownModel, TimedPeer, TimedRing
from peer.words.state import (
    Answers,
    ClusterState,
    Engine,
    LossState,
    Me,
    ModelState,
    PeerState,
    Problem,
    Refusal,
    SpareState,
    Status,
)

LOST_SHOWN_S = 600.0  # a peer that went away is shown so long
REFUSED_SHOWN_S = 600.0
SECONDS_MAX = 1e11  # of a forecast that can be told: the bound of `Seconds`


def status(agent: Agent, started: float, http: str) -> dict[str, Any]:
    """The whole status as plain values; the shape is `words.state.Status`."""
    cluster, config = agent.cluster, agent.config
    shown = _shown(agent)
    me = agent.profiles[agent.me]
    return msgspec.to_builtins(  # type: ignore[no-any-return]
        Status(
            version=VERSION,
            protocol=PROTOCOL,
            me=Me(
                agent.me,
                me.name,
                str(config.home),
                http,
                cluster.port,
                time.monotonic() - started,
                _backend(agent, agent.me, shown),
            ),
            cluster=ClusterState(
                config.cluster, cluster.term, cluster.coordinator, True, cluster.problem
            ),
            peers=tuple(_peers(agent, shown)),
            model=_model(agent, shown),
            answers=_answers(agent),
            refused=tuple(
                Refusal(turned.host, turned.why, cluster.clock() - turned.at)
                for turned in cluster.refused
                if turned.code != "cluster"  # a neighbour's ring is nothing to worry about
                and cluster.clock() - turned.at < REFUSED_SHOWN_S
            ),
            problems=tuple(_problems(agent, shown)),
            losses=(losses := tuple(_losses(agent))),
            unforeseen=not losses
            and agent.duty.serving() is not None
            and bool(agent.cluster.members),
            spares=tuple(_spares(agent)),
        )
    )


def _answers(agent: Agent) -> Answers:
    entry = agent.entry
    return Answers(entry.running, entry.served, entry.failed, entry.waiting, entry.continued)


def plan(agent: Agent) -> dict[str, Any] | None:
    """The plan that serves, else the one that is under way: with its phase, what it would take by
    the profiles of now, and what it really took."""
    shown = _shown(agent)
    if shown is None:
        return None
    return {
        "phase": shown.phase,
        "why": shown.why,
        **msgspec.to_builtins(shown.plan),
        "forecast": msgspec.to_builtins(_forecast(agent, shown)),
        "timed": msgspec.to_builtins(_timed(agent, shown)),
    }


def profiles(agent: Agent) -> dict[str, Any]:
    """All that a plan is made of, as plain values; the shape is `words.basis.Basis`."""
    shown = _shown(agent)
    present = [agent.me, *agent.cluster.members]
    models: dict[str, KnownModel] = {}
    for peer_id in present:
        for offer in agent.offers.get(peer_id, ()):
            known = models.setdefault(offer.shape.digest, KnownModel(offer.shape))
            known.held[peer_id] = offer.parts
    shape = shown.plan.shape if shown else None
    served = models.get(shape.digest) if shape else None
    return msgspec.to_builtins(  # type: ignore[no-any-return]
        Basis(
            profiles=tuple(agent.profiles[p] for p in present if p in agent.profiles),
            shape=shape,
            held=served.held if served else {},
            timed=_timed(agent, shown) if shown else TimedRing(),
            plan=shown.plan if shown else None,
            coordinator=agent.cluster.coordinator,
            models=tuple(models.values()),
        )
    )


def _forecast(agent: Agent, shown: PlanState) -> Forecast | None:
    """None where the profiles of now do not allow the plan, or are not known."""
    plan = shown.plan
    if split.unusable(plan.shape):
        return None
    known = [agent.profiles[p] for p in plan.peers if p in agent.profiles]
    found = making.as_it_runs(known, plan)
    return found if found and found.tpot_s + found.ttft_s <= SECONDS_MAX else None


def _timed(agent: Agent, shown: PlanState) -> TimedRing:
    """What the stages said; others' come with the coordinator's plans."""
    reports = {p: _report(agent, p, shown) for p in shown.plan.peers}
    timed = {p: told.timed for p, told in reports.items() if told and told.timed}
    head = timed.get(shown.plan.head)
    told = reports.get(shown.plan.head)
    return TimedRing(
        head.tpot_s if head else 0.0,
        {
            p: TimedPeer(took.decode_s, took.prefill_s, took.wait_s, took.send_s)
            for p, took in timed.items()
        },
        drafted=head.drafted if head else 0,
        accepted=head.accepted if head else 0,
        read=head.read if head else 0,
        reused=head.reused if head else 0,
        active=told.active if told else 0,
    )


def _shown(agent: Agent) -> PlanState | None:
    if serving := agent.duty.serving():
        return serving
    states = [
        part.state
        for part in agent.duty.parts.values()
        if not part.dead and part.state.phase != "draining"  # it takes no new answers
    ]
    return max(states, key=lambda state: state.plan.id, default=None)


def _model(agent: Agent, shown: PlanState | None) -> ModelState:
    if shown is None:
        return ModelState(why=agent.serving.why_not())
    plan = shown.plan
    serves = agent.duty.serving() is not None
    # It may serve for others while this peer has not met its head yet.
    phase = "serving" if serves else "linking" if shown.phase == "serving" else shown.phase
    why = "" if serves else agent.duty.why_none or shown.why
    return ModelState(
        plan.shape.model,
        plan.shape.digest,
        plan.shape.layers,
        plan.split.context,
        phase,
        str(plan.id),
        why,
        _approximate(agent, plan),
    )


def _approximate(agent: Agent, plan: Plan) -> str:
    """Whose engine computes with rounded weights, in words, or ""."""
    fits: dict[str, list[str]] = {}
    for window in plan.split.windows:
        profile = agent.profiles.get(window.peer_id)
        fit = plan.shape.fit(window.backend, profile.weights) if profile else None
        if profile and fit and fit.how == "approximate":
            names = fits.setdefault(f"{engine_name(fit.backend)}: {fit.why}", [])
            names += [] if profile.name in names else [profile.name]
    told = (f"{', '.join(names)} by {why}" for why, names in fits.items())
    return f"approximate on {'; '.join(told)}" if fits else ""


def _backend(agent: Agent, peer_id: str, shown: PlanState | None) -> str:
    """That runs a peer's windows; of one without any, that would; else that which it prefers."""
    profile = agent.profiles[peer_id]
    if shown is not None:
        for index in shown.plan.windows_of(peer_id):
            return shown.plan.split.windows[index].backend
        if would := profile.engine_for(shown.plan.shape):
            return would
    return next(iter(profile.backends), "")


def _peers(agent: Agent, shown: PlanState | None) -> Iterable[PeerState]:
    for peer_id in (agent.me, *agent.cluster.members):
        yield _peer(agent, peer_id, shown)
    for peer_id, (name, why, at) in agent.lost_peers.items():
        if time.monotonic() - at < LOST_SHOWN_S:
            yield PeerState(peer_id=peer_id, name=name, state="lost", why=why)


def _peer(agent: Agent, peer_id: str, shown: PlanState | None) -> PeerState:
    profile = agent.profiles.get(peer_id)
    member = agent.cluster.members.get(peer_id)
    mine = peer_id == agent.me
    address = "" if mine else agent.cluster.address_of(peer_id) or ""
    basic = PeerState(
        peer_id=peer_id,
        name=profile.name if profile else member.name if member else peer_id,
        address=address,
        me=mine,
        coordinator=peer_id == agent.cluster.coordinator,
        version=VERSION if mine else member.version if member else "",
    )
    if profile:
        basic = msgspec.structs.replace(
            basic,
            os=profile.os,
            cores=profile.cores,
            memory_total_bytes=profile.memory_total_bytes,
            memory_available_bytes=profile.memory_available_bytes,
            engines=tuple(Engine(e.backend, e.device, e.kind) for e in profile.engines),
            leaving=profile.leaving,
        )
    if shown is None:
        return basic
    return _with_plan(agent, basic, shown)


def _with_plan(agent: Agent, basic: PeerState, shown: PlanState) -> PeerState:
    plan, peer_id = shown.plan, basic.peer_id
    mine = [plan.split.windows[index] for index in plan.windows_of(peer_id)]
    if not mine:
        why = next((out.why for out in plan.split.left_out if out.peer_id == peer_id), "")
        return msgspec.structs.replace(basic, why=why)
    known = _report(agent, peer_id, shown)
    if shown.phase in ("serving", "draining"):
        phase = "serving"
    elif known:
        phase = known.phase
    else:  # the coordinator has not told its report yet
        phase = "ready" if shown.phase == "linking" else "loading"
    basic = msgspec.structs.replace(
        basic,
        layers=tuple((window.first, window.last) for window in mine),
        phase=phase,
        backend=mine[0].backend,
        on_gpu=mine[0].gpu_layers != 0,
    )
    if known is None:
        return basic
    return msgspec.structs.replace(
        basic,
        done_bytes=known.done_bytes,
        total_bytes=known.total_bytes,
        why=known.why,
        weights_bytes=known.weights_bytes,
        kv_bytes=known.kv_bytes,
        compute_bytes=known.compute_bytes,
    )


def _report(agent: Agent, peer_id: str, shown: PlanState) -> Report | None:
    """What a peer last said of its stage; others' come with the coordinator's plans."""
    if peer_id == agent.me:
        part = agent.duty.parts.get(shown.plan.id)
        return part.report if part else None
    return agent.reports.get((peer_id, shown.plan.id))


def _losses(agent: Agent) -> Iterable[LossState]:
    """What the coordinator of now foresees, while something serves."""
    told = agent.sparing.outlook
    if told is None or told.term != agent.cluster.term or agent.duty.serving() is None:
        return
    for loss in told.losses:
        if loss.peer_id == agent.me or loss.peer_id in agent.cluster.members:
            yield LossState(loss.peer_id, loss.outcome, loss.fetch_bytes, loss.why)


def _spares(agent: Agent) -> Iterable[SpareState]:
    """How much of what each peer is to hold it says that it holds."""
    told = agent.sparing.outlook
    for spare in told.spares if told else ():
        offers = agent.offers.get(spare.peer_id, ())
        here = spare.peer_id == agent.me or spare.peer_id in agent.cluster.members
        shapes = [o.shape for every in agent.offers.values() for o in every]
        shape = next((shape for shape in shapes if shape.digest == spare.digest), None)
        if not here or shape is None:
            continue
        held = {p for offer in offers if offer.shape.digest == spare.digest for p in offer.parts}
        yield SpareState(
            spare.peer_id,
            total_bytes(shape, held.intersection(spare.parts)),
            total_bytes(shape, spare.parts),
            agent.sparing.why if spare.peer_id == agent.me else "",
        )


def _no_engine(wanted: str) -> Problem:
    mend = f"run the installer again, or: {survey.with_engines(backend=wanted)}"
    if wanted == "auto":
        return Problem("this peer has no engine to run layers with", mend)
    return Problem(
        f"the engine that the setting `backend` asks for, {engine_name(wanted)}, does not start on "
        "this peer",
        f"{mend} in halka's environment; or backend = auto, where another one is here",
    )


def _problems(agent: Agent, shown: PlanState | None) -> Iterable[Problem]:
    if not agent.profiles[agent.me].engines and not agent.refused_engines:
        yield _no_engine(agent.config.backend)
    for why in agent.refused_engines.values():
        yield Problem(why, "halka verify")
    if agent.cluster.problem:
        yield Problem(agent.cluster.problem, "")  # it says itself what mends it
    if shown is None:
        why = agent.serving.why_not()
        if why.startswith("no model yet"):
            yield Problem("nothing is served: there is no model yet", "halka pull smollm2")
        else:
            yield Problem(why, "halka status --watch")
    elif agent.duty.serving() is None:
        model, plan_id = shown.plan.shape.model, shown.plan.id
        yield Problem(
            f"{model} is not served now: plan {plan_id} is being made ready", "halka status --watch"
        )
    elif agent.duty.why_none:
        yield Problem(
            f"{shown.plan.shape.model} goes on, because no newer plan can be: "
            f"{agent.duty.why_none}",
            "halka models",
        )
    for digest, why in agent.serving.errors.items():
        if shown and digest == shown.plan.shape.digest:
            yield Problem(f"this peer cannot read the model's words: {why}", "halka status --watch")
    if agent.store_trouble:
        yield Problem(
            f"the models on this peer cannot be read: {agent.store_trouble}",
            f"make {agent.store.root} readable, or start the agent again",
        )
    for why in agent.unusable.values():
        yield Problem(f"a model on this disk cannot be run here. {why}", "halka models")
    if agent.duty.trouble and (shown is None or agent.me not in shown.plan.peers):
        trouble = agent.named(agent.duty.trouble)
        yield Problem(f"this peer could not take part: {trouble}", "halka plan")
