"""A backend in a process of its own: any engine that may crash or hang without taking its caller.

`ChildBackend` fulfils `backends.base.Backend`; every call goes over pipes to `backends.mlx.child`
and has a deadline. A child that does not answer in time, or ends, is killed with everything that it
started, and the call raises a BackendFault, as every later one does at once: what its KV cache held
is lost, so there is nothing to reconnect to. When the caller's process dies, the guard ends the
child (see `guard`).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.base import BackendFault, Batch, Footprint, Settings, Slot, Window
from backends.mlx import messages
from backends.mlx.messages import Close, Copy, Done, Failed, Load, Open, Run, Said, Trim

LOAD_S = 600.0  # to read and repack tens of GiB from a slow disk
STEP_S = 120.0
CLOSE_S = 3.0  # to end cleanly: a GPU's memory is given back then; after it, it is killed
END_S = 5.0  # for the kernel to end what was killed; then it is left to the kernel
_LAST_WORDS_BYTES = 4096  # of what it wrote to stderr
_LAST_LINES = 4  # of these are told


class ChildBackend:
    """A backend that computes in a child process. See `backends.base.Backend`."""

    def __init__(
        self,
        engine: str,
        settings: Settings,
        *,
        title: str = "the engine's process",
        advice: str = "",
        lasting: bool = True,
        load_s: float = LOAD_S,
        step_s: float = STEP_S,
        meet_s: float = 0.0,
        without: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
    ) -> None:
        """Start the process. Raises BackendFault.

        title: what errors call it; advice: what they end with. lasting: whether it goes on after a
        call that failed. meet_s: see `messages.Open`. without, variables: the environment's.
        """
        self._title, self._advice, self._lasting = title, advice, lasting
        self._load_s, self._step_s = load_s, step_s
        self._fault: BackendFault | None = None
        self._words = b""
        environment = {key: value for key, value in os.environ.items() if key not in without}
        source = str(Path(__file__).parents[2])
        path = [source, *filter(None, [environment.get("PYTHONPATH")])]
        environment |= {"PYTHONPATH": os.pathsep.join(path), **(variables or {})}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "backends.mlx.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env=environment,
            process_group=0,  # what it starts is killed with it
        )
        assert self._process.stdin
        assert self._process.stdout
        assert self._process.stderr
        self._in = self._process.stdin.fileno()
        self._out = self._process.stdout.fileno()
        self._err = self._process.stderr.fileno()
        for end in (self._in, self._out, self._err):
            os.set_blocking(end, False)
        self._guard = _guard(self._process)
        self._ask("start", load_s, Open(engine, settings, meet_s))

    @property
    def pid(self) -> int:
        """Of the process, which is also its process group's."""
        return self._process.pid

    def load(self, window: Window) -> Footprint:
        """Make the window ready to run. Raises BackendFault."""
        done, _ = self._ask("load", self._load_s, Load(messages.travelling(window)))
        if done.used is None:
            raise self._end("load", "gave no account of its memory")
        return done.used

    def run(self, window: Window, batch: Batch, x: NDArray[Any]) -> NDArray[np.float32]:
        """One step through one window. Raises BackendFault."""
        arrays = (batch.slots, batch.positions, batch.outputs, x)
        _, given = self._ask("run", self._step_s, Run(window.first, window.last), arrays)
        rows = int(batch.outputs.sum()) if window.is_last else len(batch.slots)
        if len(given) != 1 or given[0].dtype != np.float32 or given[0].shape[:1] != (rows,):
            raise self._end("run", f"gave something else than {rows} rows")
        return given[0]

    def trim(self, slot: Slot, position: int) -> None:
        """Forget, in all windows, what lies at and beyond `position`. Raises BackendFault."""
        self._ask("trim", self._step_s, Trim(slot, position))

    def copy(self, source: Slot, target: Slot, length: int) -> None:
        """Give `target` the first `length` positions of `source`. Raises BackendFault."""
        self._ask("copy", self._step_s, Copy(source, target, length))

    def close(self) -> None:
        """End the process."""
        if self._fault is None:
            with contextlib.suppress(BackendFault):
                self._ask("close", CLOSE_S, Close())
        if self._fault is None:
            self._fault = BackendFault(f"{self._title} is closed")
        self._kill()

    # One call ---------------------------------------------------------------------------------

    def _ask(
        self, call: str, limit_s: float, said: Said, arrays: Sequence[NDArray[Any]] = ()
    ) -> tuple[Done, list[NDArray[Any]]]:
        """Say it and have the answer. Raises BackendFault."""
        if self._fault is not None:
            raise self._fault
        until_s = time.monotonic() + limit_s
        try:
            self._write(messages.pack(said, arrays), until_s)
            answer, given = self._read(until_s)
        except TimeoutError:
            raise self._end(call, f"gave no answer in {limit_s:g} seconds") from None
        except (EOFError, BrokenPipeError):
            raise self._end(call, self._how_it_ended()) from None
        except ValueError as error:
            raise self._end(call, f"gave no answer that can be read ({error})") from error
        match answer:
            case Done():
                return answer, given
            case Failed(why, kind) if self._lasting:
                raise BackendFault(why, kind)
            case Failed(why, kind):
                raise self._end(call, f"failed: {why}", kind)
        raise self._end(call, "gave no answer but a question")

    def _write(self, parts: Sequence[memoryview], until_s: float) -> None:
        for part in parts:
            sent = 0
            while sent < len(part):
                try:
                    sent += os.write(self._in, part[sent:])
                except BlockingIOError:
                    self._wait(self._in, select.POLLOUT, until_s)

    def _read(self, until_s: float) -> tuple[Said, list[NDArray[Any]]]:
        length = bytearray(messages.LENGTH.size)
        self._fill(memoryview(length), until_s)
        head = bytearray(messages.head_length(length))
        self._fill(memoryview(head), until_s)
        said, arrays = messages.unpack(head)
        for array in arrays:
            self._fill(messages.room(array), until_s)
        return said, arrays

    def _fill(self, room: memoryview, until_s: float) -> None:
        filled = 0
        while filled < len(room):
            try:
                count = os.readv(self._out, [room[filled:]])
            except BlockingIOError:
                self._wait(self._out, select.POLLIN, until_s)
                continue
            if not count:
                raise EOFError
            filled += count

    def _wait(self, end: int, event: int, until_s: float) -> None:
        """Until this end of a pipe is ready, or broken. Keeps what comes on stderr meanwhile."""
        poller = select.poll()
        poller.register(end, event)
        poller.register(self._err, select.POLLIN)
        while True:
            left_s = until_s - time.monotonic()
            ready = dict(poller.poll(max(0.0, left_s) * 1000))
            if self._err in ready and not self._listen():
                poller.unregister(self._err)
            if end in ready:
                return
            if left_s <= 0:
                raise TimeoutError

    def _listen(self) -> bool:
        """Keep what is on stderr. False where it has ended."""
        try:
            data = os.read(self._err, 65536)
        except BlockingIOError:
            return True
        self._words = (self._words + data)[-_LAST_WORDS_BYTES:]
        return bool(data)

    # The end ----------------------------------------------------------------------------------

    def _how_it_ended(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(1.0)
            if code < 0:
                return f"was ended by signal {-code} ({signal.strsignal(-code)})"
            return f"ended with exit code {code}"
        return "closed its pipe"

    def _end(self, call: str, why: str, kind: str = "failed") -> BackendFault:
        """The fault of this call and of all later ones; nothing of the process is left."""
        for _ in range(16):  # a pipe holds no more than this
            if not self._listen():
                break
        lines = self._words.decode("utf-8", "replace").strip().splitlines()[-_LAST_LINES:]
        last = f" Its last words: {' | '.join(line.strip() for line in lines)}." if lines else ""
        advice = f" {self._advice}" if self._advice and kind == "failed" else ""
        self._fault = BackendFault(f"{self._title} {why} (in {call}).{last}{advice}", kind)
        self._kill()
        return self._fault

    def _kill(self) -> None:
        if self._process.returncode is not None and self._guard.returncode is not None:
            return  # nobody has their number any more, or a stranger has
        with contextlib.suppress(ProcessLookupError, PermissionError):  # the latter: all zombies
            os.killpg(self._process.pid, signal.SIGKILL)
        for process in (self._process, self._guard):
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe:
                    pipe.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_S)


def _guard(process: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
    """Start what ends the process when this one is gone. Raises BackendFault."""
    guard = str(Path(__file__).with_name("guard.py"))
    try:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", guard],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            process_group=process.pid,
        )
    except OSError as error:
        process.kill()
        process.wait()
        raise BackendFault(f"the engine's process has no guard: {error}") from error
