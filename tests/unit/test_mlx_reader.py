"""Tensors out of files: where the header says they are, or a sentence that says why not."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import psutil
import pytest

from backends.base import BackendFault, Place, TensorFact
from backends.mlx import reader

FACT = TensorFact((32, 2), "Q8_0", 68)


@pytest.fixture
def part(tmp_path: Path) -> Path:
    """A file of 200 bytes."""
    path = tmp_path / "layer-000.gguf"
    path.write_bytes(bytes(range(200)))
    return path


def refused(place: Place, fact: TensorFact = FACT, kind: str = "refused") -> str:
    """What is said of a tensor that is not read."""
    open_files = psutil.Process().num_fds()
    with pytest.raises(BackendFault) as found:
        reader.read(place, fact)
    assert found.value.kind == kind
    assert psutil.Process().num_fds() == open_files
    return str(found.value)


@pytest.mark.parametrize("at_once", [7, 68, 1 << 26])
def test_a_tensor_is_read_from_where_it_lies(
    part: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(reader, "_READ_BYTES", at_once)
    open_files = psutil.Process().num_fds()
    for offset in (0, 96, 132):
        data = reader.read(Place(part, offset), FACT)
        assert data.dtype == np.uint8
        assert data.tobytes() == bytes(range(offset, offset + 68))
        assert not data.flags.writeable
    assert psutil.Process().num_fds() == open_files


def test_what_was_read_stays_when_the_file_goes(part: Path) -> None:
    data = reader.read(Place(part, 0), FACT)
    os.truncate(part, 0)
    part.unlink()
    assert data.tobytes() == bytes(range(68))


@pytest.mark.parametrize("offset", [-1, -(1 << 70), 133, 200, 1 << 62, 1 << 70])
def test_a_tensor_beyond_its_file_is_refused(part: Path, offset: int) -> None:
    said = refused(Place(part, offset))
    assert said == (
        f"{part} has 200 bytes, and a tensor in it should lie at bytes {offset} to {offset + 68}; "
        "remove the file, and it is fetched again"
    )


@pytest.mark.parametrize(
    ("fact", "why"),
    [
        (TensorFact((32, 2), "Q8_0", 64), "64 bytes instead of 68; pull the model again"),
        (TensorFact((32, 2), "Q8_0", 72), "72 bytes instead of 68; pull the model again"),
        (TensorFact((32, 2), "Q8_0", -68), "-68 bytes instead of 68"),
        (TensorFact((32, 2), "IQ4_NL", 36), "MLX has no tensors of type IQ4_NL"),
        (TensorFact((31, 2), "Q8_0", 68), "rows of 31 values do not divide"),
        (TensorFact((1 << 40, 1 << 40, 1 << 40), "F32", 4 << 120), "should lie at bytes 0 to"),
        (TensorFact((-4, -4), "F32", 64), "is not the shape of a tensor"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(
    part: Path, fact: TensorFact, why: str
) -> None:
    assert why in refused(Place(part, 0), fact)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # nobody writes into it: an open that waits would wait for ever
    for path in (tmp_path, tmp_path / "pipe"):
        assert refused(Place(path, 0)) == f"{path} is no file; remove it, and it is fetched again"


def test_a_file_that_is_missing_is_a_failure(tmp_path: Path) -> None:
    path = tmp_path / "layer-000.gguf"
    said = refused(Place(path, 0), kind="failed")
    assert said == f"{path} cannot be read: No such file or directory"


def test_a_file_that_becomes_shorter_after_the_check_is_a_sentence(
    part: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a mapping this is SIGBUS, and the stage is gone."""
    check = reader._check

    def then_cut(descriptor: int, place: Place, size: int) -> None:
        check(descriptor, place, size)
        os.truncate(part, 100)

    monkeypatch.setattr(reader, "_check", then_cut)
    assert "became shorter while it was read" in refused(Place(part, 64))
