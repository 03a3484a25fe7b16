"""Runs the proofs: each engine in a process of its own, what it gave compared here. A shell.

`Builtin` proves engines with the built-in model, in a few seconds; `trusted` does so for those that
this peer would offer, and remembers it. The truth is computed once and serves all engines.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import numpy as np

from peer.config import Config
from peer.errors import BackendError, HalkaError
from peer.models import disk
from peer.planning import builtin, proof
from peer.planning.hardware import version
from peer.planning.ordered import ask
from peer.planning.profile import EngineProfile
from peer.planning.proof import MODEL, Floats, LayerFigure, Subject, Verdict
from peer.planning.verified import Verified

log = logging.getLogger("halka.planning")

WITHIN_S = 60.0  # for one process; it takes 1 to 3, and a cold GPU driver tens
MODULE = "peer.planning.verify"
ROUNDED = frozenset({"Q2_K", "Q3_K", "Q6_K"})  # see `backends.base.Weights`
_PREFIX = ".verify-"
_THREADS = 1  # the built-in model is so small that threads would only wait for each other
_NO_TRUTH = "there is nothing to compare it with: {why}"

Step = dict[str, Any]
"""As `verify.Step`. Neither that module nor an engine is imported here."""


class _Ran(msgspec.Struct, frozen=True):
    """As `verify.Ran`."""

    fault: str = ""
    job: int = 0
    at: int = 0
    refused: bool = False
    weights_bytes: int = 0


class Failed(HalkaError):
    """An engine's process gave no whole answer. at: (job, step) that it did not finish; refused:
    the engine said that it cannot run this model."""

    def __init__(self, why: str, at: tuple[int, int], refused: bool = False) -> None:
        self.at, self.refused = at, refused
        super().__init__(why)


class Workplace:
    """A folder for a proof's files, removed at the end; what killed proofs left is removed, too."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._descriptor = -1

    def __enter__(self) -> Path:
        with disk.clear_errors(self._home):
            self._home.mkdir(parents=True, exist_ok=True)
            self._sweep()
            self.folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=self._home))
            self._descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            disk.try_lock(self._descriptor)
        return self.folder

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._descriptor)

    def _sweep(self) -> None:
        for left in self._home.glob(f"{_PREFIX}*"):
            if left.is_symlink() or not left.is_dir():
                continue
            descriptor = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                if disk.try_lock(descriptor):
                    shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(descriptor)


@contextlib.asynccontextmanager
async def at_work(home: Path) -> AsyncIterator[Path]:
    """A workplace for code that may not block."""
    place = Workplace(home)
    folder = await asyncio.to_thread(place.__enter__)
    try:
        yield folder
    finally:
        await asyncio.to_thread(place.__exit__, None, None, None)


async def run(
    subject: Subject,
    work: Path,
    jobs: Sequence[tuple[Path, Sequence[int], Sequence[Step]]],
    threads: int,
    within_s: float,
) -> int:
    """Have the engine run these jobs: (model's folder, rows of each batch, steps).

    Returns the bytes of its largest window's weights. Raises Failed.
    """
    order = {
        "backend": subject.backend,
        "gpu": subject.kind != "cpu",
        "weights": subject.weights,
        "threads": threads,
        "work": str(work),
        "jobs": [
            {"folder": str(folder), "chunks": list(chunks), "steps": list(steps)}
            for folder, chunks, steps in jobs
        ],
    }
    try:
        answer = await ask(MODULE, msgspec.json.encode(order), within_s)
        ran = msgspec.json.decode(answer, type=_Ran)
    except (BackendError, msgspec.MsgspecError) as error:
        why = str(error) if isinstance(error, BackendError) else f"gave no answer: {error}"
        raise Failed(f"it {why}", await asyncio.to_thread(_reached, jobs)) from None
    if ran.fault:
        raise Failed(ran.fault, (ran.job, ran.at), ran.refused)
    return ran.weights_bytes


def _reached(jobs: Sequence[tuple[Path, Sequence[int], Sequence[Step]]]) -> tuple[int, int]:
    """The first step that left no file."""
    for number, (_, _, steps) in enumerate(jobs):
        for at, step in enumerate(steps):
            if not Path(step["out"]).exists():
                return number, at
    return len(jobs), 0


def array(path: Path) -> Floats:
    """An array that a step left. Raises OSError, ValueError."""
    found: Floats = np.load(path, allow_pickle=False)
    return found


