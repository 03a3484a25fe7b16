"""A backend in a child process: the same answers, and what happens to it happens to it alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

import backends
from backends.base import Backend, BackendFault, Batch, Settings, Window
from backends.mlx import messages
from backends.mlx.process import ChildBackend
from tests import fake_models
from tests.process_groups import alive, end
from tests.unit.test_fake import PROMPT, window_of

SETTINGS = Settings(slots=4, kv_cells=2048, batch_tokens=64, threads=1)
STEP_S = 1.0  # of those that are to be late
Until = Callable[[Callable[[], object], float, str], Awaitable[None]]


@pytest.fixture
def window(tmp_path: Path) -> Window:
    return window_of(fake_models.write(tmp_path / "m.gguf", end_every=0), 0, 12, tmp_path / "w")


@pytest.fixture
def fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that switches faults of the fake engine on."""
    path = tmp_path / "fault"
    monkeypatch.setenv("HALKA_FAKE_FAULT", str(path))
    return path


@contextmanager
def opened(window: Window, **options: Any) -> Iterator[ChildBackend]:
    backend = ChildBackend("fake", SETTINGS, **options)
    try:
        backend.load(window)
        yield backend
    finally:
        backend.close()


def batch_of(slots: Sequence[int], positions: Sequence[int]) -> Batch:
    rows = len(slots)
    return Batch(np.array(slots, np.int32), np.array(positions, np.int32), np.ones(rows, np.bool_))


def step(backend: Backend, window: Window, ids: Sequence[int], at: int = 0, slot: int = 0) -> Any:
    batch = batch_of([slot] * len(ids), range(at, at + len(ids)))
    return backend.run(window, batch, np.array(ids, np.int32))


def story(backend: Backend, window: Window) -> list[NDArray[np.float32]]:
    said = [step(backend, window, PROMPT)]
    backend.copy(0, 2, 9)
    said.append(step(backend, window, [65, 66], at=9, slot=2))
    backend.trim(0, 5)
    said.append(step(backend, window, [67], at=5))
    return [np.array(logits) for logits in said]


def test_a_backend_in_a_process_answers_as_one_that_is_not(window: Window) -> None:
    here = backends.load("fake").open(SETTINGS)
    used = here.load(window)
    with opened(window) as there:
        assert there.load(window) == used
        for ours, theirs in zip(story(here, window), story(there, window), strict=True):
            assert np.array_equal(ours, theirs)
    assert alive(there.pid) == []


def test_what_the_engine_refuses_is_refused_and_it_goes_on(window: Window) -> None:
    with opened(window) as backend:
        with pytest.raises(BackendFault, match="slot 0 holds 0 positions and is given 7 to 7"):
            step(backend, window, [65], at=7)
        for at in range(0, SETTINGS.kv_cells, 64):
            step(backend, window, [65] * 64, at=at)
        with pytest.raises(BackendFault, match="are used") as caught:
            step(backend, window, [65], slot=1)
        assert caught.value.kind == "memory"
        backend.trim(0, 0)
        assert step(backend, window, PROMPT).shape[0] == len(PROMPT)


def test_a_crash_is_a_fault_that_says_why_and_every_later_call_says_it_too(
    window: Window, fault: Path
) -> None:
    with opened(window) as backend:
        fault.write_text("assert 0")
        with pytest.raises(BackendFault, match=r"signal 6 .*in run.*GGML_ASSERT\(rows > 0\)"):
            step(backend, window, PROMPT)
        for call in (lambda: backend.trim(0, 0), lambda: backend.load(window)):
            with pytest.raises(BackendFault, match=r"signal 6 .*in run"):
                call()
        assert alive(backend.pid) == []


