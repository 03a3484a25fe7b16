"""What every engine is to halka: the values that it is given and the Protocols that it fulfils.

An engine knows no peers, no sockets and no asyncio, and never imports `peer`. It is handed plain
values: a model's header, paths of files that others have checked, numpy arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Slot = int
"""One sequence's place in the KV cache, 0 ≤ slot < Settings.slots, the same in every stage."""

Activation = NDArray[np.float32]
"""[tokens, hidden]"""


@dataclass(frozen=True, slots=True)
class TensorFact:
    """A tensor as the header describes it. shape: ggml order (fastest first). size: bytes."""

    shape: tuple[int, ...]
    type: str  # GGML type name, upper case: F32, F16, Q4_1, Q8_0, …
    size: int


@dataclass(frozen=True, slots=True)
class Header:
    """A model's header: metadata by GGUF key (numbers, strings, bools, lists), tensors by name."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorFact]

    @property
    def architecture(self) -> str:
        """`general.architecture`, or "" where the key is missing."""
        return str(self.metadata.get("general.architecture", ""))

    @property
    def layers(self) -> int:
        """`<arch>.block_count`, or 0 where the key is missing."""
        value = self.metadata.get(f"{self.architecture}.block_count", 0)
        return value if isinstance(value, int) else 0


@dataclass(frozen=True, slots=True)
class Cuts:
    """Where a model may be cut, answered from its header alone.

    `starts`: layers at which a window may begin, 0 always among them; just (0,) when the model
    must stay whole. `groups`: every window must hold at least one layer of each group.
    `why`: the reason where the model cannot be split (empty otherwise), for people.
    """

    layers: int
    starts: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...] = ()
    why: str = ""

    def refusal(self, first: int, last: int) -> str:
        """Why the window [first, last) is forbidden, or "" when it is allowed."""
        if not 0 <= first < last <= self.layers:
            return f"layers {first} to {last} are not layers of a model of {self.layers}"
        if (first, last) == (0, self.layers):
            return ""
        if self.why:
            return self.why
        for edge in (first, last):
            if edge != self.layers and edge not in self.starts:
                return f"this architecture cannot be cut before layer {edge}"
        for group in self.groups:
            if not any(first <= layer < last for layer in group):
                return (
                    f"a window of this architecture must hold at least one of the layers "
                    f"{', '.join(map(str, group[:8]))}{', …' if len(group) > 8 else ''}"
                )
        return ""


@dataclass(frozen=True, slots=True)
class Stub:
    """A tensor of zero bytes that the loader insists on and the window never uses."""

    name: str
    shape: tuple[int, ...]
    type: str = "F32"  # GGML type name


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a window's small main file differs from the model's own header, as plain values.

    Whoever writes the file copies the model's metadata without the keys that start with one of
    `drop`, then applies `write` (key → (GGUF type name, value); "array:bool" and the like for
    arrays), adds the tensors of head.gguf except those in `without`, and the `stubs`. The parts of
    the window's layers follow as splits, numbered from 0; embed.gguf and output.gguf where asked,
    their tensors named as `rename` says (in headers that are rewritten anyway; no data moves).
    """

    write: Mapping[str, tuple[str, Any]]
    drop: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    stubs: tuple[Stub, ...] = ()
    embed: bool = False
    output: bool = False
    rename: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor's bytes lie. offset: from the file's start. Type and size: the header's."""

    file: Path
    offset: int


Weights = Literal["auto", "exact", "small"]
"""What an engine that cannot compute with every type of tensor as it is in the file may do: keep
it in more bytes, rounded at most to float16 (auto); nothing (exact); requantise it (small)."""


@dataclass(frozen=True, slots=True)
class Ability:
    """Whether an engine can run a model, from its header alone, and what it weighs in memory then.

    how: exact (every weight as the file says it) | approximate | no. why: for the last two, in
    words. layer_bytes, embed_bytes, output_bytes: of the weights in memory, where these differ from
    the file's; () and 0 otherwise. ranks: how many processes may compute each layer together.
    """

    how: Literal["exact", "approximate", "no"]
    why: str = ""
    layer_bytes: tuple[int, ...] = ()
    embed_bytes: int = 0
    output_bytes: int = 0
    ranks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Window:
    """Layers [first, last) of a model of `layers` layers, with the files that hold them.

    `files`: main file, then the parts in split order. `embed`: the file with the token embedding
    where the window is the first and not also the last (else None). `header`: the whole model's.
    `places`: of every tensor of these files that the model has, by its name in the whole model.
    """

    first: int
    last: int
    layers: int
    header: Header
    files: tuple[Path, ...]
    embed: Path | None = None
    places: Mapping[str, Place] = field(default_factory=dict)

    @property
    def is_first(self) -> bool:
        """Takes token ids."""
        return self.first == 0

    @property
    def is_last(self) -> bool:
        """Gives logits."""
        return self.last == self.layers


