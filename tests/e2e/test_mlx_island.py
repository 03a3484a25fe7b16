"""Islands on loopback: two processes compute each layer together, as one process would alone.

Over MLX's ring of TCP sockets. RDMA cannot run here: what MLX is told then is tested in
tests/unit/test_island_meeting.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from backends.base import Backend, BackendFault, Batch, Island, Settings, Window
from backends.mlx import archs, meeting, shares
from backends.mlx.names import EMBEDDING, NORM, OUTPUT
from tests import random_models
from tests.mlx_models import tiny
from tests.process_groups import alive, end

pytest.importorskip("mlx.core", reason="the engine is not installed: pip install halka[mlx]")
pytest.importorskip("llama_cpp", reason="models are made with it: pip install halka[llama]")

from backends.mlx.engine import MlxBackend
from backends.mlx.island import IslandBackend
from peer.ring.sockets import free_port
from tests.windows import Stored

Until = Callable[[Callable[[], object], float, str], Awaitable[None]]
SETTINGS = Settings(slots=4, kv_cells=512, batch_tokens=64, threads=1, kv_type="f32")
STEP_S, LOAD_S = 60.0, 60.0  # of islands that are to work
SOON_S = 2.0  # of calls that are to be late
CLOSE = 5e-5  # sums over ranks are rounded in another order
EXPERTS = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 128}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    return stored(tmp_path_factory.mktemp("llama"), "llama")


def stored(folder: Path, arch: str, quantised: str = "", **more: Any) -> Stored:
    model = tiny(arch, quantised=quantised, **more)
    known = {*archs.TABLE[arch].layer.values(), EMBEDDING, NORM, OUTPUT}

    def usual(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Without tensors that libllama asks for and no converter writes."""
        return {name: of for name, of in shapes.items() if {name, tail(name)} & known}

    path = random_models.write(model, folder / "model.gguf", change=usual)
    return Stored(path, folder / "home")


def tail(name: str) -> str:
    """attn_q.weight of blk.0.attn_q.weight."""
    return name.split(".", 2)[-1]


class Ranks:
    """All ranks of one island, here: each call goes to all of them at once."""

    def __init__(self, count: int, step_s: float = STEP_S, load_s: float = LOAD_S) -> None:
        at = tuple(f"127.0.0.1:{free_port('127.0.0.1')}" for _ in range(count))
        self.at = at
        self.backends = []
        self._threads = ThreadPoolExecutor(count)
        for rank in range(count):
            island = Island(rank, at, step_s=step_s)
            self.backends.append(IslandBackend(replace(SETTINGS, island=island), load_s=load_s))

    @property
    def pids(self) -> list[int]:
        return [backend.pid for backend in self.backends]

    def begin(self, call: Callable[[IslandBackend], Any]) -> list[Future[Any]]:
        return [self._threads.submit(call, backend) for backend in self.backends]

    def all(self, call: Callable[[IslandBackend], Any]) -> list[Any]:
        """What each of them answers."""
        return [future.result() for future in self.begin(call)]

    def close(self) -> None:
        self.all(lambda backend: backend.close())
        self._threads.shutdown()
        assert [process for pid in self.pids for process in alive(pid)] == []


@contextmanager
def island(count: int = 2, **options: float) -> Iterator[Ranks]:
    with ExitStack() as stack:
        ranks = Ranks(count, **options)
        stack.callback(ranks.close)
        yield ranks


def batch_of(slots: Sequence[int], positions: Sequence[int]) -> Batch:
    rows = len(slots)
    return Batch(np.array(slots, np.int32), np.array(positions, np.int32), np.ones(rows, np.bool_))


def through(
    backend: Backend, windows: Sequence[Window], ids: Sequence[int], batch: Batch
) -> NDArray[np.float32]:
    x: NDArray[Any] = np.array(ids, np.int32)
    for window in windows:
        x = np.array(backend.run(window, batch, x))
    return x


