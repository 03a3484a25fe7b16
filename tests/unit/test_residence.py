"""What leaves memory after a turn and what is read ahead, with real files and the kernel's word."""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import backends
from backends.base import Backend, Footprint, Settings, Window
from peer.models.imports import import_gguf
from peer.models.store import Store
from peer.ring import residence
from peer.ring.residence import Files, Residence, given_up
from peer.ring.windows import Windows
from tests import fake_models
from tests.conftest import Until
from tests.e2e.rings import plan_of
from tests.plans import PEERS

LAYER_BYTES = 1 << 20
linux = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux which pages it has")


# How much ---------------------------------------------------------------------------------------


def test_one_window_gives_up_what_does_not_fit_and_reads_nothing_ahead() -> None:
    assert given_up([100], [30]) == ([30], 0)


@pytest.mark.parametrize("rounds", [2, 3, 4, 8])
def test_what_windows_give_up_makes_room_for_the_next_ones_share(rounds: int) -> None:
    """All give up the excess and a buffer; the buffer holds what one of them gave up."""
    given, ahead = given_up([1000] * rounds, [12] * rounds)
    assert ahead == max(given)
    assert sum(given) - ahead >= 12 * rounds
    assert sum(given) - ahead < 12 * rounds + rounds


@pytest.mark.parametrize("wanted", [0, 3, 12, 24, 99])
def test_a_plan_that_wants_less_read_ahead_has_less_given_up(wanted: int) -> None:
    given, ahead = given_up([1000] * 2, [12] * 2, wanted)
    assert ahead == min(wanted, 24)
    assert sum(given) - ahead in (24, 25)


def test_nothing_is_given_up_that_a_window_has_not() -> None:
    given, ahead = given_up([10, 1000], [8, 8])
    assert given == [10, 16]
    assert ahead == 10, "there is room for what 26 bytes given up leave of 16 too many"


def test_a_window_without_layers_here_gives_up_nothing() -> None:
    assert given_up([0, 0], [5, 5]) == ([0, 0], 0)


# Pages ------------------------------------------------------------------------------------------


