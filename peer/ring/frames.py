"""What goes from stage to stage: a header, the rows' index, the activations.

One ZeroMQ message: the raw float32 activations [rows, hidden], the index (int32 slots, int32
positions, uint8 outputs, packed one after another), the header (msgpack) and the header's length
(uint32). All of them in one part, which costs half of what three do, or, where they are many, the
activations in a part of their own, without a copy; read in place. `Sampled`, a header alone, closes
the ring from the tail to the head.
Nothing here is trusted: every size is checked against the plan before an array is made of it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from backends.base import Batch
from peer.errors import ProtocolError, StalePlan
from peer.planning.plan import ISLAND_MAX, Plan, PlanId
from peer.planning.profile import PeerId, Seconds
from peer.protocol import IDS_BYTES_MAX, Sampling, Token

HEADER_BYTES_MAX = IDS_BYTES_MAX + (1 << 20)  # an Open that looks back on a whole context
DRAFT_TOKENS_MAX = 62  # guessed for one slot in one step: see batching.ALIKE_ROWS
ROW_BYTES = 9  # of the index: slot, position, output
TOGETHER_BYTES_MAX = 1 << 15  # of activations that are copied into one part with the rest
_ONE_ROW = struct.Struct("=iiB")
_LENGTH = struct.Struct("<I")

_Slot = Annotated[int, msgspec.Meta(ge=0, le=255)]
_Position = Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]


class SlotOp(msgspec.Struct, frozen=True, tag_field="o", omit_defaults=True):
    """What is done to a slot in every stage before the rows of the same frame are run."""


class Open(SlotOp, frozen=True, tag="open"):
    """A new answer takes the slot. `history`: int32 ids that penalties look back on (tail only)."""

    slot: _Slot
    sampling: Sampling
    history: Annotated[bytes, msgspec.Meta(max_length=IDS_BYTES_MAX)] = b""


class Trim(SlotOp, frozen=True, tag="trim"):
    """Forget what lies at and beyond the position; 0 frees the slot."""

    slot: _Slot
    position: _Position


class Copy(SlotOp, frozen=True, tag="copy"):
    """Give `target` the first `length` positions of `source`."""

    source: _Slot
    target: _Slot
    length: _Position


class Draft(msgspec.Struct, frozen=True):
    """Ids that are guessed to follow in this slot: int32. Its output rows are the last 1 + as many
    of its rows; row i of them is answered, then row i + 1 while the answer was the guess."""

    slot: _Slot
    ids: Annotated[bytes, msgspec.Meta(min_length=4, max_length=4 * DRAFT_TOKENS_MAX)]


class Fault(msgspec.Struct, frozen=True):
    """The numbers of this slot are not finite since this peer computed them."""

    slot: _Slot
    peer_id: PeerId


_Ops = Annotated[tuple[Open | Trim | Copy, ...], msgspec.Meta(max_length=1024)]
_Drafts = Annotated[tuple[Draft, ...], msgspec.Meta(max_length=256)]
_Taken = Annotated[int, msgspec.Meta(ge=1, le=DRAFT_TOKENS_MAX + 1)]
_Faults = Annotated[tuple[Fault, ...], msgspec.Meta(max_length=256)]


class FrameHeader(msgspec.Struct, frozen=True, tag_field="f", tag="frame", omit_defaults=True):
    """Names the plan, the step within it and the window that the rows go into.

    spent_s, slowest_s: what all stages so far, and the slowest of them, computed for this step.
    """

    plan: PlanId
    step: Annotated[int, msgspec.Meta(ge=1, le=1 << 60)]
    window: Annotated[int, msgspec.Meta(ge=0, le=512)]
    rows: Annotated[int, msgspec.Meta(ge=0, le=8192)]
    hidden: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
    ops: _Ops = ()
    faults: _Faults = ()
    drafts: _Drafts = ()
    spent_s: Seconds = 0.0
    slowest_s: Seconds = 0.0


class Sampled(msgspec.Struct, frozen=True, tag_field="f", tag="sampled", omit_defaults=True):
    """The tail's answer to a step: tokens of the output rows, in the batch's order.

    taken: how many of them each slot with output rows got: one, and one more for each draft that
    was right; (): one each. spent_s, slowest_s as in FrameHeader, the tail included.
    """

    plan: PlanId
    step: Annotated[int, msgspec.Meta(ge=1, le=1 << 60)]
    tokens: Annotated[tuple[Token, ...], msgspec.Meta(max_length=8192)] = ()
    faults: _Faults = ()
    taken: Annotated[tuple[_Taken, ...], msgspec.Meta(max_length=256)] = ()
    spent_s: Seconds = 0.0
    slowest_s: Seconds = 0.0


class Meet(msgspec.Struct, frozen=True, tag_field="f", tag="meet"):
    """The first stage of an island to its others: where each rank is to be met, host:port by rank.
    All of them use the same addresses, as this one sees them."""

    plan: PlanId
    addresses: Annotated[
        tuple[Annotated[str, msgspec.Meta(max_length=64)], ...], msgspec.Meta(max_length=ISLAND_MAX)
    ]


@dataclass(frozen=True, slots=True)
class Frame:
    """A header with its rows and their activations, float32 [rows, hidden], or ids, int32 [rows].
    index: the rows' as it came, to be sent on."""

    header: FrameHeader
    batch: Batch
    x: NDArray[Any]
    index: memoryview


