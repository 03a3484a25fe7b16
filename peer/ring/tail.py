"""The tail's samplers: an answer's next tokens from the logits of its rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from backends.base import Batch
from peer.protocol import Sampling
from peer.ring.frames import Draft, Fault
from peer.ring.sampling import Sampler


class Tail:
    """A sampler for each slot that an answer has."""

    def __init__(self, peer_id: str) -> None:
        self._peer_id = peer_id
        self._samplers: dict[int, Sampler] = {}

    def open(self, slot: int, sampling: Sampling, history: bytes) -> None:
        """A new answer takes the slot. history: int32 ids that penalties look back on."""
        self._samplers[slot] = Sampler(sampling, np.frombuffer(history, np.int32))

    def free(self, slot: int) -> None:
        """The answer that had the slot is over."""
        self._samplers.pop(slot, None)

    def sample(
        self,
        batch: Batch,
        logits: NDArray[np.float32],
        faults: list[Fault],
        drafts: tuple[Draft, ...] = (),
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Tokens and how many of them each slot took, as in frames.Sampled: one for its (first)
        output row, one more for each guess that was right. logits: [outputs, vocabulary]. Adds to
        `faults`; a slot with one gets a 0 that nobody will be given."""
        if len(batch.slots) == 1 and not drafts:  # what most steps are
            slot, position = batch.slots.item(), batch.positions.item() + 1
            if not batch.outputs.item():
                return (), ()
            return tuple(self._tokens(slot, position, logits, [], faults)), ()
        guesses = {draft.slot: np.frombuffer(draft.ids, np.int32).tolist() for draft in drafts}
        outputs = np.flatnonzero(batch.outputs).tolist()
        tokens: list[int] = []
        taken: list[int] = []
        row = 0
        while row < len(outputs):
            at = outputs[row]
            slot, position = int(batch.slots[at]), int(batch.positions[at]) + 1
            guessed = guesses.get(slot, [])
            rows = logits[row : row + 1 + len(guessed)]
            row += len(rows)
            found = self._tokens(slot, position, rows, guessed, faults)
            tokens += found
            taken.append(len(found))
        return tuple(tokens), tuple(taken) if len(taken) != len(tokens) else ()

    def _tokens(
        self,
        slot: int,
        position: int,
        rows: NDArray[np.float32],
        guessed: list[int],
        faults: list[Fault],
    ) -> list[int]:
        """Those of one slot."""
        for fault in faults:
            if fault.slot == slot:
                return [0]
        try:
            return _verified(self._samplers[slot], rows, position, guessed)
        except FloatingPointError:
            faults.append(Fault(slot, self._peer_id))
            return [0]


def _verified(
    sampler: Sampler, logits: NDArray[np.float32], position: int, guessed: list[int]
) -> list[int]:
    """The tokens from this position on: the next one follows only on a guess that was right, so
    that the penalties count what the answer really has, and rows on wrong guesses are not read.

    logits: [1 + guesses, vocabulary]. Raises FloatingPointError where those looked at are not
    finite.
    """
    tokens: list[int] = []
    for row, guess in zip(logits, [*guessed, None], strict=True):
        token = sampler.sample(row, position + len(tokens))
        sampler.accept(token)
        tokens.append(token)
        if token != guess:
            break
    return tokens
