"""A window that is asked for is never left out without a word."""

from __future__ import annotations

import pytest

from peer.errors import NoPlan
from peer.planning.split import Wishes, solve
from tests.coordinator import A, B, profile, shape


@pytest.mark.parametrize(
    ("others", "without", "why"),
    [
        ((), frozenset(), "it is not here"),
        ((profile(B),), frozenset({B}), "is to be done without"),
        ((profile(B, engines=()),), frozenset(), "has no engine"),
        ((profile(B, cpu_share=0.0),), frozenset(), "is refused"),
    ],
)
def test_a_window_of_a_peer_that_cannot_take_part_is_refused(
    others: tuple[object, ...], without: frozenset[str], why: str
) -> None:
    wishes = Wishes(pinned={B: (0, 4)}, without=without)
    with pytest.raises(NoPlan, match=f"{B} cannot have the window that is asked for: .*{why}"):
        solve([profile(A), *others], shape(), wishes)  # type: ignore[list-item]
