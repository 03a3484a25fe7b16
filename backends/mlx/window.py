"""One window of layers in MLX: its weights, its KV cache, and the steps that it runs.

mlx_lm's Model is built lazily from the header, cut to the window's layers and filled tensor by
tensor, strictly: a parameter that nothing fills, or a tensor that fills nothing, is an error that
names it. The loop over the layers is ours, because a window has no embedding or no head, and one
batch holds rows of several slots: each layer gets the mask of its kind, a cache that knows the
step's cells, and a rope that knows its positions. All numbers between the layers are float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.base import BackendFault, Batch, Footprint, Settings, Window
from backends.llama_cpp.cache import kv_bytes_per_cell
from backends.mlx import archs, names, skeleton
from backends.mlx.cells import LayerCells, Place, width_of
from backends.mlx.library import Library
from backends.mlx.pool import Cells, Pool
from backends.mlx.rope import Positions, Rope, unturned
from backends.mlx.sizes import sizes
from backends.mlx.weights import Matrix, Tensors

Shard = Callable[[Any, list[Any]], None]
"""Keeps one rank's share of these layers of a Model (its class has `shard`), see islands."""

_F32, _F16 = 4, 2  # bytes
_FUSED_HEADS = (64, 80, 128)  # mlx/backend/metal/scaled_dot_product_attention.cpp
_ROWS_MIN = 16  # at once, however large the cache is
SCORES_BYTES = 1 << 28  # of one layer's attention; 32 heads × 512 rows × 8192 cells have 1 GiB


