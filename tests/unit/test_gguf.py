"""models.gguf: honest files are read exactly, all others are refused with a cause and an offset."""

from __future__ import annotations

import ctypes
import os
import random
import struct
import tracemalloc
from pathlib import Path

import gguf as reference
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peer.errors import GGUFError
from peer.models import gguf
from peer.models.gguf import Value
from tests.gguf_files import EVERY_TYPE, F32, File, Tensor, every_type

MEMORY_BYTES_MAX = 4 << 20  # of reading a small file, whatever it says: the read-ahead and change


def attempt(path: Path, data: bytes) -> gguf.GGUF | GGUFError:
    """What reading these bytes comes to; any other error fails the test."""
    path.write_bytes(data)
    try:
        return gguf.read(path)
    except GGUFError as error:
        return error


def refused(path: Path, data: bytes, *words: str) -> GGUFError:
    """The error of reading these bytes, which must say these words."""
    found = attempt(path, data)
    assert isinstance(found, GGUFError), "it was accepted"
    for word in words:
        assert word in str(found)
    return found


def plain(value: object) -> object:
    """A value as the test wrote it: odd bytes of token pieces as bytes again."""
    if isinstance(value, list):
        return [plain(one) for one in value]
    if isinstance(value, str) and not value.isprintable():
        return value.encode("utf-8", "surrogateescape")
    return value


def test_every_type_of_value_is_read_as_it_was_written(tmp_path: Path) -> None:
    found = gguf.read(every_type().write(tmp_path / "a.gguf"))
    for key, kind, value in EVERY_TYPE:
        assert found.metadata[str(key)].type == kind
        if "float32" in kind:
            value = np.array(value, np.float32).tolist()
        assert plain(found.metadata[str(key)].value) == value
    assert found.header().architecture == "tiny"
    assert [(t.name, t.shape, t.type, t.size) for t in found.tensors] == [
        ("one", (4, 3), "F32", 48),
        ("two.weight", (32, 2), "Q8_0", 68),
        ("three", (5,), "F32", 20),
    ]


def test_copied_metadata_is_the_same_bytes(tmp_path: Path) -> None:
    data = every_type().encoded()
    path = tmp_path / "a.gguf"
    path.write_bytes(data)
    found = gguf.read(path)
    again = gguf.header_bytes(found.metadata, [(t.name, t.shape, t.type) for t in found.tensors])
    assert again == data[: found.data_offset]


def test_files_of_the_gguf_package_are_read_as_the_package_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    writer = reference.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 7)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "ç"])
    writer.add_custom_alignment(64)
    arrays = {f"t{i}": np.arange(i + 3, dtype=np.float32) for i in range(5)}
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = gguf.read(path)
    assert (found.header().layers, found.alignment) == (7, 64)
    for tensor in found.tensors:
        data = path.read_bytes()[tensor.offset : tensor.offset + tensor.size]
        assert np.frombuffer(data, np.float32).tolist() == arrays[tensor.name].tolist()


def test_files_that_we_write_are_read_by_the_gguf_package(tmp_path: Path) -> None:
    header = gguf.header_bytes(
        {"general.architecture": Value("string", "llama"), "x": Value("array:bool", [True, False])},
        [("a.weight", (32, 2), "Q8_0"), ("b", (3,), "F32")],
        pad_to=4096,
    )
    assert len(header) == 4096
    path = tmp_path / "a.gguf"
    path.write_bytes(header + bytes(range(68)) + bytes(28) + struct.pack("<3f", 1, 2, 3))
    reader = reference.GGUFReader(path)
    assert reader.fields["x"].contents() == [True, False]
    assert reader.tensors[0].data.tobytes() == bytes(range(68))
    assert reader.tensors[1].data.tolist() == [1.0, 2.0, 3.0]
    assert reader.data_offset == 4096


def test_sizes_of_all_tensor_types_are_those_of_ggml() -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs the llama extra")
    folder = Path(llama_cpp.__file__).parent / "lib"
    found = [*folder.glob("libggml-base.so"), *folder.glob("libggml-base.dylib")]
    ggml = ctypes.CDLL(str(found[0]))
    ggml.ggml_type_size.restype = ctypes.c_size_t
    ggml.ggml_blck_size.restype = ctypes.c_int64
    ggml.ggml_type_name.restype = ctypes.c_char_p
    numbers = {number: name for name, (number, _, _) in gguf.TYPES.items()}
    for number in range(int(llama_cpp.GGML_TYPE_COUNT)):
        size = ggml.ggml_type_size(number)
        assert (size > 0) == (number in numbers), number
        if size:
            name = ggml.ggml_type_name(number).decode().upper()
            assert (name, gguf.TYPES[name]) == (
                numbers[number],
                (number, ggml.ggml_blck_size(number), size),
            )


