"""The process that runs a whole model, as its one client sees it: started, asked, ended.

Blocking. It is gone when the `with` block ends, whatever ended it, and ends by itself where this
process is killed: its stdin ends then.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import tempfile
import time
from types import TracebackType
from typing import IO

import msgspec

from peer import children
from peer.bench.orders import Answer, Ask, Failed, Open, Opened, Order, Took
from peer.errors import BackendError

LOAD_S = 600.0  # a large model from a slow disk
READ_S = 600.0  # for the prompts of one question, beside its limit
_READ_BYTES = 1 << 16
_LAST_BYTES = 600  # of its own words, for the reason of its end
_END_S = 2.0
_answers: msgspec.json.Decoder[Answer] = msgspec.json.Decoder(Answer)


class Reference:
    """A process without a model yet. pid: its own."""

    def __init__(self) -> None:
        self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        try:
            self._process = subprocess.Popen(
                children.command("peer.bench.whole"),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said,
                env=children.environment(),
                start_new_session=True,  # Ctrl-C is for this process, which then ends that one
            )  # fmt: skip
        except OSError:
            self._said.close()
            raise
        self._unread = b""

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def __enter__(self) -> Reference:
        return self

    def __exit__(
        self, _kind: type | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with contextlib.suppress(OSError):
                process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.0 if _error else _END_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()
            self._said.close()

    def open(self, order: Open) -> Opened:
        """Load a model. Raises BackendError, saying why not."""
        answer = self._ask(order, LOAD_S)
        assert isinstance(answer, Opened)
        return answer

    def ask(self, order: Ask) -> Took:
        """Have it answer. Raises BackendError."""
        answer = self._ask(order, order.limit_s + READ_S)
        assert isinstance(answer, Took)
        return answer

    def _ask(self, order: Order, timeout_s: float) -> Answer:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(msgspec.json.encode(order) + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._ended() from None
        line = self._line(time.monotonic() + timeout_s)
        try:
            answer = _answers.decode(line)
        except msgspec.MsgspecError as error:
            raise BackendError(f"the whole model in one process gave no answer: {error}") from error
        if isinstance(answer, Failed):
            raise BackendError(answer.why)
        return answer

    def _line(self, until_s: float) -> bytes:
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        while b"\n" not in self._unread:
            left_s = until_s - time.monotonic()
            if left_s <= 0 or not select.select([pipe], [], [], left_s)[0]:
                raise BackendError("the whole model in one process takes too long")
            data = os.read(pipe, _READ_BYTES)
            if not data:
                raise self._ended()
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _ended(self) -> BackendError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)
        code = self._process.returncode
        how = f"was ended by signal {-code}" if code and code < 0 else f"ended with {code}"
        self._said.seek(0, os.SEEK_END)
        self._said.seek(max(0, self._said.tell() - _LAST_BYTES))
        lines = self._said.read().decode("utf-8", "replace").strip().splitlines()[-3:]
        return BackendError(
            f"the whole model in one process {how}: {' | '.join(lines) or 'no word'}"
        )
