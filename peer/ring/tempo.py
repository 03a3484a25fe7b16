"""What a step of so many rows takes in this ring, learned from the steps that came around. Pure.

No line through the origin tells it: on two cores with a small model a row takes 7.1 ms, two take
17.5, sixteen 83, and each further one 4.7; a GPU takes as long for hundreds as for one. So the
latest steps are kept by their numbers of rows, in classes 1, 2, 3-4, 5-8 and so on. A class counts
with its median, which single steps of ten times their time, as on a shared machine, do not move;
between classes lie straight lines. More rows never take less.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque

_CLASSES = 14  # up to 8,192 rows: a frame holds no more
_KEPT = 15  # steps of a class: eight of another pace, and the median is theirs
_FIRM = 3  # steps: the least of which a median withstands an outlier
_STALE_STEPS = 512  # around the ring: what was known of a class that had none may be over


class Tempo:
    """What a step of n rows takes in this ring, learned from the steps that came around."""

    def __init__(self) -> None:
        self._steps = 0
        self._spent = _Curve(beyond=True)
        self._slowest = _Curve(beyond=True)
        self._hops = _Curve(beyond=False)

    @property
    def known(self) -> bool:
        """Whether a step of one row was seen."""
        return bool(self._spent.seconds[0])

    def observe(self, rows: int, spent_s: float, slowest_s: float, elapsed_s: float | None) -> None:
        """A step came around. spent_s: computed by all stages together; slowest_s: by the slowest
        of them; elapsed_s: from its begin to its return, where nothing else was in flight."""
        if rows < 1:
            return
        self._steps += 1
        of = min((rows - 1).bit_length(), _CLASSES - 1)
        self._spent.observe(of, rows, spent_s, self._steps)
        self._slowest.observe(of, rows, slowest_s, self._steps)
        if elapsed_s is not None:
            self._hops.observe(of, rows, max(0.0, elapsed_s - spent_s), self._steps)

    def round_s(self, rows: int) -> float:
        """For a step to come around with nothing else in flight: compute of all stages, and hops.
        0.0 while nothing is known."""
        return self._spent.at(rows, self._steps) + self._hops.at(rows, self._steps)

    def stage_s(self, rows: int) -> float:
        """Of the slowest stage. 0.0 while nothing is known."""
        return self._slowest.at(rows, self._steps)

    def rows_within(self, seconds: float, most: int) -> int:
        """The most rows, at least one and at most so many, whose stage_s stays within the seconds;
        `most` while nothing is known."""
        return max(1, bisect_right(range(1, most + 1), seconds, key=self.stage_s))


class _Curve:
    """Seconds by rows. beyond: whether they grow in proportion outside of what was seen, as what is
    computed does; the time of a hop stays."""

    def __init__(self, beyond: bool) -> None:
        self.seconds: list[deque[float]] = [deque(maxlen=_KEPT) for _ in range(_CLASSES)]
        self._rows: list[deque[int]] = [deque(maxlen=_KEPT) for _ in range(_CLASSES)]
        self._last = [0] * _CLASSES  # step of each class
        self._middles: list[tuple[int, float] | None] = [None] * _CLASSES
        self._drawn: tuple[list[int], list[float]] | None = None
        self._beyond = beyond

    def observe(self, of: int, rows: int, seconds: float, step: int) -> None:
        """A step of this class took so long."""
        self.seconds[of].append(seconds)
        self._rows[of].append(rows)
        self._last[of] = step
        self._middles[of] = self._drawn = None

    def at(self, rows: int, step: int) -> float:
        """Seconds of so many rows. step: the latest one."""
        all_rows, seconds = self._drawn or self._draw(step)
        if not all_rows:
            return 0.0
        after = bisect_left(all_rows, rows)
        if 0 < after < len(all_rows):
            return _line(all_rows, seconds, after - 1, after, rows)
        nearest = min(after, len(all_rows) - 1)
        return seconds[nearest] * (rows / all_rows[nearest] if self._beyond else 1.0)

    def _draw(self, step: int) -> tuple[list[int], list[float]]:
        """The points between which lines lie.

        A class of few steps, or of none lately, counts no more than its neighbours make likely. One
        that was met in a bad moment would else never be tried again, and never be known better.
        """
        classes = [of for of in range(_CLASSES) if self.seconds[of]]
        middles = [self._middle(of) for of in classes]
        rows, seconds = [middle[0] for middle in middles], [middle[1] for middle in middles]
        for place, of in enumerate(classes):
            weak = len(self.seconds[of]) < _FIRM or step - self._last[of] > _STALE_STEPS
            if weak and 0 < place < len(classes) - 1:
                likely = _line(rows, seconds, place - 1, place + 1, rows[place])
                seconds[place] = min(seconds[place], likely)
            if place and seconds[place] < seconds[place - 1]:
                seconds[place] = seconds[place - 1]
        self._drawn = rows, seconds
        return self._drawn

    def _middle(self, of: int) -> tuple[int, float]:
        """Medians; of an even number the lower: what disturbs a step makes it longer."""
        if (middle := self._middles[of]) is None:
            place = (len(self.seconds[of]) - 1) // 2
            middle = sorted(self._rows[of])[place], sorted(self.seconds[of])[place]
            self._middles[of] = middle
        return middle


def _line(rows: list[int], seconds: list[float], first: int, last: int, at: int) -> float:
    share = (at - rows[first]) / (rows[last] - rows[first])
    return seconds[first] + share * (seconds[last] - seconds[first])
