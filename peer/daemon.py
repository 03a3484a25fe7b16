"""`halka run`: builds every object, owns the one TaskGroup, the signals and the readiness.

Order of life: settings → identity (and the lock on HALKA_HOME) → HTTP's port, before any socket of
ours could be given it → store → what this machine can do → cluster → HTTP → ready. Order of death:
new answers are refused while others take over what this peer runs (`leaving`), then HTTP ends, then
the rest.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from peer import VERSION, notify, report
from peer.agent import Agent
from peer.api import port
from peer.api.server import Server
from peer.api.service import Piece
from peer.clockwork import Retries
from peer.cluster import thunderbolt_shell
from peer.cluster.identity import Identity
from peer.config import Config
from peer.errors import ConfigError, HalkaError, ModelError, NoPlan
from peer.leaving import Parting
from peer.logs import harmless
from peer.models.store import Store, Stored
from peer.planning import survey
from peer.planning.leaving import Reason
from peer.planning.profile import EngineProfile, ModelOffer, ModelShape, Port
from peer.protocol import Sampling
from peer.sleep import Sleep

log = logging.getLogger("halka.agent")

STORE_S = 1.0  # between looks at the store: `halka pull` is noticed within a second
MEASURE_AGAIN_S = 30.0  # after measuring failed: its process may have been killed, or the disk full
MEASURE_AGAIN_MAX_S = 3600.0  # of a model that no engine here runs, at last
DESCRIPTORS = 65536  # as the service's unit allows
STATUS_S = 5.0  # between lines for `systemctl status`


def main(config: Config, warnings: list[str]) -> int:
    """Run the agent until SIGTERM or SIGINT. Returns an exit code. Raises ConfigError."""
    _log_to(sys.stderr.fileno(), config.log)
    _allow_descriptors()
    for warning in warnings:
        log.warning("setting=ignored because=%s", warning)
    identity = Identity(config.home)
    try:
        return asyncio.run(Daemon(config, identity).run())
    except BaseExceptionGroup as group:
        # Of several failures at once the first is the cause; a plain one is for people to read.
        known = group.subgroup(HalkaError)
        while known is not None and isinstance(known.exceptions[0], BaseExceptionGroup):
            known = known.exceptions[0]
        if known is None:
            raise
        raise known.exceptions[0] from None
    finally:
        # All is done; a signal now would only make it look as if it were not.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        identity.close()


def _log_to(descriptor: int, level: str) -> None:
    """stderr; without times where systemd adds its own."""
    journal = "JOURNAL_STREAM" in os.environ
    form = "%(name)s %(message)s" if journal else "%(asctime)s %(levelname)s %(name)s %(message)s"
    logging.basicConfig(level=logging.WARNING, format=form)
    for handler in logging.getLogger().handlers:
        harmless(handler)
    logging.getLogger("halka").setLevel(level.upper())


def _allow_descriptors() -> None:
    """As many as the system lets us have: the usual 1024 are soon filled by half-open connections,
    and then nothing works, neither the disk nor the API."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS)
    if soft < wanted:
        with contextlib.suppress(ValueError, OSError):  # macOS refuses some values
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class Daemon:
    """One run of the agent; the service that the API talks to."""

    def __init__(self, config: Config, identity: Identity) -> None:
        self.config, self.identity = config, identity
        self.started = time.monotonic()
        self.stop = asyncio.Event()
        self.server: Server | None = None
        self.parting: Parting | None = None
        self._shapes: dict[str, ModelShape] = {}
        self._measuring = Retries(MEASURE_AGAIN_S, MEASURE_AGAIN_MAX_S)

    async def run(self) -> int:
        """From the first object to the last goodbye."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)
        listening = await port.take(self.config.http_host, self.config.http_port, self.stop)
        if listening is None:
            return 0  # a signal came first
        with contextlib.closing(listening):
            return await self._run(listening)

    async def _run(self, listening: socket.socket) -> int:
        """All that comes once the port of HTTP is ours."""
        store = await asyncio.to_thread(Store, self.config.home)
        refused: dict[str, str] = {}
        if (engines := await self._engines(refused)) is None:
            return 0  # a signal came first
        if not engines:
            self._measuring.failed("engines", time.monotonic())
        profile = await asyncio.to_thread(
            survey.profile, self.config, self.identity.peer_id, engines
        )
        async with asyncio.TaskGroup() as tasks:

            def spawn(work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
                return tasks.create_task(work, name=name)

            agent = Agent(self.config, self.identity, store, profile, spawn)
            self.agent = agent
            agent.refused_engines = refused
            try:
                await self._begin(agent, listening)
                parting = self.parting = Parting(agent, self._may_go)
                helpers = [
                    spawn(agent.cluster.run(), "cluster"),
                    spawn(parting.run(), "leaving"),
                    spawn(Sleep(parting).run(), "sleep"),
                    spawn(agent.plan(), "planner"),
                    spawn(agent.measuring.run(), "measuring"),
                    spawn(agent.sparing.run(), "spare parts"),
                    spawn(thunderbolt_shell.watch(_ports_of(agent)), "thunderbolt"),
                    spawn(self._watch_store(agent, store), "store"),
                    spawn(self._tell_service_manager(agent), "service manager"),
                ]
                await self.stop.wait()
            finally:
                notify.stopping()
                log.info("agent=stopping")
                await self._end(agent)
            for helper in helpers[1:]:
                helper.cancel()
        log.info("agent=stopped")
        return 0

    async def _engines(self, refused: dict[str, str]) -> tuple[EngineProfile, ...] | None:
        """This peer's, None where a signal came first: a cold GPU's driver and the proof of an
        engine take up to minutes."""
        looking = asyncio.ensure_future(survey.engines(self.config, refused))
        stopped = asyncio.ensure_future(self.stop.wait())
        try:
            await asyncio.wait((looking, stopped), return_when=asyncio.FIRST_COMPLETED)
            return looking.result() if looking.done() else None
        finally:
            for task in (looking, stopped):
                task.cancel()
            await asyncio.gather(looking, stopped, return_exceptions=True)

    def _signalled(self) -> None:
        """The first signal lets others take over, the second ends everything at once."""
        if self.parting is None or "stop" in self.parting.reasons:
            self.stop.set()
            return
        notify.stopping("leaving")
        self.parting.wish("stop")
        if not self.stop.is_set():
            log.info("agent=leaving hint=a second signal ends it at once")

    def _may_go(self, reason: Reason) -> None:
        """Nothing is waited for any more."""
        if reason != "sleep":
            self.stop.set()

    async def _begin(self, agent: Agent, listening: socket.socket) -> None:
        await agent.cluster.start()
        host, number = self.config.http_host, self.config.http_port
        self.server = await Server.start(_Service(agent, self), host, number, listening=listening)
        await asyncio.to_thread(_write, self.config.home / "http", self.http)
        log.info("version=%s api=http://%s/v1 home=%s", VERSION, self.http, self.config.home)
        notify.ready()

    async def _end(self, agent: Agent) -> None:
        if self.server is not None:
            await self.server.close()
        with contextlib.suppress(OSError):
            await asyncio.to_thread((self.config.home / "http").unlink)
        await agent.close("its agent was stopped")

    @property
    def http(self) -> str:
        """host:port of the API."""
        return self.server.url.removeprefix("http://").rstrip("/") if self.server else ""

    async def _watch_store(self, agent: Agent, store: Store) -> None:
        """Offer what is in the store; measure a model once, when it is first seen."""
        while True:
            if not agent.profiles[agent.me].engines:
                await self._look_for_engines(agent)
            try:
                offers = await self._offers(agent, store)
            except ModelError as error:
                offers = []
                if agent.store_trouble != str(error):
                    log.error("store=unreadable because=%s", error)
                agent.store_trouble = str(error)
            else:
                agent.store_trouble = ""
            agent.announce(offers)
            await asyncio.sleep(STORE_S)

    async def _offers(self, agent: Agent, store: Store) -> list[ModelOffer]:
        """What is in the store. Raises ModelError where it cannot be read."""
        offers = []
        stored_models = await asyncio.to_thread(store.models)
        here = {stored.digest for stored in stored_models}
        agent.unusable = {k: v for k, v in agent.unusable.items() if k in here}
        for stored in stored_models:
            shape = await self._shape(agent, store, stored)
            if shape is not None:
                offers.append(ModelOffer(shape, stored.pulled_s, stored.parts))
        return offers

    async def _look_for_engines(self, agent: Agent) -> None:
        """None was found at start; one may have been installed since, or been unlucky then."""
        if not self._measuring.due("engines", time.monotonic()):
            return
        if engines := await survey.engines(self.config, agent.refused_engines):
            profile = await asyncio.to_thread(survey.profile, self.config, agent.me, engines)
            mine = agent.profiles[agent.me]
            known = {"links": mine.links, "unreachable": mine.unreachable, "ports": mine.ports}
            profile = replace(profile, leaving=mine.leaving, **known)
            log.info("engines=%s", ",".join(engine.device for engine in engines))
            agent.introduce(profile)
            self._measuring.worked("engines")
        else:
            self._measuring.failed("engines", time.monotonic())

    async def _shape(self, agent: Agent, store: Store, stored: Stored) -> ModelShape | None:
        digest, engines = stored.digest, agent.profiles[agent.me].engines
        if digest in self._shapes or not self._measuring.due(digest, time.monotonic()):
            return self._shapes.get(digest)
        if not engines or not await asyncio.to_thread(store.has, digest, "head"):
            return None
        try:
            backend = survey.teller([engine.backend for engine in engines])
            self._shapes[digest] = await survey.shape(backend, store.folder(digest))
        except ModelError as error:
            self._measuring.failed(digest, time.monotonic())
            why = f"{stored.manifest.model}: {error}"
            if agent.unusable.get(digest) != why:
                log.warning("model=unusable digest=%s because=%s", digest[:12], why)
            agent.unusable[digest] = why
        else:
            self._measuring.worked(digest)
            agent.unusable.pop(digest, None)
        return self._shapes.get(digest)

    async def _tell_service_manager(self, agent: Agent) -> None:
        every_s = notify.alive_every_s()
        while True:
            notify.alive()
            serving = agent.duty.serving()
            model = serving.plan.shape.model if serving else "nothing yet"
            leaving = self.parting.told() if self.parting else ""
            serves = f"{len(agent.cluster.members) + 1} peers, serving {model}"
            notify.status(leaving or serves)
            await asyncio.sleep(min(every_s or STATUS_S, STATUS_S))


class _Service:
    """`api.service.Service`: the agent, with the daemon's own status."""

    def __init__(self, agent: Agent, daemon: Daemon) -> None:
        self._agent, self._daemon = agent, daemon
        serving = agent.serving
        self.models, self.text, self.context = serving.models, serving.text, serving.context

    def answer(
        self,
        request_id: str,
        model_id: str,
        ids: Sequence[int],
        sampling: Sampling,
        tokens_max: int,
        ends: tuple[int, ...],
    ) -> AsyncGenerator[Piece, None]:
        """See `api.service.Service`. Raises NoPlan while this peer goes away."""
        if why := self.leaving():
            raise NoPlan(why)
        return self._agent.serving.answer(request_id, model_id, ids, sampling, tokens_max, ends)

    def leaving(self) -> str:
        """Why new answers are refused, or ""."""
        return self._daemon.parting.refuses if self._daemon.parting else ""

    async def leave(self) -> AsyncGenerator[Mapping[str, Any], None]:
        """Go away once others have taken over."""
        if (parting := self._daemon.parting) is None:
            raise NoPlan("the agent is still starting; try again in a moment")
        parting.wish("leave")
        async with contextlib.aclosing(parting.progress()) as steps:
            async for step in steps:
                yield msgspec.to_builtins(step)

    def stay(self) -> None:
        """Take that back."""
        if self._daemon.parting:
            self._daemon.parting.stay("leave")

    def status(self) -> Mapping[str, Any]:
        """The whole status."""
        return report.status(self._agent, self._daemon.started, self._daemon.http)

    def plan(self) -> Mapping[str, Any] | None:
        """The plan, with its phase, its forecast and what it really takes."""
        return report.plan(self._agent)

    def profiles(self) -> Mapping[str, Any]:
        """All that a plan is made of."""
        return report.profiles(self._agent)


def _ports_of(agent: Agent) -> Callable[[tuple[Port, ...]], None]:
    """What puts this Mac's Thunderbolt ports into its profile."""
    return lambda ports: agent.measuring.change(ports=ports)


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(".new")
    try:
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({error.strerror}). Free disk space, or make {path.parent} "
            "writable for this user"
        ) from None
