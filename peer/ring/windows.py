"""A stage's windows on its engine, and the samplers where it is the tail."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.base import (
    Backend,
    BackendFault,
    Batch,
    Engine,
    Footprint,
    Island,
    Settings,
    Weights,
    Window,
)
from peer.models.manifest import load as load_manifest
from peer.models.parts import hold, load_header, place
from peer.planning.plan import Plan
from peer.ring.frames import Copy, Open, Trim
from peer.ring.residence import Files, Residence
from peer.ring.tail import Tail


class Windows:
    """This stage's windows on its backend, and the samplers where it is the tail (`sample`)."""

    def __init__(
        self,
        engine: Engine,
        plan: Plan,
        peer_id: str,
        threads: int,
        weights: Weights = "auto",
    ) -> None:
        self.plan, self.peer_id = plan, peer_id
        self.mine = plan.windows_of(peer_id)
        split = plan.split
        self._engine = engine
        self._settings = Settings(
            split.slots,
            split.kv_cells,
            split.batch_tokens,
            threads,
            split.windows[self.mine[0]].gpu_layers,
            split.kv_type,
            split.flash,
            weights,
        )
        self._backend: Backend | None = None
        self.vocabulary = 0  # ids below it exist; known once loaded
        self.rewinds = True  # whether a slot can be trimmed to any position; known once loaded
        self._windows: dict[int, Window] = {}
        self._tail = Tail(peer_id)
        self.sample = self._tail.sample
        self._residence: Residence | None = None  # only where the plan streams
        self._last_run = 0  # the window of this stage whose turn it was last

    def load(self, folder: Path, island: Island | None = None) -> Footprint:
        """Place the parts of every window and load them. island: who computes them together."""
        backend = self._backend = self._engine.open(replace(self._settings, island=island))
        manifest = load_manifest(folder)
        header = load_header(folder, manifest)
        hidden = header.metadata.get(f"{header.architecture}.embedding_length")
        if (header.layers, hidden) != (self.plan.shape.layers, self.plan.shape.hidden):
            raise BackendFault("the plan was made for another model than the one that is here")
        self.vocabulary = header.tensors["token_embd.weight"].shape[-1]
        self.rewinds = self._engine.rewinds(header)
        with hold(folder):  # nobody else is placing: what is there was left by a stage that died
            for left in folder.glob("window-*"):
                shutil.rmtree(left, ignore_errors=True)
        weights = kv = compute = 0
        held: list[Files] = []
        for index in self.mine:
            first, last = self.plan.split.windows[index].first, self.plan.split.windows[index].last
            recipe = self._engine.recipe(header, first, last)
            # Headers are read at load only: another stage may rewrite them right after.
            with (
                hold(folder),
                TemporaryDirectory(prefix=f"window-{first}-{last}-", dir=folder) as into,
            ):
                placed = place(folder, manifest, recipe, first, last, Path(into))
                window = Window(
                    first, last, header.layers, header, placed.files, placed.embed, placed.places
                )
                used = backend.load(window)
            self._windows[index] = window
            weights, kv = weights + used.weights_bytes, kv + used.kv_bytes
            compute += used.compute_bytes  # each window has a context, with buffers of its own
            held.append(self._files(index, placed.files[1:]))
        if any(files.streamed_bytes for files in held):
            self._residence = Residence(held)
        return Footprint(weights, kv, compute)

    def _files(self, index: int, splits: tuple[Path, ...]) -> Files:
        """A window's layers on the processor; those on a GPU, its last ones, are read only once."""
        window = self.plan.split.windows[index]
        layers = window.last - window.first
        on_gpu = layers if window.gpu_layers < 0 else min(layers, window.gpu_layers)
        return Files(splits[: layers - on_gpu], window.streamed_bytes, window.ahead_bytes)

    def apply(self, ops: tuple[Open | Trim | Copy, ...]) -> None:
        """Do what the frame asks for before its rows are run."""
        for op in ops:
            match op:
                case Open(slot, sampling, history):
                    self._tail.open(slot, sampling, history)
                case Trim(slot, position):
                    self._ready().trim(slot, position)
                    if position == 0:
                        self._tail.free(slot)
                case Copy(source, target, length):
                    self._ready().copy(source, target, length)

    def run(self, index: int, batch: Batch, x: NDArray[Any]) -> NDArray[np.float32]:
        """One step through one of the windows; x as in `Backend.run`."""
        self._last_run = index
        return self._ready().run(self._windows[index], batch, x)

    def _ready(self) -> Backend:
        if self._backend is None:
            raise BackendFault("a step came before the windows were loaded")
        return self._backend

    def rest(self) -> None:
        """The turn is over and told: time for what a plan that streams does between turns."""
        if self._residence:
            self._residence.after(self.mine.index(self._last_run))

    def close(self) -> None:
        """Free the engine's memory."""
        if self._residence:
            self._residence.close()
        if self._backend:
            self._backend.close()
