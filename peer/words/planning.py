"""`halka plan` where it plans itself: what if something were different, and clusters that are not
here. It asks the agent for profiles, or reads them from a file; it changes nothing anywhere.

Loads the planner and its solver, so it is imported only when one of its flags was typed.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from peer.errors import CommandError, NoPlan
from peer.planning import costs, making
from peer.planning.plan import Forecast, Split
from peer.planning.profile import Profile
from peer.planning.together import solve
from peer.words import cables, forecast, paces, plan, profiles, shapes, whatif
from peer.words.agent import Agent
from peer.words.basis import Basis, KnownModel, TimedRing, find, labels
from peer.words.forecast import Seen
from peer.words.profiles import Source
from peer.words.screen import Screen, note, say
from peer.words.whatif import WhatIf


@dataclass(frozen=True, slots=True)
class Outcome:
    """A plan, or why there is none."""

    seen: Seen | None
    why: str = ""

    def plain(self) -> dict[str, Any]:
        """For programs."""
        if self.seen is None:
            return {"why": self.why}
        told = {"split": self.seen.split, "forecast": self.seen.forecast, "timed": self.seen.timed}
        return {key: msgspec.to_builtins(value) for key, value in told.items()}


@dataclass(frozen=True, slots=True)
class Case:
    """What is planned for. known: the peers of now, with their speeds for the model. reckoned:
    names of those whose speeds are another model's."""

    basis: Basis
    model: KnownModel
    known: tuple[Profile, ...]
    reckoned: tuple[str, ...] = ()


def command(args: Namespace) -> int:
    """Returns 0, or 4 where there is no plan. Raises: CommandError."""
    change = whatif.read(args)
    agent = Agent(args.home, args.http)
    source = profiles.read(Path(args.profiles)) if args.profiles else None
    if source is not None and not change.joins:
        basis = source.basis
    else:
        basis = agent.question("/halka/profiles", Basis)
    if args.save:
        _save(basis, Path(args.save))
        if change.nothing and args.model is None and not args.profiles:
            return 0
    if change.joins and source is None:
        raise CommandError(
            f"--with {change.joins[0]}: which file describes it?",
            "--profiles FILE.toml, or NAME:memory=+8GiB for a peer that is here", 2,
        )  # fmt: skip
    case = _case(basis, shapes.model_of(args.model, basis, agent.settings), source)
    changed = case.known if change.nothing else _changed(case, change, source)
    now = as_it_is(case)
    then = None if change.nothing else as_it_would_be(case, changed, change)
    if args.json:
        say(json.dumps(_plain(case, now, then), indent=2))
    else:
        say("\n".join(lines(case, now, then, Screen.of(sys.stdout))))
    return 4 if (then or now).seen is None else 0


def _save(basis: Basis, path: Path) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(basis), indent=2) + b"\n")
    note(f"{path} has the profiles of {len(basis.profiles)} now: halka plan --profiles {path}")


# What is planned for ---------------------------------------------------------------------------


def _case(basis: Basis, model: KnownModel, source: Source | None) -> Case:
    """The peers of now, each with speeds for this model as far as anything is known of them."""
    known, reckoned = [], []
    names = basis.labels()
    for profile in basis.profiles:
        profile, was = _with_speeds(profile, basis, model, source)
        known.append(profile)
        reckoned += [names[profile.peer_id]] if was else []
    return Case(basis, model, tuple(known), tuple(reckoned))


def _with_speeds(
    profile: Profile, basis: Basis, model: KnownModel, source: Source | None
) -> tuple[Profile, bool]:
    written = source.paces.get(profile.peer_id, {}) if source else {}
    shapes_by_digest = {known.shape.digest: known.shape for known in basis.models}
    if basis.shape:
        shapes_by_digest[basis.shape.digest] = basis.shape
    return paces.carried(paces.paced(profile, model.shape, written), model.shape, shapes_by_digest)


