"""What is guessed to come next, and how long a guess pays. Pure.

A guess goes behind an answer's last token; the tail verifies it, so that an answer never changes:
it only takes fewer steps. `Lookup` guesses that what followed the last ids before follows again.
What its guesses are worth is learned without paying: at every token that comes, one looks whether
it would have been the guess. `Speculation` puts as many ids into a step as make the most tokens a
second, by what steps cost in this ring, and none where none pay. A small model on the head, a
`Drafter`, is asked where lookup has nothing that pays; it costs, so it is tried rarely in vain.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

import numpy as np

_LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 62)  # of guesses; on CPUs only long ones pay
_GAIN_LEAST = 1.05  # tokens a second with a guess, to those without: less is within the errors
_CHANCE_LEAST = 0.02  # what comes after a less likely guess is not worth a look

# Lookup. On 80 edits out of this project's history and 33 files of it (130,000 tokens), 16
# candidates, 64 or the latest 4 guess alike; as do an index of threes beside that of pairs, and
# looking for a better place at every token while one goes on.
_CANDIDATES = 16
_COMPARED = 16  # ids backwards
_TABLE_LEAST = 1 << 13
_BULK = 512  # ids; more are indexed at once
_FIRST, _SECOND, _SHIFT = 2654435761, 2246822519, 13  # of a pair's hash

# The chance that a guess is wrong after a match of so many ids: between what edited files (0.54,
# 0.38, 0.28, 0.21, 0.13, 0.07, 0.04, 0.018, 0.008, 0.002) and new ones (0.63, 0.52, 0.45, 0.38,
# 0.28, 0.21, 0.25, 0.23) gave.
_FROM = (2, 3, 4, 5, 7, 9, 13, 17, 33, 65)
_WRONG = (0.6, 0.45, 0.36, 0.3, 0.2, 0.14, 0.1, 0.05, 0.02, 0.01)
_WRONG_MOST = 0.98
_CLASS = tuple(max(sum(first <= n for first in _FROM) - 1, 0) for n in range(_FROM[-1] + 1))
_PRIOR = 6.0  # guesses that the numbers above count for
_KEPT = 0.98  # of the evidence, at every guess of its class: 34 guesses halve it

# A small model's guesses.
_MODEL_PRIOR = (3.0, 4.0)  # right, of so many: it is there because somebody hopes so
_MODEL_KEPT = 0.95
_MODEL_BEST = 0.95  # it is right no more often: where that does not pay, it is not even tried
_PROBE = 4  # ids
_PAUSE_LEAST, _PAUSE_MOST = 16, 256  # tokens between tries in vain


class Drafter(Protocol):
    """A small model on the head. seconds_each: what one guessed token costs, measured lately."""

    seconds_each: float

    def draft(self, key: Hashable, ids: Sequence[int], most: int) -> tuple[int, ...]:
        """Up to `most` ids that may follow `ids`, all of this answer so far."""
        ...

    def forget(self, key: Hashable) -> None:
        """The answer is over."""
        ...


class Lookup:
    """Prompt lookup (Saxena 2023; as in vLLM's n-gram proposer and llama.cpp's lookup): what
    followed the last ids the last time they occurred, after the longest match.

    An index as in LZ77: for every pair of ids where it ended last, and for every place where its
    pair ended before. A match goes on from id to id while it holds; then the latest places of the
    last pair are compared. 8 to 20 bytes an id. ids: all so far; matched: how many of the last ones
    occurred before (0 or 2 and more); follows: the index in ids of what followed them then.
    """

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = array("i")
        self.matched = self.follows = 0
        self._heads = array("i")
        self._before = array("i", [0])
        self._append(ids)

    def extend(self, ids: Sequence[int]) -> None:
        """These came next."""
        if len(ids) > _BULK:
            self._append(ids)
            return
        for token in ids:
            self.add(token)

    def add(self, token: int) -> None:
        """This one came next."""
        ids = self.ids
        if self.matched and ids[self.follows] == token:
            self.follows += 1
            self.matched += 1
        else:
            self.matched = 0
        ids.append(token)
        end = len(ids)
        if end < 2:
            self._before.append(0)
            return
        place = (ids[-2] * _FIRST + token * _SECOND) >> _SHIFT & len(self._heads) - 1
        self._before.append(self._heads[place])
        self._heads[place] = end
        if end > len(self._heads):
            self._index()
        if not self.matched and self._before[end]:
            self._find()

    def draft(self, most: int) -> tuple[int, ...]:
        """Ids that may follow; () where the last two did not occur before. What reaches the end
        goes on with itself: a text that repeats is guessed to repeat on."""
        if not self.matched or most <= 0:
            return ()
        found = self.ids[self.follows : self.follows + most]
        while len(found) < most:
            found += found[: most - len(found)]
        return tuple(found)

    def _append(self, ids: Sequence[int]) -> None:
        self.ids.extend(ids)
        self._index()
        self._find()

    def _find(self) -> None:
        """Take the longest match, of equals the latest."""
        ids, chain = self.ids, self._before
        end, best = len(ids), 0
        before = chain[end]  # where a pair of the same hash ended
        for _ in range(_CANDIDATES):
            if not before:
                break
            length, most = 0, min(_COMPARED, before)
            while length < most and ids[before - 1 - length] == ids[end - 1 - length]:
                length += 1
            if length >= 2 and length > best:
                best, self.follows = length, before
                if best == _COMPARED:
                    break
            before = chain[before]
        self.matched = best

    def _index(self) -> None:
        """Index all ids: 12 ms for 100,000."""
        count = len(self.ids)
        size = max(_TABLE_LEAST, 1 << (2 * count - 1).bit_length() if count else 0)
        heads, before = np.zeros(size, np.int32), np.zeros(count + 1, np.int32)
        if count >= 2:
            ids = np.frombuffer(self.ids, np.int32).astype(np.uint64)  # a copy: self.ids can grow
            mixed = ids[:-1] * np.uint64(_FIRST) + ids[1:] * np.uint64(_SECOND)
            places = (mixed >> np.uint64(_SHIFT) & np.uint64(size - 1)).astype(np.int64)
            order = np.argsort(places, kind="stable")
            ends = order.astype(np.int32) + 2  # how many ids there are where that pair ends
            sorted_places = places[order]
            again = sorted_places[1:] == sorted_places[:-1]
            before[ends[1:][again]] = ends[:-1][again]
            last = np.append(~again, True)
            heads[sorted_places[last]] = ends[last]
        self._heads, self._before = array("i", heads.tobytes()), array("i", before.tobytes())


class _Trust:
    """How often lookup is right after a match of so many ids, in this answer, lately.

    A guess of n ids after a match of m is right where the matches of m, m + 1, ... m + n - 1 ids
    are: each class of lengths has its decayed counts, and what a class is better or worse than
    expected is expected, by half, of the next longer one.
    """

    def __init__(self) -> None:
        self._seen = [0.0] * len(_FROM)
        self._wrong = [0.0] * len(_FROM)
        self._rates: list[float] | None = None

    def saw(self, matched: int, right: bool) -> None:
        """What followed a match of so many ids was, or was not, what had followed before."""
        of = _CLASS[min(matched, _FROM[-1])]
        self._seen[of] = self._seen[of] * _KEPT + 1.0
        self._wrong[of] = self._wrong[of] * _KEPT + (0.0 if right else 1.0)
        self._rates = None

    def chances(self, matched: int, most: int) -> list[float]:
        """[i]: that the first i + 1 ids of a guess are right; as far as it is worth a look."""
        if self._rates is None:
            self._rates = self._wrong_rates()
        chance, found = 1.0, []
        for length in range(matched, matched + most):
            chance *= 1.0 - self._rates[_CLASS[min(length, _FROM[-1])]]
            if chance < _CHANCE_LEAST:
                break
            found.append(chance)
        return found

    def _wrong_rates(self) -> list[float]:
        rates, worse = [], 1.0  # than expected
        for prior, seen, wrong in zip(_WRONG, self._seen, self._wrong, strict=True):
            expected = min(prior * worse, _WRONG_MOST)
            rate = (_PRIOR * expected + wrong) / (_PRIOR + seen)
            rates.append(min(rate, _WRONG_MOST))
            worse = (rate / prior) ** 0.5
        return rates


class Speculation:
    """One answer's: what to guess, and for how many tokens, so that it pays.

    key: the answer's name for the drafter. ids: all that the answer goes on from.
    """

    def __init__(
        self, ids: Sequence[int], drafter: Drafter | None = None, key: Hashable = None
    ) -> None:
        self._lookup = Lookup(ids)
        self._trust = _Trust()
        self._model = None if drafter is None else _Model(drafter, key)

    def took(self, ids: Sequence[int]) -> None:
        """These ids were sampled for the answer, guessed or not."""
        lookup, trust = self._lookup, self._trust
        if self._model is not None:
            self._model.took(ids)
        for token in ids:
            if lookup.matched:
                trust.saw(lookup.matched, lookup.ids[lookup.follows] == token)
            lookup.add(token)

    def draft(self, most: int, cost_s: Callable[[int], float]) -> tuple[int, ...]:
        """The ids to put behind the last one now, at most so many; () where none pay.

        cost_s(n): seconds of a step in which this answer has n guesses; 0 while unknown.
        """
        if most <= 0 or (not self._lookup.matched and self._model is None):
            return ()
        if self._lookup.matched:
            chances = self._trust.chances(self._lookup.matched, min(most, _LENGTHS[-1]))
            if count := best(chances, most, cost_s):
                return self._lookup.draft(count)
        return () if self._model is None else self._model.draft(self._lookup.ids, most, cost_s)


class _Model:
    """When to ask the small model, and for how many ids."""

    def __init__(self, drafter: Drafter, key: Hashable) -> None:
        self._drafter = drafter
        self._key = key
        self._guess: tuple[int, ...] = ()
        self._right, self._seen = _MODEL_PRIOR
        self._since = self._pause = 0  # tokens since the last guess; to wait between two in vain

    def took(self, ids: Sequence[int]) -> None:
        """Compare what came with the guess. Where fewer ids came than were guessed and all of them
        are right, the others were not looked at: an answer ended, or the guess was not run."""
        self._since += len(ids)
        guess, self._guess = self._guess, ()
        right = 0
        for token, guessed in zip(ids, guess, strict=False):
            hit = token == guessed
            self._right = self._right * _MODEL_KEPT + hit
            self._seen = self._seen * _MODEL_KEPT + 1.0
            right += hit
        if guess and right * 2 >= len(guess):
            self._pause = 0  # it may pay again: the next try tells more

    def draft(
        self, ids: Sequence[int], most: int, cost_s: Callable[[int], float]
    ) -> tuple[int, ...]:
        """Its guess where one pays, or where it is time to try whether one would."""
        each = self._drafter.seconds_each
        self._guess = ()

        def cost(guessed: int) -> float:
            return cost_s(guessed) + each * guessed

        count = best(_powers(self._right / self._seen, most), most, cost)
        if not count:
            if self._since < self._pause:
                return ()
            count = min(best(_powers(_MODEL_BEST, most), most, cost), _PROBE)
            self._pause = min(max(2 * self._pause, _PAUSE_LEAST), _PAUSE_MOST)
        self._since = 0
        if count:
            self._guess = self._drafter.draft(self._key, ids, count)[:count]
            if not self._guess:  # it is reading the prompt still: that was no try
                self._pause = 0
        return self._guess


def best(chances: Sequence[float], most: int, cost_s: Callable[[int], float]) -> int:
    """How many ids to guess, at most so many, for the most tokens a second; 0: none pay.

    chances[i]: that the first i + 1 are right, 0 beyond. cost_s as in Speculation.draft.
    """
    plain_s = cost_s(0)
    if plain_s <= 0.0 or not chances:
        return 0
    count, tokens, rate = 0, 1.0, _GAIN_LEAST / plain_s
    reached, most = 0, min(most, len(chances))
    for length in (*_LENGTHS, most):
        if not reached < length <= most:
            continue
        tokens += sum(chances[reached:length])
        reached = length
        if (cost := cost_s(length)) > 0.0 and tokens / cost > rate:
            count, rate = length, tokens / cost
    return count


def _powers(chance: float, most: int) -> list[float]:
    found, each = [], 1.0
    for _ in range(min(most, _LENGTHS[-1])):
        each *= chance
        if each < _CHANCE_LEAST:
            break
        found.append(each)
    return found
