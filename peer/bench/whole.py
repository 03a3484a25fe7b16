"""`python -m peer.bench.whole`: a whole model in one process, for rings to be measured against.

The same engine, the same settings, the same samplers as a stage's, and nothing else: no ring, no
sockets, no scheduler. It reads a JSON order a line from stdin and writes an answer a line to
stdout; when stdin ends, it ends. A crash of the engine ends this process and no other.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

import backends
from backends.base import BackendFault, Batch
from peer.bench.orders import Answer, Ask, Failed, Open, Opened, Order, Took
from peer.errors import HalkaError
from peer.ring.frames import Trim
from peer.ring.sampling import Sampler
from peer.ring.windows import Windows

ORDER_BYTES_MAX = 64 << 20


class Whole:
    """The model, loaded. Raises BackendFault, HalkaError, OSError."""

    def __init__(self, order: Open) -> None:
        split, folder = order.plan.split, Path(order.folder)
        engine = backends.load(split.windows[0].backend)
        self._split = split
        self._windows = Windows(engine, order.plan, order.plan.head, order.threads, order.weights)
        used = self._windows.load(folder)
        self._vocabulary = engine.vocabulary(folder / "head.gguf")
        self.opened = Opened(used.weights_bytes, used.kv_bytes, used.compute_bytes)

    def answer(self, ask: Ask) -> Took:
        """Do it. Raises BackendFault, FloatingPointError; ValueError where there is no room."""
        prompts = [self._ids(prompt) for prompt in ask.prompts]
        slots = range(len(prompts))
        cells = sum(map(len, prompts)) + ask.tokens * len(prompts)
        if len(prompts) > self._split.slots or cells > self._split.kv_cells:
            raise ValueError(f"{len(prompts)} answers of {cells} tokens together have no room")
        try:
            return self._answer(ask, prompts)
        finally:
            self._windows.apply(tuple(Trim(slot, 0) for slot in slots))

    def _ids(self, prompt: str | tuple[int, ...]) -> list[int]:
        if isinstance(prompt, str):
            words = self._vocabulary
            return [*words.starts_with, *words.encode(prompt, special=False)]
        return [*prompt]

    def _answer(self, ask: Ask, prompts: Sequence[list[int]]) -> Took:
        seed = ask.sampling.seed
        samplers = [
            Sampler(msgspec.structs.replace(ask.sampling, seed=seed + i), ids)
            for i, ids in enumerate(prompts)
        ]
        answers: list[list[int]] = []
        read_s: list[float] = []
        for slot, ids in enumerate(prompts):
            began_s = time.perf_counter()
            logits = self._read(slot, ids, max(1, min(ask.chunk, self._split.batch_tokens)))
            answers.append([_next(samplers[slot], logits[0], len(ids))])
            read_s.append(time.perf_counter() - began_s)
        steps_s: list[float] = []
        slots = range(len(prompts))
        group = ask.group or len(prompts)
        until_s = time.monotonic() + ask.limit_s
        while len(steps_s) < ask.tokens - 1 and time.monotonic() < until_s:
            began_s = time.perf_counter()
            for first in slots[::group]:
                some = slots[first : first + group]
                at = [len(prompts[slot]) + len(answers[slot]) - 1 for slot in some]
                logits = self._run([answers[slot][-1] for slot in some], some, at, [True] * len(at))
                for row, slot in enumerate(some):
                    answers[slot].append(_next(samplers[slot], logits[row], at[row] + 1))
            steps_s.append(time.perf_counter() - began_s)
        told = tuple(map(tuple, answers))
        return Took(tuple(map(len, prompts)), tuple(read_s), tuple(steps_s), told)

    def _read(self, slot: int, ids: Sequence[int], chunk: int) -> NDArray[np.float32]:
        """The logits behind a prompt: [1, vocabulary]."""
        for first in range(0, len(ids), chunk):
            some = ids[first : first + chunk]
            end = first + len(some)
            outputs = [False] * (len(some) - 1) + [end == len(ids)]
            logits = self._run(some, [slot] * len(some), range(first, end), outputs)
        return logits

    def _run(
        self,
        ids: Sequence[int],
        slots: Sequence[int],
        positions: Sequence[int],
        outputs: Sequence[bool],
    ) -> NDArray[np.float32]:
        batch = Batch(
            np.array(slots, np.int32), np.array(positions, np.int32), np.array(outputs, np.bool_)
        )
        return self._windows.run(0, batch, np.array(ids, np.int32))

    def close(self) -> None:
        """Free the engine's memory."""
        self._windows.close()


def _next(sampler: Sampler, logits: NDArray[np.float32], position: int) -> int:
    token = sampler.sample(logits, position)
    sampler.accept(token)
    return token


def main() -> int:
    """Answer orders until stdin ends."""
    # Engines and their drivers print what they like; stdout is for answers alone.
    answers = os.dup(1)
    os.dup2(2, 1)
    model: Whole | None = None
    with os.fdopen(answers, "wb", buffering=0) as out:
        while line := sys.stdin.buffer.readline(ORDER_BYTES_MAX):
            answer: Answer
            try:
                order = msgspec.json.decode(line, type=Order)
                match order:
                    case Open():
                        model = Whole(order)
                        answer = model.opened
                    case Ask() if model:
                        answer = model.answer(order)
                    case _:
                        answer = Failed("no model is loaded")
            except (BackendFault, HalkaError, ImportError, KeyError, OSError, MemoryError,
                    FloatingPointError, ValueError) as error:  # fmt: skip
                answer = Failed(f"{error}" or type(error).__name__)
            out.write(msgspec.json.encode(answer) + b"\n")
    if model:
        model.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
