"""One streamed chat, read as it comes: its text, its error, and how the stream ended.

A `Stream` reads the API's own bytes; a `Reader` is a process on the machine in which the `openai`
client reads them, as everybody has it.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from itertools import pairwise
from types import TracebackType
from typing import Any

from tests.netns.world import Machine

CLIENT = """
import json, sys, time
import openai

def tell(**what):
    print(json.dumps({"at_s": time.monotonic(), **what}), flush=True)

client = openai.OpenAI(base_url="http://127.0.0.1:42552/v1", api_key="none", max_retries=0)
try:
    for chunk in client.chat.completions.create(
        stream=True, stream_options={"include_usage": True}, **json.loads(sys.argv[1])
    ):
        for choice in chunk.choices:
            tell(text=choice.delta.content or "", finish=choice.finish_reason or "")
        if chunk.usage:
            tell(tokens=chunk.usage.completion_tokens)
except openai.APIError as error:
    tell(error=str(error))
"""


class Stream:
    """A chat asked on a machine. error: what the API said is wrong, "" while nothing is."""

    def __init__(self, machine: Machine, question: str, **settings: Any) -> None:
        self.text, self.error, self.clean = "", "", False
        body = {
            "messages": [{"role": "user", "content": question}], "stream": True,
            "temperature": 0, **settings,
        }  # fmt: skip
        self._connection = machine.connection()
        self._connection.request(
            "POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    @property
    def ended(self) -> bool:
        """Nothing more will come. `clean`: it looked finished to a client."""
        return not self._thread.is_alive()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, _kind: type | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        """Go away, as a client does."""
        if self._connection.sock is not None:
            with contextlib.suppress(OSError):  # ended already
                self._connection.sock.shutdown(socket.SHUT_RDWR)
        self._thread.join(10.0)
        self._connection.close()

    def _read(self) -> None:
        response = self._connection.getresponse()
        try:
            if response.status != 200:
                self.error = json.loads(response.read())["error"]["message"]
            for line in response:
                if line.startswith(b"data: "):
                    self._take(line[6:].strip())
        except (OSError, ValueError, http.client.HTTPException):
            pass  # cut off: `clean` stays what it was
        finally:
            response.close()

    def _take(self, data: bytes) -> None:
        if data == b"[DONE]":
            self.clean = True
            return
        event = json.loads(data)
        if "error" in event:
            self.error = event["error"]["message"]
            return
        for choice in event["choices"]:
            self.text += choice["delta"].get("content") or ""
            self.clean = self.clean or choice.get("finish_reason") is not None


class Reader:
    """A chat read by the `openai` client on a machine. times_s: when each piece of text came;
    finish: why it ended; tokens: how many there were, by the usage that comes last; error: what the
    client was told, or said, is wrong."""

    def __init__(self, machine: Machine, model: str, question: str, **settings: Any) -> None:
        self.text, self.error, self.finish = "", "", ""
        self.tokens = 0
        self.times_s: list[float] = []
        wish = {
            "model": model, "messages": [{"role": "user", "content": question}],
            "temperature": 0, **settings,
        }  # fmt: skip
        self._process = machine.open(sys.executable, "-c", CLIENT, json.dumps(wish))
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    @property
    def came(self) -> int:
        """Pieces of text so far; nearly all are of one token."""
        return len(self.times_s)

    @property
    def ended(self) -> bool:
        """Nothing more will come."""
        return not self._thread.is_alive()

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between one piece of text and the next."""
        return [b - a for a, b in pairwise(self.times_s)]

    @property
    def pause_s(self) -> float:
        """The longest of them."""
        return max(self.gaps_s, default=0.0)

    def wait(self, pieces: int, within_s: float) -> Reader:
        """Until so many came, or it is over."""
        deadline_s = time.monotonic() + within_s
        while self.came < pieces and not self.ended:
            assert time.monotonic() < deadline_s, f"{self.came} of {pieces} pieces in {within_s} s"
            time.sleep(0.002)
        return self

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, _kind: type | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        """End the client, where it has not ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0.5 if self.ended else 0.0)
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
        self._thread.join(10.0)
        self._process.wait(10.0)

    def _read(self) -> None:
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        with self._process.stdout as told, self._process.stderr as said:
            for line in told:
                self._take(json.loads(line))
            self.error = self.error or (said.read()[-500:] if self._process.wait(5.0) else "")

    def _take(self, told: dict[str, Any]) -> None:
        if text := told.get("text"):
            self.text += text
            self.times_s.append(told["at_s"])
        self.finish = told.get("finish") or self.finish
        self.tokens = told.get("tokens", self.tokens)
        self.error = told.get("error", self.error)