def test_sizes_of_all_tensor_types_are_those_of_the_gguf_package() -> None:
    for kind, (block, size) in reference.constants.GGML_QUANT_SIZES.items():
        if kind.name != "Q8_1":  # the package counts 40 bytes, ggml 36
            assert gguf.TYPES[kind.name] == (int(kind), block, size)


def test_a_file_cut_short_at_every_64th_of_header_and_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    data = every_type().encoded()
    whole = attempt(path, data)
    assert isinstance(whole, gguf.GGUF)
    last = max(t.offset + t.size for t in whole.tensors)
    cuts = {whole.data_offset * i // 64 for i in range(64)} | {last * i // 64 for i in range(64)}
    for cut in sorted(cuts | {last - 1}):
        error = refused(path, data[:cut])
        assert str(path) in str(error)
    for cut in range(whole.data_offset):
        assert refused(path, data[:cut]).offset is not None


def test_no_single_flipped_bit_crashes_the_reader(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    data = every_type().encoded()
    whole = attempt(path, data)
    assert isinstance(whole, gguf.GGUF)
    refusals = 0
    with path.open("r+b", buffering=0) as file:
        for at in range(whole.data_offset):
            for bit in range(8):
                os.pwrite(file.fileno(), bytes([data[at] ^ 1 << bit]), at)
                try:
                    found = gguf.read_descriptor(file.fileno())
                    assert all(t.offset + t.size <= len(data) for t in found.tensors)
                except GGUFError:
                    refusals += 1
            os.pwrite(file.fileno(), data[at : at + 1], at)
    assert refusals > whole.data_offset * 2  # letters and plain values may change unnoticed


ABSURD = (1 << 63, (1 << 64) - 1, (1 << 63) - 1, 1 << 40, 1 << 32, (1 << 32) - 1, 1 << 31, 1 << 24)
FIELDS = (lambda file: (file.encoded(), list(file.fields))[1])(every_type())


@pytest.mark.parametrize("field", FIELDS, ids=lambda f: f.name)
def test_a_size_or_count_that_lies_is_refused_before_memory_is_taken(
    field: object, tmp_path: Path
) -> None:
    file = every_type()
    data = file.encoded()
    path = tmp_path / "a.gguf"
    field = next(f for f in file.fields if f == field)
    tracemalloc.start()
    try:
        for value in ABSURD:
            if value < 1 << field.bits:
                error = refused(path, field.lie(data, value))
                assert error.offset is not None
                assert len(str(error)) < 600
        for value in {0, 1, field.read(data) - 1, field.read(data) + 1, field.read(data) * 2}:
            if 0 <= value < 1 << field.bits and value != field.read(data):
                attempt(path, field.lie(data, value))  # may be another true file; never a crash
        assert tracemalloc.get_traced_memory()[1] < MEMORY_BYTES_MAX
    finally:
        tracemalloc.stop()


def one(tensor: Tensor, **changes: object) -> bytes:
    return File([], [tensor], **changes).encoded()  # type: ignore[arg-type]


U = "uint32"
CASES = {
    "not a GGUF": (b"PK\3\4" + bytes(60), "not a GGUF file"),
    "empty": (b"", "too short"),
    "version 1": (File(version=1).encoded(), "version 1"),
    "version 4": (File(version=4).encoded(), "version 4"),
    "big-endian": (File(version=3 << 24).encoded(), "big-endian"),
    "two keys": (File([("a", U, 1), ("a", U, 2)]).encoded(), "comes twice"),
    "key without letters": (File([("", U, 1)]).encoded(), "is empty"),
    "key not UTF-8": (File([(b"\xff", U, 1)]).encoded(), "not UTF-8"),
    "text not UTF-8": (File([("a", "string", b"\xc3\x28")]).encoded(), "not UTF-8"),
    "long key": (File([("k" * 65536, U, 1)]).encoded(), "longer than 65535"),
    "bool of 2": (File([("a", "bool", True)]).encoded()[:-1] + b"\2", "a bool of 2"),
    "bools of 7": (File([("a", "array:bool", [True])]).encoded()[:-1] + b"\7", "neither 0 nor 1"),
    "arrays in arrays": (File([("a", "array:array", [])]).encoded(), "array of metadata type 9"),
    "alignment 0": (File([("general.alignment", U, 0)]).encoded(), "power of two"),
    "alignment 48": (File([("general.alignment", U, 48)]).encoded(), "power of two"),
    "alignment huge": (File([("general.alignment", U, 1 << 31)]).encoded(), "power of two"),
    "alignment as text": (File([("general.alignment", "string", "x")]).encoded(), "power of two"),
    "two tensors": (File([], [Tensor("a", (8,)), Tensor("a", (8,))]).encoded(), "comes twice"),
    "no name": (one(Tensor("", (8,))), "not a tensor's name"),
    "name with NUL": (one(Tensor("a\0b", (8,))), "not a tensor's name"),
    "name not UTF-8": (one(Tensor(b"\xff", (8,))), "not UTF-8"),
    "long name": (one(Tensor("n" * 64, (8,))), "longer than 63"),
    "dimension of 0": (one(Tensor("a", (8, 0)), data=bytes(64)), "not the shape"),
    "no dimension": (one(Tensor("a", ()), data=bytes(64)), "0 dimensions"),
    "five dimensions": (one(Tensor("a", (1, 1, 1, 1, 1))), "5 dimensions"),
    "product beyond 64 bits": (one(Tensor("a", (1 << 33,) * 2), data=b""), "cannot be"),
    "product of 2^64 + 16": (one(Tensor("a", (4, (1 << 46) + 1)), data=bytes(16)), "should end"),
    "unknown type": (one(Tensor("a", (8,), 99)), "unknown type 99"),
    "removed type": (one(Tensor("a", (8,), 4)), "unknown type 4"),
    "rows that are no blocks": (one(Tensor("a", (33,), 8)), "do not divide"),
    "unaligned": (one(Tensor("a", (8,), F32, 8), data=bytes(64)), "not aligned"),
    "beyond the end": (one(Tensor("a", (8,), F32, 64), data=bytes(64)), "cut short"),
    "overlapping": (
        File([], [Tensor("a", (16,)), Tensor("b", (8,), F32, 32)], data=bytes(96)).encoded(),
        "overlaps",
    ),
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_file_that_contradicts_itself_is_refused_with_the_cause(
    case: str, tmp_path: Path
) -> None:
    data, words = CASES[case]
    refused(tmp_path / "a.gguf", data, words)


def test_what_is_not_a_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "none"):
        with pytest.raises(GGUFError, match=str(path)):
            gguf.read(path)


def test_the_longest_header_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "HEADER_BYTES_MAX", 1000)
    refused(tmp_path / "a.gguf", File([("a", "string", "x" * 2000)]).encoded(), "longer than 1000")


def test_a_lying_count_is_refused_where_it_stands(tmp_path: Path) -> None:
    file = every_type()
    data = file.encoded()
    counts = [f for f in file.fields if "count" in f.name]
    assert len(counts) > 8
    for field in counts:
        error = refused(tmp_path / "a.gguf", field.lie(data, 1 << 40), "do not fit into the file")
        assert error.offset == field.offset


@pytest.mark.parametrize(("limit", "what"), [("KEYS_MAX", "keys"), ("TENSORS_MAX", "tensors")])
def test_there_are_never_more_keys_tensors_and_items_than_is_sane(
    limit: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf, limit, 2)
    refused(tmp_path / "a.gguf", every_type().encoded(), f"{what} do not fit")
    monkeypatch.setattr(gguf, limit, 100)
    monkeypatch.setattr(gguf, "ITEMS_MAX", 4)
    refused(tmp_path / "a.gguf", every_type().encoded(), "5 strings of an array do not fit")


@settings(max_examples=300, deadline=None, database=None)
@given(
    data=st.binary(max_size=400), prefix=st.sampled_from([b"", b"GGUF\3\0\0\0", b"GGUF\2\0\0\0"])
)
def test_random_bytes_never_crash_the_reader(
    data: bytes, prefix: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    attempt(tmp_path_factory.getbasetemp() / "random.gguf", prefix + data)


@settings(max_examples=300, deadline=None, database=None)
@given(seed=st.integers(0, 1 << 32), changes=st.integers(1, 12))
def test_a_file_changed_in_many_places_never_crashes_the_reader(
    seed: int, changes: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    draw = random.Random(seed)
    data = bytearray(every_type().encoded())
    for _ in range(changes):
        at = draw.randrange(len(data))
        kind = draw.randrange(3)
        if kind == 0:
            data[at] = draw.randrange(256)
        elif kind == 1:
            data[at : at + 8] = struct.pack("<Q", draw.getrandbits(draw.choice((8, 31, 40, 64))))
        else:
            del data[at : at + draw.randrange(40)]
    attempt(tmp_path_factory.getbasetemp() / "changed.gguf", bytes(data))


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("uint8", 256),
        ("uint32", -1),
        ("int32", 1 << 31),
        ("uint32", "7"),
        ("string", 7),
        ("array:int32", [1, None]),
        ("array:string", ["a", 1]),
        ("array:uint8", 5),
        ("number", 1),
        ("array:array", [[1]]),
        ("uint32:string", 1),
    ],
)
def test_a_value_that_is_not_of_its_type_is_not_written(kind: str, value: object) -> None:
    with pytest.raises(GGUFError, match=r"some\.key"):
        gguf.header_bytes({"some.key": Value(kind, value)}, [])


def test_a_header_that_does_not_fit_its_region_is_not_written() -> None:
    with pytest.raises(GGUFError, match="does not fit into 64"):
        gguf.header_bytes({"a": Value("string", "x" * 100)}, [], pad_to=64)
