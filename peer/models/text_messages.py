"""What an agent and its text process say to each other, over the process's stdin and stdout.

A message is its length (4 bytes, little endian) and that many bytes of msgpack. The text process is
not trusted: it may be run by a hostile template or tokenizer, so the agent checks what it says.
"""

from __future__ import annotations

import struct
from array import array
from typing import Any

import msgspec

MESSAGE_BYTES_MAX = 96 << 20  # > a text of template.TEXT_CHARS_MAX, and > any table of pieces
LENGTH = struct.Struct("<I")


class Message(msgspec.Struct, frozen=True, tag_field="m"):
    """Base. `request`: its number; an answer carries that of what it answers."""

    request: int


class Open(Message, frozen=True, tag="open"):
    """First of all: the engine's name and the path of head.gguf. Answered by Done."""

    engine: str
    head: str


class WantFacts(Message, frozen=True, tag="facts?"):
    """Answered by Facts."""


class Render(Message, frozen=True, tag="render"):
    """A chat, to be written out by the template. Answered by Rendered."""

    messages: list[dict[str, Any]]
    chars_max: int


class Encode(Message, frozen=True, tag="encode"):
    """Text to be made into ids. Answered by Encoded."""

    text: str


class Done(Message, frozen=True, tag="done"):
    """It worked."""


class Facts(Message, frozen=True, tag="facts"):
    """What is true of the vocabulary. template: the chat template's name."""

    pieces: list[bytes]
    ends: list[int]
    template: str


class Rendered(Message, frozen=True, tag="rendered"):
    """The chat as one text."""

    text: str


class Encoded(Message, frozen=True, tag="encoded"):
    """ids: int32, this machine's byte order, with what the model wants before any text."""

    ids: bytes


class Failed(Message, frozen=True, tag="failed"):
    """It did not work. client: the request is to blame (code, param as in RequestError)."""

    why: str
    client: bool = False
    code: str | None = None
    param: str | None = None


Question = Open | WantFacts | Render | Encode
Answer = Done | Facts | Rendered | Encoded | Failed

_encoder = msgspec.msgpack.Encoder()
questions: msgspec.msgpack.Decoder[Question] = msgspec.msgpack.Decoder(Question)
answers: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)


def framed(message: Message) -> bytes:
    """A message as it goes through the pipe. Raises ValueError where it is too long."""
    data = _encoder.encode(message)
    if len(data) > MESSAGE_BYTES_MAX:
        raise ValueError(f"a message of {len(data)} bytes")
    return LENGTH.pack(len(data)) + data


def packed(ids: list[int]) -> bytes:
    """Token ids as in Encoded."""
    return array("i", ids).tobytes()


def unpacked(data: bytes) -> list[int]:
    """Raises ValueError where the bytes are not whole numbers of 4 bytes."""
    ids = array("i")
    ids.frombytes(data)
    return ids.tolist()
