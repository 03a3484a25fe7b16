"""The model in use, as far as this peer holds it: engines compared on some of its layers. A shell.

A few layers are copied in F32, one of every kind among them, and given the same random rows; where
the whole model is here and fits into memory, its logits are compared, too. What cannot be compared
here is no verdict against an engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from peer.errors import HalkaError
from peer.models.manifest import Manifest, layer_part
from peer.planning import copies, proof
from peer.planning.proof import LayerFigure, LogitsFigure, Subject, Verdict
from peer.planning.proving import ROUNDED, Failed, Step, array, run

LAYERS_MAX = 6
COPIED_BYTES_MAX = 4 << 30  # of copies in F32, on disk
WHOLE_BYTES_MAX = 2 << 30  # of a model that is copied whole
WITHIN_S = 300.0  # for one engine
ROWS, CHUNKS = 32, (24, 1, 1, 6)  # a prompt, single tokens, a few at once
_SEED = 22


class Canary:
    """One model and the truth about it. held: its parts that are here. memory_bytes: free."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        held: Collection[str],
        work: Path,
        threads: int,
        memory_bytes: int,
    ) -> None:
        self._folder, self._manifest, self._work = folder, manifest, work
        self._threads = threads
        parts = {part.name: part for part in manifest.parts}
        whole = all(name in held for name in parts)
        weights = sum(part.data_bytes for part in parts.values())
        sizes = [copies.copied_bytes(part) for part in parts.values() if part.name != "head"]
        self.copies_whole = (
            whole and all(sizes) and sum(sizes) <= min(WHOLE_BYTES_MAX, memory_bytes // 3)
        )
        self.runs_whole = whole and weights <= memory_bytes // 2
        budget = min(COPIED_BYTES_MAX, memory_bytes)
        self._layers = copies.sampled(manifest, held, LAYERS_MAX, budget)
        self._copied = [i for i in self._layers if copies.copied_bytes(parts[layer_part(i)])]
        self._routed = copies.has_experts(manifest.parts)
        self._no_truth: str | None = None  # "": it is there

    @property
    def untold(self) -> str:
        """Why the whole model is not compared, or ""."""
        if self.runs_whole:
            return ""
        return (
            "only some layers are compared: the model is not whole on this peer, or needs more "
            "than half of the free memory"
        )

    async def prove(self, subject: Subject) -> Verdict:
        """Whether the engine computes this model rightly. Never raises because of the engine."""
        model = self._manifest.model
        if not self._layers and not self.runs_whole:
            why = "too little of it is here, and fits into memory, to be compared"
            return Verdict(model, "skipped", why)
        await self._seek_truth()
        if self._no_truth:
            return Verdict(model, "skipped", self._no_truth)
        label = f"{subject.backend}-{subject.kind}"
        steps = [*self._layer_steps(label), *self._whole_steps(label)]
        try:
            await run(subject, self._work, [(self._folder, CHUNKS, steps)], self._threads, WITHIN_S)
            return await asyncio.to_thread(self._judge, subject, label)
        except Failed as error:
            if error.refused:
                return Verdict(model, "skipped", f"it does not run this model: {error}")
            return Verdict(model, "failed", f"{error} ({self._where(error.at[1])})")
        except (OSError, ValueError) as error:
            return Verdict(model, "failed", f"it left no numbers: {error}")

    async def _seek_truth(self) -> None:
        """Layers first, then the whole: where one cannot be had, the other may do."""
        if self._no_truth is not None:
            return
        self._no_truth = ""
        trusted = Subject(proof.TRUSTED, "cpu")
        try:
            copy = await asyncio.to_thread(self._prepare)
            jobs = [(self._folder, CHUNKS, self._layer_steps("own"))]
            if copy is not None:
                jobs.append((copy, CHUNKS, self._layer_steps("truth", self._copied)))
            await run(trusted, self._work, jobs, self._threads, WITHIN_S)
        except (HalkaError, OSError) as error:
            self._layers = []
            self._no_truth = f"llama.cpp, which is trusted, does not run it here: {error}"
            return
        if not self.runs_whole:
            return
        jobs = [(self._folder, CHUNKS, self._whole_steps("own"))]
        if self.copies_whole and copy is not None:
            jobs.append((copy, CHUNKS, self._whole_steps("truth")))
        try:
            await run(trusted, self._work, jobs, self._threads, WITHIN_S)
        except HalkaError as error:
            self.runs_whole = self.copies_whole = False
            if not self._layers:
                self._no_truth = f"llama.cpp, which is trusted, does not run it here: {error}"

    def _prepare(self) -> Path | None:
        """Write what the engines are given, and the copies. Returns the copy's folder."""
        random = np.random.default_rng(_SEED)
        embedding = next(t for t in self._manifest.part("embed").tensors if len(t.shape) > 1)
        hidden, vocabulary = embedding.shape[0], embedding.shape[-1]
        rows = random.standard_normal((ROWS, hidden), dtype=np.float32)
        ids = random.integers(0, vocabulary, ROWS).astype(np.int32)
        for path, values in ((self._rows, rows), (self._ids, ids)):
            with path.open("xb") as out:
                np.save(out, values, allow_pickle=False)
        parts = {layer_part(layer) for layer in self._copied}
        if self.copies_whole:
            parts = {part.name for part in self._manifest.parts if part.name != "head"}
        if not parts:
            return None
        return copies.copy(self._folder, self._manifest, parts, self._work)

    @property
    def _rows(self) -> Path:
        return self._work / "canary-rows.npy"

    @property
    def _ids(self) -> Path:
        return self._work / "canary-ids.npy"

    def _out(self, label: str, what: str) -> Path:
        return self._work / f"canary-{label}-{what}.npy"

    def _layer_steps(self, label: str, layers: Sequence[int] | None = None) -> list[Step]:
        return [
            {
                "first": i,
                "last": i + 1,
                "x": str(self._rows),
                "out": str(self._out(label, f"{i:03d}")),
            }
            for i in (self._layers if layers is None else layers)
        ]

    def _whole_steps(self, label: str) -> list[Step]:
        if not self.runs_whole:
            return []
        last = self._manifest.layers
        out = str(self._out(label, "whole"))
        return [{"first": 0, "last": last, "x": str(self._ids), "out": out}]

    def _where(self, step: int) -> str:
        if step >= len(self._layers):
            return f"the whole of {self._manifest.model}"
        layer = self._layers[step]
        holds = copies.holds(self._manifest.part(layer_part(layer)))
        return f"layer {layer} of {self._manifest.model}, {holds} weights"

    def _judge(self, subject: Subject, label: str) -> Verdict:
        x = array(self._rows)
        figures = []
        for layer in self._layers:
            part, name = self._manifest.part(layer_part(layer)), f"{layer:03d}"
            own, found = array(self._out("own", name)), array(self._out(label, name))
            copied = layer in self._copied
            truth = array(self._out("truth", name)) if copied else own
            figures.append(
                LayerFigure(
                    layer,
                    copies.holds(part),
                    proof.layer_error(truth, found, x, routed=self._routed),
                    proof.layer_error(truth, own, x, routed=self._routed),
                    rounded=copies.rounded(part, ROUNDED),
                    copied=copied,
                )
            )
        logits, own_logits = self._logits_of(label)
        return proof.judge(subject, self._manifest.model, figures, logits, own_logits, real=True)

    def _logits_of(self, label: str) -> tuple[LogitsFigure | None, LogitsFigure | None]:
        """The engine's logits against the truth, and llama.cpp's own; else against llama.cpp's."""
        if not self.runs_whole:
            return None, None
        own, found = array(self._out("own", "whole")), array(self._out(label, "whole"))
        if not self.copies_whole:
            return proof.logits_figure(own, found), None
        truth = array(self._out("truth", "whole"))
        return proof.logits_figure(truth, found), proof.logits_figure(truth, own)
