"""Small pieces between pure machines and the loop: an alarm, a queue of events in one order, and
when to try again what failed.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable


class Alarm:
    """Calls `ring` once when its time comes. Times are the loop's, which are `time.monotonic`'s."""

    def __init__(self, ring: Callable[[], None]) -> None:
        self._ring = ring
        self._handle: asyncio.TimerHandle | None = None
        self._at: float | None = None

    def set(self, at: float | None) -> None:
        """Ring at this time and no other; None: not at all."""
        if at == self._at and at is not None:
            return
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        self._at = at
        if at is not None:
            self._handle = asyncio.get_running_loop().call_at(at, self._due)

    def _due(self) -> None:
        self._handle = self._at = None
        self._ring()


class Turns:
    """Runs calls one after another: what a call asks for runs after it, never inside it.

    Two machines that answer each other's actions would else be stepped in the middle of a step.
    """

    def __init__(self) -> None:
        self._calls: deque[Callable[[], None]] = deque()
        self._running = False

    def take(self, call: Callable[[], None]) -> None:
        """Run the call now, or after those that are under way."""
        self._calls.append(call)
        if self._running:
            return
        self._running = True
        try:
            while self._calls:
                self._calls.popleft()()
        finally:
            self._calls.clear()
            self._running = False


class Retries:
    """When to try again what failed, by name: after `first_s`, then after twice as long each time.

    What will never work then costs next to nothing, and what was bad luck is mended by itself.
    """

    def __init__(self, first_s: float, most_s: float) -> None:
        self._first_s, self._most_s = first_s, most_s
        self._failed: dict[str, tuple[float, float]] = {}  # when again; the wait until then

    def due(self, name: str, now: float) -> bool:
        """Whether it may be tried now."""
        again, _ = self._failed.get(name, (now, 0.0))
        return now >= again

    def failed(self, name: str, now: float) -> None:
        """It was tried, and it failed."""
        _, before_s = self._failed.get(name, (now, 0.0))
        wait_s = min(2 * before_s or self._first_s, self._most_s)
        self._failed[name] = (now + wait_s, wait_s)

    def worked(self, name: str) -> None:
        """It was tried, and it worked."""
        self._failed.pop(name, None)


class Lull:
    """Whether something that comes again and again has come to rest: after twice the time that lay
    between its last two times, but least_s at least and most_s at most."""

    def __init__(self, least_s: float, most_s: float) -> None:
        self._least_s, self._most_s = least_s, most_s
        self._last, self._over = -math.inf, -math.inf

    def goes_on(self, now: float) -> None:
        """It came."""
        wait_s = min(max(self._least_s, 2 * (now - self._last)), self._most_s)
        self._last, self._over = now, now + wait_s

    def is_over(self, now: float) -> bool:
        """Whether nothing is to be expected any more."""
        return now >= self._over
