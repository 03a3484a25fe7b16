"""A rehearsal plays whole steps, for as long as it is asked to, and touches nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from peer.planning.plan import Plan
from peer.ring import steps
from peer.ring.head import Head
from peer.ring.rehearsal import Rehearsal
from peer.ring.scheduler import Deliver
from tests.plans import PEERS, plan

RING = plan(4, 8, 12, context=64, batch_tokens=16)


@pytest.mark.parametrize("peer", PEERS[:3])
def test_every_stage_rehearses_all_that_it_does_to_a_frame(
    peer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def noted(name: str, real: Any) -> Any:
        def call(*args: Any, **named: Any) -> Any:
            done.append(name)
            return real(*args, **named)

        return call

    for name in ("decode", "encode_frame", "encode_sampled", "unfinite"):
        monkeypatch.setattr(steps, name, noted(name, getattr(steps, name)))
    rehearsal = Rehearsal(RING, peer)
    for _ in range(3):
        rehearsal.play()
    done.clear()
    rehearsal.play()
    expected = {
        PEERS[0]: ["decode", "encode_frame"],
        PEERS[1]: ["decode", "unfinite", "encode_frame"],
        PEERS[2]: ["decode", "unfinite", "encode_sampled"],
    }
    assert done == expected[peer]
    assert rehearsal.dropped == 0


@pytest.mark.parametrize(
    "of",
    [
        RING,
        plan(4, 12, context=64),
        plan(4, 12, context=64, chunk_tokens=4),
        plan(4, 12, context=64, batch_tokens=1),
    ],
)
def test_it_goes_on_for_ever_and_does_not_grow(of: Plan) -> None:
    """The head's own answer ends with the context, and another one begins."""
    rehearsal = Rehearsal(of, of.ring[0])
    for _ in range(500):
        rehearsal.play()
    assert rehearsal.dropped == 0
    assert rehearsal.waiting <= 1


def test_its_answers_stay_short_however_long_those_of_the_plan_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One of 65,536 took 6 MB with those before it, and its index 10 ms at a time."""
    longest = 0

    def deliver(head: Any, action: Any) -> None:
        nonlocal longest
        if isinstance(action, Deliver):
            longest = max(longest, action.position)
        real(head, action)

    real = Head._perform
    monkeypatch.setattr(Head, "_perform", deliver)
    rehearsal = Rehearsal(plan(4, 12, context=65_536, kv_cells=262_144), PEERS[0])
    for _ in range(3000):
        rehearsal.play()
    assert 0 < longest < 1024
