"""What all messages are made of: their base, their bounds, and values that several of them hold."""

from __future__ import annotations

from typing import Annotated

import msgspec

from peer.planning.plan import TERM_MAX
from peer.planning.profile import Count, Seconds

PROTOCOL = 2
"""Raised when peers of two versions could misunderstand each other; another one is refused."""

MESSAGE_BYTES_MAX = 4 << 20  # the largest is Submit with 768 Ki token ids
CHUNK_BYTES_MAX = 256 << 10  # < 0.5 s on the slowest Wi-Fi we plan for, so heartbeats get through
MANIFEST_BYTES_MAX = 2 << 20
IDS_BYTES_MAX = 4 * 768 * 1024  # prompt ids, int32 little endian

Key = Annotated[str, msgspec.Meta(min_length=40, max_length=40)]  # CURVE public key, Z85
Address = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]  # tcp://host:port
Addresses = Annotated[tuple[Address, ...], msgspec.Meta(max_length=32)]
Term = Annotated[int, msgspec.Meta(ge=0, le=TERM_MAX)]
Part = Annotated[str, msgspec.Meta(max_length=16, pattern="^(head|embed|output|layer-[0-9]{3,4})$")]
RequestId = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
TokenIds = Annotated[bytes, msgspec.Meta(max_length=IDS_BYTES_MAX)]
Token = Annotated[int, msgspec.Meta(ge=0, le=(1 << 31) - 1)]
Finite = Annotated[float, msgspec.Meta(ge=-1e9, le=1e9)]


class Message(msgspec.Struct, frozen=True, tag_field="m", omit_defaults=True):
    """Base of all messages."""


class Timed(msgspec.Struct, frozen=True, omit_defaults=True):
    """What steps really took lately, as medians; 0: none were seen.

    decode_s: seconds that this stage computed for a step of one row. prefill_s: for each row of
    longer steps. tpot_s: from step to step of one answer alone, on the head, all stages and hops.
    wait_s, send_s: of a step of one row, what this stage waited for its frame and took to send on.
    drafted, accepted: ids that were guessed, and of them right, since the plan began. read, reused:
    ids of prompts that were computed, and that were in a slot already (all four: head).
    """

    decode_s: Seconds = 0.0
    prefill_s: Seconds = 0.0
    tpot_s: Seconds = 0.0
    wait_s: Seconds = 0.0
    send_s: Seconds = 0.0
    drafted: Count = 0
    accepted: Count = 0
    read: Count = 0
    reused: Count = 0
