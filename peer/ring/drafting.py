"""The draft model: a small whole model on the head that guesses what the ring then verifies.

It has an engine and a KV cache of its own, in the head's stage process, and is asked between steps,
so all that it does at once is short: a prompt is read a little at a time, and until it has caught
up it guesses nothing. What it guesses changes no answer, so whatever goes wrong with it is a line
in the log and the end of guessing, never the end of a plan.
"""

from __future__ import annotations

import logging
import math
import time
from array import array
from collections.abc import Callable, Collection, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
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
    Header,
    Settings,
    Weights,
    Window,
)
from peer.errors import HalkaError
from peer.models import tokenizers
from peer.models.manifest import Manifest
from peer.models.manifest import load as load_manifest
from peer.models.parts import hold, load_header, place
from peer.planning.drafts import BATCH_TOKENS, SLOTS, cells
from peer.planning.profile import PLAIN_ENGINE
from peer.protocol import StageOrder

log = logging.getLogger("halka.stage")

READ_S = 0.03  # of reading in one call: five times as long as the ring takes for a fast token
_READ_LEAST = 8  # rows at once; with fewer a processor reads its weights more often than it need
_TIMED = 0.2  # what the newest measurement counts
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")  # of `tokenizer.ggml.`


@dataclass(slots=True)
class _Slot:
    """What one answer has in the draft model's KV cache. held: its ids, in order."""

    number: int
    held: array[int] = field(default_factory=lambda: array("i"))


