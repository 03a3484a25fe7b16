"""Which peer runs which layers: profiles and a model's shape in, a split out. Pure.

For now a peer's share is proportional to its memory. `solve` is the one door: whatever chooses
better (by measured speed, in several rounds) replaces what is behind it and nothing around it.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, permutations

import numpy as np

from peer.errors import NoPlan
from peer.planning.cuts import Cuts, Needs, nearest, reaches
from peer.planning.plan import LeftOut, PlanWindow, Split
from peer.planning.profile import ModelShape, Profile

SLOTS = 8  # answers at once; more wait for their turn
BATCH_TOKENS = 512  # rows of a prefill chunk: llama.cpp's own default
CONTEXT_DEFAULT = 32768  # tokens; a longer context is taken only when it is asked for
CONTEXT_LEAST = 512  # tokens; with less there is no use in answering
BYTES_MAX = 1 << 60  # the bound of `Bytes`: no sum beyond it can be told to a peer
_ORDERS_MAX = 120  # ring orders that are tried before a split is called impossible
_EFFORT_MAX = 6_000_000  # layers times peers times orders: 0.1 s on a slow core
_EFFORT_LEAST = 500  # layers; numpy takes as long for fewer


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A peer that could take part. memory_bytes: what its stage may use."""

    profile: Profile
    backend: str
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class _Size:
    """How much is to be kept for answers."""

    context: int
    kv_cells: int


def solve(
    profiles: Sequence[Profile],
    shape: ModelShape,
    *,
    context_wanted: int = 0,
    spread_all: bool = False,
    order: Sequence[str] = (),
) -> Split:
    """Give every layer of `shape` to a window, in proportion to memory, one window a peer.

    order: peer ids of an earlier ring, kept as far as its peers are here; others follow by id.
    context_wanted: tokens, 0: the model's, at most CONTEXT_DEFAULT. spread_all: no peer is left
    out that can be given a layer, at the cost of context where need be.
    Raises: NoPlan, saying what is missing and the smallest thing that would help.
    """
    if why := unusable(shape):
        raise NoPlan(why)
    able, left_out = _candidates(profiles, order)
    if not able:
        raise NoPlan(
            f"no peer here has an engine for {shape.model}: "
            + ("; ".join(left.why for left in left_out) or "no profile has arrived yet")
        )
    model = _Model(shape, context_wanted)
    found = _first_fit(able, model, spread_all)
    if found is None:
        raise NoPlan(_missing(able, model))
    ring, edges, size = found
    windows = tuple(
        PlanWindow(
            peer_id=candidate.profile.peer_id,
            first=a,
            last=b,
            backend=candidate.backend,
            memory_bytes=shape.window_bytes(a, b) + size.kv_cells * sum(shape.layer_kv_bytes[a:b]),
        )
        for candidate, (a, b) in zip(ring, edges, strict=True)
        if b > a
    )
    busy = {window.peer_id for window in windows}
    least = model.needs(size.kv_cells).least
    left_out += [
        LeftOut(c.profile.peer_id, _why_left_out(c, able, shape, least)[:1000])
        for c in able
        if c.profile.peer_id not in busy
    ]
    return Split(
        windows=windows,
        context=size.context,
        kv_cells=size.kv_cells,
        slots=SLOTS,
        batch_tokens=BATCH_TOKENS,
        left_out=tuple(left_out),
        why=_why(shape, windows, size, model.sizes[0]),
    )


# Who and how much ------------------------------------------------------------------------------


def _candidates(
    profiles: Sequence[Profile], order: Sequence[str]
) -> tuple[list[_Candidate], list[LeftOut]]:
    """Peers with an engine, in ring order, and those without."""
    place = {peer_id: i for i, peer_id in enumerate(order)}
    ring = sorted(profiles, key=lambda p: (place.get(p.peer_id, len(place)), p.peer_id))
    able, left_out = [], []
    for profile in ring:
        if profile.engines:
            backend = profile.engines[0].backend
            able.append(_Candidate(profile, backend, memory_bytes(profile, backend)))
        else:
            why = f"{profile.name} has no engine for this model: install halka[llama] there"
            left_out.append(LeftOut(profile.peer_id, why))
    return able, left_out