def _changed(case: Case, change: WhatIf, source: Source | None) -> tuple[Profile, ...]:
    """The peers as they would be. Raises: CommandError (2)."""
    everyone = list(case.known)
    for name in change.joins if source else ():
        assert source is not None
        peer_id = find(name, source.basis.labels(), "--with")
        new = next(p for p in source.basis.profiles if p.peer_id == peer_id)
        if any(peer_id == p.peer_id for p in everyone):
            raise CommandError(f"--with {name}: it is in the cluster already", exit_code=2)
        new, _ = _with_speeds(new, source.basis, case.model, source)
        everyone.append(new)
        if peer_id in source.cables:
            everyone = cables.recabled(everyone, peer_id, source.cables[peer_id])
    return tuple(whatif.profiles(everyone, change, case.model.shape))


# Planning --------------------------------------------------------------------------------------


def as_it_is(case: Case) -> Outcome:
    """The plan that runs, by the profiles of now; where none does, the one that would be made."""
    running = case.basis.plan
    if running is not None and running.shape.digest == case.model.shape.digest:
        expected = making.as_it_runs(case.known, running)
        return Outcome(_seen(case, case.known, running.split, expected, case.basis.timed))
    return as_it_would_be(case, case.known, WhatIf())


def as_it_would_be(case: Case, peers: Sequence[Profile], change: WhatIf) -> Outcome:
    """The plan that would be made of these peers."""
    shape = case.model.shape
    try:
        wishes = whatif.wishes(case.basis, case.model, change, labels(peers))
        split = solve(peers, shape, wishes)
    except NoPlan as error:
        return Outcome(None, str(error))
    return Outcome(_seen(case, peers, split, costs.forecast(peers, shape, split)))


def _seen(
    case: Case,
    peers: Sequence[Profile],
    split: Split,
    expected: Forecast | None,
    timed: TimedRing | None = None,
) -> Seen:
    gpus = _gpus(peers, split)
    return Seen(case.model.shape, split, expected, timed or TimedRing(), labels(peers), gpus)


def _gpus(peers: Sequence[Profile], split: Split) -> Mapping[str, tuple[str, str]]:
    """(device, kind) of the GPU that the engine of each peer's windows can use."""
    of_windows = {window.peer_id: window.backend for window in split.windows}
    return {
        peer.peer_id: (engine.device, engine.kind)
        for peer in peers
        for engine in reversed(peer.engines)
        if engine.kind != "cpu" and engine.backend == of_windows.get(peer.peer_id)
        and engine.memory_free_bytes
    }  # fmt: skip


# Told ------------------------------------------------------------------------------------------


def _plain(case: Case, now: Outcome, then: Outcome | None) -> dict[str, Any]:
    told: dict[str, Any] = {"model": case.model.shape.model, "now": now.plain()}
    if then is not None:
        told["then"] = then.plain()
        if then.seen and case.model.held:
            parts, weight = forecast.moves(case.model.shape, then.seen.split, case.model.held)
            told["moves"] = {"parts": parts, "bytes": weight}
    return told


def lines(case: Case, now: Outcome, then: Outcome | None, screen: Screen) -> list[str]:
    """The plan of now in a line, the one that would be, and the difference; or the one there is."""
    model = screen.clean(case.model.shape.model)
    if then is None:
        return _whole(f"A plan for {model}", case, now, screen)
    line = forecast.in_a_line(now.seen, screen) if now.seen else f"no plan: {now.why}"
    out = screen.wrap(line, "Now         ")
    out += ["", *_whole(f"What would be, for {model}", case, then, screen)]
    if now.seen and then.seen:
        out += ["", *forecast.difference(now.seen, then.seen, case.model.held, screen)]
    return [*out, screen.paint("Nothing was changed: this was only thought through.", "dim")]


def _whole(title: str, case: Case, outcome: Outcome, screen: Screen) -> list[str]:
    if outcome.seen is None:
        return screen.wrap(f"There is no plan for {case.model.shape.model}: {outcome.why}", "")
    out = [screen.paint(title, "bold")]
    out += screen.wrap(forecast.facts(outcome.seen, screen), "  ")
    out += screen.wrap(outcome.seen.split.why, "  ") if outcome.seen.split.why else []
    if case.reckoned:
        out += screen.wrap(
            f"speeds of {', '.join(case.reckoned)} are reckoned from those of another model", "  "
        )
    return [*out, *plan.body(outcome.seen, screen)]
