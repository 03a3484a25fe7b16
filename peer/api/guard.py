"""Who may talk to the endpoint, and how long they may take to say what they want.

A web page in any browser of this machine can reach 127.0.0.1, by its address or by a name of its
own that resolves to it. So the Host must be one of ours, and a browser's request must come from our
own pages. There are no CORS headers: no other page may read an answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web

from peer.api.limits import Limits
from peer.api.shapes import Problem
from peer.errors import RequestError

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_REFUSED_S = 2.0  # for a connection over the limit to hear so


def check_caller(request: web.Request, names: Collection[str]) -> None:
    """Raises RequestError (403) for other Hosts and other sites' pages. names: our own hosts."""
    headers = request.headers
    hosts = headers.getall("Host", [])
    if len(hosts) != 1 or _hostname(hosts[0]) not in _LOOPBACK | set(names):
        raise _forbidden(
            "this agent answers for localhost and its own name only, not for the host "
            f"`{', '.join(hosts)[:200]}`"
        )
    site = headers.get("Sec-Fetch-Site", "")
    if site in ("same-origin", "none"):
        return
    if request.method in ("GET", "HEAD") and headers.get("Sec-Fetch-Mode") == "navigate":
        return  # somebody followed a link to us; it changes nothing and nobody else can read it
    origin = headers.get("Origin")
    if site or (origin is not None and urlsplit(origin).netloc.lower() != hosts[0].lower()):
        raise _forbidden("pages of other sites may not use this agent")


def _hostname(host: str) -> str:
    """The name or address in a Host header, "" where it is none."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def _forbidden(why: str) -> RequestError:
    return RequestError(why, status=403, kind="permission_error", code="forbidden")


class Connection(web.RequestHandler):
    """aiohttp's connection, with a deadline whenever no request is under way.

    The deadline is for a whole head, so that one byte now and then does not extend it.
    """

    def __init__(self, server: web.Server, *, head_s: float, **settings: Any) -> None:
        super().__init__(server, **settings)
        self._head_s = head_s
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Somebody dialled."""
        super().connection_made(transport)
        self.ended()

    def connection_lost(self, exc: BaseException | None) -> None:
        """They are gone."""
        self.begun()
        super().connection_lost(exc)

    def begun(self) -> None:
        """A request has come whole (its head)."""
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def ended(self) -> None:
        """Its answer is written, or being taken by the client; the next request may come."""
        self.begun()
        if self.transport is not None:
            loop = asyncio.get_running_loop()
            self._deadline = loop.call_later(self._head_s, self.transport.abort)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What is not HTTP. Not logged: it may hold a prompt."""
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun")
        kind = "invalid_request_error" if status < 500 else "server_error"
        response = Problem(status, "this is not a request that HTTP allows", kind).response()
        response.force_close()
        return response


class Overfull(asyncio.Protocol):
    """A connection too many: it hears why as soon as it says anything, and is closed."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._end: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for a word, but not long."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._end = asyncio.get_running_loop().call_later(_REFUSED_S, transport.abort)

    def data_received(self, data: bytes) -> None:
        """Whatever it is: not now."""
        problem = Problem(503, "this agent has too many connections", "overloaded", code="busy")
        body = problem.body()
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(
                b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
                b"Retry-After: 1\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b"
                % (len(body), body)
            )
            self._transport.close()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Gone."""
        if self._end is not None:
            self._end.cancel()


def door(server: web.Server, limits: Limits) -> Callable[[], asyncio.Protocol]:
    """What is made for each connection."""
    loop = asyncio.get_running_loop()

    def opened() -> asyncio.Protocol:
        if len(server.connections) >= limits.connections:
            return Overfull()
        return Connection(
            server,
            loop=loop,
            head_s=limits.head_s,
            keepalive_timeout=limits.head_s,
            lingering_time=limits.linger_s,
            access_log=None,
        )

    return opened
