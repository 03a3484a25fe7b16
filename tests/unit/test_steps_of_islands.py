"""Steps of stages that compute a window together: the first feeds, the others answer nobody."""

from __future__ import annotations

from dataclasses import replace as changed
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from peer.errors import ProtocolError
from peer.planning.plan import Plan
from peer.ring.frames import (
    Frame,
    FrameHeader,
    Meet,
    Trim,
    decode,
    encode_frame,
    encode_sampled,
    pack_index,
)
from tests.plans import PEERS, plan
from tests.unit.test_steps import Stage, frame, rows, run, sampled

OTHER = "o" * 16
ISLAND = ("10.0.0.1:5000", "10.0.0.2:5001")


def island(of: Plan, window: int) -> Plan:
    windows = list(of.split.windows)
    windows[window] = replace(windows[window], island=(OTHER,))
    return replace(of, split=replace(of.split, windows=tuple(windows)))


FIRST, LAST = island(plan(4, 8, 12), 0), island(plan(4, 8, 12), 2)


def leading(of: Plan, peer: str) -> Stage:
    stage = Stage(of, peer)
    stage.links.followers = [object()]
    return stage


def heard(of: Plan, parts: list[Any], *, ids: bool = False) -> Any:
    return decode([memoryview(part) for part in parts], of, 100, ids=ids)


def test_the_head_gives_the_ids_of_each_step_to_those_who_compute_with_it() -> None:
    stage = leading(FIRST, PEERS[0])
    stage.steps.begin(run(1, Trim(3, 0), count=2), True)
    (parts,) = stage.links.shared
    given = heard(FIRST, parts, ids=True)
    assert (given.header.step, given.header.window, given.header.ops) == (1, 0, (Trim(3, 0),))
    np.testing.assert_array_equal(given.x, [1, 1])
    (onward,) = stage.sent
    assert isinstance(onward, Frame)
    assert onward.header.window == 1

    other = Stage(FIRST, OTHER)
    other.hear(parts)
    assert other.did == [(Trim(3, 0),), 0]
    assert other.links.sent == []
    assert other.steps.count == 1


def test_a_tails_follower_computes_and_samples_nothing() -> None:
    stage = leading(LAST, PEERS[2])
    stage.hear(frame(LAST, 1, 2))
    (parts,) = stage.links.shared
    other = Stage(LAST, OTHER)
    other.hear(parts)
    assert other.did == [2]
    assert (other.links.sent, other.steps.rows) == ([], 1)


def test_a_step_without_rows_is_shared_too_for_what_it_does_to_slots() -> None:
    stage = leading(FIRST, PEERS[0])
    empty = run(1, Trim(1, 0))
    nothing = np.zeros(0, np.int32)
    stage.steps.begin(
        changed(
            empty, ids=nothing, slots=nothing, positions=nothing, outputs=np.zeros(0, np.bool_)
        ),
        True,
    )
    other = Stage(FIRST, OTHER)
    other.hear(*stage.links.shared)
    assert other.did == [(Trim(1, 0),)]


def test_who_follows_is_told_once_where_to_meet_and_nobody_else_is() -> None:
    other = Stage(LAST, OTHER)
    meet = encode_sampled(Meet(LAST.id, ISLAND))
    other.hear(meet)
    assert other.steps.island == ISLAND
    other.hear(encode_sampled(Meet(LAST.id, ISLAND[::-1])))
    assert (other.steps.island, other.steps.dropped) == (ISLAND, 1)

    short = Stage(LAST, OTHER)
    short.hear(encode_sampled(Meet(LAST.id, ISLAND[:1])))
    assert (short.steps.island, short.steps.dropped) == ((), 1)

    tail = Stage(LAST, PEERS[2])
    tail.hear(meet)
    assert (tail.steps.island, tail.steps.dropped) == ((), 1)


def test_ids_that_the_model_has_not_are_refused_and_rows_of_numbers_are_no_ids() -> None:
    header = FrameHeader(FIRST.id, 1, 0, 1, FIRST.shape.hidden)
    index = pack_index(rows())
    assert heard(FIRST, encode_frame(header, index, np.array([99], np.int32)), ids=True)
    for wrong in (np.array([100], np.int32), np.array([-1], np.int32), np.zeros((1, 8))):
        with pytest.raises(ProtocolError):
            heard(FIRST, encode_frame(header, index, wrong), ids=True)
    with pytest.raises(ProtocolError):  # the first window is nobody else's
        heard(FIRST, encode_frame(header, index, np.array([99], np.int32)))
    with pytest.raises(ProtocolError):
        heard(FIRST, sampled(FIRST, 1)[:0])


def test_an_islands_peers_are_each_others_neighbours() -> None:
    assert FIRST.peers == (*PEERS[:3], OTHER)
    assert FIRST.ring == PEERS[:3]
    assert FIRST.island_of(OTHER) == FIRST.island_of(PEERS[0]) == (PEERS[0], OTHER)
    assert FIRST.island_of(PEERS[1]) == ()
    assert (FIRST.after(OTHER), FIRST.before(OTHER)) == (PEERS[0], PEERS[0])
    assert FIRST.windows_of(OTHER) == (0,)
