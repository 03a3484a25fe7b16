"""A client of the agent on this machine: where it answers, one JSON question, one stream of events.

Plain http.client: it is imported in 20 ms, and one connection a question is all that is needed.
What comes back is bounded in size and time, like everything received.
"""

from __future__ import annotations

import http.client
import json
import socket
import struct
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from peer import config
from peer.errors import CommandError
from peer.words.state import Status

CONNECT_S = 2.0  # an agent on this machine answers in milliseconds
ANSWER_S = 10.0  # for a whole JSON answer
SILENCE_S = 180.0  # between bytes of a stream; > Timing.step_s, so the agent gives up first
BODY_BYTES_MAX = 16 << 20
LINE_BYTES_MAX = 1 << 20
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: nothing is left of the connection; else, for a minute

T = TypeVar("T")


class Agent:
    """The agent that `home` belongs to, or the one at `given` (host:port) where that was typed."""

    def __init__(self, home: str | None = None, given: str | None = None) -> None:
        """Raises: ConfigError, where the settings that say its address cannot be used."""
        self.settings, _ = config.load(flags={"home": home, "http": given})
        self.candidates = [_reachable(self.settings.http_host, self.settings.http_port)]
        if given is None and (written := _written(self.settings.home)):
            self.candidates.insert(0, written)
        if len(self.candidates) > 1 and not self.settings.http_port:
            del self.candidates[1]  # port 0: only the agent itself knows what it was given
        self._answered: tuple[str, int] | None = None

    @property
    def address(self) -> str:
        """host:port, where it answered or should."""
        return _joined(*(self._answered or self.candidates[0]))

    def status(self) -> Status:
        """What `halka status` draws. Raises CommandError (3 where nothing answers)."""
        return self.read(self.status_bytes(), Status)

    def status_bytes(self) -> bytes:
        """The same as it came."""
        code, data = self.get("/halka/status")
        if code != 200:
            raise CommandError(
                f"what answers at {self.address} is not a halka agent (HTTP {code})",
                "end it, or give halka another address: HALKA_HTTP=127.0.0.1:42553 halka run",
                3,
            )
        return data

    def question(self, path: str, shape: type[T]) -> T:
        """A JSON answer as `shape`. Raises CommandError."""
        code, data = self.get(path)
        if code != 200:
            raise CommandError(error_text(data) or f"the agent answers {path} with HTTP {code}")
        return self.read(data, shape)

    def read(self, data: bytes, shape: type[T]) -> T:
        """An answer's bytes as `shape`. Raises CommandError."""
        try:
            return msgspec.json.decode(data, type=shape)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise CommandError(
                f"the agent at {self.address} answers in a way that this `halka` does not "
                f"understand: {error}",
                "update both to one version, then restart the agent",
            ) from None

    def get(self, path: str) -> tuple[int, bytes]:
        """HTTP status and body. Raises CommandError."""
        return self._ask("GET", path)

    def post(self, path: str) -> tuple[int, bytes]:
        """The same, of a request that changes something and needs no words. Raises CommandError."""
        return self._ask("POST", path)

    def _ask(self, method: str, path: str) -> tuple[int, bytes]:
        with closing(self._connect()) as connection:
            try:
                connection.sock.settimeout(ANSWER_S)
                connection.request(method, path)
                response = connection.getresponse()
                data = response.read(BODY_BYTES_MAX + 1)
            except (OSError, http.client.HTTPException) as error:
                raise self._broken(error) from None
        if len(data) > BODY_BYTES_MAX:
            raise CommandError(f"the agent's answer to {path} has no end")
        return response.status, data

    def events(
        self,
        path: str,
        body: Mapping[str, Any],
        opened: Callable[[socket.socket], None] = lambda connection: None,
    ) -> Generator[dict[str, Any], None, None]:
        """The data of server-sent events, up to [DONE] or the connection's end.

        Closing the iterator closes the connection, which tells the agent that nobody listens.
        opened: told of the connection, which another thread may shut down to end the events.
        Raises: CommandError, with the agent's own words where it sent an error.
        """
        data = json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        with closing(self._connect()) as connection:
            try:
                connection.sock.settimeout(SILENCE_S)
                opened(connection.sock)
                connection.request("POST", path, data, headers)
                response = connection.getresponse()
                if response.status != 200:
                    text = error_text(response.read(BODY_BYTES_MAX))
                    raise CommandError(text or f"the agent answers with HTTP {response.status}")
                while line := response.readline(LINE_BYTES_MAX):
                    event = _event(line)
                    if event is None:
                        continue
                    if event.get("error"):
                        raise CommandError(_words(event) or "the answer failed")
                    if event.get("done"):
                        return
                    yield event
            except (OSError, http.client.HTTPException) as error:
                raise self._broken(error) from None

    def _connect(self) -> http.client.HTTPConnection:
        for host, port in [self._answered] if self._answered else self.candidates:
            connection = http.client.HTTPConnection(host, port, timeout=CONNECT_S)
            try:
                connection.connect()
            except OSError:
                connection.close()
                continue
            if _reached_itself(connection):
                connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                connection.close()
                continue
            self._answered = host, port
            return connection
        tried = " or ".join(_joined(*candidate) for candidate in self.candidates if candidate[1])
        why = f"no agent answers at {tried}" if tried else f"{self.settings.home} has no agent"
        raise CommandError(f"halka is not running: {why}", f"start it: {start_command()}", 3)

    def _broken(self, error: Exception) -> CommandError:
        why = "it was silent" if isinstance(error, TimeoutError) else "the connection broke"
        return CommandError(
            f"the agent at {self.address} stopped answering: {why}",
            "look at it: halka status, and its log",
        )


