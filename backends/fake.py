"""A tiny deterministic engine: the same tokens from any split, so that most tests need no C++.

It runs models of architecture "fake": one tensor of four rows a layer, a vocabulary of the 256
bytes and a few control ids (see `fake_model`). What a layer makes of a token depends on the token,
its position, everything before it in its slot and the layer's own weights, read from the very files
that a real engine would map: a wrong part, order, position, trim or copy gives other tokens or an
error, never the right answer by luck.

`HALKA_FAKE_DELAY_S` (or the metadata key `fake.delay_s`) makes each step of a window take longer;
for what else can go wrong in a stage, see `fake_faults`.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from backends import fake_faults
from backends.base import (
    Ability,
    BackendFault,
    Batch,
    Cuts,
    Device,
    Engine,
    Footprint,
    Header,
    Recipe,
    Settings,
    Slot,
    Vocabulary,
    Weights,
    Window,
)
from backends.fake_model import (
    ARCHITECTURE,
    BOS,
    CONTROL,
    EOS,
    PRIME,
    VOCABULARY,
    Integers,
    Layer,
    Reader,
    embed,
    integers,
    logits_of,
)


@dataclass(slots=True)
class _Loaded:
    window: Window
    layers: list[Layer]
    embedding: Integers | None
    output: Integers | None
    end_every: int
    delay_s: float


class FakeBackend:
    """Windows of a fake model. See `backends.base.Backend`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._loaded: dict[tuple[int, int], _Loaded] = {}
        self._lengths: dict[tuple[int, int], dict[Slot, int]] = {}

    def load(self, window: Window) -> Footprint:
        """Make the window ready to run. Raises BackendFault naming what is missing."""
        _refuse_others(window.header)
        fake_faults.at_load(window.first)
        readers = [Reader(path) for path in window.files]
        if window.embed is not None:
            readers.append(Reader(window.embed))
        tensors = {name: values for r in readers for name, values in r.tensors.items()}
        main = readers[0].metadata
        count = main.get("fake.block_count")
        if count != window.last - window.first:
            raise BackendFault(f"the main file says {count} layers, not the window's")
        names = [f"blk.{i}.weight" for i in range(count)]
        ends = {"token_embd.weight"} if window.is_first else set()
        output = (
            "output.weight" if "output.weight" in window.header.tensors else "token_embd.weight"
        )
        if window.is_last:
            ends.add(output)
        if missing := [name for name in [*names, *sorted(ends)] if name not in tensors]:
            raise BackendFault(f"{', '.join(missing[:3])} not in the window's files")
        key = (window.first, window.last)
        self._loaded[key] = _Loaded(
            window,
            [Layer(integers(tensors[name])) for name in names],
            integers(tensors["token_embd.weight"]) if window.is_first else None,
            integers(tensors[output]) if window.is_last else None,
            int(main.get("fake.end_every", 0)),
            float(os.environ.get("HALKA_FAKE_DELAY_S") or main.get("fake.delay_s", 0.0)),
        )
        self._lengths[key] = {}
        hidden = tensors[names[0]].shape[1]
        return Footprint(
            weights_bytes=sum(tensors[n].nbytes for n in {*names, *ends}),
            kv_bytes=self._settings.kv_cells * hidden * 8 * count,
            compute_bytes=self._settings.batch_tokens * hidden * 8,
        )

    def run(self, window: Window, batch: Batch, x: NDArray[Any]) -> NDArray[np.float32]:
        """One step through one window, checked more strictly than a real engine can.

        Raises BackendFault: kind memory where the KV cells are used up; failed where positions do
        not continue their slots, rows are out of order or the input is not of this model.
        """
        loaded = self._loaded.get((window.first, window.last))
        if loaded is None:
            raise BackendFault(f"window {window.first}-{window.last} is not loaded")
        if loaded.delay_s:
            time.sleep(loaded.delay_s)
        spans = self._spans(loaded, batch)
        if loaded.embedding is not None:
            if x.dtype != np.int32 or x.ndim != 1 or ((x < 0) | (x >= VOCABULARY)).any():
                raise BackendFault("the first window was given something else than token ids")
            rows = embed(loaded.embedding, x.astype(np.int64))
        else:
            rows = self._activations(loaded, x)
        if len(rows) != len(batch.slots):
            raise BackendFault(f"{len(rows)} rows of input for {len(batch.slots)} of the batch")
        broken = fake_faults.at_step(window.first, rows[:, 0])
        positions = batch.positions.astype(np.int64)
        for layer in loaded.layers:
            rows = np.concatenate(
                [layer.run(slot, positions[a:b], rows[a:b]) for slot, a, b in spans]
            )
        lengths = self._lengths[window.first, window.last]
        for slot, a, b in spans:
            lengths[slot] = lengths.get(slot, 0) + b - a
        if loaded.output is None:
            return _infinite(rows.astype(np.float32), broken)
        wanted = batch.outputs
        logits = logits_of(loaded.output, rows[wanted], positions[wanted], loaded.end_every)
        return _infinite(logits, broken[wanted])

    def trim(self, slot: Slot, position: int) -> None:
        """Forget, in all windows, what lies at and beyond `position` of the slot."""
        for key, loaded in self._loaded.items():
            lengths = self._lengths[key]
            if lengths.get(slot, 0) <= position:
                continue
            lengths[slot] = position
            for layer in loaded.layers:
                layer.sums[slot] = layer.sums[slot][:position].copy()

    def copy(self, source: Slot, target: Slot, length: int) -> None:
        """Give `target` the first `length` positions of `source`, instead of what it had."""
        for key, loaded in self._loaded.items():
            lengths = self._lengths[key]
            if lengths.get(source, 0) < length:
                raise BackendFault(f"slot {source} has no {length} positions to copy")
            self._room(key, length - lengths.get(target, 0))
            lengths[target] = length
            for layer in loaded.layers:
                if length:
                    layer.sums[target] = layer.sums[source][:length].copy()
                else:
                    layer.sums.pop(target, None)

    def close(self) -> None:
        """Free everything."""
        self._loaded.clear()
        self._lengths.clear()

    def _room(self, key: tuple[int, int], more: int) -> None:
        used = sum(self._lengths[key].values())
        if used + more > self._settings.kv_cells:
            raise BackendFault(
                f"{used} of {self._settings.kv_cells} KV cells are used, {more} more are wanted",
                "memory",
            )

    def _spans(self, loaded: _Loaded, batch: Batch) -> list[tuple[Slot, int, int]]:
        """(slot, first row, last row + 1) of every slot in the batch. Raises BackendFault."""
        key = (loaded.window.first, loaded.window.last)
        rows = len(batch.slots)
        if not 1 <= rows <= self._settings.batch_tokens:
            raise BackendFault(f"a batch of {rows} rows, not 1 to {self._settings.batch_tokens}")
        edges = [0, *(np.flatnonzero(np.diff(batch.slots)) + 1).tolist(), rows]
        spans = [(int(batch.slots[a]), a, b) for a, b in pairwise(edges)]
        if len({slot for slot, _, _ in spans}) < len(spans):
            raise BackendFault("rows of one slot are not together")
        for slot, a, b in spans:
            if not 0 <= slot < self._settings.slots:
                raise BackendFault(f"slot {slot} of {self._settings.slots}")
            held = self._lengths[key].get(slot, 0)
            if batch.positions[a:b].tolist() != list(range(held, held + b - a)):
                raise BackendFault(
                    f"slot {slot} holds {held} positions and is given "
                    f"{batch.positions[a]} to {batch.positions[b - 1]}"
                )
        self._room(key, rows)
        return spans

    def _activations(self, loaded: _Loaded, x: NDArray[Any]) -> Integers:
        hidden = loaded.layers[0].weight.shape[1]
        if x.dtype != np.float32 or x.ndim != 2 or x.shape[1] != hidden:
            raise BackendFault(
                f"activations of {x.dtype} {x.shape}, not float32 [tokens, {hidden}]"
            )
        with np.errstate(invalid="ignore"):
            rows = x.astype(np.int64)
        if (
            not np.isfinite(x).all()
            or (rows != x).any()
            or (rows < 0).any()
            or (rows >= PRIME).any()
        ):
            raise BackendFault("activations that no fake window gives")
        return rows


