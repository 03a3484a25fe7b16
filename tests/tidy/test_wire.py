"""The wire is append-only: bytes that the first version wrote mean the same today.

tests/data/wire holds a golden file for each kind of message (hexadecimal; JSON for the pipe to a
stage) and fields.json, every tag with its fields. `pytest tests/tidy/test_wire.py --rewrite` adds
what is new and changes nothing that is there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from peer import protocol
from peer.errors import ProtocolError
from peer.ring.frames import FrameHeader, Meet, Sampled
from tests.tidy.source import ROOT, none
from tests.tidy.wire_examples import ALL, ANSWERING, CONTROL, PIPE, RING

GOLDEN = ROOT / "tests/data/wire"
FIELDS = GOLDEN / "fields.json"
Shown = dict[str, dict[str, str]]


def kind(message: msgspec.Struct) -> str:
    """ManifestWanted → manifest-wanted, the golden file's name; -2 for its second example."""
    words = re.sub(r"(?<!^)(?=[A-Z])", "-", type(message).__name__).lower()
    count = 1 + [other for other in ALL if type(other) is type(message)].index(message)
    return words if count == 1 else f"{words}-{count}"


def write(message: msgspec.Struct) -> str:
    """What a golden file holds of it."""
    if message in PIPE:
        return msgspec.json.encode(message).decode() + "\n"
    digits = msgspec.msgpack.encode(message).hex()
    return "\n".join(digits[i : i + 96] for i in range(0, len(digits), 96)) + "\n"


def read(message: msgspec.Struct, text: str) -> Any:
    """Decode a golden file by the door that its bytes come through."""
    if message in PIPE:
        return msgspec.json.decode(text, type=protocol.Pipe)
    data = bytes.fromhex(text)
    if message in CONTROL:
        return protocol.decode_control(data)
    if message in ANSWERING:
        return protocol.decode_answering(data)
    return msgspec.msgpack.decode(data, type=FrameHeader | Sampled | Meet)


def plain(message: msgspec.Struct, text: str) -> Any:
    """What any decoder makes of it."""
    return json.loads(text) if message in PIPE else msgspec.msgpack.decode(bytes.fromhex(text))


def golden(message: msgspec.Struct) -> Path:
    """Its golden file."""
    return GOLDEN / f"{kind(message)}.{'json' if message in PIPE else 'hex'}"


each = pytest.mark.parametrize("message", ALL, ids=kind)


def subclasses(of: type) -> Iterator[type]:
    """All of them, however far down."""
    for found in of.__subclasses__():
        yield found
        yield from subclasses(found)


def test_there_is_an_example_of_every_message() -> None:
    files = ("peer.protocol", "peer.stage_messages")
    messages = {found for found in subclasses(protocol.Message) if found.__module__ in files}
    assert messages == {type(message) for message in (*CONTROL, *ANSWERING, *PIPE)}
    assert {type(message) for message in RING} == {FrameHeader, Sampled, Meet}


@each
def test_examples_set_every_field_to_something(message: msgspec.Struct) -> None:
    """Else a golden file would prove nothing about the fields that it leaves out."""
    examples = [other for other in ALL if type(other) is type(message)]
    for field in msgspec.structs.fields(message):
        if not field.required:
            assert any(getattr(example, field.name) != field.default for example in examples), (
                f"{field.name} is new? add a second example to wire_examples.py that sets it"
            )


@each
def test_bytes_of_the_first_version_mean_what_they_meant(
    message: msgspec.Struct, rewrite: bool
) -> None:
    file = golden(message)
    if rewrite and not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(write(message))
    assert file.exists(), f"a new message? {file.name} is missing: run this test with --rewrite"
    assert read(message, file.read_text()) == message


@each
def test_the_first_version_can_read_what_is_written_today(message: msgspec.Struct) -> None:
    """Field for field, as long as only what it knew is set. Not byte for byte: msgpack has several
    ways to say how many fields follow, and a Struct of more than 15 that may be left out takes the
    longer one."""
    assert plain(message, write(message)) == plain(message, golden(message).read_text())


@each
def test_what_a_later_version_adds_is_skipped(message: msgspec.Struct) -> None:
    if message in PIPE:
        raw = json.loads(golden(message).read_text())
        later = json.dumps(raw | {"added_later": [1, {"a": None}]})
    else:
        raw = msgspec.msgpack.decode(bytes.fromhex(golden(message).read_text()))
        later = msgspec.msgpack.encode(raw | {"added_later": [1, {"a": None}]}).hex()
    assert read(message, later) == message


@pytest.mark.parametrize("message", [*CONTROL, *ANSWERING], ids=kind)
def test_a_tag_of_a_later_version_is_refused_by_name(message: msgspec.Struct) -> None:
    raw = msgspec.msgpack.decode(msgspec.msgpack.encode(message)) | {"m": "of-tomorrow"}
    with pytest.raises(ProtocolError, match="of-tomorrow"):
        read(message, msgspec.msgpack.encode(raw).hex())


@pytest.mark.parametrize("message", [*CONTROL, *ANSWERING], ids=kind)
def test_a_message_cut_short_anywhere_is_refused(message: msgspec.Struct) -> None:
    data = msgspec.msgpack.encode(message)
    for length in range(0, len(data), max(1, len(data) // 64)):
        with pytest.raises(ProtocolError):
            read(message, data[:length].hex())


def known_today() -> Shown:
    """tag → field → "required" or its default."""
    return {
        str(type(message).__struct_config__.tag): {
            field.encode_name: "required" if field.required else f"default {field.default!r}"
            for field in msgspec.structs.fields(message)
        }
        for message in ALL
    }


def test_no_tag_is_used_twice() -> None:
    kinds = {type(message) for message in ALL}
    assert len({known.__struct_config__.tag for known in kinds}) == len(kinds)


def test_tags_and_fields_are_only_ever_added(rewrite: bool) -> None:
    today = known_today()
    before: Shown = json.loads(FIELDS.read_text()) if FIELDS.exists() else {}

    def complaints() -> Iterator[str]:
        for tag, fields in before.items():
            for field, shown in fields.items():
                now = today.get(tag, {}).get(field, "gone")
                if now != shown:
                    yield f"`{tag}`.{field} was {shown}, is {now}: old peers cannot know; undo it"
        for tag in before.keys() & today.keys():
            for field in today[tag].keys() - before[tag].keys():
                if today[tag][field] == "required":
                    yield f"`{tag}`.{field} is new and has no default: old peers do not send it"

    none(complaints())
    if rewrite:
        merged = {tag: before.get(tag, {}) | today.get(tag, {}) for tag in before | today}
        FIELDS.write_text(json.dumps(merged, indent=1) + "\n")
        before = json.loads(FIELDS.read_text())
    assert before == today, "new tags or fields: run this test with --rewrite, read the difference"
