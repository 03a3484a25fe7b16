"""Splits to compare with (being written)."""

from __future__ import annotations

from peer.planning.costs import Problem
from peer.planning.halda import Ring, solve


def memory_proportional(of: Problem) -> Ring | None:
    """Being written."""
    return solve(of)