@dataclass(frozen=True, slots=True)
class Island:
    """Processes that compute each layer of a window together; this one is of `rank`.

    addresses: host:port where each rank is to be met, in order. devices: RDMA device from rank i to
    rank j, "" where there is none; () to meet over TCP. step_s: for one call of the backend; what
    takes longer has hung.
    """

    rank: int
    addresses: tuple[str, ...]
    devices: tuple[tuple[str, ...], ...] = ()
    step_s: float = 120.0


@dataclass(frozen=True, slots=True)
class Settings:
    """What a stage asks of its engine, the same for all of its windows."""

    slots: int  # sequences at once
    kv_cells: int  # tokens of KV cache, shared by all slots
    batch_tokens: int  # rows of the longest batch
    threads: int
    gpu_layers: int = -1  # of each window; -1: all that the engine can
    kv_type: str = "f16"  # GGML type name of the KV cache, lower case: f16 | q8_0
    flash: str = "auto"  # flash attention: auto (the engine's choice) | on | off
    weights: Weights = "auto"
    island: Island | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one step; row i is the token at positions[i] of the sequence in slots[i].

    Rows of one slot are consecutive and ascending. outputs: rows whose logits the last window owes.
    """

    slots: NDArray[np.int32]
    positions: NDArray[np.int32]
    outputs: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes really used by a loaded window."""

    weights_bytes: int
    kv_bytes: int
    compute_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of them."""
        return self.weights_bytes + self.kv_bytes + self.compute_bytes


@dataclass(frozen=True, slots=True)
class Device:
    """A processor that the engine can use. kind: cpu | cuda | rocm | metal | vulkan | …

    integrated: a GPU that has no memory of its own.
    """

    name: str
    kind: str
    memory_free_bytes: int
    memory_total_bytes: int
    integrated: bool = False


class Backend(Protocol):
    """One engine holding a stage's windows. Blocking, single-threaded."""

    def load(self, window: Window) -> Footprint:
        """Make the window ready to run. Raises BackendFault."""
        ...

    def run(self, window: Window, batch: Batch, x: NDArray[Any]) -> NDArray[np.float32]:
        """Run one step through one window.

        x: int32 [tokens] token ids in the first window, float32 [tokens, hidden] in all others.
        Returns float32 [tokens, hidden]; in the last window [rows of outputs, vocabulary]. The
        result is valid until the next call. Raises BackendFault.
        """
        ...

    def trim(self, slot: Slot, position: int) -> None:
        """Forget, in all windows, what lies at and beyond `position` of the slot."""
        ...

    def copy(self, source: Slot, target: Slot, length: int) -> None:
        """Give `target` the first `length` positions of `source`, in all windows."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...


class Vocabulary(Protocol):
    """A model's words, from head.gguf alone."""

    @property
    def ends(self) -> frozenset[int]:
        """Ids that end an answer."""
        ...

    @property
    def starts_with(self) -> tuple[int, ...]:
        """Ids that the model wants before any text (often its BOS), () where none."""
        ...

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Token ids of text, without `starts_with`. special: read "<|…|>" spellings as such."""
        ...

    def pieces(self) -> list[bytes]:
        """The bytes of every token id, in order; b"" for control tokens."""
        ...

    def text_of(self, token: int) -> str:
        """A token's spelling, control tokens included ("</s>"), for chat templates."""
        ...


class Engine(Protocol):
    """A backend's module-level door: what it can do, and how to open it."""

    name: str

    def devices(self) -> list[Device]:
        """The processors it can use here, the CPU always among them."""
        ...

    def cuts(self, header: Header) -> Cuts:
        """Where this engine may cut the model, from the header alone."""
        ...

    def can_run(self, header: Header, weights: Weights = "auto") -> Ability:
        """Whether it can run the model, and what it weighs in memory then."""
        ...

    def recipe(self, header: Header, first: int, last: int) -> Recipe:
        """How to write the main file of the window [first, last). Raises BackendFault."""
        ...

    def kv_bytes_per_cell(self, header: Header, kv_type: str = "f16") -> tuple[int, ...]:
        """Bytes of KV cache that one token takes, for each layer."""
        ...

    def kv_types(self, header: Header) -> tuple[str, ...]:
        """The types that the model's KV cache can have, "f16" always among them."""
        ...

    def rewinds(self, header: Header) -> bool:
        """Whether a slot can be trimmed to, and copied up to, any position. False where layers are
        recurrent: their state can only be dropped whole, or copied whole."""
        ...

    def open(self, settings: Settings) -> Backend:
        """An empty backend."""
        ...

    def vocabulary(self, head: Path) -> Vocabulary:
        """The words of the model whose head.gguf this is. Raises BackendFault."""
        ...


class BackendFault(Exception):
    """An engine failed or refused. `kind`: refused | memory | failed."""

    def __init__(self, why: str, kind: str = "failed") -> None:
        self.kind = kind
        super().__init__(why)