class LoadedWindow:
    """A window ready to run; `close` lets MLX free what it holds."""

    def __init__(
        self, library: Library, settings: Settings, window: Window, shard: Shard | None = None
    ) -> None:
        self._library, self._mx = library, library.mx
        self._settings, self._header = settings, window.header
        self._first, self._last = window.is_first, window.is_last
        self._of = sizes(window.header)
        self._windows = skeleton.windows(window.header)[window.first : window.last]
        self._pool = Pool(settings.kv_cells, settings.slots)
        self._place, self._positions = Place(), Positions(library.mx)
        self._tainted = np.zeros(settings.kv_cells, dtype=np.bool_)  # cells with what is not finite
        self._embedding: Matrix | None = None
        self._head: Matrix | None = None
        self._norm: Any = None
        self._layers: list[Any] = []
        self._cells: list[LayerCells] = []
        tensors = Tensors(library, window.header, window.places, settings.weights)
        # float32, as llama.cpp's: mlx_lm rounds gemma's to bfloat16.
        self._scale = np.float32(skeleton.embedding_scale(window.header)).item()
        self._softcap = skeleton.softcap(window.header)
        self._divisor = np.float32(skeleton.logits_divisor(window.header)).item()
        self._build(window, tensors, shard)
        self._weights_bytes, self._widened_bytes = tensors.size_bytes, tensors.widened_bytes

    def _build(self, window: Window, tensors: Tensors, shard: Shard | None) -> None:
        """Everything that the window holds, from its files."""
        row = archs.row(window.header)
        assert row is not None
        self._fused = row.fused
        model = self._library.model(row.model, skeleton.arguments(window.header))
        rotations = skeleton.rotations(window.header)
        factors = None
        if names.ROPE_FREQS in window.header.tensors:
            factors = tensors.vector(names.ROPE_FREQS)
            dims = max(rotation.dims for rotation in rotations if rotation)
            if factors.shape != (dims // 2,) or not (factors > 0).all():
                raise BackendFault(f"the model's tensor {names.ROPE_FREQS} is odd", "refused")
        wanted = archs.layer_names(window.header)
        for number in range(window.first, window.last):
            layer = model.model.layers[number]
            self._fill(layer, number, wanted, row.norm_offset, tensors)
            rotation = rotations[number]
            layer.self_attn.rope = (
                Rope(self._mx, rotation, self._positions, factors if rotation.factors else None)
                if rotation
                else unturned
            )
            if shard is not None:
                before = _bytes(self._library, layer)
                shard(model, [layer])
                self._mx.eval(layer.parameters())
                tensors.size_bytes += _bytes(self._library, layer) - before
            self._layers.append(layer)
            cells = self._settings.kv_cells, self._settings.kv_type
            self._cells.append(LayerCells(self._library, self._place, *cells))
        self._ends(model, tensors, row.norm_offset)

    def _fill(
        self, layer: Any, number: int, wanted: names.Names, offset: float, tensors: Tensors
    ) -> None:
        found = {path for path, _ in self._library.utils.tree_flatten(layer.parameters())}
        if odd := sorted(found ^ set(wanted)):
            raise BackendFault(
                f"mlx_lm's layer {number} and halka's table differ in its parameter {odd[0]}: "
                f"this release of mlx-lm was not tested"
            )
        for path, tensor in wanted.items():
            is_norm = "norm" in path and path.endswith(".weight")
            tensors.fill(layer, path, f"blk.{number}.{tensor}", offset if is_norm else 0.0)

    def _ends(self, model: Any, tensors: Tensors, offset: float) -> None:
        """The embedding of a first window, the norm and the head of a last one."""
        words, hidden = self._of.words, self._of.hidden
        tied = names.OUTPUT not in self._header.tensors
        if self._first or (self._last and tied):
            self._embedding = tensors.matrix(names.EMBEDDING, words, hidden)
        if self._last:
            self._norm = model.model.norm
            tensors.fill(model.model, "norm.weight", names.NORM, offset)
            head = self._embedding if tied else tensors.matrix(names.OUTPUT, words, hidden)
            self._head = head

    @property
    def footprint(self) -> Footprint:
        """Bytes of the weights as they are in memory, of all cells once they are used, and of a
        step's arrays (see `compute_bytes`)."""
        ranks = len(self._settings.island.addresses) if self._settings.island else 1
        per_cell = kv_bytes_per_cell(self._header)[: len(self._layers)]
        wide = _F32 // _F16 if self._settings.kv_type == "f32" else 1
        kv_bytes = sum(per_cell) * wide * self._settings.kv_cells // ranks
        return Footprint(self._weights_bytes, kv_bytes, self.compute_bytes)

    @property
    def compute_bytes(self) -> int:
        """An estimate of what a step needs beside weights and cells: masks, scores and widened
        cells of one layer, some activations of it, one widened tensor, and the logits."""
        rows, cells = self._rows_at_once(self._settings.kv_cells), self._settings.kv_cells
        of = self._of
        masks = rows * cells * len(set(self._windows))
        scores = rows * self._row_scores_bytes(cells)
        widened = 2 * of.kv_heads * of.head * cells * (_F32 + _F16)
        expert_rows = of.expert * max(1, of.experts_used)
        inner = max(of.ffn if not of.experts else 0, expert_rows if of.experts else 0)
        activations = rows * (6 * of.hidden + 3 * inner + 3 * of.heads * of.head) * _F32
        logits = rows * of.words * _F32 if self._last else 0
        return masks + scores + widened + activations + self._widened_bytes + logits

    def run(self, batch: Batch, x: NDArray[Any]) -> NDArray[np.float32]:
        """See Backend.run."""
        rows = len(batch.slots)
        if rows > self._settings.batch_tokens:
            raise BackendFault(
                f"{rows} tokens in a batch of at most {self._settings.batch_tokens}", "refused"
            )
        shape = (rows,) if self._first else (rows, self._of.hidden)
        if x.shape != shape or len(batch.positions) != rows or len(batch.outputs) != rows:
            raise BackendFault(f"the window's input has shape {x.shape}, not {shape}", "refused")
        if self._first and rows and not 0 <= int(x.min()) <= int(x.max()) < self._of.words:
            raise BackendFault(f"a token id is not among the model's {self._of.words}", "refused")
        if rows == 0:
            return np.empty((0, self._of.words if self._last else self._of.hidden), np.float32)
        cells = self._pool.take(batch.slots, batch.positions)
        try:
            return self._steps(batch, x, cells)
        except BaseException as error:
            self._pool.give_back(batch.slots, cells)
            if isinstance(error, RuntimeError | ValueError | MemoryError):
                raise _fault(error) from error
            raise

    def _steps(self, batch: Batch, x: NDArray[Any], cells: Cells) -> NDArray[np.float32]:
        """The batch, in parts where its scores would be too large. A part does not see what later
        ones hold: they are later positions."""
        width = width_of(self._pool.used, self._settings.kv_cells)
        rows = self._rows_at_once(width)
        if len(cells) <= rows:
            return self._step(batch, x, cells, width)
        parts = []
        for at in range(0, len(cells), rows):
            r = slice(at, at + rows)
            part = Batch(batch.slots[r], batch.positions[r], batch.outputs[r])
            parts.append(self._step(part, x[r], cells[r], width))
        return np.concatenate(parts)

    def _rows_at_once(self, width: int) -> int:
        """Rows whose scores over so many cells fit into SCORES_BYTES."""
        row_bytes = self._row_scores_bytes(width)
        fitting = SCORES_BYTES // row_bytes if row_bytes else self._settings.batch_tokens
        return min(self._settings.batch_tokens, max(_ROWS_MIN, fitting))

    def _row_scores_bytes(self, width: int) -> int:
        """What a row's scores and their softmax take; nothing where MLX never writes them down.

        Metal has such kernels for some sizes of heads, the processor has none.
        """
        fused = self._mx.metal.is_available() and self._of.head in _FUSED_HEADS
        return 0 if fused and self._fused else 2 * self._of.heads * width * _F32

    def _step(self, batch: Batch, x: NDArray[Any], cells: Cells, width: int) -> NDArray[np.float32]:
        mx = self._mx
        self._place.set(mx, cells, width)
        self._positions.set(batch.positions)
        masks = {
            window: mx.array(self._pool.mask(batch.slots, batch.positions, width, window))
            for window in set(self._windows)
        }
        hidden = self._enter(x)
        for layer, held, window in zip(self._layers, self._cells, self._windows, strict=True):
            hidden = layer(hidden, masks[window], held)
        hidden = hidden[0]
        result = self._leave(hidden, batch.outputs) if self._last else hidden
        finite = mx.isfinite(hidden).all(axis=-1)
        kept = [part for held in self._cells for part in (held.keys, held.values)]
        mx.eval(result, finite, *kept)
        if not np.array(finite).all():
            self._tainted[cells[~np.array(finite)]] = True
        return np.array(result, dtype=np.float32)

    def _enter(self, x: NDArray[Any]) -> Any:
        """float32 [1, tokens, hidden]."""
        mx = self._mx
        if not self._first:
            return mx.array(np.ascontiguousarray(x, dtype=np.float32))[None]
        assert self._embedding is not None
        rows = self._embedding.rows(mx.array(x.astype(np.int32)))[None]
        return rows * self._scale if self._scale != 1.0 else rows

    def _leave(self, hidden: Any, outputs: NDArray[np.bool_]) -> Any:
        """Logits of the rows that owe them, [rows, vocabulary]."""
        mx = self._mx
        assert self._head is not None
        wanted = np.flatnonzero(outputs)
        if len(wanted) == 0:
            return mx.zeros((0, self._of.words))
        if len(wanted) < len(outputs):
            hidden = hidden[mx.array(wanted.astype(np.int32))]
        logits = self._head.times(self._norm(hidden))
        logits = logits / self._divisor if self._divisor != 1.0 else logits
        return mx.tanh(logits / self._softcap) * self._softcap if self._softcap else logits

    def trim(self, slot: int, position: int) -> None:
        """See Backend.trim."""
        freed = self._pool.trim(slot, position)
        if self._tainted.any() and len(dirty := freed[self._tainted[freed]]):
            for held in self._cells:
                held.wipe(dirty)
            self._tainted[dirty] = False

    def copy(self, source: int, target: int, length: int) -> None:
        """See Backend.copy."""
        self.trim(target, 0)
        self._pool.copy(source, target, length)

    def close(self) -> None:
        """Let go of every array. May be called again."""
        self._layers.clear()
        self._cells.clear()
        self._embedding = self._head = self._norm = None


def _bytes(library: Library, layer: Any) -> int:
    return sum(array.nbytes for _, array in library.utils.tree_flatten(layer.parameters()))


def _fault(error: BaseException) -> BackendFault:
    """What MLX says of a step that it could not compute."""
    words = str(error).strip().splitlines()
    said = words[0][:200] if words else type(error).__name__
    memory = isinstance(error, MemoryError) or "alloc" in said.lower() or "memory" in said.lower()
    return BackendFault(f"MLX could not compute the step: {said}", "memory" if memory else "failed")


def usual_cache_bytes(compute_bytes: int) -> int:
    """How much freed memory MLX may keep for the next step, instead of as much as there is."""
    return max(1 << 26, math.ceil(compute_bytes))
