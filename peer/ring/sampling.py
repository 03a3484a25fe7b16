"""How the tail chooses a token: what llama.cpp's sampler chain does, in numpy.

The order is llama.cpp's: logit bias, penalties, top-k, top-p, min-p, temperature, draw. The draw is
keyed by (seed, position) alone, so an answer does not depend on which peer samples, on what else
runs, or on how often its ring was rebuilt on the way.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from peer.protocol import Sampling

Logits = NDArray[np.float32]
"""[vocabulary]"""

_FIRST_K = 256  # candidates that top-p looks at first; nearly always enough, as in llama.cpp


class Sampler:
    """One answer's sampler.

    ids: prompt and tokens delivered so far; the penalties count the last `repeat_last_n` of them.
    """

    def __init__(self, sampling: Sampling, ids: Iterable[int]) -> None:
        self._sampling = sampling
        last = sampling.repeat_last_n
        self._penalising = last != 0 and (
            sampling.repeat_penalty != 1
            or sampling.frequency_penalty != 0
            or sampling.presence_penalty != 0
        )
        self._recent: deque[int] = deque(maxlen=None if last < 0 else last)
        self._counts: Counter[int] = Counter()
        if self._penalising:
            self._recent.extend(int(token) for token in ids)
            self._counts.update(self._recent)

    def accept(self, token: int) -> None:
        """The token is part of the answer now."""
        if not self._penalising:
            return
        if len(self._recent) == self._recent.maxlen:
            oldest = self._recent[0]
            self._counts[oldest] -= 1
            if not self._counts[oldest]:
                del self._counts[oldest]
        self._recent.append(token)
        self._counts[token] += 1

    def sample(self, logits: Logits, position: int) -> int:
        """The token at `position` of the sequence. `logits` may be changed in place.

        Raises: FloatingPointError where a logit is not finite.
        """
        if self._sampling.temperature == 0:
            if self._penalising or self._sampling.logit_bias:
                _demand_finite(logits)
                self._adjust(logits)
                return int(logits.argmax())
            token = int(logits.argmax())  # of a NaN, where there is one
            if not (math.isfinite(logits[token]) and math.isfinite(logits.min())):
                raise FloatingPointError("the logits are not finite")
            return token
        ids, probabilities = self.candidates(logits)
        sums = np.cumsum(probabilities)
        at = np.searchsorted(sums, uniform(self._sampling.seed, position) * sums[-1], side="right")
        return int(ids[min(int(at), len(ids) - 1)])

    def candidates(self, logits: Logits) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
        """Ids that may be drawn, likeliest first (ties: lowest id first), and their probabilities.

        `logits` may be changed in place. Raises: FloatingPointError where one is not finite.
        """
        settings = self._sampling
        _demand_finite(logits)
        self._adjust(logits)
        if 0 < settings.top_k < len(logits):
            ids = _largest(logits, settings.top_k)
            if settings.top_p < 1:
                ids = ids[: _nucleus(logits[ids], settings.top_p)]
        elif settings.top_p < 1:
            ids = _nucleus_of_all(logits, settings.top_p)
        else:
            ids = _largest(logits, len(logits))
        kept = logits[ids]
        if settings.min_p > 0:
            least = kept[0] + np.float32(math.log(settings.min_p))
            kept = kept[: max(1, int(np.searchsorted(-kept, -least, side="right")))]
        # From the largest on, before dividing: a tiny temperature then underflows to 0, not to NaN.
        shifted = kept.astype(np.float64) - float(kept[0])
        with np.errstate(over="ignore", under="ignore"):
            weights = np.exp(shifted / settings.temperature)
        return ids[: len(kept)], weights / weights.sum()

    def _adjust(self, logits: Logits) -> None:
        """Bias and penalties, in place."""
        settings, vocabulary = self._sampling, len(logits)
        for token, bias in settings.logit_bias:
            if token < vocabulary:
                logits[token] += np.float32(bias)
        if not self._penalising or not self._counts:
            return
        tokens = np.fromiter(self._counts.keys(), np.int64, len(self._counts))
        counts = np.fromiter(self._counts.values(), np.float32, len(self._counts))
        known = (tokens >= 0) & (tokens < vocabulary)
        tokens, counts = tokens[known], counts[known]
        repeat = np.float32(settings.repeat_penalty)
        some = logits[tokens]
        # Dividing a negative logit would make its token likelier.
        some = np.where(some <= 0, some * repeat, some / repeat)
        some -= counts * np.float32(settings.frequency_penalty)
        some -= np.float32(settings.presence_penalty)
        logits[tokens] = some


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1), evenly distributed, that depends on its arguments alone."""
    key = seed.to_bytes(8, "little") + position.to_bytes(8, "little")
    return float(int.from_bytes(blake2b(key, digest_size=8).digest(), "little") >> 11) * 2.0**-53


def _demand_finite(logits: Logits) -> None:
    # The extremes are NaN where any logit is, and numpy finds them several times faster than
    # isfinite finds all.
    if not (math.isfinite(logits.max()) and math.isfinite(logits.min())):
        raise FloatingPointError("the logits are not finite")


def _largest(logits: Logits, count: int) -> NDArray[np.intp]:
    """Ids of the `count` largest, in descending order, ties by id."""
    if count < len(logits):
        least = np.partition(logits, len(logits) - count)[len(logits) - count]
        ids = np.flatnonzero(logits >= least)  # more than `count` where several equal the least
    else:
        ids = np.arange(len(logits))
    order = np.argsort(-logits[ids], kind="stable")
    return ids[order[:count]]


def _nucleus(logits: Logits, top_p: float, total: float = 0.0) -> int:
    """How many of these descending logits reach the share `top_p`; 0: all of them do not.

    total: sum of exp(logit - the first) over all candidates, 0: over these.
    """
    sums = np.cumsum(np.exp(logits - logits[0], dtype=np.float64))
    share = sums / (total or sums[-1])
    at = int(np.searchsorted(share, top_p, side="left"))
    if at < len(sums):
        return at + 1
    return 0 if total else len(sums)


def _nucleus_of_all(logits: Logits, top_p: float) -> NDArray[np.intp]:
    """The nucleus of the whole vocabulary, sorting as little of it as is needed."""
    total = float(np.exp(logits - logits.max()).sum(dtype=np.float64))
    count = _FIRST_K
    while count < len(logits):
        ids = _largest(logits, count)
        if enough := _nucleus(logits[ids], top_p, total):
            return ids[:enough]
        count *= 8
    ids = _largest(logits, len(logits))
    return ids[: _nucleus(logits[ids], top_p)]