def story(backend: Backend, windows: Sequence[Window]) -> list[NDArray[np.float32]]:
    """Prefill, decode, two sequences at once, one that forgets and one that is a copy."""
    ids = np.random.default_rng(5).integers(3, 250, 200).tolist()
    said = [through(backend, windows, ids[:40], batch_of([0] * 40, range(40)))]
    for at in range(40, 46):
        said.append(through(backend, windows, ids[at : at + 1], batch_of([0], [at])))
    backend.copy(0, 1, 30)
    both = batch_of([0, 1, 1], [46, 30, 31])
    said.append(through(backend, windows, ids[60:63], both))
    backend.trim(0, 10)
    said.append(through(backend, windows, ids[80:90], batch_of([0] * 10, range(10, 20))))
    backend.trim(1, 0)
    said.append(through(backend, windows, ids[100:105], batch_of([1] * 5, range(5))))
    return said


MODELS = {
    "llama": ("llama", "", {}),
    "llama-Q8_0": ("llama", "Q8_0", {}),
    "llama-Q4_1": ("llama", "Q4_1", {}),
    "qwen2": ("qwen2", "", {}),
    "qwen3-F16": ("qwen3", "F16", {}),
    "qwen3moe-Q4_1": ("qwen3moe", "Q4_1", EXPERTS),
    "gpt-oss-MXFP4": ("gpt-oss", "MXFP4", {**EXPERTS, "attention.sliding_window": 16}),
}


@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_compute_what_one_process_does(name: str, tmp_path: Path) -> None:
    arch, quantised, more = MODELS[name]
    model = stored(tmp_path, arch, quantised, **more)
    edges = [0, 2, model.header.layers] if name == "llama" else [0, model.header.layers]
    windows = [model.window(first, last) for first, last in pairwise(edges)]
    assert shares.shardable(model.header, 2) == ""
    alone = MlxBackend(SETTINGS)
    used = [alone.load(window) for window in windows]
    truth = story(alone, windows)
    with island() as ranks:
        for window, whole in zip(windows, used, strict=True):
            layers = slice(window.first, window.last)
            saved = sum(shares.share_bytes(model.header, 1)[layers]) - sum(
                shares.share_bytes(model.header, 2)[layers]
            )
            for share in ranks.all(lambda backend, window=window: backend.load(window)):
                assert share.weights_bytes == whole.weights_bytes - saved
                assert share.kv_bytes * 2 == whole.kv_bytes
        answers = ranks.all(lambda backend: story(backend, windows))
    for first, second, true in zip(*answers, truth, strict=True):
        assert np.array_equal(first, second)
        assert np.abs(first - true).max() <= CLOSE
    alone.close()


def test_three_ranks_compute_what_one_process_does(tmp_path: Path) -> None:
    heads = {"attention.head_count": 6, "attention.head_count_kv": 3, "embedding_length": 192}
    model = stored(tmp_path, "llama", "Q8_0", **heads)
    windows = [model.window(0, model.header.layers)]
    assert shares.shardable(model.header, 2) != ""
    assert shares.shardable(model.header, 3) == ""
    alone = MlxBackend(SETTINGS)
    alone.load(windows[0])
    with island(3) as ranks:
        ranks.all(lambda backend: backend.load(windows[0]))
        answers = ranks.all(lambda backend: story(backend, windows))
    for *of_ranks, true in zip(*answers, story(alone, windows), strict=True):
        for logits in of_ranks:
            assert np.abs(logits - true).max() <= CLOSE
    alone.close()


# What goes wrong ------------------------------------------------------------------------------


@contextmanager
def loaded(model: Stored, step_s: float = SOON_S) -> Iterator[tuple[Ranks, Window]]:
    window = model.window(0, model.header.layers)
    with island(step_s=step_s) as ranks:
        ranks.all(lambda backend: backend.load(window))
        yield ranks, window


def fault_of(future: Future[Any]) -> str:
    error = future.exception()
    assert isinstance(error, BackendFault)
    return str(error)


