"""`halka verify`: proves every engine of this machine, with the built-in model and the one in use.

It does so now, whatever was proven before, and needs no agent; what it finds is kept, and believed
by the agent's next start.
"""

from __future__ import annotations

import asyncio
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Literal

import msgspec
import psutil

from peer.config import Config
from peer.errors import BackendError, CommandError
from peer.models.store import Store, Stored
from peer.planning import proof, survey
from peer.planning.canary import Canary
from peer.planning.groups import control_group_bytes
from peer.planning.profile import EngineProfile
from peer.planning.proving import Builtin, at_work, subject_of
from peer.planning.verified import Verified, versions
from peer.words.agent import Agent
from peer.words.screen import Screen, note, say
from peer.words.verify_show import Proof, Told, checklist, lines

WITHIN_S = 120.0  # for an engine and the built-in model: a cold GPU driver compiles its kernels
_BACKENDS: tuple[tuple[Literal["llama_cpp", "mlx"], tuple[str, ...]], ...] = (
    ("llama_cpp", ("llama_cpp",)),
    ("mlx", ("mlx", "mlx_lm")),
)


def command(args: Namespace) -> int:
    """Returns 0 where every engine is right, else 1. Raises: CommandError, ConfigError."""
    config = Agent(args.home, args.http).settings
    told = asyncio.run(_verify(config))
    if args.json:
        say(msgspec.json.format(msgspec.json.encode(told)).decode())
    else:
        say("\n".join(lines(told, Screen.of(sys.stdout))))
    return 1 if any(proof.wrong for proof in told.proofs) else 0


async def _verify(config: Config) -> Told:
    engines, notes = await _engines(config)
    if not engines:
        raise CommandError("; ".join(notes) or "no engine is here", survey.with_engines())
    proofs: list[Proof] = []
    async with at_work(config.home) as work:
        builtin = Builtin(work, config.weights, WITHIN_S)
        stored = await asyncio.to_thread(_in_use, config)
        canary = None
        if stored is None:
            notes.append("There is no model here yet to compare the engines with: halka pull")
        else:
            canary = Canary(
                Store(config.home).folder(stored.digest), stored.manifest, set(stored.parts), work,
                survey.threads(config), _free_bytes(config),
            )  # fmt: skip
        for engine in engines:
            proofs.append(await _prove(config, engine, builtin, canary, stored))
        if canary is not None and canary.untold and any(_compared(p) for p in proofs):
            notes.append(f"Of {stored.manifest.model if stored else ''} {canary.untold}.")
    if any(p.wrong and not p.subject.trusted for p in proofs):
        notes.append("An agent that runs already goes on with that engine: start it again.")
    seen = dict.fromkeys(line for p in proofs for line in versions(p.subject))
    return Told(tuple(proofs), checklist(proofs, sys.platform), tuple(seen), tuple(notes))


def _compared(proof: Proof) -> bool:
    return proof.canary is not None and proof.canary.how != "skipped"


async def _prove(
    config: Config,
    engine: EngineProfile,
    builtin: Builtin,
    canary: Canary | None,
    stored: Stored | None,
) -> Proof:
    subject = subject_of(engine, config.weights)
    where = f"{subject.name} on {subject.device or subject.kind}"
    note(f"{where}: the built-in model …")
    verdict = await builtin.prove(subject)
    store = Verified(config.home)
    await asyncio.to_thread(store.keep, subject, verdict)
    second = None
    if canary is not None and stored is not None and verdict.how == "passed":
        note(f"{where}: {stored.manifest.model} …")
        second = await canary.prove(subject)
        if second.how != "skipped":
            await asyncio.to_thread(store.keep, subject, second, stored.digest)
    return Proof(subject, verdict, second, engine.memory_total_bytes)


async def _engines(config: Config) -> tuple[list[EngineProfile], list[str]]:
    """What is installed, whatever the setting `backend` prefers: llama.cpp on each kind of device,
    others on the one that they compute with. And why something is not there."""
    found: list[EngineProfile] = []
    notes: list[str] = []
    for name, libraries in _BACKENDS:
        if not all(map(find_spec, libraries)):
            if config.backend == name:
                install = survey.with_engines(backend=name)
                notes.append(f"{proof.NAMES[name]} is not installed here: {install}")
            continue
        try:
            here = await survey.measure(replace(config, backend=name))
        except BackendError as error:
            notes.append(str(error))
            continue
        notes.extend(here.faults.values())
        kinds = {engine.kind: engine for engine in reversed(here.engines)}
        found += reversed(kinds.values()) if name == proof.TRUSTED else here.engines[:1]
    return found, notes


def _in_use(config: Config) -> Stored | None:
    """The model that the setting names, else the one pulled last. Raises ModelError."""
    models: Sequence[Stored] = Store(config.home).models()
    named = [m for m in models if config.model in (m.manifest.model, m.digest)]
    return next(iter(named or models), None)


def _free_bytes(config: Config) -> int:
    free = int(psutil.virtual_memory().available)
    return survey.available_bytes(config.memory, free, control_group_bytes())