class Builtin:
    """The built-in model in a workplace, with the truth about it once that is known."""

    def __init__(self, work: Path, weights: str = "auto", within_s: float = WITHIN_S) -> None:
        self._work, self._within_s = work, within_s
        self._kinds = builtin.types(weights)
        self._weights = weights
        self._folders: tuple[Path, Path] | None = None
        self._no_truth: str | None = None  # "": it is there

    async def prove(self, subject: Subject, within_s: float = 0.0) -> Verdict:
        """Whether the engine computes this model rightly. Never raises because of the engine."""
        subject = msgspec.structs.replace(subject, weights=self._weights)
        await self._seek_truth()
        if self._no_truth or self._folders is None:
            return Verdict(MODEL, "failed", _NO_TRUTH.format(why=self._no_truth))
        label = f"{subject.backend}-{subject.kind}"
        steps = self._steps(label)
        try:
            jobs = [(self._folders[0], builtin.CHUNKS, steps)]
            await run(subject, self._work, jobs, _THREADS, within_s or self._within_s)
            return await asyncio.to_thread(self._judge, subject, label)
        except Failed as error:
            return Verdict(MODEL, "failed", f"{error} ({self._where(error.at[1])})")
        except (OSError, ValueError) as error:
            return Verdict(MODEL, "failed", f"it left no numbers: {error}")

    async def _seek_truth(self) -> None:
        if self._no_truth is not None:
            return
        try:
            self._folders = await asyncio.to_thread(self._make)
            itself, copy = self._folders
            jobs = [
                (copy, builtin.CHUNKS, self._steps("truth")),
                (itself, builtin.CHUNKS, self._steps("own")),
            ]
            trusted = Subject(proof.TRUSTED, "cpu")
            await run(trusted, self._work, jobs, _THREADS, self._within_s)
            self._no_truth = ""
        except HalkaError as error:
            self._no_truth = f"llama.cpp, which is trusted: {error}"

    def _make(self) -> tuple[Path, Path]:
        with (self._work / "tokens.npy").open("xb") as out:
            np.save(out, builtin.tokens(), allow_pickle=False)
        return builtin.make(self._work, self._kinds)

    def _steps(self, label: str) -> list[Step]:
        """Every layer alone, given what is right, and then all of them."""
        layers = len(self._kinds)
        steps = [
            {"first": i, "last": i + 1, "x": str(self._x(i)), "out": str(self._out(label, i))}
            for i in range(layers)
        ]
        whole = {"first": 0, "last": layers, "x": str(self._x(0))}
        return [*steps, {**whole, "out": str(self._out(label, layers))}]

    def _x(self, layer: int) -> Path:
        return self._out("truth", layer - 1) if layer else self._work / "tokens.npy"

    def _out(self, label: str, layer: int) -> Path:
        return self._work / f"{label}-{layer:03d}.npy"

    def _where(self, step: int) -> str:
        if step >= len(self._kinds):
            return MODEL
        return f"layer {step} of {MODEL}, {self._holds(step)} weights"

    def _holds(self, layer: int) -> str:
        kinds = [self._kinds[layer]]
        if layer == 0:
            kinds.append(f"{builtin.EMBEDDING} embedding")
        if layer == len(self._kinds) - 1:
            kinds.append(f"{builtin.OUTPUT} output")
        return " and ".join(kinds)

    def _judge(self, subject: Subject, label: str) -> Verdict:
        layers = len(self._kinds)
        figures = []
        for layer in range(layers):
            x = array(self._x(layer)) if 0 < layer < layers - 1 else None
            truth = array(self._out("truth", layer))
            figures.append(
                LayerFigure(
                    layer,
                    self._holds(layer),
                    proof.layer_error(truth, array(self._out(label, layer)), x),
                    proof.layer_error(truth, array(self._out("own", layer)), x),
                    rounded=self._kinds[layer] in ROUNDED,
                )
            )
        truth = array(self._out("truth", layers))
        logits = proof.logits_figure(truth, array(self._out(label, layers)))
        own = proof.logits_figure(truth, array(self._out("own", layers)))
        return proof.judge(subject, MODEL, figures, logits, own)


def subject_of(engine: EngineProfile, weights: str) -> Subject:
    """An engine of this peer, as it is proven."""
    return Subject(engine.backend, engine.kind, engine.device, version(engine.backend), weights)


async def trusted(
    config: Config,
    engines: Sequence[EngineProfile],
    refused: dict[str, str] | None = None,
    *,
    within_s: float = WITHIN_S,
) -> tuple[EngineProfile, ...]:
    """Those of these engines that may be used; why not, in `refused`, by backend.

    llama.cpp is trusted, and the fake one asked for. What was proven with these very versions is
    not proven again; what could not be proven is tried again at the next start.
    """
    why: dict[str, str] = {}
    seen = {proof.TRUSTED, "fake"}
    async with contextlib.AsyncExitStack() as stack:
        proofs: Builtin | None = None
        for engine in engines:
            if engine.backend in seen:  # of its devices it computes with the first
                continue
            seen.add(engine.backend)
            subject, verdict = await asyncio.to_thread(_remembered, config, engine)
            if verdict is None:
                log.info(
                    "engine=proving name=%s hint=takes seconds, once for each release of it",
                    subject.name,
                )
                try:
                    if proofs is None:
                        work = await stack.enter_async_context(at_work(config.home))
                        proofs = Builtin(work, config.weights, within_s)
                    verdict = await proofs.prove(subject)
                except HalkaError as error:
                    verdict = Verdict(MODEL, "failed", str(error))
                await asyncio.to_thread(Verified(config.home).keep, subject, verdict)
            if verdict.how == "passed":
                log.info("engine=proven name=%s device=%s", subject.name, subject.device)
                continue
            why[engine.backend] = proof.refusal(subject, verdict)
            log.warning("engine=refused because=%s", why[engine.backend])
    if refused is not None:
        refused.clear()
        refused.update(why)
    return tuple(engine for engine in engines if engine.backend not in why)


def _remembered(config: Config, engine: EngineProfile) -> tuple[Subject, Verdict | None]:
    subject = subject_of(engine, config.weights)
    return subject, Verified(config.home).find(subject)