_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[FrameHeader | Sampled | Meet] = msgspec.msgpack.Decoder(
    FrameHeader | Sampled | Meet
)


def pack_index(batch: Batch) -> bytes:
    """The rows' index, ROW_BYTES a row."""
    return (
        batch.slots.tobytes() + batch.positions.tobytes() + batch.outputs.view(np.uint8).tobytes()
    )


def message_bytes_max(plan: Plan) -> int:
    """What no part of a message of the plan exceeds."""
    rows = plan.split.batch_tokens
    rest = TOGETHER_BYTES_MAX + rows * ROW_BYTES + HEADER_BYTES_MAX + _LENGTH.size
    return max(rest, rows * plan.shape.hidden * 4)


def encode_frame(header: FrameHeader, index: bytes | memoryview, x: NDArray[Any]) -> list[Any]:
    """The message's parts."""
    head = _encoder.encode(header)
    rest = (index, head, _LENGTH.pack(len(head)))
    if x.nbytes <= TOGETHER_BYTES_MAX:
        return [b"".join((x.tobytes(), *rest))]
    return [np.ascontiguousarray(x).reshape(-1).view(np.uint8).data, b"".join(rest)]


def encode_sampled(sampled: Sampled | Meet) -> list[bytes]:
    """The part of a message without rows."""
    head = _encoder.encode(sampled)
    return [head + _LENGTH.pack(len(head))]


def decode(
    parts: list[memoryview], plan: Plan, vocabulary: int = 0, *, ids: bool = False
) -> Frame | Sampled | Meet:
    """What came in, checked against the plan. vocabulary: ids below it exist; 0: not known. ids:
    this stage computes the first window together with the head, so its rows are ids, int32.

    Raises: StalePlan for another plan's frames, ProtocolError for anything that does not fit.
    """
    if not 1 <= len(parts) <= 2 or len(parts[-1]) < _LENGTH.size:
        raise ProtocolError("not a frame: wrong number or size of parts")
    last = parts[-1]
    end = len(last) - _LENGTH.size
    begin = end - _LENGTH.unpack_from(last, end)[0]
    if begin < 0 or end - begin > HEADER_BYTES_MAX:
        raise ProtocolError("not a frame: its header is longer than it, or than any")
    try:
        header = _decoder.decode(last[begin:end])
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, ValueError) as error:
        raise ProtocolError(f"not a frame: {error}") from error
    if header.plan != plan.id:
        raise StalePlan(f"a frame of plan {header.plan}, but plan {plan.id} is served")
    if not isinstance(header, FrameHeader):
        if len(parts) != 1 or begin:
            raise ProtocolError("sampled tokens or addresses with something else")
        if isinstance(header, Meet):
            return header
        if header.taken and sum(header.taken) != len(header.tokens):
            raise ProtocolError("the slots' shares are not the tokens that came")
        _check_faults(header.faults, plan)
        return header
    middle = begin - header.rows * ROW_BYTES
    if middle < 0 or (len(parts) == 2 and middle):
        raise ProtocolError("the parts' sizes are not those that the header states")
    data = parts[0] if len(parts) == 2 else last[:middle]
    return _frame(header, last[middle:begin], data, plan, vocabulary, ids)


