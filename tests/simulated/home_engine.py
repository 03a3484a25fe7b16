"""The fake engine of the simulated home, and the truth about every answer.

What a window makes of a row depends on every row that its slot was fed since it was freed: a hole,
a stale slot, a row fed twice or at a wrong position gives another number, and a number that is not
the one of the windows before spreads to the tail. A token is drawn from that number as the real
sampler draws: from (seed, position) where it is not greedy, with penalties that look back. Some
answers repeat themselves for most of their tokens, so that guesses are right now and then.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np

from peer.planning.plan import PlanWindow
from peer.protocol import Sampling
from peer.ring.frames import Copy, Draft, Open, Trim

END = 1  # the token that ends an answer
END_EVERY = 53  # so seldom
VOCABULARY = 1 << 20
SINGS_EVERY = 3  # so many answers repeat themselves,
BREAKS_OFF_EVERY = 8  # but for so many of their tokens
REFRAIN = 5  # tokens

Row = tuple[int, int, int]
"""slot, position, token id"""


def link(chain: int, position: int, token: int) -> int:
    """The number of a sequence that goes on with this token. Of ints alone: the same in any run."""
    return hash((chain, position, token))


def draw(home: int, sampling: Sampling, number: int, position: int, recent: Iterable[int]) -> int:
    """The token at a position. recent: ids that penalties look back on."""
    if sings(sampling) and number % BREAKS_OFF_EVERY:
        return 2 + hash((home, sampling.seed, position % REFRAIN)) % (VOCABULARY - 2)
    chance = (sampling.seed, position) if sampling.temperature else (0, 0)
    drawn = hash((home, number, chance, tuple(recent)))
    return END if drawn % END_EVERY == 0 else 2 + drawn % (VOCABULARY - 2)


def sings(sampling: Sampling) -> bool:
    """Whether an answer repeats itself."""
    return sampling.seed % SINGS_EVERY == 0 and not pays(sampling)


def pays(sampling: Sampling) -> bool:
    """Whether tokens that came before are held against a token."""
    return sampling.repeat_penalty != 1.0


class Truth:
    """The one right answer, token by token."""

    def __init__(self, home: int, prompt: Sequence[int], sampling: Sampling) -> None:
        self.home, self.sampling, self.ids, self.chain = home, sampling, [*prompt], 0
        for position, token in enumerate(prompt):
            self.chain = link(self.chain, position, token)

    def next(self) -> int:
        """The token that comes now."""
        recent: Sequence[int] = ()
        if pays(self.sampling):
            last = self.sampling.repeat_last_n
            recent = self.ids if last < 0 else self.ids[-last:]
        return draw(self.home, self.sampling, self.chain, len(self.ids), recent)

    def copy(self) -> Truth:
        """One that may go another way."""
        copy = Truth(self.home, (), self.sampling)
        copy.ids, copy.chain = [*self.ids], self.chain
        return copy

    def accept(self, token: int) -> None:
        """It was given."""
        self.chain = link(self.chain, len(self.ids), token)
        self.ids.append(token)


class Windows:
    """The windows of one stage, their KV caches, and the samplers where it is the tail."""

    def __init__(self, home: int, windows: Sequence[PlanWindow], mine: Iterable[int]) -> None:
        self.home, self.windows, self.mine = home, windows, tuple(mine)
        self.chains: dict[int, dict[int, list[int]]] = {index: {} for index in self.mine}
        self.samplers: dict[int, tuple[Sampling, deque[int]]] = {}

    def apply(self, ops: Iterable[Open | Trim | Copy]) -> None:
        """As ring.windows does."""
        for op in ops:
            match op:
                case Open(slot, sampling, history):
                    last = sampling.repeat_last_n
                    recent: deque[int] = deque(maxlen=None if last < 0 else last)
                    recent.extend(np.frombuffer(history, np.int32).tolist())
                    self.samplers[slot] = (sampling, recent)
                case Trim(slot, position):
                    for chains in self.chains.values():
                        del chains.setdefault(slot, [])[position:]
                    if position == 0:
                        self.samplers.pop(slot, None)
                case Copy(source, target, length):
                    for chains in self.chains.values():
                        chains[target] = chains.setdefault(source, [])[:length]

    def run(self, index: int, rows: Sequence[Row], x: Sequence[int], reached: int) -> list[int]:
        """One step through one window. x: what the window before made of the rows. reached: the
        layer up to which they have come."""
        chains, out = self.chains[index], []
        astray = reached != self.windows[index].first
        for (slot, position, token), number in zip(rows, x, strict=True):
            chain = chains.setdefault(slot, [])
            own = link(chain[-1] if chain else 0, position, token)
            chain.append(own)
            right = (index == 0 or own == number) and not astray
            out.append(own if right else hash((own, number, index, reached)))
        return out

    def sample(
        self,
        rows: Sequence[Row],
        x: Sequence[int],
        outputs: Sequence[bool],
        drafts: Sequence[Draft] = (),
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A token for each output row, and how many each slot took: of rows with guesses only up to
        the first that was wrong."""
        guesses = {d.slot: np.frombuffer(d.ids, np.int32).tolist() for d in drafts}
        wrong: set[int] = set()
        tokens: list[int] = []
        taken: dict[int, int] = {}
        for (slot, position, _), number, wanted in zip(rows, x, outputs, strict=True):
            if not wanted or slot in wrong:
                continue
            sampling, recent = self.samplers[slot]
            token = draw(
                self.home, sampling, number, position + 1, recent if pays(sampling) else ()
            )
            recent.append(token)
            tokens.append(token)
            at = taken[slot] = taken.get(slot, 0) + 1
            if guesses.get(slot, [])[at - 1 : at] != [token]:
                wrong.add(slot)
        return tuple(tokens), tuple(taken.values()) if drafts else ()
