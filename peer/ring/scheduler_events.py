"""What the head's scheduler is told, and what it asks for. Pure: values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from peer.protocol import Sampling
from peer.ring.batching import Key, Run
from peer.ring.frames import Fault


@dataclass(frozen=True, slots=True)
class Submitted:
    """An entry peer asks for an answer."""

    key: Key
    ids: NDArray[np.int32]
    sampling: Sampling
    tokens_max: int
    ends: frozenset[int]


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Nobody waits for this answer any more."""

    key: Key


@dataclass(frozen=True, slots=True)
class Returned:
    """A step came around the ring. Fields as in frames.Sampled."""

    step: int
    tokens: tuple[int, ...]
    faults: tuple[Fault, ...] = ()
    taken: tuple[int, ...] = ()
    spent_s: float = 0.0
    slowest_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed."""


Event = Submitted | Cancelled | Returned | Tick


@dataclass(frozen=True, slots=True)
class Deliver:
    """Tokens for the entry peer; `position` is the first one's. finish as in protocol.Tokens.

    Without tokens and finish it is a sign of life.
    """

    key: Key
    position: int
    ids: tuple[int, ...]
    finish: Literal["", "stop", "length"] = ""


@dataclass(frozen=True, slots=True)
class Refuse:
    """The answer does not begin, or does not go on. code as in protocol.Unanswered."""

    key: Key
    code: Literal["busy", "stale", "invalid", "failed"]
    why: str


@dataclass(frozen=True, slots=True)
class Lost:
    """A step did not come back in time: the ring's state is unknown, the stage must end."""

    why: str


@dataclass(frozen=True, slots=True)
class Blame:
    """This peer computes numbers that are not finite, whatever it is asked."""

    peer_id: str


Action = Run | Deliver | Refuse | Lost | Blame
