"""The table of the KV cache's cells: what each row sees, and what is free again when."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.base import BackendFault
from backends.mlx.pool import Pool


def take(pool: Pool, slot: int, first: int, count: int = 1) -> list[int]:
    """The cells of so many rows of one slot."""
    slots = np.full(count, slot, dtype=np.int32)
    return pool.take(slots, np.arange(first, first + count, dtype=np.int32)).tolist()


def sees(pool: Pool, slot: int, position: int, window: int = 0) -> list[int]:
    """The cells that a row sees."""
    row = np.array([slot], np.int32), np.array([position], np.int32)
    return np.flatnonzero(pool.mask(*row, pool.cells, window)[0]).tolist()


def test_rows_take_the_lowest_free_cells_and_see_their_own_past() -> None:
    pool = Pool(8, 2)
    assert take(pool, 0, 0, 3) == [0, 1, 2]
    assert take(pool, 1, 0, 2) == [3, 4]
    assert take(pool, 0, 3) == [5]
    assert sees(pool, 0, 3) == [0, 1, 2, 5]
    assert sees(pool, 0, 1) == [0, 1]
    assert sees(pool, 1, 1) == [3, 4]
    assert pool.used == 6


def test_a_sliding_row_sees_as_many_positions_as_the_window_has() -> None:
    pool = Pool(16, 1)
    take(pool, 0, 0, 10)
    assert sees(pool, 0, 9, window=4) == [6, 7, 8, 9]
    assert sees(pool, 0, 2, window=4) == [0, 1, 2]


def test_a_trimmed_slot_frees_the_cells_that_nobody_else_holds() -> None:
    pool = Pool(8, 2)
    take(pool, 0, 0, 4)
    pool.copy(0, 1, 3)
    assert pool.trim(0, 1).tolist() == [3]
    assert sees(pool, 1, 2) == [0, 1, 2]
    assert take(pool, 0, 1) == [3]
    assert pool.trim(1, 0).tolist() == [1, 2]
    assert pool.end(1) == 0


def test_a_copy_takes_no_cells() -> None:
    pool = Pool(4, 3)
    take(pool, 0, 0, 4)
    pool.copy(0, 1, 4)
    pool.copy(1, 2, 2)
    assert pool.end(1) == 4
    assert pool.end(2) == 2
    assert sees(pool, 2, 1) == [0, 1]
    with pytest.raises(BackendFault, match=r"no room .* 1 tokens, and 0 of 4 cells are free") as it:
        take(pool, 2, 2)
    assert it.value.kind == "memory"


def test_a_batch_that_has_no_room_changes_nothing() -> None:
    pool = Pool(4, 2)
    take(pool, 0, 0, 3)
    slots, positions = np.array([0, 1, 1], np.int32), np.array([3, 0, 1], np.int32)
    with pytest.raises(BackendFault, match="no room"):
        pool.take(slots, positions)
    assert (pool.end(0), pool.end(1), pool.used) == (3, 0, 3)
    assert take(pool, 0, 3) == [3]


def test_what_was_taken_for_a_step_that_failed_is_given_back() -> None:
    pool = Pool(6, 2)
    take(pool, 0, 0, 2)
    slots, positions = np.array([0, 1, 1], np.int32), np.array([2, 0, 1], np.int32)
    pool.give_back(slots, pool.take(slots, positions))
    assert (pool.end(0), pool.end(1), pool.used) == (2, 0, 2)
    assert sees(pool, 0, 5) == [0, 1]
    assert take(pool, 1, 0, 4) == [2, 3, 4, 5]


@pytest.mark.parametrize(
    ("slots", "positions", "why"),
    [
        ([2], [0], "there is no slot 2 of 2"),
        ([-1], [0], "there is no slot -1 of 2"),
        ([0], [3], "at position 3, and the slot's next one is 2"),
        ([0], [1], "at position 1, and the slot's next one is 2"),
        ([0, 0], [2, 2], "at position 2, and the slot's next one is 3"),
        ([1, 1], [0, 2], "at position 2, and the slot's next one is 1"),
        ([1], [-1], "at position -1"),
    ],
)
def test_rows_that_do_not_follow_are_refused(
    slots: list[int], positions: list[int], why: str
) -> None:
    pool = Pool(8, 2)
    take(pool, 0, 0, 2)
    with pytest.raises(BackendFault, match=why) as caught:
        pool.take(np.array(slots, np.int32), np.array(positions, np.int32))
    assert caught.value.kind == "refused"
    assert (pool.end(0), pool.end(1), pool.used) == (2, 0, 2)


def test_more_than_a_slot_holds_is_not_copied() -> None:
    pool = Pool(8, 2)
    take(pool, 0, 0, 2)
    with pytest.raises(BackendFault, match="3 positions of a slot cannot be copied: it holds 2"):
        pool.copy(0, 1, 3)


_STEPS = st.lists(
    st.tuples(st.sampled_from(["take", "trim", "copy"]), *(st.integers(0, 9) for _ in range(3))),
    max_size=40,
)


@given(_STEPS)
def test_whatever_happens_each_slot_sees_what_was_said_in_it(
    steps: list[tuple[str, int, int, int]],
) -> None:
    pool, said = Pool(24, 3), {0: list[int](), 1: list[int](), 2: list[int]()}
    written, words = [-1] * 24, 0  # by cell: the word that a step put there
    for what, a, b, c in steps:
        slot = a % 3
        if what == "take":
            count = 1 + b
            try:
                cells = take(pool, slot, len(said[slot]), count)
            except BackendFault:
                shared = {cell for s in said for cell in sees(pool, s, 99)}
                assert len(shared) + count > 24
                continue
            for cell in cells:
                words += 1
                written[cell] = words
                said[slot].append(words)
        elif what == "trim":
            pool.trim(slot, b)
            del said[slot][b:]
        elif slot != c % 3:
            length = min(b, len(said[slot]))
            pool.trim(c % 3, 0)
            pool.copy(slot, c % 3, length)
            said[c % 3] = said[slot][:length]
        for each, words_said in said.items():
            assert [written[cell] for cell in sees_in_order(pool, each)] == words_said
            assert pool.end(each) == len(words_said)


def sees_in_order(pool: Pool, slot: int) -> list[int]:
    """The slot's cells by position."""
    return [
        next(iter(set(sees(pool, slot, p)) - set(sees(pool, slot, p - 1))))
        for p in range(pool.end(slot))
    ]
