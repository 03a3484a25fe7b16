"""How fast this machine's cores are just now, told by the engine itself.

On a shared machine the same step takes up to 1.7 times as long from one minute to the next, for as
long as a neighbour of the virtual machine wishes, and whatever runs inside of it. What a peer
measured of itself in one such minute says nothing of the next one. So a gauge runs before and after
everything that is timed, and what was not timed at the pace of the first measurement is not used.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Collection, Sequence

from tests.plain_llama import PlainLlama

STEPS = 8
CELLS = 512
EVEN = 0.08  # so far from the reference, it is the same pace


class Pace:
    """A decode step of the whole model, in this process, on each of these cores.

    reference_s: the pace that counts, by core.
    """

    def __init__(self, model: PlainLlama, prompt: Sequence[int], cores: Collection[int]) -> None:
        self._model, self._prompt, self._cores = model, prompt, tuple(sorted(set(cores)))
        self.reference_s = self.now()

    def now(self) -> dict[int, float]:
        """Seconds of a step, by core."""
        allowed = os.sched_getaffinity(0)
        found = {}
        for core in self._cores:
            os.sched_setaffinity(0, {core})
            self._model.clear()
            times = []
            for at in range(STEPS):
                began_s = time.perf_counter()
                self._model.step(self._prompt[at : at + 1], [at])
                times.append(time.perf_counter() - began_s)
            found[core] = quick(times[1:])
        os.sched_setaffinity(0, allowed)
        return found

    def ratio(self) -> float:
        """Now to the reference, of the core that is furthest from it."""
        ratios = [now_s / self.reference_s[core] for core, now_s in self.now().items()]
        return max(ratios, key=lambda ratio: max(ratio, 1 / ratio))

    def refer(self) -> None:
        """Today's weather is the one that counts from now on."""
        self.reference_s = self.now()


def is_even(ratio: float) -> bool:
    """Whether it is the pace of the reference."""
    return 1 / (1 + EVEN) <= ratio <= 1 + EVEN


def quick(times: Sequence[float]) -> float:
    """The median of the faster half: what else runs on a machine only makes things slower."""
    return statistics.median(sorted(times)[: (len(times) + 1) // 2])