class DraftModel:
    """Guesses greedily. A `speculation.Drafter`.

    backend: with the whole model loaded as `window`. kv_cells: tokens that fit into its KV cache,
    for all slots. ids: token ids below it are known to both models. ends: ids that end an answer.
    """

    def __init__(
        self,
        name: str,
        backend: Backend,
        window: Window,
        kv_cells: int,
        ids: int,
        ends: Collection[int] = (),
    ) -> None:
        self.name = name
        self.why = ""  # it does not guess any more, once there is a reason
        self._backend: Backend | None = backend
        self._window, self._cells, self._ids, self._ends = window, kv_cells, ids, frozenset(ends)
        self._slots: dict[Hashable, _Slot] = {}  # whoever was guessed for last is the last one
        self._free = list(range(SLOTS))
        self._row_s = self.seconds_each = 0.0
        self._measure()

    def draft(self, key: Hashable, ids: Sequence[int], most: int) -> tuple[int, ...]:
        """Up to `most` ids that may follow `ids`, all of this answer so far. () while it has not
        read them all, and where they are too many for it."""
        most = min(most, self._cells - len(ids) + 1)  # the last guess needs no cell
        if self._backend is None or most <= 0 or not len(ids):
            return ()
        try:
            slot = self._slot(key, len(ids) + most - 1)
            self._trim(slot, min(_common(slot.held, ids), len(ids) - 1))
            if max(ids[len(slot.held) :]) >= self._ids:  # of the other vocabulary's padding
                return ()
            return self._guess(slot, ids, most) if self._read(slot, ids) else ()
        except BackendFault as fault:
            self._fall(str(fault))
            return ()

    def forget(self, key: Hashable) -> None:
        """The answer is over."""
        try:
            self._release(key)
        except BackendFault as fault:
            self._fall(str(fault))

    def close(self) -> None:
        """Free its memory. May be called again."""
        backend, self._backend = self._backend, None
        self._slots.clear()
        if backend is not None:
            backend.close()

    def _fall(self, why: str) -> None:
        """The ring goes on without it."""
        self.why = why
        log.warning("draft=dropped model=%s because=%s", self.name, why)
        self.close()

    # Slots ----------------------------------------------------------------------------------

    def _slot(self, key: Hashable, length: int) -> _Slot:
        """The answer's slot, with room for so many ids: others that waited for longest give way."""
        slot = self._slots.pop(key, None)
        while self._slots and (
            (slot is None and not self._free) or self._taken() + length > self._cells
        ):
            self._release(next(iter(self._slots)))
        if slot is None:
            slot = _Slot(self._free.pop())
        self._slots[key] = slot
        return slot

    def _release(self, key: Hashable) -> None:
        if slot := self._slots.pop(key, None):
            self._trim(slot, 0)
            self._free.append(slot.number)

    def _taken(self) -> int:
        return sum(len(slot.held) for slot in self._slots.values())

    def _trim(self, slot: _Slot, length: int) -> None:
        if self._backend is not None and len(slot.held) > length:
            self._backend.trim(slot.number, length)
            del slot.held[length:]

    # Steps ----------------------------------------------------------------------------------

    def _read(self, slot: _Slot, ids: Sequence[int]) -> bool:
        """Catch up with the answer, for a moment. True once what is left is read with the guess."""
        until = time.monotonic() + READ_S
        while len(ids) - len(slot.held) > (rows := self._rows()):
            began = time.monotonic()
            if began >= until:
                return False
            self._run(slot, ids[len(slot.held) : len(slot.held) + rows], wanted=False)
            self._row_s = _lately(self._row_s, (time.monotonic() - began) / rows)
        return True

    def _rows(self) -> int:
        """To be read at once, so that it takes about READ_S."""
        rows = int(READ_S / self._row_s) if self._row_s > 0 else BATCH_TOKENS
        return max(_READ_LEAST, min(BATCH_TOKENS, rows))

    def _guess(self, slot: _Slot, ids: Sequence[int], most: int) -> tuple[int, ...]:
        """The likeliest id, and the likeliest after that one, and so on."""
        began, unread = time.monotonic(), len(ids) - len(slot.held)
        found: list[int] = []
        logits = self._run(slot, ids[len(slot.held) :], wanted=True)
        while True:
            token = int(logits.argmax())
            if not math.isfinite(float(logits[token])):
                raise BackendFault("its numbers are not finite")
            if token >= self._ids:
                break
            found.append(token)
            if len(found) == most or token in self._ends:
                break
            logits = self._run(slot, (token,), wanted=True)
        if found and unread <= len(found) + 1:  # else most of the time went into reading
            took_s = time.monotonic() - began
            self.seconds_each = _lately(self.seconds_each, took_s / len(found))
        return tuple(found)

    def _run(self, slot: _Slot, ids: Sequence[int], *, wanted: bool) -> NDArray[np.float32]:
        """One step of one slot. Returns [vocabulary] logits of its last row, where wanted."""
        if self._backend is None:
            raise BackendFault("it is closed")
        rows, held = len(ids), len(slot.held)
        outputs = np.zeros(rows, np.bool_)
        outputs[-1] = wanted
        batch = Batch(
            np.full(rows, slot.number, np.int32),
            np.arange(held, held + rows, dtype=np.int32),
            outputs,
        )
        logits = self._backend.run(self._window, batch, np.array(ids, np.int32))
        slot.held.extend(ids)
        row: NDArray[np.float32] = logits[-1] if wanted else np.empty(0, np.float32)
        return row

    def _measure(self) -> None:
        """What reading and guessing take. The first step also fetches the weights from the disk."""
        slot, rows = _Slot(self._free[-1]), min(_READ_LEAST, self._cells // 4)
        for _ in range(2):
            self._trim(slot, 0)
            began = time.monotonic()
            self._run(slot, (0,) * max(rows, 1), wanted=False)
            self._row_s = (time.monotonic() - began) / max(rows, 1)
        began, count = time.monotonic(), min(3, self._cells - len(slot.held))
        for _ in range(count):
            self._run(slot, (0,), wanted=True).argmax()
        self.seconds_each = (time.monotonic() - began) / max(count, 1)
        self._trim(slot, 0)


def of_head(
    engine: Engine, order: StageOrder, loaded: Callable[[str], Engine]
) -> DraftModel | None:
    """The model that drafts for a stage's plan, None where there is none, or where it cannot: the
    reason is in the log, and the plan goes on without it. It runs on the stage's engine, or on the
    plain one where that cannot run it; loaded: gives the engine of a name."""
    split = order.plan.plan.split
    if not order.draft_folder or order.plan.plan.head != order.peer_id:
        return None
    try:
        folder = Path(order.draft_folder)
        if engine.can_run(load_header(folder), order.weights).how == "no":
            engine = loaded(PLAIN_ENGINE)
        return load(
            engine,
            folder,
            Path(order.folder),
            threads=order.threads,
            kv_cells=split.kv_cells,
            gpu_layers=-1 if split.windows[0].gpu_layers else 0,
            weights=order.weights,
        )
    except (BackendFault, HalkaError, ImportError, OSError) as error:
        log.warning("draft=none plan=%s because=%s", order.plan.plan.id, error)
        return None


def load(
    engine: Engine,
    folder: Path,
    target: Path,
    *,
    threads: int,
    kv_cells: int,
    gpu_layers: int = 0,
    weights: Weights = "auto",
) -> DraftModel:
    """Load the model in `folder`, all of it, to draft for the one in `target`. Both: of the store.

    kv_cells: of the target's stage. gpu_layers: 0 or -1, all of them. weights: the setting. Raises
    BackendFault and ModelError: the reason why it cannot draft, such as another tokenizer.
    """
    manifest = load_manifest(folder)
    header, of_target = load_header(folder, manifest), load_header(target)
    if why := tokenizers.difference(of_target.metadata, header.metadata):
        raise BackendFault(f"{manifest.model} cannot draft: {why}", "refused")
    if not engine.rewinds(header):
        why = "its recurrent layers cannot take a wrong guess back"
        raise BackendFault(f"{manifest.model} cannot draft: {why}", "refused")
    context = header.metadata.get(f"{header.architecture}.context_length", 0)
    room = cells(kv_cells, context if isinstance(context, int) else 0)
    settings = Settings(SLOTS, room, min(BATCH_TOKENS, room), threads, gpu_layers, weights=weights)
    backend = engine.open(settings)
    try:
        window = _load_whole(engine, backend, folder, manifest, header)
        ids = min(h.tensors["token_embd.weight"].shape[-1] for h in (header, of_target))
        found = DraftModel(manifest.model, backend, window, room, ids, _ends(header))
    except BaseException:
        with suppress(BackendFault):
            backend.close()
        raise
    log.info("draft=loaded model=%s each_s=%.4f", manifest.model, found.seconds_each)
    return found


def _load_whole(
    engine: Engine, backend: Backend, folder: Path, manifest: Manifest, header: Header
) -> Window:
    """All layers in one window, as a stage loads its own (see `ring.windows`)."""
    recipe = engine.recipe(header, 0, header.layers)
    with hold(folder), TemporaryDirectory(prefix="window-draft-", dir=folder) as into:
        placed = place(folder, manifest, recipe, 0, header.layers, Path(into))
        window = Window(
            0, header.layers, header.layers, header, placed.files, placed.embed, placed.places
        )
        backend.load(window)
    return window


def _ends(header: Header) -> set[int]:
    values: list[Any] = [header.metadata.get(f"tokenizer.ggml.{name}") for name in _ENDS]
    return {value for value in values if isinstance(value, int)}


def _common(held: Sequence[int], ids: Sequence[int]) -> int:
    """How many ids both begin with. As a rule nearly all of them, so that is looked at first."""
    low, high = 0, min(len(held), len(ids))
    middle = high
    ours, theirs = array("i", held[:high]), array("i", ids[:high])
    while low < high:
        if ours[low:middle] == theirs[low:middle]:
            low = middle
        else:
            high = middle - 1
        middle = (low + high + 1) // 2
    return low


def _lately(before: float, now: float) -> float:
    return before + _TIMED * (now - before)