def _frame(
    header: FrameHeader,
    index: memoryview,
    data: memoryview,
    plan: Plan,
    vocabulary: int,
    ids: bool,
) -> Frame:
    split, rows = plan.split, header.rows
    if header.hidden != plan.shape.hidden:
        raise ProtocolError(f"hidden size {header.hidden}, the model's is {plan.shape.hidden}")
    if rows > split.batch_tokens or not (not ids) <= header.window < len(split.windows):
        raise ProtocolError(f"{rows} rows for window {header.window} are outside the plan")
    if len(data) != rows * (1 if ids else header.hidden) * 4:
        raise ProtocolError("the parts' sizes are not those that the header states")
    slots = np.frombuffer(index, np.int32, rows)
    positions = np.frombuffer(index, np.int32, rows, rows * 4)
    flags = np.frombuffer(index, np.uint8, rows, rows * 8)
    if rows == 1 and not header.drafts:  # what most frames are: a token of an answer alone
        slot, position, flag = _ONE_ROW.unpack(index)
        if not (0 <= slot < split.slots and 0 <= position < split.context and flag <= 1):
            raise ProtocolError("a slot, position or flag out of range")
    elif rows:
        _check_rows(slots, positions, flags, plan)
        _check_outputs(header.drafts, slots, flags, vocabulary)
    elif header.drafts:
        raise ProtocolError("guesses without rows")
    if header.ops:
        _check_ops(header.ops, plan)
    _check_faults(header.faults, plan)
    batch = Batch(slots, positions, flags.view(np.bool_))
    if not ids:
        return Frame(
            header, batch, np.frombuffer(data, np.float32).reshape(rows, header.hidden), index
        )
    tokens = np.frombuffer(data, np.int32)
    if rows and not (int(tokens.min()) >= 0 and int(tokens.max()) < (vocabulary or 1 << 31)):
        raise ProtocolError("ids that are not among the model's")
    return Frame(header, batch, tokens, index)


def _check_rows(
    slots: NDArray[np.int32], positions: NDArray[np.int32], flags: NDArray[np.uint8], plan: Plan
) -> None:
    if (
        int(slots.min()) < 0
        or int(slots.max()) >= plan.split.slots
        or int(positions.min()) < 0
        or int(positions.max()) >= plan.split.context
        or int(flags.max()) > 1
    ):
        raise ProtocolError("slots, positions or flags out of range")
    same = slots[1:] == slots[:-1]
    if not np.array_equal(positions[1:][same], positions[:-1][same] + 1):
        raise ProtocolError("the rows of a slot are not consecutive")
    if 1 + int(np.count_nonzero(~same)) != len(set(slots.tolist())):
        raise ProtocolError("the rows of a slot are scattered")


def _check_outputs(
    drafts: tuple[Draft, ...], slots: NDArray[np.int32], flags: NDArray[np.uint8], vocabulary: int
) -> None:
    """Only the last row of a slot is answered, and of one with a draft so many more before it."""
    ends = np.flatnonzero(np.append(slots[1:] != slots[:-1], True))
    expected = np.zeros_like(flags)
    expected[ends] = flags[ends]
    last = dict(zip(slots[ends].tolist(), ends.tolist(), strict=True))
    for draft in drafts:
        count, end = len(draft.ids) // 4, last.pop(draft.slot, -1)
        if len(draft.ids) % 4 or end < count or int(slots[end - count]) != draft.slot:
            raise ProtocolError("guesses for a slot without as many rows, or twice for one")
        ids = np.frombuffer(draft.ids, np.int32)
        if int(ids.min()) < 0 or (vocabulary and int(ids.max()) >= vocabulary):
            raise ProtocolError("guesses that are not among the model's ids")
        expected[end - count : end + 1] = 1
    if not np.array_equal(flags, expected):
        raise ProtocolError("answers are wanted of other rows than the last of their slots")


def _check_ops(ops: tuple[Open | Trim | Copy, ...], plan: Plan) -> None:
    slots, context = plan.split.slots, plan.split.context
    for op in ops:
        match op:
            case Open(slot, _, history):
                if slot >= slots or len(history) % 4:
                    raise ProtocolError("an answer opens outside the plan's slots")
            case Trim(slot, position):
                if slot >= slots or position > context:
                    raise ProtocolError("a trim outside the plan's slots or context")
            case Copy(source, target, length):
                if source >= slots or target >= slots or source == target or length > context:
                    raise ProtocolError("a copy outside the plan's slots or context")


def _check_faults(faults: tuple[Fault, ...], plan: Plan) -> None:
    ring = plan.ring
    for fault in faults:
        if fault.slot >= plan.split.slots or fault.peer_id not in ring:
            raise ProtocolError("a fault of an unknown slot or peer")


def unfinite(frame_slots: NDArray[np.int32], x: NDArray[np.float32]) -> list[int]:
    """Slots with rows that are not finite. x: [rows, width]."""
    # The sum is finite unless an element is not, or it overflows: then look closely.
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(x.sum()):
            return []
    bad = ~np.isfinite(x).all(axis=1)
    return [int(slot) for slot in np.unique(frame_slots[bad])]