def memory_bytes(profile: Profile, backend: str) -> int:
    """What a stage of this backend may use on the peer.

    Layers go to GPUs where there are any: memory of their own where they have it (CUDA, ROCm), the
    machine's where they share it (Metal, and whatever else does not say). At most BYTES_MAX.
    """
    devices = [e for e in profile.engines if e.backend == backend and e.memory_free_bytes]
    own = sum(e.memory_free_bytes for e in devices if e.kind in ("cuda", "rocm", "hip"))
    if own:
        return min(own, BYTES_MAX)
    shared = [e.memory_free_bytes for e in devices if e.kind != "cpu"]
    return min([profile.memory_available_bytes, *shared])


def _sizes(shape: ModelShape, context_wanted: int) -> Iterator[_Size]:
    """Sizes to try, the best first: cells are given up before context, down to CONTEXT_LEAST."""
    context = min(shape.context or CONTEXT_DEFAULT, context_wanted or CONTEXT_DEFAULT)
    least = min(context, CONTEXT_LEAST)
    while True:
        cells = min(SLOTS * context, max(context, CONTEXT_DEFAULT))
        while cells > context:
            yield _Size(context, cells)
            cells = max(context, cells // 2)
        yield _Size(context, context)
        if context <= least:
            return
        context = max(least, context // 2)


def compute_bytes(shape: ModelShape, kv_cells: int) -> int:
    """An engine's scratch memory for one step, generously: activations and mask."""
    return 4 * BATCH_TOKENS * (16 * shape.hidden + kv_cells)


def logits_bytes(shape: ModelShape) -> int:
    """What the tail needs besides: a row of logits for each row of the batch.

    The vocabulary is not among a shape's facts; a quantised row of the embedding has about as many
    bytes as it has columns, which gives its number of rows.
    """
    words = max(shape.embed_bytes, shape.output_bytes) // max(1, shape.hidden)
    return 4 * BATCH_TOKENS * words


# The split -------------------------------------------------------------------------------------


def unusable(shape: ModelShape) -> str:
    """Why no plan can be made of a shape, whatever peers there are, or ""."""
    if not shape.layers or {len(shape.layer_bytes), len(shape.layer_kv_bytes)} != {shape.layers}:
        return f"the header of {shape.model} contradicts itself: remove it and pull it again"
    least = min(shape.context or CONTEXT_LEAST, CONTEXT_LEAST)
    if _whole_bytes(shape, least) > BYTES_MAX:
        return (
            f"the header of {shape.model} speaks of more than {BYTES_MAX >> 50:,} PiB: remove it "
            "and pull it again"
        )
    return ""


def _whole_bytes(shape: ModelShape, kv_cells: int) -> int:
    """What one stage with all layers needs; in Python's integers, which cannot overflow."""
    ends = compute_bytes(shape, kv_cells) + logits_bytes(shape)
    cache = kv_cells * sum(shape.layer_kv_bytes)
    return shape.window_bytes(0, shape.layers) + cache + ends


class _Model:
    """A shape and what stages need for it. sizes: to try, the best first."""

    def __init__(self, shape: ModelShape, context_wanted: int) -> None:
        self.shape = shape
        self.sizes = [
            size
            for size in _sizes(shape, context_wanted)
            if _whole_bytes(shape, size.kv_cells) <= BYTES_MAX
        ]
        self._cuts = Cuts(shape)
        self._weights = np.array(shape.layer_bytes, np.int64)
        self._kv = np.array(shape.layer_kv_bytes, np.int64)
        self._needs: dict[int, Needs] = {}

    @property
    def cells(self) -> list[int]:
        """How much KV cache may be kept, the most first."""
        return sorted({size.kv_cells for size in self.sizes}, reverse=True)

    def needs(self, kv_cells: int) -> Needs:
        """What windows need with so much KV cache."""
        if kv_cells not in self._needs:
            shape = self.shape
            self._needs[kv_cells] = Needs(
                self._cuts,
                self._weights + kv_cells * self._kv,
                compute=compute_bytes(shape, kv_cells),
                embed=shape.embed_bytes,
                tail=shape.output_bytes + logits_bytes(shape),
                tied=shape.embed_bytes if shape.tied else 0,
            )
        return self._needs[kv_cells]


def _first_fit(
    able: list[_Candidate], model: _Model, spread_all: bool
) -> tuple[Sequence[_Candidate], list[tuple[int, int]], _Size] | None:
    """The ring, its edges and the largest size that fits; None where nothing does."""
    cells = model.cells
    least = model.needs(cells[-1])
    spare = sum(max(0, c.memory_bytes - least.compute) for c in able)
    if spare < least.whole - least.compute:
        return None  # in no order
    for everyone in (True, False) if spread_all else (False,):
        if everyone and len(able) > model.shape.layers:
            continue
        for ring in (able, *_other_orders(able, model.shape.layers)):
            memories = [c.memory_bytes for c in ring]
            if not reaches(least, memories, not everyone):
                continue  # not even the smallest size
            # What fits with so much KV cache fits with less: the first that does is bisected for.
            first = bisect.bisect_left(
                cells, True, key=lambda n: reaches(model.needs(n), memories, not everyone)
            )
            size = next(size for size in model.sizes if size.kv_cells <= cells[first])
            edges = nearest(model.needs(size.kv_cells), memories, spread_all)
            return ring, edges, size
    return None


def _other_orders(able: list[_Candidate], layers: int) -> Iterator[Sequence[_Candidate]]:
    """Ring orders to try where the stable one does not fit: the ends weigh more than the middle."""
    tries = max(1, min(_ORDERS_MAX, _EFFORT_MAX // (len(able) * (layers + _EFFORT_LEAST))))
    yield from islice(_orders(able), tries)


def _orders(able: list[_Candidate]) -> Iterator[Sequence[_Candidate]]:
    if math.factorial(min(len(able), 6)) <= _ORDERS_MAX:
        yield from permutations(able)
        return
    largest = sorted(able, key=lambda c: (-c.memory_bytes, c.profile.peer_id))[:11]
    for head in largest:
        for tail in largest:
            if head is not tail:
                yield [head, *(c for c in able if c is not head and c is not tail), tail]


# Words -----------------------------------------------------------------------------------------


def _missing(able: list[_Candidate], model: _Model) -> str:
    """What is missing for the smallest size, and the smallest thing that would help."""
    shape, size = model.shape, model.sizes[-1]
    largest = max(able, key=lambda c: (c.memory_bytes, c.profile.peer_id))
    name, has = largest.profile.name, largest.memory_bytes
    whole = _whole_bytes(shape, size.kv_cells)
    if shape.whole_why:
        return (
            f"{shape.model} must stay whole ({shape.whole_why}) and needs {_mib(whole)}; {name}, "
            f"which has most, has {_mib(has)}: {_mib(whole - has)} are missing there. Free memory "
            f"on {name} or pull a smaller model"
        )
    compute = compute_bytes(shape, size.kv_cells)
    free = sum(max(0, c.memory_bytes - compute) for c in able)
    wanted = whole - compute
    if wanted > free:
        return (
            f"{shape.model} needs {_mib(wanted)} for its weights and {size.context} tokens of "
            f"context; {_count(len(able), 'peer')} here can give {_mib(free)}: "
            f"{_mib(wanted - free)} are missing. Free that much on {name}, start another peer, or "
            "pull a smaller model"
        )
    return (
        f"{shape.model} fits into the peers' memory together, but not at the layers where "
        f"{shape.architecture} may be cut. Free {_mib(max(1, whole - has))} on {name}, which could "
        "then run it alone, or start another peer"
    )


def _why_left_out(
    candidate: _Candidate, able: list[_Candidate], shape: ModelShape, least: int
) -> str:
    """Why a peer that could take part has no window. least: bytes that the smallest one needs."""
    name, has = candidate.profile.name, candidate.memory_bytes
    if shape.whole_why:
        return f"{shape.model} must stay whole: {shape.whole_why}"
    if least > has:
        return f"{name} has {_mib(has)} free and the smallest window needs {_mib(least)}"
    share = shape.layers * has / (sum(c.memory_bytes for c in able) or 1)
    if share < 1:
        return f"the memory of {name} is too small a share of the ring's for one layer"
    return f"{shape.model} cannot be cut so that {name} gets a window too"


def _why(shape: ModelShape, windows: Sequence[PlanWindow], size: _Size, best: _Size) -> str:
    """The split in words."""
    if len(windows) == 1:
        text = f"one peer runs all {shape.layers} layers"
    else:
        text = f"{len(windows)} peers share {shape.layers} layers in proportion to their memory"
    if size.context < best.context:
        text += f"; the context is {size.context} tokens, not {best.context}, for want of memory"
    elif size.kv_cells < best.kv_cells:
        text += f"; {size.kv_cells} tokens of KV cache, not {best.kv_cells}, for want of memory"
    return text


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _mib(size: int) -> str:
    """Rounded up, so that what is missing is never called 0."""
    return f"{-(-size // (1 << 20)):,} MiB"
