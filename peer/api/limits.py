"""What one HTTP endpoint takes on at once, and how long it waits for clients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from peer.errors import RequestError


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds. Silent and slow connections are gone after head_s, or body_s + linger_s: < 15 s."""

    body_bytes: int = 16 << 20  # a context of 1 Mi tokens as text, with some room
    connections: int = 512  # at once; half of the file descriptors that most systems allow
    answers: int = 256  # at once; the ring queues those that it has no slot for
    head_s: float = 12.0  # for a connection to say what it wants, first and between requests
    body_s: float = 10.0  # for a request's body to arrive
    linger_s: float = 2.0  # to read the rest of a body that was refused, so its sender hears why
    write_s: float = 30.0  # for a client to take what was written
    pause_s: float = 10.0  # between signs of life in a stream that has no text yet


class Places:
    """Answers that may be under way at once."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.used = 0

    @contextmanager
    def taken(self, count: int) -> Iterator[None]:
        """Hold `count` places. Raises RequestError (503) when there are not so many."""
        if self.used + count > self._most:
            raise RequestError(
                f"this peer already works on {self.used} answers; ask again, or ask another peer",
                status=503,
                kind="overloaded",
                code="busy",
            )
        self.used += count
        try:
            yield
        finally:
            self.used -= count
