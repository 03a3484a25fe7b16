"""Frames between stages: what fits comes through unchanged, the rest is refused by name."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.base import Batch
from peer.errors import ProtocolError, StalePlan
from peer.planning.plan import PlanId
from peer.protocol import IDS_BYTES_MAX, Sampling
from peer.ring.frames import (
    DRAFT_TOKENS_MAX,
    ROW_BYTES,
    TOGETHER_BYTES_MAX,
    Copy,
    Draft,
    Fault,
    Frame,
    FrameHeader,
    Open,
    Sampled,
    Trim,
    decode,
    encode_frame,
    encode_sampled,
    message_bytes_max,
    pack_index,
    unfinite,
)
from tests.plans import PEERS, plan, shape

PLAN = plan(4, 8, 12)


def batch(slots: list[int], positions: list[int]) -> Batch:
    return Batch(
        np.array(slots, np.int32), np.array(positions, np.int32), np.ones(len(slots), np.bool_)
    )


def wire(header: FrameHeader, rows: Batch, x: np.ndarray) -> list[memoryview]:
    return [memoryview(part) for part in encode_frame(header, pack_index(rows), x)]


def header(count: int, **changes: object) -> FrameHeader:
    return msgspec.structs.replace(FrameHeader(PLAN.id, 1, 1, count, 8), **changes)


GOOD = batch([0, 0, 3], [5, 6, 0])
GOOD.outputs[0] = False
X = np.arange(24, dtype=np.float32).reshape(3, 8)


def test_a_frame_comes_through_unchanged() -> None:
    ops = (Open(3, Sampling(), b"\1\0\0\0"), Trim(0, 5), Copy(0, 3, 2))
    sent = header(3, ops=ops, faults=(Fault(0, PEERS[0]),))
    came = decode(wire(sent, GOOD, X), PLAN)
    assert isinstance(came, Frame)
    assert came.header == sent
    assert came.x.tolist() == X.tolist()
    assert came.batch.slots.tolist() == [0, 0, 3]
    assert came.batch.positions.tolist() == [5, 6, 0]
    assert came.batch.outputs.tolist() == [False, True, True]
    assert bytes(came.index) == pack_index(GOOD), "it can be sent on as it came"


def test_a_frame_of_one_row_comes_through_unchanged() -> None:
    came = decode(wire(header(1), batch([7], [1023]), X[:1]), PLAN)
    assert isinstance(came, Frame)
    assert came.x.tolist() == X[:1].tolist()
    assert (came.batch.slots.tolist(), came.batch.positions.tolist()) == ([7], [1023])
    assert came.batch.outputs.tolist() == [True]


def test_sampled_tokens_come_through_unchanged() -> None:
    sampled = Sampled(PLAN.id, 7, (1, 2), (Fault(1, PEERS[1]),))
    assert decode([memoryview(p) for p in encode_sampled(sampled)], PLAN) == sampled


def ids(*tokens: int) -> bytes:
    return np.array(tokens, np.int32).tobytes()


DRAFTED = batch([2, 0, 0, 0, 0, 3], [9, 4, 5, 6, 7, 0])  # two guesses for slot 0, none for others
DRAFTED.outputs[1] = False
WIDE = np.ones((6, 8), np.float32)


def test_guesses_come_through_beside_rows_without_any() -> None:
    sent = header(6, drafts=(Draft(0, ids(11, 12)),), spent_s=0.5, slowest_s=0.25)
    came = decode(wire(sent, DRAFTED, WIDE), PLAN, vocabulary=13)
    assert isinstance(came, Frame)
    assert came.header == sent
    one = batch([5, 5], [0, 1])
    assert isinstance(
        decode(wire(header(2, drafts=(Draft(5, ids(1)),)), one, WIDE[:2]), PLAN), Frame
    )


@pytest.mark.parametrize(
    "drafts",
    [
        (),  # three rows of a slot would be answered
        (Draft(0, ids(1)),),  # fewer guesses than rows that are answered
        (Draft(0, ids(1, 2, 3)),),  # the row before them is not answered
        (Draft(0, ids(1, 2, 3, 4)),),  # more than it has rows
        (Draft(0, ids(1, 2)), Draft(0, ids(1, 2))),
        (Draft(0, ids(1, 2)), Draft(3, ids(1))),
        (Draft(0, ids(1, 2)), Draft(1, ids(1))),  # a slot without rows
        (Draft(0, ids(1, 2)), Draft(200, ids(1))),
        (Draft(0, ids(1, 2) + b"123"),),
        (Draft(0, ids(1, -2)),),
        (Draft(0, ids(1, 13)),),  # no such id
    ],
)
def test_guesses_that_do_not_fit_their_rows_are_refused(drafts: tuple[Draft, ...]) -> None:
    with pytest.raises(ProtocolError):
        decode(wire(header(6, drafts=drafts), DRAFTED, WIDE), PLAN, vocabulary=13)


def test_guesses_are_refused_where_nothing_is_run_and_where_there_is_one_row() -> None:
    guess = (Draft(0, ids(1)),)
    none = batch([], [])
    with pytest.raises(ProtocolError):
        decode(wire(header(0, drafts=guess), none, WIDE[:0]), PLAN)
    with pytest.raises(ProtocolError):
        decode(wire(header(1, drafts=guess), batch([0], [5]), WIDE[:1]), PLAN)


@pytest.mark.parametrize("row", [0, 1, 2])
def test_a_row_that_is_not_its_slots_last_is_not_answered(row: int) -> None:
    rows = batch([0, 0, 3], [5, 6, 0])
    rows.outputs[:] = False
    rows.outputs[row] = True
    parts = wire(header(3), rows, X)
    if row:
        assert isinstance(decode(parts, PLAN), Frame)
    else:
        with pytest.raises(ProtocolError, match="last of their slots"):
            decode(parts, PLAN)


def test_more_guesses_than_any_step_has_are_refused_unread() -> None:
    many = Draft(0, bytes(4 * DRAFT_TOKENS_MAX + 4))
    with pytest.raises(ProtocolError, match="not a frame"):
        decode(wire(header(3, drafts=(many,)), GOOD, X), PLAN)


@pytest.mark.parametrize("taken", [(1,), (1, 2), (3,), (1, 1, 1)])
def test_tokens_that_the_slots_shares_do_not_add_up_to_are_refused(taken: tuple[int, ...]) -> None:
    good = Sampled(PLAN.id, 7, (1, 2, 5), (), (1, 2), 0.5, 0.25)
    assert decode([memoryview(p) for p in encode_sampled(good)], PLAN) == good
    bad = msgspec.structs.replace(good, tokens=(1, 2), taken=taken)
    with pytest.raises(ProtocolError):
        decode([memoryview(p) for p in encode_sampled(bad)], PLAN)


@pytest.mark.parametrize("row", [(8, 0, 1), (-1, 0, 1), (0, 1024, 1), (0, -1, 1), (0, 0, 2)])
def test_one_row_out_of_range_is_refused(row: tuple[int, int, int]) -> None:
    parts = wire(header(1), batch([0], [0]), X[:1])
    slot, position, flag = row
    whole = bytearray(parts[0])
    whole[32 : 32 + ROW_BYTES] = ids(slot, position) + bytes([flag])  # behind eight numbers
    parts = [memoryview(whole)]
    with pytest.raises(ProtocolError, match="out of range"):
        decode(parts, PLAN)


def test_many_activations_are_a_part_of_their_own_and_are_not_copied() -> None:
    wide = plan(4, 8, 12, model=shape(hidden=TOGETHER_BYTES_MAX // 8))
    x = np.arange(3 * wide.shape.hidden, dtype=np.float32).reshape(3, -1)
    sent = header(3, hidden=wide.shape.hidden)
    data, rest = encode_frame(sent, pack_index(GOOD), x)
    assert np.shares_memory(np.frombuffer(data, np.float32), x)
    came = decode([memoryview(data), memoryview(rest)], wide)
    assert isinstance(came, Frame)
    assert came.header == sent
    assert np.array_equal(came.x, x)
    assert np.shares_memory(came.x, x), "nor where they come in"
    assert came.batch.positions.tolist() == [5, 6, 0]
    for parts in ([rest], [rest, data], [data, rest, b""], [data[4:], rest], [data, rest[1:]]):
        with pytest.raises(ProtocolError):
            decode([memoryview(part) for part in parts], wide)


@pytest.mark.parametrize("length", [0, 1, 1 << 20, (1 << 32) - 1])
def test_a_header_of_another_length_than_it_has_is_refused(length: int) -> None:
    for parts in (wire(header(3), GOOD, X), [memoryview(encode_sampled(Sampled(PLAN.id, 1))[0])]):
        whole = bytearray(parts[0])
        whole[-4:] = length.to_bytes(4, "little")
        with pytest.raises(ProtocolError):
            decode([memoryview(whole)], PLAN)


def test_what_a_plan_can_send_is_within_its_bound() -> None:
    rows = batch([0] * 64, list(range(64)))
    rows.outputs[:-1] = False
    ops = (Open(1, Sampling(), bytes(IDS_BYTES_MAX)),)
    for hidden in (8, 128, 4096):
        of = plan(4, 8, 12, model=shape(hidden=hidden))
        x = np.ones((64, hidden), np.float32)
        parts = encode_frame(header(64, hidden=hidden, ops=ops), pack_index(rows), x)
        assert isinstance(decode([memoryview(part) for part in parts], of), Frame)
        assert max(len(part) for part in parts) <= message_bytes_max(of)


def test_a_frame_of_another_plan_is_stale() -> None:
    with pytest.raises(StalePlan, match=r"1\.2"):
        decode(wire(header(3, plan=PlanId(1, 2)), GOOD, X), PLAN)


@pytest.mark.parametrize(
    ("changes", "rows", "x"),
    [
        ({"hidden": 9}, GOOD, X),
        ({"rows": 2}, GOOD, X),
        ({"rows": 4}, GOOD, X),
        ({"window": 3}, GOOD, X),
        ({"window": 0}, GOOD, X),
        ({"rows": 65}, GOOD, X),
        ({}, GOOD, X[:2]),
        ({}, batch([0, 0, 8], [5, 6, 0]), X),
        ({}, batch([0, 0, -1], [5, 6, 0]), X),
        ({}, batch([0, 0, 3], [5, 6, 1024]), X),
        ({}, batch([0, 0, 3], [5, 6, -1]), X),
        ({}, batch([0, 0, 3], [5, 7, 0]), X),
        ({}, batch([0, 3, 0], [5, 0, 6]), X),
        ({"ops": (Trim(8, 0),)}, GOOD, X),
        ({"ops": (Trim(0, 1025),)}, GOOD, X),
        ({"ops": (Copy(1, 1, 5),)}, GOOD, X),
        ({"ops": (Open(9, Sampling()),)}, GOOD, X),
        ({"ops": (Open(1, Sampling(), b"123"),)}, GOOD, X),
        ({"faults": (Fault(0, "z" * 16),)}, GOOD, X),
        ({"faults": (Fault(9, PEERS[0]),)}, GOOD, X),
    ],
)
def test_a_frame_that_does_not_fit_the_plan_is_refused(
    changes: dict[str, object], rows: Batch, x: np.ndarray
) -> None:
    with pytest.raises(ProtocolError):
        decode(wire(header(3, **changes), rows, x), PLAN)


def test_settings_out_of_range_are_refused_at_the_door() -> None:
    raw = msgspec.to_builtins(header(3, ops=(Open(1, Sampling()),)))
    raw["ops"][0]["sampling"] = {"temperature": -1}
    data = msgspec.msgpack.encode(raw)
    rows = X.tobytes() + pack_index(GOOD)
    parts = [memoryview(rows + data + len(data).to_bytes(4, "little"))]
    with pytest.raises(ProtocolError, match="temperature"):
        decode(parts, PLAN)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(max_size=200), min_size=0, max_size=4))
def test_random_bytes_are_refused(parts: list[bytes]) -> None:
    with pytest.raises((ProtocolError, StalePlan)):
        decode([memoryview(part) for part in parts], PLAN)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 255))
def test_a_flipped_byte_never_does_more_than_be_refused(at: int, value: int) -> None:
    (part,) = wire(header(3, ops=(Trim(1, 4),)), GOOD, X)
    target = bytearray(part)
    target[X.nbytes + at % (len(target) - X.nbytes)] = value
    try:
        came = decode([memoryview(target)], PLAN)
    except (ProtocolError, StalePlan):
        return
    assert isinstance(came, Frame)
    assert came.x.shape == (3, 8)
    assert (came.batch.slots < PLAN.split.slots).all()


def test_rows_that_are_not_finite_are_found_by_slot_and_large_ones_are_not_blamed() -> None:
    slots = np.array([0, 0, 3], np.int32)
    assert unfinite(slots, X) == []
    assert unfinite(slots, np.full((3, 8), 3e38, np.float32)) == []
    bad = X.copy()
    bad[2, 7] = np.nan
    assert unfinite(slots, bad) == [3]
    bad[0, 0] = -np.inf
    assert unfinite(slots, bad) == [0, 3]