def test_a_process_that_is_over_is_killed_no_second_time(
    window: Window, fault: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[int] = []  # the kernel may have given its number to somebody else by then
    with opened(window) as backend:
        fault.write_text("assert 0")
        with pytest.raises(BackendFault, match="signal 6"):
            step(backend, window, PROMPT)
        monkeypatch.setattr(os, "killpg", lambda group, _: killed.append(group))
    assert killed == []


@pytest.mark.parametrize("kind", ["sleep", "spin"])
def test_a_step_that_hangs_ends_by_its_deadline(window: Window, fault: Path, kind: str) -> None:
    with opened(window, step_s=STEP_S) as backend:
        fault.write_text(f"{kind} 0")
        began_s = time.monotonic()
        with pytest.raises(BackendFault, match="no answer in 1 seconds"):
            step(backend, window, PROMPT)
        assert STEP_S <= time.monotonic() - began_s < STEP_S + 5
        assert alive(backend.pid) == []


def test_a_stopped_process_is_late_even_where_the_pipe_is_full(window: Window) -> None:
    with opened(window, step_s=STEP_S) as backend:
        os.kill(backend.pid, signal.SIGSTOP)
        x = np.zeros(1 << 20, np.int32)  # more than a pipe holds
        with pytest.raises(BackendFault, match="no answer in 1 seconds"):
            backend.run(window, batch_of([0], [0]), x)
        assert alive(backend.pid) == []


class _Telling(ChildBackend):
    """Says when it has asked and begins to wait."""

    asked: threading.Event | None = None

    def _read(self, until_s: float) -> Any:
        if self.asked:
            self.asked.set()
        return super()._read(until_s)


def test_a_process_killed_in_mid_step_is_noticed_at_once(window: Window, fault: Path) -> None:
    backend = _Telling("fake", SETTINGS)
    try:
        backend.load(window)
        fault.write_text("sleep 0")
        backend.asked = asked = threading.Event()

        def kill() -> None:
            asked.wait()
            os.kill(backend.pid, signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        with pytest.raises(BackendFault, match=r"was ended by signal 9"):
            step(backend, window, PROMPT)
        killer.join()
        assert alive(backend.pid) == []
    finally:
        backend.close()


def test_a_load_that_crashes_is_a_fault(window: Window, fault: Path) -> None:
    fault.write_text("load-crash 0")
    with pytest.raises(BackendFault, match=r"signal 11 .*in load"), opened(window):
        pass


def test_an_error_that_no_engine_should_make_is_quoted() -> None:
    with pytest.raises(BackendFault, match=r"exit code 1 \(in start\).*KeyError: 'unknown'"):
        ChildBackend("unknown", SETTINGS)


PARENT = """
import sys
import numpy as np
from pathlib import Path
from backends.base import Batch, Settings
from backends.mlx.process import ChildBackend
from tests import fake_models
from tests.unit.test_fake import window_of
folder = Path(sys.argv[1])
window = window_of(fake_models.write(folder / "m.gguf"), 0, 12, folder / "w")
backend = ChildBackend("fake", Settings(slots=4, kv_cells=2048, batch_tokens=64, threads=1))
backend.load(window)
print(backend.pid, flush=True)
one = np.zeros(1, np.int32)
if sys.argv[2] == "computing":
    backend.run(window, Batch(one, one, one == 0), one)
sys.stdin.read()
"""


@pytest.mark.parametrize("state", ["idle", "stopped", "computing"])
@pytest.mark.blocks("it starts a process the plain way")
async def test_a_process_does_not_outlive_its_parent(
    state: str, tmp_path: Path, fault: Path, until: Until
) -> None:
    fault.write_text("spin 0")  # noqa: ASYNC240
    parent = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-c", PARENT, str(tmp_path), state],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert parent.stdin
    assert parent.stdout
    pid = int(parent.stdout.readline())
    try:
        assert len(alive(pid)) == 2  # with its guard
        if state == "stopped":
            os.kill(pid, signal.SIGSTOP)
        if state == "computing":
            process = psutil.Process(pid)
            before_s = process.cpu_times().user
            await until(lambda: process.cpu_times().user > before_s + 0.1, 10, "it spins")
        parent.kill()
        parent.wait()
        parent.stdin.close()
        parent.stdout.close()
        await until(lambda: alive(pid) == [], 10, "the process has ended with its parent")
    finally:
        end(pid)


def test_what_libraries_print_does_not_come_as_an_answer() -> None:
    program = (
        "import os, sys\n"
        "from backends.mlx import child\n"
        "told = child._open\n"
        "def loud(order):\n"
        "    os.write(1, b'a library says hello')\n"
        "    print('and so does Python', flush=True)\n"
        "    return told(order)\n"
        "child._open = loud\n"
        "child.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=b"".join(messages.pack(messages.Open("fake", SETTINGS))),
        capture_output=True, cwd=Path(__file__).parents[2], check=True, timeout=60,
    )  # fmt: skip
    length = messages.LENGTH.size
    assert messages.unpack(done.stdout[length:]) == (messages.Done(), [])
    assert b"hello" in done.stderr