def asked(backend: IslandBackend, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when it has told its process what to do, and waits."""
    event, read = threading.Event(), backend._read

    def telling(until_s: float) -> Any:
        event.set()
        return read(until_s)

    monkeypatch.setattr(backend, "_read", telling)
    return event


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_the_others_end_within_their_deadline_when_a_rank_is_lost_in_mid_step(
    how: signal.Signals, llama: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    with loaded(llama) as (ranks, window):
        first, second = ranks.backends
        waits = asked(first, monkeypatch)
        step = batch_of([0], [0])
        began_s = time.monotonic()
        with ThreadPoolExecutor(2) as threads:
            mine = threads.submit(through, first, [window], [5], step)
            waits.wait()  # in its first collective, or on the way there
            os.kill(second.pid, how)
            others = threads.submit(through, second, [window], [5], step)
            for future in (mine, others):
                assert "of the island" in fault_of(future)
        assert time.monotonic() - began_s < SOON_S + 5
        assert [process for pid in ranks.pids for process in alive(pid)] == []
        with pytest.raises(BackendFault, match="rank 0 of the island"):
            first.trim(0, 0)
        assert time.monotonic() - began_s < SOON_S + 5


def test_a_rank_that_never_comes_ends_the_load_by_its_deadline_and_is_named(llama: Stored) -> None:
    window = llama.window(0, llama.header.layers)
    with island(step_s=SOON_S, load_s=3.0) as ranks:
        began_s = time.monotonic()
        with pytest.raises(BackendFault, match=r"rank 1 \(127.* of the island did not come"):
            ranks.backends[0].load(window)
        assert time.monotonic() - began_s < 8
        assert alive(ranks.backends[0].pid) == []


def test_a_load_that_hangs_in_mlx_itself_ends_by_its_deadline(llama: Stored) -> None:
    """Where MLX waits for a rank it holds the interpreter's lock and can be killed only."""
    window = llama.window(0, llama.header.layers)
    with island(step_s=SOON_S, load_s=3.0) as ranks:
        first = ranks._threads.submit(ranks.backends[0].load, window)
        meeting.meet(replace(SETTINGS, island=Island(1, ranks.at)), 3.0)  # and no more than that
        assert "no answer in 3 seconds (in load)" in fault_of(first)
        assert alive(ranks.backends[0].pid) == []


def test_ranks_that_were_given_different_steps_say_so(llama: Stored) -> None:
    with loaded(llama, STEP_S) as (ranks, window):
        calls = [
            ranks._threads.submit(through, backend, [window], [word], batch_of([0], [0]))
            for backend, word in zip(ranks.backends, (5, 6), strict=True)
        ]
        assert "given other steps: rank 1 heard" in fault_of(calls[0])
        assert "given other steps: rank 0 heard" in fault_of(calls[1])


def test_a_call_that_one_rank_missed_is_noticed_at_the_next_step(llama: Stored) -> None:
    with loaded(llama, STEP_S) as (ranks, window):
        ids, start = list(range(3, 13)), batch_of([0] * 10, range(10))
        ranks.all(lambda backend: through(backend, [window], ids, start))
        ranks.backends[0].trim(0, 4)
        ranks.backends[0].copy(0, 1, 4)
        ranks.backends[1].trim(0, 4)
        futures = ranks.begin(lambda b: through(b, [window], [5], batch_of([0], [4])))
        assert all("other steps" in fault_of(future) for future in futures)


def test_ranks_that_load_different_windows_say_so(llama: Stored) -> None:
    layers = llama.header.layers
    windows = [llama.window(0, layers), llama.window(0, layers - 1)]
    with island() as ranks:
        calls = [
            ranks._threads.submit(backend.load, window)
            for backend, window in zip(ranks.backends, windows, strict=True)
        ]
        assert all("load other windows" in fault_of(call) for call in calls)


PARENT = """
import sys
from backends.base import Island, Settings, Window, Header
from backends.mlx.island import IslandBackend
settings = Settings(2, 64, 8, 1, island=Island(0, tuple(sys.argv[1:])))
backend = IslandBackend(settings)
print(backend.pid, flush=True)
try:
    backend.load(Window(0, 1, 1, Header({}, {}), ()))
finally:
    print("loaded", flush=True)
"""


@pytest.mark.blocks("it starts a process the plain way")
async def test_a_rank_that_waits_in_mlx_ends_with_its_parent(until: Until) -> None:
    at = tuple(f"127.0.0.1:{free_port('127.0.0.1')}" for _ in range(2))
    parent = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-c", PARENT, *at], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    assert parent.stdout
    pid = int(parent.stdout.readline())
    try:
        meeting.meet(Settings(2, 64, 8, 1, island=Island(1, at)), 20.0)  # and no more than that
        parent.kill()
        parent.wait()
        assert parent.stdout.read() == b""
        parent.stdout.close()
        await until(lambda: alive(pid) == [], 10, "the rank has ended with its parent")
    finally:
        end(pid)
