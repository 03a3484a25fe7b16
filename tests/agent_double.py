"""An HTTP server that says what a test wants an agent to say. Ends with its `with` block."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Write = Callable[[bytes], None]


class Broken(Exception):
    """Raised by a test's stream to abort the connection."""


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # joined by server_close
    double: AgentDouble


class AgentDouble:
    """`answers`: path → body (bytes, or anything JSON) or (status, body). `stream`: what a chat
    sends, by calling its argument with bytes. `asked`: bodies of the chats. `posted`: paths of all
    that was posted; those among `answers` get that. `gone`: set when a client left before its
    stream was over.
    """

    def __init__(self, **answers: Any) -> None:
        self.answers: dict[str, Any] = answers
        self.stream: Callable[[Write], None] = lambda write: None
        self.refusal: tuple[int, Any] | None = None
        self.asked: list[dict[str, Any]] = []
        self.posted: list[str] = []
        self.gone = threading.Event()

    def __enter__(self) -> AgentDouble:
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.double = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def http(self) -> str:
        """host:port."""
        return f"127.0.0.1:{self._server.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        answer = self.server.double.answers.get(self.path, (404, {"error": "no such page"}))
        status, body = answer if isinstance(answer, tuple) else (200, answer)
        self._send(status, body)

    def do_POST(self) -> None:
        double = self.server.double
        body = self.rfile.read(int(self.headers["Content-Length"]))
        double.posted.append(self.path)
        if self.path in double.answers:
            return self._send(200, double.answers[self.path])
        double.asked.append(json.loads(body))
        if double.refusal:
            return self._send(*double.refusal)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        try:
            double.stream(self._chunk)
            self.wfile.write(b"0\r\n\r\n")
        except Broken:
            pass
        except OSError:
            double.gone.set()

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def _send(self, status: int, body: Any) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: pytest shows what matters."""


def event(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"


def piece(text: str | None = None, finish: str | None = None) -> bytes:
    """One chunk of a streamed chat."""
    delta = {} if text is None else {"content": text}
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return event({"id": "x", "object": "chat.completion.chunk", "choices": [choice]})


def usage(prompt: int, completion: int) -> bytes:
    """The chunk that counts."""
    counts = {"prompt_tokens": prompt, "completion_tokens": completion}
    return event({"choices": [], "usage": counts})


DONE = event(b"[DONE]")


def a_peer(letter: str, name: str, **changes: Any) -> dict[str, Any]:
    """One peer of a status."""
    peer: dict[str, Any] = {
        "peer_id": letter * 16, "name": name, "address": f"tcp://10.0.0.{ord(letter) - 96}:4242",
        "me": False, "coordinator": False, "os": "linux", "cores": 4,
        "memory_total_bytes": 16 << 30, "memory_available_bytes": 9 << 30,
        "engines": [{"backend": "llama_cpp", "device": "CPU", "kind": "cpu"}], "state": "member",
        "version": "0.1.0", "layers": [], "phase": "idle", "done_bytes": 0, "total_bytes": 0,
        "weights_bytes": 0, "kv_bytes": 0, "compute_bytes": 0, "why": "",
    }  # fmt: skip
    return peer | changes


def a_status(**changes: Any) -> dict[str, Any]:
    """What a healthy agent in a cluster of three says."""
    status: dict[str, Any] = {
        "version": "0.1.0", "protocol": 1,
        "me": {"peer_id": "a" * 16, "name": "desk", "home": "/nowhere/halka", "port": 40000,
               "http": "127.0.0.1:42552", "uptime_s": 7384.5, "backend": "llama_cpp"},
        "cluster": {"name": "home", "term": 3, "coordinator": "b" * 16, "open": True,
                    "discovery": ""},
        "peers": [
            a_peer("a", "desk", me=True, layers=[[0, 12]], phase="serving", weights_bytes=70 << 20),
            a_peer("b", "attic", coordinator=True, layers=[[12, 21]], phase="serving"),
            a_peer("c", "mini", layers=[[21, 30]], phase="serving"),
        ],
        "model": {"id": "smollm2-135m-instruct-q4_1", "digest": "0" * 64, "layers": 30,
                  "context": 8192, "phase": "serving", "plan": "3.2", "why": ""},
        "answers": {"running": 1, "served": 22, "failed": 0},
        "refused": [],
        "problems": [],
    }  # fmt: skip
    return status | changes
