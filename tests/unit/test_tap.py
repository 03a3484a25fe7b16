"""backends.llama_cpp.tap and tap_library: both taps on true tensors of ggml, and how one is built.

A graph here is a list of tensors, and whoever computes it does what ggml's scheduler does: it asks
about each, and shows those that were wanted once they are computed, until it is told to stop.
"""

from __future__ import annotations

import ctypes
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from backends.base import BackendFault
from backends.llama_cpp import tap, tap_library
from backends.llama_cpp.library import library
from backends.llama_cpp.tap import State, Tap, TapInC
from backends.llama_cpp.tap_library import NoTap
from backends.llama_cpp.window import Rows

HIDDEN = 8
X = np.arange(100, 100 + 4 * HIDDEN, dtype=np.float32).reshape(4, HIDDEN)


class _Params(ctypes.Structure):
    """ggml.h: struct ggml_init_params."""

    _fields_ = (("size", ctypes.c_size_t), ("at", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class Tensors:
    """Makes tensors of ggml in a buffer of the processor, and frees them."""

    def __init__(self) -> None:
        self.ggml = library().ggml
        self._init = library().function("ggml_init", ctypes.c_void_p, _Params)
        self._contexts: list[int] = []
        self._buffers: list[int] = []

    def _call(self, name: str, *arguments: int) -> int:
        kinds = [ctypes.c_void_p if i == 0 else ctypes.c_int64 for i in range(len(arguments))]
        return int(library().function(name, ctypes.c_void_p, *kinds)(*arguments) or 0)

    def make(self, name: str, values: NDArray[np.float32], *, transposed: bool = False) -> int:
        """One with these values. transposed: seen the other way round, not contiguous."""
        context = self._init(_Params(1 << 16, None, True))
        self._contexts.append(context)
        new = library().function(
            "ggml_new_tensor_2d", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int,
            ctypes.c_int64, ctypes.c_int64,
        )  # fmt: skip
        rows, columns = values.shape
        tensor = new(context, 0, columns, rows)
        seen = tensor
        if transposed:
            turn = library().function("ggml_transpose", *[ctypes.c_void_p] * 3)
            seen = turn(context, tensor)
        kind = library().function("ggml_backend_cpu_buffer_type", ctypes.c_void_p)()
        allocate = library().function(
            "ggml_backend_alloc_ctx_tensors_from_buft", *[ctypes.c_void_p] * 3
        )
        self._buffers.append(allocate(context, kind))
        data = np.ascontiguousarray(values)
        self.ggml.ggml_backend_tensor_set(tensor, data.ctypes.data, 0, data.nbytes)
        called = library().function(
            "ggml_set_name", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p
        )
        called(seen, name.encode())
        return int(seen)

    def values(self, tensor: int) -> NDArray[np.float32]:
        """What is in it now, flat."""
        found = np.empty(self.ggml.ggml_nbytes(tensor) // 4, np.float32)
        self.ggml.ggml_backend_tensor_get(tensor, found.ctypes.data, 0, found.nbytes)
        return found

    def close(self) -> None:
        """Free all of them."""
        for buffer in self._buffers:
            self._call("ggml_backend_buffer_free", buffer)
        for context in self._contexts:
            self._call("ggml_free", context)


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    """The library of this very source: whoever changed it does not have to install again."""
    tap_library.main()


@pytest.fixture
def tensors() -> Iterator[Tensors]:
    made = Tensors()
    yield made
    made.close()


@pytest.fixture(params=[Tap, TapInC], ids=["python", "c"])
def kind(request: pytest.FixtureRequest) -> type[Tap]:
    """Each of the two taps."""
    found: type[Tap] = request.param
    return found


def compute(tapped: Tap, graph: Sequence[int]) -> list[int]:
    """What ggml's scheduler does with a graph. Returns the tensors that were computed."""
    done = []
    for tensor in graph:
        wanted = tapped.callback(tensor, True, tapped.user_data)
        done.append(tensor)
        if wanted and not tapped.callback(tensor, False, tapped.user_data):
            break
    return done


def slots(*of: int) -> NDArray[np.int32]:
    return np.array(of, np.int32)


def test_the_last_layers_output_is_taken_and_nothing_after_it_computed(
    kind: type[Tap], tensors: Tensors
) -> None:
    tapped = kind(library(), 3, HIDDEN, 4)
    graph = [tensors.make(n, X + i) for i, n in enumerate(["l_out-20", "l_out-2", "norm"])]
    for tokens in (4, 1, 3):  # a step leaves nothing for the next
        graph[1] = tensors.make("l_out-2", X[:tokens] * tokens)
        tapped.begin(tokens, X.ctypes.data)
        assert compute(tapped, graph) == graph[:2]
        np.testing.assert_array_equal(tapped.end(tokens, slots(0) * tokens), X[:tokens] * tokens)


def test_micro_batches_of_one_sequence_are_put_together(kind: type[Tap], tensors: Tensors) -> None:
    tapped = kind(library(), 1, HIDDEN, 4)
    tapped.begin(4, X.ctypes.data)
    for part in (X[:3], X[3:]):
        compute(tapped, [tensors.make("l_out-0", part)])
    np.testing.assert_array_equal(tapped.end(4, slots(2, 2, 2, 2)), X)


def test_pieces_of_several_sequences_are_refused(kind: type[Tap], tensors: Tensors) -> None:
    tapped = kind(library(), 1, HIDDEN, 4)
    tapped.begin(4, X.ctypes.data)
    for part in (X[:2], X[2:]):
        compute(tapped, [tensors.make("l_out-0", part)])
    with pytest.raises(BackendFault, match="cut a batch of several sequences into pieces"):
        tapped.end(4, slots(0, 0, 1, 1))


def test_rows_that_lack_are_told(kind: type[Tap], tensors: Tensors) -> None:
    tapped = kind(library(), 1, HIDDEN, 4)
    tapped.begin(4, X.ctypes.data)
    compute(tapped, [tensors.make("l_out-0", X[:3])])
    with pytest.raises(BackendFault, match="l_out-0 came with 3 rows for 4 tokens"):
        tapped.end(4, slots(0, 0, 0, 0))


def test_more_rows_than_tokens_are_told_and_written_nowhere(
    kind: type[Tap], tensors: Tensors
) -> None:
    tapped = kind(library(), 1, HIDDEN, 2)
    tapped.begin(2, X.ctypes.data)
    compute(tapped, [tensors.make("l_out-0", X[:2])])
    for rows in (1, 4):
        compute(tapped, [tensors.make("l_out-0", X[:rows] + 5)])
        with pytest.raises(BackendFault, match=f"{rows * 32} bytes came, which are not rows of 32"):
            tapped.end(2, slots(0, 0))
    tapped.begin(2, X.ctypes.data)
    compute(tapped, [tensors.make("l_out-0", X[2:])])
    np.testing.assert_array_equal(tapped.end(2, slots(0, 0)), X[2:])


def test_rows_of_another_size_are_told(kind: type[Tap], tensors: Tensors) -> None:
    tapped = kind(library(), 1, HIDDEN, 4)
    tapped.begin(2, X.ctypes.data)
    compute(tapped, [tensors.make("l_out-0", X[:, :5])])
    with pytest.raises(BackendFault, match="80 bytes came, which are not rows of 32"):
        tapped.end(2, slots(0, 0))


def test_scattered_rows_are_told(kind: type[Tap], tensors: Tensors) -> None:
    tapped = kind(library(), 1, HIDDEN, 4)
    tapped.begin(4, X.ctypes.data)
    compute(tapped, [tensors.make("l_out-0", X, transposed=True)])
    with pytest.raises(BackendFault, match="their memory is not contiguous"):
        tapped.end(4, slots(0, 0, 0, 0))


def test_a_scaled_input_is_overwritten_and_the_graph_goes_on(
    kind: type[Tap], tensors: Tensors
) -> None:
    tapped = kind(library(), 1, HIDDEN, 4, "inp_scaled")
    graph = [tensors.make("inp_scaled", X * 16), tensors.make("l_out-0", X + 1)]
    tapped.begin(4, X.ctypes.data)
    assert compute(tapped, graph) == graph
    np.testing.assert_array_equal(tensors.values(graph[0]), X.ravel())
    np.testing.assert_array_equal(tapped.end(4, slots(0, 0, 0, 0)), X + 1)
    tapped.begin(4, X.ctypes.data)
    compute(tapped, graph[1:])
    with pytest.raises(BackendFault, match="inp_scaled came with 0 rows for 4 tokens"):
        tapped.end(4, slots(0, 0, 0, 0))


def test_a_last_window_that_is_overwritten_runs_to_its_end(
    kind: type[Tap], tensors: Tensors
) -> None:
    tapped = kind(library(), 0, HIDDEN, 4, "inp_scaled")
    halves = [tensors.make("inp_scaled", X[:2] * 16), tensors.make("inp_scaled", X[2:] * 16)]
    end = [tensors.make("l_out-0", X), tensors.make("result_output", X)]
    tapped.begin(4, X.ctypes.data)
    for half in halves:
        assert compute(tapped, [half, *end]) == [half, *end]
    for half, rows in zip(halves, (X[:2], X[2:]), strict=True):
        np.testing.assert_array_equal(tensors.values(half), rows.ravel())
    tapped.end(4, slots(1, 1, 1, 1))
    with pytest.raises(BackendFault, match="cut a batch of several sequences"):
        tapped.end(4, slots(0, 1, 1, 1))


def test_structs_are_those_of_c_and_of_the_bindings() -> None:
    assert tap.compiled().halka_tap_bytes() == ctypes.sizeof(State)
    theirs = library().llama.llama_batch
    assert ctypes.sizeof(theirs) == ctypes.sizeof(Rows)
    for (name, kind), (other, its) in zip(Rows._fields_, theirs._fields_, strict=True):
        assert (name, ctypes.sizeof(kind)) == (other, ctypes.sizeof(its))
        assert getattr(Rows, name).offset == getattr(theirs, other).offset


def test_the_tap_in_c_is_the_one_that_is_used() -> None:
    tap.best.cache_clear()
    assert tap.best() is TapInC


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the source, and no library yet."""
    shutil.copy(tap_library.FOLDER / "tap.c", tmp_path)
    return tmp_path


def test_a_library_is_built_whole_and_nothing_is_left_beside_it(folder: Path) -> None:
    with pytest.raises(NoTap, match="not built"):
        tap_library.load(folder)
    built = tap_library.build(folder, folder / "tap.c")
    assert tap_library.load(folder).halka_tap_bytes() == ctypes.sizeof(State)
    assert {path.name for path in folder.iterdir()} == {"tap.c", built.name}
    assert tap_library.build(folder, folder / "tap.c") == built  # twice is once
    assert platform.machine().lower() in built.name


def test_a_library_of_another_source_is_not_used_and_the_command_is_told(folder: Path) -> None:
    old = tap_library.build(folder, folder / "tap.c")
    tap_library.load(folder)
    text = (folder / "tap.c").read_text().replace("return sizeof(struct tap)", "return 1234")
    (folder / "tap.c").write_text(text)
    with pytest.raises(NoTap, match=r"another source; build it with: .*tap_library\.py"):
        tap_library.load(folder)
    tap_library.build(folder, folder / "tap.c")
    assert tap_library.load(folder).halka_tap_bytes() == 1234  # of the new one, in one process
    assert not old.exists()


def _not_a_library(path: Path) -> None:
    path.write_bytes(b"\x7fELF of another processor")


def _not_ours(path: Path) -> None:
    shutil.copy(library().llama._lib._name, path)


@pytest.mark.parametrize("spoil", [_not_a_library, _not_ours])
def test_a_file_that_is_no_tap_is_not_used(folder: Path, spoil: Callable[[Path], None]) -> None:
    spoil(folder / tap_library.file_name(folder / "tap.c"))
    with pytest.raises(NoTap, match="is of no use here"):
        tap_library.load(folder)


@pytest.mark.parametrize("compiler", ["false", "/nowhere/cc", ""])
def test_without_a_compiler_there_is_a_note_and_the_tap_in_python(
    folder: Path,
    compiler: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("PATH", "/nowhere" if not compiler else "/bin:/usr/bin")
    monkeypatch.setattr(tap_library, "FOLDER", folder)
    monkeypatch.setattr(tap_library.load, "__defaults__", (folder,))
    monkeypatch.setattr(tap_library.build, "__defaults__", (folder / "tap.c",))
    tap_library.main()
    assert "the tap in C was not built, Python's is used" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["tap.c"]
    tap.compiled.cache_clear()
    tap.best.cache_clear()
    try:
        assert tap.best() is Tap
    finally:
        tap.compiled.cache_clear()
        tap.best.cache_clear()


def test_a_library_whose_struct_is_another_is_not_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (folder / "tap.c").read_text()
    (folder / "tap.c").write_text(text.replace("uint64_t calls;", "uint64_t calls, more;"))
    tap_library.build(folder, folder / "tap.c")
    monkeypatch.setattr(tap, "load", lambda: tap_library.load(folder))
    tap.compiled.cache_clear()
    try:
        with pytest.raises(NoTap, match="its struct has 136 bytes, not 128"):
            tap.compiled()
    finally:
        tap.compiled.cache_clear()
