"""One streamed chat, read as it comes: its text, its error, and how the stream ended."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
from types import TracebackType
from typing import Any

from tests.netns.world import Machine


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