class FakeVocabulary:
    """Bytes and a few control words. See `backends.base.Vocabulary`."""

    ends = frozenset({EOS})
    starts_with = (BOS,)

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Token ids of text: its UTF-8 bytes; control words, where they are read, are one id."""
        data, ids, at = text.encode("utf-8", "replace"), [], 0
        words = [(spelling.encode(), token) for token, spelling in CONTROL.items()]
        while at < len(data):
            for spelling, token in words if special else ():
                if data.startswith(spelling, at):
                    ids.append(token)
                    at += len(spelling)
                    break
            else:
                ids.append(data[at])
                at += 1
        return ids

    def pieces(self) -> list[bytes]:
        """The bytes of every token id, in order; b"" for control tokens."""
        return [bytes([i]) for i in range(256)] + [b""] * len(CONTROL)

    def text_of(self, token: int) -> str:
        """A token's spelling."""
        return CONTROL[token] if token in CONTROL else bytes([token]).decode("latin-1")


class FakeEngine:
    """The module's door. See `backends.base.Engine`."""

    name = "fake"

    def devices(self) -> list[Device]:
        """The processor."""
        memory = psutil.virtual_memory()
        return [Device("CPU", "cpu", int(memory.available), int(memory.total))]

    def cuts(self, header: Header) -> Cuts:
        """Before every layer of a fake model; nowhere in another one."""
        if header.architecture != ARCHITECTURE:
            why = f"the fake engine runs the fake architecture only, not {header.architecture}"
            return Cuts(header.layers, (0,), why=why)
        return Cuts(header.layers, tuple(range(header.layers)))

    def can_run(self, header: Header, weights: Weights = "auto") -> Ability:
        """Fake models, exactly."""
        if header.architecture != ARCHITECTURE:
            return Ability("no", f"the fake engine runs fake models, not {header.architecture}")
        return Ability("exact")

    def recipe(self, header: Header, first: int, last: int) -> Recipe:
        """How to write the main file of [first, last). Raises BackendFault if refused."""
        _refuse_others(header)
        if refusal := self.cuts(header).refusal(first, last):
            raise BackendFault(refusal, "refused")
        is_last, tied = last == header.layers, "output.weight" not in header.tensors
        return Recipe(
            write={"fake.block_count": ("uint32", last - first)},
            drop=() if is_last else ("tokenizer.",),
            embed=is_last and (tied or first == 0),
            output=is_last and not tied,
        )

    def kv_types(self, header: Header) -> tuple[str, ...]:
        """It keeps running sums, which have one type."""
        return ("f16",)

    def rewinds(self, header: Header) -> bool:
        """It keeps the sums of every position."""
        return True

    def kv_bytes_per_cell(self, header: Header, kv_type: str = "f16") -> tuple[int, ...]:
        """Bytes of running sums that one token takes, for each layer."""
        hidden = int(header.metadata.get("fake.embedding_length", 0))
        return (hidden * 8,) * header.layers

    def open(self, settings: Settings) -> FakeBackend:
        """An empty backend."""
        return FakeBackend(settings)

    def vocabulary(self, head: Path) -> Vocabulary:
        """The words of a fake model. Raises BackendFault for another model."""
        if (other := Reader(head).metadata.get("general.architecture")) != ARCHITECTURE:
            raise BackendFault(f"the fake engine has no words for {other}", "refused")
        return FakeVocabulary()


ENGINE: Engine = FakeEngine()


def _infinite(x: NDArray[np.float32], broken: NDArray[np.bool_]) -> NDArray[np.float32]:
    """The rows, of which some were to go wrong. x: [rows, width]."""
    if broken.any():
        x[broken] = np.nan
    return x


def _refuse_others(header: Header) -> None:
    if header.architecture != ARCHITECTURE:
        raise BackendFault(
            f"the fake engine runs models of architecture fake, not {header.architecture}; "
            "set backend to auto",
            "refused",
        )
