"""Times windows of random layers on a real engine, as a stage would run them.

Each window is loaded through the engine's own door and given steps of one row, and chunks of many.
Steps are short and taken singly, and the faster half of those counts that nothing interrupted: what
a busy machine, or a control group that throttles, does to the others is not this engine's speed.
"""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from backends.base import (
    Backend,
    BackendFault,
    Batch,
    Device,
    Engine,
    Header,
    Settings,
    Weights,
    Window,
)
from peer.planning import trials
from peer.planning.profile import ModelShape, Speed
from peer.planning.random_layers import RandomLayers, as_filled
from peer.planning.trials import Sample, Trial, by_kind, is_free, quick_s
from peer.protocol import Sampling
from peer.ring.sampling import Sampler

ROWS = 512  # of a prefill chunk
CHUNK_S = 1.5  # it may take at most; else it has fewer rows
WANTED_BYTES = 128 << 20  # of active weights: more than a processor's cache
BUDGET_BYTES = 2 << 30  # of weights at once
BUDGET_SHARE = 4  # … and a quarter of the free memory
HEAD_FACTOR = 16.0  # by which the output head may be faster or slower than layers, byte by byte
_SOME_ROWS = 16  # by which the length of a chunk is chosen
_STEPS = (6, 60)  # of one row: at least, and at most
_STEPS_S = 0.2  # for them
_CHUNKS = (3, 10)
_CHUNKS_S = 0.8
_SHORTER = (16, 64, 128, 256)  # rows of shorter chunks, at most half of the long one
_SHORTER_S = 0.1  # that one of them may take; of up to 64 rows, whatever it takes
_LONGER = 4  # so many times as long where something else holds them up
_REST_S = 0.003  # between steps: in a ring a stage waits for others, and wakes up again
_WAITED_SHARE = 0.05  # of a step; less is how long every wake-up takes
_TASKS = Path("/proc/self/task")
_PERIOD_S = 0.1  # of a control group's quota


@dataclass(frozen=True, slots=True)
class Terms:
    """Under which a model is measured. cpu_share: as in Profile. memory_bytes: free for it."""

    threads: int
    cpu_share: float
    memory_bytes: int
    until_s: float  # time.monotonic() at which it must be over
    weights: Weights = "auto"  # the setting


class _Over(Exception):
    """There is no time left."""


