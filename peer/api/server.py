"""The HTTP endpoint of a peer: its socket, its routes, and every request's outermost handler."""

from __future__ import annotations

import asyncio
import logging
import socket
import traceback
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

import msgspec
from aiohttp import web

from peer import VERSION
from peer.api import guard
from peer.api.limits import Limits
from peer.api.openai import OpenAI
from peer.api.port import listen
from peer.api.service import Service
from peer.api.shapes import Problem, json_response, problem_of
from peer.api.sse import EVENTS, Events
from peer.errors import HalkaError

log = logging.getLogger("halka.api")

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Server:
    """Listens until `close`. host, port: where, really."""

    def __init__(self, service: Service, limits: Limits) -> None:
        self.host, self.port = "", 0
        self._service, self._limits = service, limits
        self._names: frozenset[str] = frozenset()
        self._openai = OpenAI(service, limits)
        self._busy: set[asyncio.Task[Any]] = set()  # requests under way
        application = web.Application(
            client_max_size=limits.body_bytes, middlewares=[self._outermost]
        )
        application.add_routes(self._openai.routes())
        application.add_routes(
            [
                web.get("/", self._root),
                web.get("/health", self._health),
                web.get("/halka/status", self._status),
                web.get("/halka/plan", self._plan),
                web.get("/halka/profiles", self._profiles),
                web.post("/halka/leave", self._leave),
                web.post("/halka/stay", self._stay),
            ]
        )
        # A client that leaves must end its answer at once, streamed or not.
        self._runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=0.25)
        self._listener: asyncio.Server | None = None

    @classmethod
    async def start(
        cls,
        service: Service,
        host: str,
        port: int,
        limits: Limits | None = None,
        *,
        listening: socket.socket | None = None,
    ) -> Server:
        """Listen on host:port (0: chosen by the system).

        listening: the socket that does so already, by `port.take`; it is the server's from now on.
        Raises: ConfigError, when the address is taken, is not ours or is not a loopback one.
        """
        server = cls(service, limits or Limits())
        own = socket.gethostname().lower()
        server._names = frozenset({own, f"{own}.local", host.lower()})
        listening = listening or listen(host, port)
        try:
            await server._answer_on(listening)
        except BaseException:
            listening.close()
            raise
        log.info("http listening url=%s", server.url)
        return server

    async def _answer_on(self, listening: socket.socket) -> None:
        """Take connections from now on, and those that wait already."""
        self.host, self.port = listening.getsockname()[:2]
        await self._runner.setup()
        assert self._runner.server is not None
        factory = guard.door(self._runner.server, self._limits)
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(factory, sock=listening)

    @property
    def url(self) -> str:
        """http://host:port"""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    async def close(self) -> None:
        """Stop listening. Answers that still run end with an error: the daemon drains before."""
        if self._listener is not None:
            self._listener.close()
        await self._openai.end("this peer is stopping; ask again, or ask another peer")
        await self._runner.cleanup()
        if self._busy:  # cancelled by now; their answers end in the turns that follow
            await asyncio.wait(self._busy, timeout=2.0)

    @web.middleware
    async def _outermost(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Lets in, times, and answers whatever goes wrong in the shape that clients know."""
        connection = request.protocol
        assert isinstance(connection, guard.Connection)
        connection.begun()
        if task := asyncio.current_task():
            self._busy.add(task)
            task.add_done_callback(self._busy.discard)
        try:
            guard.check_caller(request, self._names)
            return await handler(request)
        except HalkaError as error:
            problem = problem_of(error)
            if problem.status >= 500:
                log.warning("request refused path=%s because=%s", request.path[:200], error)
            return problem.response()
        except web.HTTPException as error:
            return _http_problem(request, error)
        except ConnectionError:
            return _opened(request) or web.Response()  # nobody is there to read it
        except Exception as error:  # noqa: BLE001 (the outermost handler of the API)
            log.error("request broke path=%s because=%s", request.path[:200], _where(error))
            problem = Problem(500, "halka made a mistake; its log says where", "server_error")
            if (response := _opened(request)) is None:
                return problem.response()
            await request[EVENTS].fail(problem)
            return response
        finally:
            connection.ended()

    async def _root(self, request: web.Request) -> web.Response:
        page = {
            "name": "halka",
            "version": VERSION,
            "api": f"{self.url}/v1",
            "models": [model.id for model in self._service.models()],
            "paths": ["/v1/chat/completions", "/v1/completions", "/v1/models", "/health",
                      "/halka/status", "/halka/plan", "/halka/profiles", "/halka/leave",
                      "/halka/stay"],
        }  # fmt: skip
        return _plain(page)

    async def _health(self, request: web.Request) -> web.Response:
        if why := self._service.leaving():
            return _plain({"status": "leaving", "why": why}, 503)
        models = self._service.models()
        if any(model.ready for model in models):
            return _plain({"status": "ok"})
        why = next((m.why for m in models if m.why), "no model is served. Look: halka status")
        return _plain({"status": "degraded", "why": why}, 503)

    async def _status(self, request: web.Request) -> web.Response:
        return _plain(self._service.status())

    async def _plan(self, request: web.Request) -> web.Response:
        return _plain(self._service.plan())  # null where there is none: status says why

    async def _profiles(self, request: web.Request) -> web.Response:
        return _plain(self._service.profiles())

    async def _leave(self, request: web.Request) -> web.StreamResponse:
        """Events, until this peer goes or stays. Who stops listening takes nothing back."""
        events = request[EVENTS] = Events(request, self._limits.write_s)
        async with aclosing(self._service.leave()) as steps:
            async for step in steps:
                await events.send(msgspec.json.encode(step))
        await events.done()
        return events.response

    async def _stay(self, request: web.Request) -> web.Response:
        self._service.stay()
        return _plain({"leaving": self._service.leaving()})


def _plain(value: Any, status: int = 200) -> web.Response:
    return json_response(msgspec.json.encode(value), status)


def _opened(request: web.Request) -> web.StreamResponse | None:
    """The stream that the request has already begun to get."""
    events = request.get(EVENTS)
    return events.response if events is not None and events.opened else None


def _http_problem(request: web.Request, error: web.HTTPException) -> web.Response:
    """aiohttp's own refusals (404, 405, 413, …) in our shape."""
    message = error.reason
    if error.status == 404:
        message = f"there is nothing at {request.path[:200]}; the API begins at /v1"
    elif error.status == 405:
        message = f"{request.path[:200]} does not take {request.method}"
    response = Problem(error.status, message, "invalid_request_error").response()
    if allowed := error.headers.get("Allow"):
        response.headers["Allow"] = allowed
    return response


def _where(error: Exception) -> str:
    """The error's type and the way to it, without its text: that may hold a prompt."""
    frames = traceback.extract_tb(error.__traceback__)[-6:]
    way = " < ".join(f"{f.filename}:{f.lineno} {f.name}" for f in reversed(frames))
    return f"{type(error).__name__} at {way}"