def start_command(root: Path = Path("/")) -> str:
    """How this machine starts its agent: by its service where one is installed."""
    if sys.platform == "darwin":
        if (root / "Library/LaunchDaemons/dev.halka.agent.plist").exists():
            return "sudo launchctl kickstart system/dev.halka.agent"
        if (Path.home() / "Library/LaunchAgents/dev.halka.agent.plist").exists():
            return "launchctl kickstart gui/$(id -u)/dev.halka.agent"
        return "halka run"
    folders = ("etc/systemd/system", "usr/lib/systemd/system", "lib/systemd/system")
    if any((root / folder / "halka.service").exists() for folder in folders):
        return "sudo systemctl start halka"
    user_folders = (
        Path.home() / ".config/systemd/user",
        root / "etc/systemd/user",
        root / "usr/lib/systemd/user",
    )
    if any((folder / "halka.service").exists() for folder in user_folders):
        return "systemctl --user start halka"
    return "halka run"


def error_text(data: bytes) -> str:
    """The agent's own words in an error body, or ""."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        return ""
    return _words(body) if isinstance(body, dict) else ""


def _words(body: dict[str, Any]) -> str:
    error = body.get("error")
    message = error.get("message") if isinstance(error, dict) else error
    return str(message)[:2000] if message else ""


def _event(line: bytes) -> dict[str, Any] | None:
    """One `data:` line's object; {"done": True} for [DONE]; None for comments and blank lines."""
    if not line.startswith(b"data:"):
        return None
    text = line[5:].strip()
    if text == b"[DONE]":
        return {"done": True}
    try:
        event = json.loads(text)
    except (ValueError, RecursionError):
        event = None
    if not isinstance(event, dict):
        raise CommandError("the agent sent an event that is not JSON; the answer is cut off")
    event.pop("done", None)
    return event


def _written(home: Path) -> tuple[str, int] | None:
    """Where the agent of `home` says that it answers: host:port in the file `http`."""
    try:
        with (home / "http").open(encoding="ascii") as file:
            host, _, port = file.read(300).strip().rpartition(":")
    except (OSError, ValueError):
        return None
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        return None
    return _reachable(host.removeprefix("[").removesuffix("]"), int(port))


def _reachable(host: str, port: int) -> tuple[str, int]:
    """The address to dial for an address that was listened on."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port


def _reached_itself(connection: http.client.HTTPConnection) -> bool:
    """Where nobody listens on a port that the system also gives to clients, as 42552, a client may
    be given that very port, and TCP connects it with itself. It then keeps the agent from it, and
    goes on to for a minute after its end unless that is a reset."""
    sock = connection.sock
    return sock is not None and sock.getsockname() == sock.getpeername()


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