class Stopwatch:
    """One model on one of an engine's kinds of processors."""

    def __init__(
        self,
        engine: Engine,
        device: Device,
        header: Header,
        shape: ModelShape,
        layers: RandomLayers,
        terms: Terms,
    ) -> None:
        self._engine, self._header, self._shape = engine, header, shape
        self._layers, self._terms = layers, terms
        self.kind = device.kind
        gpu_layers = 0 if device.kind == "cpu" else -1
        # Positions beyond its context are missing in some models, and abort the process.
        self._rows_max = max(1, min(ROWS, shape.context or ROWS))
        self._settings = Settings(
            1, ROWS, self._rows_max, terms.threads, gpu_layers, weights=terms.weights
        )
        memory = terms.memory_bytes
        if device.kind != "cpu":
            memory = min(memory, device.memory_free_bytes)
        self._budget_bytes = min(BUDGET_BYTES, memory // BUDGET_SHARE)
        self._burst_s = _PERIOD_S * terms.cpu_share if terms.cpu_share < 1 else float("inf")
        self._random = np.random.default_rng(1)
        # Sparse, so that rows differ in direction: a router then sends them to different experts.
        values = self._random.random((ROWS, shape.hidden), dtype=np.float32) < 0.25
        self._rows = values.astype(np.float32) * 3
        self._ids = self._random.integers(0, max(1, shape.vocabulary), ROWS).astype(np.int32)
        self._chunk = 0  # rows of a chunk, once known
        self._took: dict[int, float] = {}  # seconds of chunks by rows, of the first kind of layers

    def speed(self, backend: str, families: tuple[int, ...]) -> Speed:
        """Measure it. Raises BackendFault, ModelError."""
        shape = self._shape
        plan = trials.choose(shape, families, self._budget_bytes, WANTED_BYTES)
        try:
            times = self._in_windows(plan) if plan.short else self._as_a_whole()
        except _Over:
            raise BackendFault(
                "running even one layer of it takes too long to be measured"
            ) from None
        decode_s, prefill_s, window_s, head_s = times
        return Speed(
            shape.digest,
            backend,
            self.kind,
            self._terms.threads,
            decode_s,
            prefill_s,
            self._chunk,
            window_s,
            head_s + self._sampler_s(),
            short_chunks=trials.short_chunks(self._took, window_s),
        )

    def _in_windows(
        self, plan: trials.Trials
    ) -> tuple[tuple[float, ...], tuple[float, ...], float, float]:
        """Kinds one by one; those for which there is no time or window are told by their bytes."""
        weights = self._kind_bytes()
        window_s = self._around(plan)
        chunks: list[tuple[tuple[int, ...], float]] = []
        steps: list[tuple[tuple[int, ...], float]] = []
        for kind in plan.kinds:
            if kind not in plan.long:
                continue
            try:
                with self._loaded(plan.short[kind]) as run:
                    chunk_s = self._chunk_s(run)
                trial, step_s = self._decoded(plan.long[kind], plan.middle[kind])
            except _Over:
                if not steps:
                    raise
                break
            # Of a very short window the rest is the layers' own, at least in part.
            chunks.append((plan.short[kind].counts, max(chunk_s - window_s, chunk_s / 2)))
            steps.append((trial.counts, max(step_s - window_s, step_s / 2)))
        decode_s, prefill_s = by_kind(steps, weights), by_kind(chunks, weights)
        return decode_s, prefill_s, window_s, self._head_s(decode_s, window_s)

    def _decoded(self, long: Trial, middle: Trial) -> tuple[Trial, float]:
        """A step of the long window, or on a busy machine of a shorter one that is let alone."""
        with self._loaded(long) as run:
            steps = self._steps(run)
        if not is_free(steps) and middle != long:
            with self._loaded(middle) as run:
                fewer = self._steps(run)
            if is_free(fewer):
                return middle, quick_s(fewer)
        return long, quick_s(steps)

    def _as_a_whole(self) -> tuple[tuple[float, ...], tuple[float, ...], float, float]:
        """A model that cannot be cut: all of it, told apart by bytes."""
        shape = self._shape
        whole = trials.itself(shape, 0, shape.layers)
        size = shape.window_bytes(0, shape.layers)
        if size > self._budget_bytes:
            why = shape.whole_why or "no window of it is small enough"
            raise BackendFault(
                f"its {size} bytes are more than can be tried out here "
                f"({self._budget_bytes}), and fewer cannot be: {why}"
            )
        with self._loaded(whole) as run:
            chunk_s, step_s = self._chunk_s(run), quick_s(self._steps(run))
        head_bytes = shape.output_bytes or shape.embed_bytes
        active_bytes = sum(shape.active_bytes)
        head_s = step_s * head_bytes / max(1, active_bytes + head_bytes)
        weights = self._kind_bytes()
        decode_s = by_kind([(whole.counts, step_s - head_s)], weights)
        return decode_s, by_kind([(whole.counts, chunk_s)], weights), 0.0, head_s

    def _kind_bytes(self) -> tuple[int, ...]:
        """What one token reads of a layer, by kind."""
        kinds = self._shape.kinds
        every = range(max(kinds) + 1)
        return tuple(self._shape.active_bytes[kinds.index(kind)] for kind in every)

    def _around(self, plan: trials.Trials) -> float:
        """window_s, with a rest before each step."""
        if plan.single is None or plan.several is None:
            return 0.0
        with self._loaded(plan.single) as run:
            single = self._steps(run, _REST_S)
        with self._loaded(plan.several) as run:
            several = self._steps(run, _REST_S)
        if not (is_free(single) and is_free(several)):
            return 0.0  # on a busy machine it drowns; it is small on any
        return trials.around_s(quick_s(single), quick_s(several), plan.times)

    def _head_s(self, decode_s: tuple[float, ...], window_s: float) -> float:
        """The output head for one row: what a window that ends in it takes beyond its layers."""
        shape = self._shape
        weights = self._kind_bytes()
        head_bytes = shape.output_bytes or shape.embed_bytes
        by_bytes = head_bytes * sum(decode_s) / max(1, sum(weights))
        trial = trials.tail(shape, self._budget_bytes)
        if trial is None:
            return by_bytes
        try:
            with self._loaded(trial) as run:
                steps = self._steps(run)
        except _Over:
            return by_bytes
        if not is_free(steps):
            return by_bytes
        layers_s = sum(n * s for n, s in zip(trial.counts, decode_s, strict=True))
        # Bytes are bytes: what is far from how fast the layers read theirs was held up.
        return min(
            max(quick_s(steps) - layers_s - window_s, by_bytes / HEAD_FACTOR),
            by_bytes * HEAD_FACTOR,
        )

    @contextmanager
    def _loaded(self, trial: Trial) -> Iterator[_Run]:
        """The trial's window, ready to run."""
        if time.monotonic() > self._terms.until_s:
            raise _Over
        recipe = self._engine.recipe(self._header, trial.first, trial.last)
        backend = self._engine.open(self._settings)
        try:
            files = self._layers.place(trial, recipe)
            total = self._shape.layers
            told = as_filled(self._header, trial), files.files, files.embed, files.places
            window = Window(trial.first, trial.last, total, *told)
            backend.load(window)
            yield _Run(backend, window, self._ids if window.is_first else self._rows)
        finally:
            backend.close()

    def _steps(self, run: _Run, rest_s: float = 0.0) -> list[Sample]:
        """Steps of one row."""

        def step(at: int) -> None:
            run.step(at % self._rows_max, 1)

        def begin_again(at: int) -> None:
            if (at + 1) % self._rows_max == 0:
                run.backend.trim(0, 0)

        return self._sampled(step, _STEPS, _STEPS_S, rest_s, begin_again)

    def _chunk_s(self, run: _Run) -> float:
        """Seconds of a prefill chunk. The first one's chooses how many rows it has."""

        def sampled(rows: int, counts: tuple[int, int], limit_s: float) -> float:
            def empty(_at: int) -> None:
                run.backend.trim(0, 0)

            return quick_s(
                self._sampled(lambda _at: run.step(0, rows), counts, limit_s, 0.0, empty)
            )

        if not self._chunk:
            some = min(_SOME_ROWS, self._rows_max)
            some_s = sampled(some, _STEPS, _STEPS_S / 4)
            # A chunk that fits between two throttlings tells the speed without them.
            longest_s = min(CHUNK_S, self._burst_s * 0.8)
            self._chunk = trials.chunk_rows(some, some_s, longest_s, self._rows_max)
        chunk_s = sampled(self._chunk, _CHUNKS, _CHUNKS_S)
        if not self._took:
            self._took = {self._chunk: chunk_s} | self._shorter(run, chunk_s)
        return chunk_s

    def _shorter(self, run: _Run, chunk_s: float) -> dict[int, float]:
        """Seconds of shorter chunks, by rows. Each is the middle one of those that the long one
        would be cut into: it looks back at as much as one of its rows does."""
        took = {}
        for rows in (rows for rows in _SHORTER if 2 * rows <= self._chunk):
            if rows > 64 and rows * chunk_s / self._chunk > _SHORTER_S:
                break
            before = (self._chunk - rows) // 2
            run.step(0, before)
            try:
                took[rows] = quick_s(self._middle(run, before, rows))
            except BackendFault as fault:
                if fault.kind != "refused":
                    raise
                took.clear()  # recurrent layers go back to nowhere: what is usual is taken instead
            run.backend.trim(0, 0)
            if not took:
                break
        return took

    def _middle(self, run: _Run, before: int, rows: int) -> list[Sample]:
        """Chunks of so many rows, each behind the same `before` ones."""

        def again(_at: int) -> None:
            run.backend.trim(0, before)

        return self._sampled(lambda _at: run.step(before, rows), _CHUNKS, _STEPS_S, 0.0, again)

    def _sampled(
        self,
        step: Callable[[int], object],
        counts: tuple[int, int],
        limit_s: float,
        rest_s: float,
        after: Callable[[int], object],
    ) -> list[Sample]:
        """Steps, the first left out: it maps the weights. Raises _Over."""
        least, most = counts
        samples: list[Sample] = []
        free = 0  # of them, not held up
        began_s = time.monotonic()
        for at in range(_LONGER * most + 1):
            sample = timed(partial(step, at))
            after(at)
            if at:
                samples.append(sample)
                free += not sample.held
            now_s = time.monotonic()
            if now_s > self._terms.until_s:
                raise _Over
            after_s = now_s - began_s
            if free >= most or (free >= least and after_s > limit_s):
                break
            if len(samples) >= least and after_s > _LONGER * limit_s:
                break
            # A long step wants the whole of a quota that is filled anew every 0.1 s.
            time.sleep(_PERIOD_S if sample.seconds > self._burst_s / 4 else rest_s)
        return samples

    def _sampler_s(self) -> float:
        """Choosing a token, with the settings that a client gets who asks for none."""
        sampler = Sampler(Sampling(seed=1), ())
        logits = self._random.normal(0, 3, (8, max(2, self._shape.vocabulary))).astype(np.float32)
        return quick_s([timed(partial(sampler.sample, row, 1)) for row in logits])


@dataclass(frozen=True, slots=True)
class _Run:
    """A loaded window and what it is given."""

    backend: Backend
    window: Window
    given: NDArray[np.float32] | NDArray[np.int32]

    def step(self, position: int, rows: int) -> None:
        """So many rows of slot 0, from `position` on."""
        at = position % (len(self.given) - rows + 1)
        outputs = np.zeros(rows, dtype=np.bool_)
        outputs[-1] = True
        positions = np.arange(position, position + rows, dtype=np.int32)
        batch = Batch(np.zeros(rows, dtype=np.int32), positions, outputs)
        self.backend.run(self.window, batch, self.given[at : at + rows])


def timed(step: Callable[[], object]) -> Sample:
    """Run it once. Held, where one of our threads lost its processor, or had to wait for one."""
    taken, waited_s = _taken(), _waited_s()
    began_s = time.perf_counter()
    step()
    seconds = time.perf_counter() - began_s
    held = _taken() > taken or _waited_s() - waited_s > seconds * _WAITED_SHARE
    return Sample(seconds, held)


def _taken() -> int:
    """How often the system took a processor from one of our threads."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _waited_s() -> float:
    """How long our threads, ready to run, had to wait for a processor (Linux; elsewhere 0)."""
    waited_ns = 0
    for task in _TASKS.glob("*/schedstat"):
        with contextlib.suppress(OSError, ValueError, IndexError):  # it ended just now
            waited_ns += int(task.read_text(encoding="ascii").split()[1])
    return waited_ns * 1e-9
