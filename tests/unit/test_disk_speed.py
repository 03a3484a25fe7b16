"""planning.disk: how fast a disk reads, whatever is on it, leaving nothing on it."""

from __future__ import annotations

import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from peer.planning import disk

MIB = 1 << 20


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megabytes instead of hundreds of them."""
    for name, value in (("FILE_BYTES", 8 * MIB), ("BLOCK_BYTES", MIB), ("_ENOUGH_BYTES", 4 * MIB)):
        monkeypatch.setattr(disk, name, value)


def part(home: Path, name: str, size: int) -> Path:
    path = home / "models" / "m" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(os.urandom(size))
    return path


@pytest.mark.usefixtures("small")
def test_an_empty_home_is_measured_with_a_file_that_is_gone_afterwards(tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert disk.read_bytes_per_s(home) > 1e6
    assert list(home.iterdir()) == []


@pytest.mark.usefixtures("small")
def test_parts_are_read_where_there_are_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part(tmp_path, "layer-000.gguf", 3 * MIB + 77)
    part(tmp_path, "layer-001.gguf", 2 * MIB)

    def unwanted(home: Path) -> float:
        raise AssertionError("a file was written")

    monkeypatch.setattr(disk, "_rate_of_a_new_file", unwanted)
    assert disk.read_bytes_per_s(tmp_path) > 1e6


@pytest.mark.usefixtures("small")
def test_reading_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part(tmp_path, "layer-000.gguf", 6 * MIB)
    monkeypatch.setattr(disk, "READ_BYTES", 3 * MIB)
    read: list[int] = []
    preadv = os.preadv

    def counted(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        read.append(preadv(descriptor, buffers, offset))
        return read[-1]

    monkeypatch.setattr(os, "preadv", counted)
    disk.read_bytes_per_s(tmp_path)
    assert 3 * MIB <= sum(read) <= 4 * MIB  # the first block is read twice, to ask
    read.clear()
    monkeypatch.setattr(disk, "READ_S", 0.0)
    assert disk.read_bytes_per_s(tmp_path) == 0.0


@pytest.mark.usefixtures("small")
def test_a_full_disk_is_not_filled_further(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, 1 << 40, 1 << 20))
    assert disk.read_bytes_per_s(tmp_path) == 0.0


@pytest.mark.usefixtures("small")
def test_a_filesystem_without_direct_reads_is_read_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgotten: list[int] = []
    monkeypatch.setattr(disk, "_past_cache", lambda descriptor, block: False)
    monkeypatch.setattr(os, "posix_fadvise", lambda *given: forgotten.append(given[0]))
    assert disk.read_bytes_per_s(tmp_path) > 1e6
    assert forgotten


@pytest.mark.usefixtures("small")
def test_a_home_that_is_not_ours_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert disk.read_bytes_per_s(tmp_path / "file") == 0.0
