"""What a draft model takes on the head is its own cost, and no part of the way around the ring."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from types import SimpleNamespace

import numpy as np
import pytest

from peer.protocol import Sampling
from peer.ring import head as module
from peer.ring.head import Head
from peer.ring.scheduler import Returned, Submitted
from tests.plans import plan


class Slow:
    """Takes a second to find nothing."""

    seconds_each = 0.001

    def __init__(self) -> None:
        self.now = 100.0
        self.asked = 0

    def draft(self, key: Hashable, ids: Sequence[int], most: int) -> tuple[int, ...]:
        self.asked += 1
        self.now += 1.0
        return ()

    def forget(self, key: Hashable) -> None:
        pass


def test_the_time_of_a_draft_is_not_learned_as_that_of_a_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slow = Slow()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: slow.now))
    head = Head(plan(4, 12), 60.0)
    head.scheduler.speculate, head.scheduler.drafter = True, slow
    head.take(Submitted((b"", "a"), np.array([5], np.int32), Sampling(), 100, frozenset()))
    for token in range(10):
        step = head.next_step().step
        slow.now += 0.03
        head.take(Returned(step, (token,), spent_s=0.02, slowest_s=0.01))
    assert slow.asked > 5
    assert head.scheduler.tempo.round_s(1) == pytest.approx(0.03)
