"""Models cut into windows in this process, without stages and sockets; and a worker that does it.

`python -m tests.windows NAMES…` compares random models and says a line of JSON for each. It exists
because libllama aborts its process where a rule is wrong: that must be the failure of one
architecture, not the end of the test run.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.base import Backend, BackendFault, Batch, Cuts, Engine, Header, Settings, Window
from backends.llama_cpp import ENGINE
from peer.models.imports import import_gguf
from peer.models.manifest import Manifest
from peer.models.parts import load_header, place
from peer.models.store import Store


class Stored:
    """An imported model and what the engine says of it."""

    def __init__(self, path: Path, home: Path, engine: Engine = ENGINE) -> None:
        store = Store(home)
        self.manifest: Manifest = import_gguf(path, store)
        self.folder = store.folder(self.manifest.digest)
        self.header: Header = load_header(self.folder, self.manifest)
        self.engine = engine
        self.cuts: Cuts = engine.cuts(self.header)
        self._home = home

    def window(self, first: int, last: int) -> Window:
        """The files of a window, placed as a stage places them."""
        recipe = self.engine.recipe(self.header, first, last)
        placed = place(self.folder, self.manifest, recipe, first, last, self._home)
        return Window(
            first, last, self.header.layers, self.header, placed.files, placed.embed, placed.places
        )

    @contextmanager
    def cut(self, edges: Sequence[int], settings: Settings) -> Iterator[Ring]:
        """The model in windows between these edges (0 and the number of layers are implied)."""
        backend = self.engine.open(settings)
        try:
            windows = []
            for first, last in pairwise([0, *edges, self.header.layers]):
                windows.append(self.window(first, last))
                backend.load(windows[-1])
            yield Ring(backend, windows)
        finally:
            backend.close()


class Ring:
    """Windows in order. Steps as PlainLlama.step takes them."""

    def __init__(self, backend: Backend, windows: Sequence[Window]) -> None:
        self.backend, self.windows = backend, windows

    def step(
        self,
        ids: Sequence[int],
        positions: Sequence[int],
        *,
        slots: Sequence[int] | None = None,
        outputs: Sequence[bool] | None = None,
    ) -> NDArray[np.float32]:
        """Logits [rows with outputs, vocabulary] of one step; all rows by default."""
        tokens = len(ids)
        batch = Batch(
            np.array(slots if slots is not None else [0] * tokens, dtype=np.int32),
            np.array(positions, dtype=np.int32),
            np.array(outputs if outputs is not None else [True] * tokens, dtype=np.bool_),
        )
        x: NDArray[Any] = np.array(ids, dtype=np.int32)
        for window in self.windows:
            x = self.backend.run(window, batch, x).copy()  # as over a wire
        return x

    def greedy(self, prompt: Sequence[int], tokens: int, chunk: int) -> list[int]:
        """As PlainLlama.greedy."""
        position, answer = 0, []
        for begin in range(0, len(prompt), chunk):
            ids = prompt[begin : begin + chunk]
            last = begin + len(ids) == len(prompt)
            outputs = [False] * (len(ids) - 1) + [last]
            logits = self.step(ids, range(position, position + len(ids)), outputs=outputs)
            position += len(ids)
        for _ in range(tokens):
            answer.append(int(logits[-1].argmax()))
            logits = self.step(answer[-1:], [position])
            position += 1
        return answer


def all_edges(cuts: Cuts) -> list[tuple[int, ...]]:
    """Every allowed cut in two, and the allowed cut into the most windows."""
    twice = [
        (at,)
        for at in cuts.starts
        if at and not cuts.refusal(0, at) and not cuts.refusal(at, cuts.layers)
    ]
    finest: dict[int, tuple[int, ...] | None] = {0: ()}  # windows that end here: their edges
    for last in range(1, cuts.layers + 1):
        ways = [
            (*(finest[first] or ()), first)
            for first in range(last)
            if finest[first] is not None and not cuts.refusal(first, last)
        ]
        finest[last] = max(ways, key=len, default=None)
    most = (finest[cuts.layers] or (0,))[1:]
    return twice + ([most] if len(most) > 1 else [])


def story(run: Any, trim: Any, copy: Any, words: int) -> list[NDArray[np.float32]]:
    """Four sequences in shared batches; one forgets, one becomes a copy, one starts again."""
    ids = np.random.default_rng(3).integers(3, words, 400).tolist()
    seen = []

    def step(rows: Sequence[tuple[int, int, int]]) -> None:
        """rows: (slot, first position, tokens)."""
        slots = [slot for slot, _, count in rows for _ in range(count)]
        positions = [first + i for _, first, count in rows for i in range(count)]
        said = [ids[(slot * 97 + p) % 400] for slot, p in zip(slots, positions, strict=True)]
        seen.append(run.step(said, positions, slots=slots))

    step([(0, 0, 40), (1, 0, 7), (2, 0, 25), (3, 0, 1)])
    step([(0, 40, 1), (1, 7, 1), (2, 25, 1), (3, 1, 1)])
    trim(1, 3)  # rolled back, and then on with other tokens
    copy(0, 3, 30)
    step([(0, 41, 1), (1, 3, 9), (2, 26, 1), (3, 30, 2)])
    trim(2, 0)
    copy(1, 2, 12)
    for i in range(4):
        step([(0, 42 + i, 1), (1, 12 + i, 1), (2, 12 + i, 1), (3, 32 + i, 1)])
    trim(0, 0)
    step([(0, 0, 33), (1, 16, 1), (3, 36, 1)])
    return seen


CHUNK, PREFILL, DECODE = 64, 120, 6  # tokens; random models slide over 32


def logits_of(run: Any, ids: Sequence[int]) -> NDArray[np.float32]:
    """All logits of a prefill in chunks and some steps of one token."""
    edges = [*range(0, PREFILL, CHUNK), PREFILL, *range(PREFILL + 1, PREFILL + DECODE + 1)]
    return np.concatenate([run.step(ids[a:b], range(a, b)) for a, b in pairwise(edges)])


def compare(name: str, folder: Path) -> dict[str, Any]:
    """How far the windows of a random model are from the whole one, at every allowed cut.

    cuts: edges → the largest difference of a logit, as a part of the largest logit.
    """
    from tests.plain_llama import PlainLlama
    from tests.random_models import write
    from tests.rule_models import MODELS

    model = MODELS[name]
    began_s = time.perf_counter()
    path = write(model, folder / f"{name}.gguf")
    stored = Stored(path, folder)
    cells = PREFILL + DECODE + CHUNK
    random = np.random.default_rng(7)
    with PlainLlama(path, cells=cells, batch=CHUNK) as plain:
        ids = random.integers(3, plain.words, PREFILL + DECODE).tolist()
        expected = logits_of(plain, ids)
    settings = Settings(slots=1, kv_cells=cells, batch_tokens=CHUNK, threads=1, gpu_layers=0)
    found: dict[str, float] = {}
    for edges in [(), *all_edges(stored.cuts)]:
        with stored.cut(edges, settings) as ring:
            logits = logits_of(ring, ids)
        apart = float(np.abs(logits - expected).max() / np.abs(expected).max())
        found[" ".join(map(str, edges))] = apart if np.isfinite(logits).all() else float("inf")
    return {
        "why": stored.cuts.why,
        "cuts": found,
        "spread": float(expected.std()),
        "seconds": round(time.perf_counter() - began_s, 2),
    }


def main() -> None:
    """Answer each name of the command line with a line, in order."""
    for name in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as folder:
            try:
                answer: dict[str, Any] = compare(name, Path(folder))
            except (BackendFault, RuntimeError, AssertionError) as error:
                answer = {"failed": f"{type(error).__name__}: {error}"}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
