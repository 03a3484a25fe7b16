"""The command in a process of its own: with pipes, and behind a pseudo terminal that types."""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import select
import socket
import subprocess
import sys
import termios
import time

WAIT_S = 30.0  # a busy machine is slow, a broken program never answers


def halka(*argv: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "peer", *argv],
        env={**os.environ, **changes},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


class Terminal:
    """`halka` behind a pseudo terminal that types and reads. Killed at the end of its block."""

    def __init__(self, *argv: str, **changes: str) -> None:
        environment = {"TERM": "xterm", "LC_ALL": "C.UTF-8", **changes}
        self.seen, self._from = "", 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._ours, theirs = pty.openpty()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "peer", *argv],
            env={**os.environ, **environment},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=_take_terminal,  # so that a typed Ctrl-C becomes SIGINT
        )
        os.close(theirs)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._ours)

    def type(self, text: str) -> None:
        """Keys."""
        os.write(self._ours, text.encode())

    def wait_for(self, text: str) -> None:
        """Read on until this is seen."""
        deadline_s = time.monotonic() + WAIT_S
        while text not in self.seen[self._from :]:
            assert self._read(deadline_s), f"{text!r} did not come: {self.seen!r}"
        self._from = self.seen.index(text, self._from) + len(text)

    def ended(self) -> int:
        """Its exit code, once it has said everything."""
        deadline_s = time.monotonic() + WAIT_S
        while self._read(deadline_s):
            pass
        return self._process.wait(WAIT_S)

    def _read(self, deadline_s: float) -> bool:
        ready, _, _ = select.select([self._ours], [], [], max(0.0, deadline_s - time.monotonic()))
        if not ready:
            return False
        try:
            data = os.read(self._ours, 65536)
        except OSError:  # Linux says so when the other side is closed
            return False
        self.seen += self._decoder.decode(data)
        return bool(data)


def _take_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def on_a_terminal(*argv: str, **changes: str) -> str:
    """Everything that the command writes to a terminal."""
    with Terminal(*argv, **changes) as terminal:
        terminal.ended()
        return terminal.seen


def unused_port() -> int:
    """A port that nobody listens on: one that the system gave and took back."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
