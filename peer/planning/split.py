"""Which peer runs which layers: profiles and a model's shape in, a split out. Pure.

For now a peer's share is proportional to its memory. `solve` is the one door: whatever chooses
better (by measured speed, in several rounds) replaces what is behind it and nothing around it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from peer.errors import NoPlan
from peer.planning.plan import LeftOut, PlanWindow, Split
from peer.planning.profile import ModelShape, Profile

SLOTS = 8  # answers at once; more wait for their turn
BATCH_TOKENS = 512  # rows of a prefill chunk: llama.cpp's own default
CONTEXT_DEFAULT = 32768  # tokens; a longer context is taken only when it is asked for
CONTEXT_LEAST = 512  # tokens; with less there is no use in answering
_ORDERS_MAX = 120  # ring orders that are tried before a split is called impossible
_ABSENT = 1e12  # cost of leaving a peer out where all are wanted; > any sum of squared layers

Matrix = NDArray[np.float64]
Flags = NDArray[np.bool_]


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
    if not shape.layers or {len(shape.layer_bytes), len(shape.layer_kv_bytes)} != {shape.layers}:
        raise NoPlan(f"the header of {shape.model} contradicts itself: remove it and pull it again")
    able, left_out = _candidates(profiles, order)
    if not able:
        raise NoPlan(
            f"no peer here has an engine for {shape.model}: "
            + ("; ".join(left.why for left in left_out) or "no profile has arrived yet")
        )
    allowed = _allowed(shape)
    sizes = list(_sizes(shape, context_wanted))
    found = _first_fit(able, shape, allowed, sizes, spread_all)
    if found is None:
        raise NoPlan(_missing(able, shape, sizes[-1]))
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
    left_out += [
        LeftOut(c.profile.peer_id, _why_left_out(c, able, shape, allowed, size))
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
        why=_why(shape, windows, size, sizes[0]),
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
    machine's where they share it (Metal, and whatever else does not say).
    """
    devices = [e for e in profile.engines if e.backend == backend and e.memory_free_bytes]
    own = sum(e.memory_free_bytes for e in devices if e.kind in ("cuda", "rocm", "hip"))
    if own:
        return own
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


def _allowed(shape: ModelShape) -> Flags:
    """[layers + 1, layers + 1]: whether the window [a, b) is allowed; as `shape.refusal` says."""
    n = shape.layers
    flags = np.zeros((n + 1, n + 1), np.bool_)
    if not shape.whole_why:
        starts = np.zeros(n + 1, np.bool_)
        starts[[s for s in shape.cut_starts if s < n]] = True
        ends = starts.copy()
        ends[n] = True
        at = np.arange(n + 1)
        flags = starts[:, None] & ends[None, :] & (at[:, None] < at[None, :])
        for group in shape.cut_groups:
            held = np.zeros(n + 1, np.int64)
            held[[layer for layer in group if layer < n]] = 1
            before = np.concatenate([[0], np.cumsum(held)])[: n + 1]
            flags &= before[None, :] > before[:, None]
    flags[0, n] = True
    return flags


def _needs(shape: ModelShape, size: _Size) -> Matrix:
    """[layers + 1, layers + 1]: bytes that a stage needs for the window [a, b)."""
    n = shape.layers
    each = np.array(shape.layer_bytes, np.float64) + size.kv_cells * np.array(
        shape.layer_kv_bytes, np.float64
    )
    sums = np.concatenate([[0.0], np.cumsum(each)])
    needs: Matrix = sums[None, :] - sums[:, None] + compute_bytes(shape, size.kv_cells)
    needs[0, :] += shape.embed_bytes
    needs[1:, n] += shape.embed_bytes if shape.tied else 0
    needs[:, n] += shape.output_bytes + logits_bytes(shape)
    return needs


def _first_fit(
    able: list[_Candidate],
    shape: ModelShape,
    allowed: Flags,
    sizes: list[_Size],
    spread_all: bool,
) -> tuple[Sequence[_Candidate], list[tuple[int, int]], _Size] | None:
    """The ring, its edges and the largest size that fits; None where nothing does."""
    needs = [_needs(shape, size) for size in sizes]
    for everyone in (True, False) if spread_all else (False,):
        for ring in (able, *_other_orders(able)):
            if not _fit(ring, allowed, needs[-1], spread_all, everyone):
                continue  # not even the smallest size
            for size, needed in zip(sizes, needs, strict=True):
                if edges := _fit(ring, allowed, needed, spread_all, everyone):
                    return ring, edges, size
    return None


def _fit(
    ring: Sequence[_Candidate], allowed: Flags, needs: Matrix, spread_all: bool, everyone: bool
) -> list[tuple[int, int]] | None:
    edges = _edges(ring, allowed, needs, spread_all)
    return edges if edges and (not everyone or all(b > a for a, b in edges)) else None


def _other_orders(able: list[_Candidate]) -> Iterator[Sequence[_Candidate]]:
    """Ring orders to try where the stable one does not fit: the ends weigh more than the middle."""
    if math.factorial(min(len(able), 6)) <= _ORDERS_MAX:
        yield from permutations(able)
        return
    largest = sorted(able, key=lambda c: (-c.memory_bytes, c.profile.peer_id))[:11]
    for head in largest:
        for tail in largest:
            if head is not tail:
                yield [head, *(c for c in able if c is not head and c is not tail), tail]


def _edges(
    ring: Sequence[_Candidate], allowed: Flags, needs: Matrix, spread_all: bool
) -> list[tuple[int, int]] | None:
    """The window [a, b) of each peer in ring order, (a, a) for none; None where nothing fits.

    A dynamic programme over (peers so far, layers so far): the least sum of squared distances
    between what a peer gets and its share, so that allowed cuts nearest to the shares are taken.
    """
    n = len(allowed) - 1
    total = sum(c.memory_bytes for c in ring) or 1
    counts = np.arange(n + 1)[None, :] - np.arange(n + 1)[:, None]
    best = np.full(n + 1, np.inf)
    best[0] = 0.0
    choices = []
    for candidate in ring:
        share = n * candidate.memory_bytes / total
        fits = allowed & (needs <= candidate.memory_bytes)
        costs = np.where(fits, best[:, None] + (counts - share) ** 2, np.inf)
        np.fill_diagonal(costs, best + share**2 + (_ABSENT if spread_all else 0.0))
        choices.append(costs.argmin(axis=0))
        best = costs.min(axis=0)
    if not math.isfinite(best[n]):
        return None
    edges, b = [], n
    for choice in reversed(choices):
        a = int(choice[b])
        edges.append((a, b))
        b = a
    return edges[::-1]


# Words -----------------------------------------------------------------------------------------


def _missing(able: list[_Candidate], shape: ModelShape, size: _Size) -> str:
    """What is missing for the smallest size, and the smallest thing that would help."""
    largest = max(able, key=lambda c: (c.memory_bytes, c.profile.peer_id))
    name, has = largest.profile.name, largest.memory_bytes
    needs = _needs(shape, size)
    whole = int(needs[0, shape.layers])
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
    candidate: _Candidate,
    able: list[_Candidate],
    shape: ModelShape,
    allowed: Flags,
    size: _Size,
) -> str:
    """Why a peer that could take part has no window."""
    name, has = candidate.profile.name, candidate.memory_bytes
    if shape.whole_why:
        return f"{shape.model} must stay whole: {shape.whole_why}"
    least = int(_needs(shape, size)[allowed].min())
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
