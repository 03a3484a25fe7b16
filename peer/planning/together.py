"""The best split of a model, with islands where they are worth it. Pure.

`split` finds the best one of peers as they are told to it; here it is asked twice, with the Macs
that could be islands as single peers, and a plan with an island has to be clearly better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from peer.errors import NoPlan
from peer.planning import costs, islands
from peer.planning import split as plain
from peer.planning.plan import Split
from peer.planning.profile import ModelShape, Profile
from peer.planning.wishes import Wishes

WORTH = 0.1  # of a token's time has to be gained: an island is lost with any one of its peers


def solve(profiles: Sequence[Profile], shape: ModelShape, wishes: Wishes | None = None) -> Split:
    """Give every layer to a window, with the least time of a token. Raises NoPlan, as `split`."""
    wishes = wishes or Wishes()
    # After a loss what is left is to stay where it is; fixed windows name peers, not islands.
    settled = wishes.pinned or wishes.before or wishes.spread_all or wishes.rounds > 1
    wanted = [
        p
        for p in profiles
        if p.peer_id not in wishes.without and (not wishes.only or p.peer_id in wishes.only)
    ]
    found = () if settled else islands.possible(wanted, shape)
    if not found:
        return plain.solve(profiles, shape, wishes)
    merged = islands.as_peers(profiles, shape, found)
    try:
        alone = plain.solve(profiles, shape, wishes)
    except NoPlan as error:
        try:
            return _merged(merged, shape, wishes, found)
        except NoPlan:
            raise error from None  # in words of peers, not of islands
    try:
        other = _merged(merged, shape, wishes, found)
    except NoPlan:
        return alone
    if not any(window.island for window in other.windows):
        return alone
    before, after = (_cost_s(profiles, shape, split, wishes) for split in (alone, other))
    return other if before and after and after <= before * (1 - WORTH) else alone


def _merged(
    merged: Sequence[Profile], shape: ModelShape, wishes: Wishes, found: Sequence[islands.Found]
) -> Split:
    """With islands as single peers. In one round, as `plan.check` wants it of them."""
    split = islands.applied(plain.solve(merged, shape, wishes), found)
    ring = {window.peer_id for window in split.windows}
    if len(split.windows) > len(ring) and any(window.island for window in split.windows):
        once = replace(wishes, rounds=1)
        split = islands.applied(plain.solve(merged, shape, once), found)
    return split


def _cost_s(
    profiles: Sequence[Profile], shape: ModelShape, split: Split, wishes: Wishes
) -> float | None:
    found = costs.forecast(profiles, shape, split)
    return found.cost_s(wishes.objective) if found else None