class Part:
    """A file, mapped and touched as an engine does."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(os.urandom(LAYER_BYTES))
        self.path = path
        with path.open("rb") as file:
            os.fsync(file.fileno())
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.address = int(np.frombuffer(self._map, np.uint8).ctypes.data)

    def touch(self) -> None:
        """Read all of it."""
        assert len(bytes(self._map)) == LAYER_BYTES

    def forget(self) -> None:
        """Drop all of it from memory."""
        residence._madvise(self.address, LAYER_BYTES, mmap.MADV_DONTNEED)
        with self.path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def resident(self) -> list[bool]:
        """Of each page, whether it is in memory."""
        pages = LAYER_BYTES // mmap.PAGESIZE
        answer = (ctypes.c_ubyte * pages)()
        libc = ctypes.CDLL(None, use_errno=True)
        address, size = ctypes.c_void_p(self.address), ctypes.c_size_t(LAYER_BYTES)
        assert libc.mincore(address, size, answer) == 0, os.strerror(ctypes.get_errno())
        return [bool(each & 1) for each in answer]

    def close(self) -> None:
        self._map.close()


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[list[Part]]:
    """Four layers, all of them in memory, read from disk as in life: what was only written is kept
    in larger pieces."""
    made = [Part(tmp_path / f"layer-{i:03d}.gguf") for i in range(4)]
    for part in made:
        part.forget()
        if any(part.resident()):
            pytest.skip("files here are memory themselves (tmpfs)")
        part.touch()
    yield made
    for part in made:
        part.close()


def gone(held: Residence, place: int, part: Part, first: int = 0) -> bool:
    """Whether a part's pages left memory after this turn. A page that another processor has only
    just read can be dropped a little later only: the turn comes again, as it does in a ring."""
    held.after(place)
    return not any(part.resident()[first:])


def two_windows(parts: list[Part], excess: int) -> Residence:
    """Windows of two layers each, of which so many bytes do not fit together."""
    paths = [part.path for part in parts]
    half = excess // 2
    return Residence([Files(tuple(paths[:2]), half), Files(tuple(paths[2:]), half)])


@linux
async def test_after_a_turn_its_last_layers_leave_memory_and_the_next_ones_come(
    parts: list[Part], until: Until
) -> None:
    parts[3].forget()
    held = two_windows(parts, LAYER_BYTES)
    try:
        await until(lambda: gone(held, 0, parts[1]), 10, "the used layer has left")
        await until(lambda: all(parts[3].resident()), 10, "the next layer is there")
        assert all(parts[0].resident()), "what stays was dropped"
        assert all(parts[2].resident())
        parts[3].touch()  # its turn
        await until(lambda: gone(held, 1, parts[3]), 10, "the second used layer has left")
        await until(lambda: all(parts[1].resident()), 10, "the first window's is read again")
    finally:
        held.close()


@linux
async def test_half_a_layer_can_be_given_up(parts: list[Part], until: Until) -> None:
    held = two_windows(parts, LAYER_BYTES // 2)
    middle = LAYER_BYTES // 2 // mmap.PAGESIZE
    try:
        await until(lambda: gone(held, 0, parts[1], middle), 10, "its second half has left")
        assert all(parts[1].resident()[:middle]), "its first half was dropped, too"
    finally:
        held.close()


@linux
async def test_one_window_gives_up_its_last_layer_and_reads_nothing(
    parts: list[Part], until: Until
) -> None:
    held = Residence([Files(tuple(part.path for part in parts), LAYER_BYTES)])
    try:
        await until(lambda: gone(held, 0, parts[3]), 10, "the used layer has left")
        assert all(all(part.resident()) for part in parts[:3])
    finally:
        held.close()
    assert not any(parts[3].resident()), "it was read ahead without room"


# What cannot be done ----------------------------------------------------------------------------


async def test_advice_that_the_kernel_refuses_is_told_once(
    parts: list[Part],
    until: Until,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    calls = []

    def refuse(_address: int, _size: int, advice: int) -> int:
        calls.append(advice)
        ctypes.set_errno(errno.EINVAL)
        return -1

    monkeypatch.setattr(residence, "_madvise", refuse)
    with caplog.at_level(logging.WARNING, "halka.stage"):
        held = two_windows(parts, LAYER_BYTES)
        for turn in (0, 1, 0):
            calls.clear()
            held.after(turn)
            await until(lambda: calls, 10, "the advice was given")
        held.close()
    assert [record.message for record in caplog.records] == [
        f"streaming=unaided because={os.strerror(errno.EINVAL)}"
    ]


def test_a_part_that_is_gone_is_told_and_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    held = Residence([Files((tmp_path / "layer-000.gguf",), 10)])
    held.after(0)
    held.close()
    held.close()
    assert "No such file" in caplog.text


# In a stage -------------------------------------------------------------------------------------


class Counted:
    """An engine of the fake kind that says how much scratch memory a window takes."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.loaded: list[Window] = []

    def load(self, window: Window) -> Footprint:
        self.loaded.append(window)
        used = self._backend.load(window)
        return Footprint(used.weights_bytes, used.kv_bytes, 100 + window.first)


def test_windows_of_one_stage_have_scratch_memory_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    manifest = import_gguf(fake_models.write(tmp_path / "fake.gguf"), store)
    engine = backends.load("fake")
    opened = engine.open(Settings(8, 4096, 512, 1))
    monkeypatch.setattr(engine, "open", lambda _settings: Counted(opened))
    windows = Windows(engine, plan_of(store, manifest, [2, 5, 9], "fake", peers=2), PEERS[0], 1)
    used = windows.load(store.folder(manifest.digest))
    assert used.compute_bytes == 100 + 105
    assert windows._residence is None, "nothing of this plan streams"
    opened.close()
