"""api.port: HTTP's port is ours before any other socket of ours, and waited for where a passing
connection of somebody else was given it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from peer import daemon
from peer.api import port
from peer.api.port import RESET, Patience, listen, take
from peer.api.server import Server
from peer.cluster.identity import Identity
from peer.config import Config
from peer.errors import ConfigError
from peer.planning import survey
from peer.planning.profile import EngineProfile
from tests.conftest import Until
from tests.fake_service import FakeService, serving

HOST = "127.0.0.1"
EVER_S = 1000.0  # longer than a test may take
TAKEN = "is taken by another program. Give halka another one: HALKA_HTTP=127.0.0.1:"


class Passing:
    """A connection of another program that was given a port; `end` leaves nothing of it."""

    def __init__(self) -> None:
        with socket.create_server((HOST, 0)) as listening:
            self._ours = socket.create_connection(listening.getsockname())
            self._theirs, _ = listening.accept()
        self.port = int(self._ours.getsockname()[1])

    def end(self) -> None:
        for end in (self._ours, self._theirs):
            with contextlib.suppress(OSError):  # ended before
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            end.close()


@pytest.fixture
def passing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Passing]:
    """It has a port; attempts to have that are made quickly."""
    monkeypatch.setattr(port, "AGAIN_S", 0.01)
    monkeypatch.setattr(port, "KNOCK_S", 0.1)
    made = Passing()
    yield made
    made.end()


def waits(caplog: pytest.LogCaptureFixture) -> bool:
    return "http=waiting" in caplog.text


async def test_a_port_that_a_passing_connection_was_given_is_waited_for(
    passing: Passing, caplog: pytest.LogCaptureFixture, until: Until
) -> None:
    patience = Patience(program_s=0.0, connection_s=EVER_S)
    async with asyncio.TaskGroup() as tasks:
        taking = tasks.create_task(take(HOST, passing.port, asyncio.Event(), patience))
        await until(lambda: waits(caplog), 5, "it waits")
        assert not taking.done()
        passing.end()
    with taking.result() or socket.socket() as listening:
        assert listening.getsockname() == (HOST, passing.port)
        assert listening.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    assert f"port={passing.port} because=a connection has it" in caplog.text


async def test_a_connection_that_stays_is_not_waited_for_for_ever(passing: Passing) -> None:
    patience = Patience(program_s=EVER_S, connection_s=0.05)
    with pytest.raises(ConfigError, match=f"port {passing.port} {TAKEN}{passing.port + 1}"):
        await take(HOST, passing.port, asyncio.Event(), patience)


@pytest.mark.usefixtures("passing")
async def test_a_program_that_listens_is_given_a_short_time_to_end(
    caplog: pytest.LogCaptureFixture, until: Until
) -> None:
    with socket.create_server((HOST, 0)) as other:
        number = other.getsockname()[1]
        with pytest.raises(ConfigError, match=TAKEN):
            await take(HOST, number, asyncio.Event(), Patience(0.05, EVER_S))
        caplog.clear()
        async with asyncio.TaskGroup() as tasks:
            patience = Patience(program_s=EVER_S, connection_s=EVER_S)
            taking = tasks.create_task(take(HOST, number, asyncio.Event(), patience))
            await until(lambda: waits(caplog), 5, "it waits")
            assert "because=a program has it" in caplog.text
            other.close()
        (taking.result() or other).close()
        assert taking.result()


async def test_another_agent_is_told_of_at_once() -> None:
    async with serving(FakeService()) as server:
        with pytest.raises(ConfigError, match=TAKEN):
            await take(HOST, server.port, asyncio.Event(), Patience(EVER_S, EVER_S))


async def test_an_agent_that_is_started_again_finds_its_port_at_once() -> None:
    server = await Server.start(FakeService(), HOST, 0)
    reader, writer = await asyncio.open_connection(HOST, server.port)
    writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    await reader.readuntil(b"\r\n\r\n")
    await server.close()  # ends the connection first, so TCP remembers it on this side
    again = await take(HOST, server.port, asyncio.Event(), Patience(0.0, 0.0))
    assert again is not None
    again.close()
    writer.close()
    await writer.wait_closed()


async def test_a_client_that_comes_before_the_agent_is_ready_is_answered_then() -> None:
    listening = listen(HOST, 0)
    host, number = listening.getsockname()
    reader, writer = await asyncio.open_connection(host, number)
    writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    server = await Server.start(FakeService(), host, number, listening=listening)
    async with asyncio.timeout(5):
        assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
    writer.transport.abort()
    await server.close()


# The daemon's order ------------------------------------------------------------------------------


@pytest.fixture
def identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Identity]:
    """A peer's; what its daemon tells systemd goes nowhere."""
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    identity = Identity(tmp_path)
    yield identity
    identity.close()


async def test_http_has_its_port_before_any_other_socket_of_the_agent(
    identity: Identity, tmp_path: Path
) -> None:
    with listen(HOST, 0) as free:
        number = free.getsockname()[1]
    # The agent's own listener wants the very port: who is there first shows in who complains.
    config = Config.fast_test(home=tmp_path, backend="fake", http_port=number, port=number)
    with pytest.raises(ExceptionGroup) as raised:
        await daemon.Daemon(config, identity).run()
    (error,) = raised.value.exceptions
    assert "cannot listen for other peers" in str(error)
    listen(HOST, number).close()  # nothing of it is left


async def test_a_signal_ends_an_agent_that_waits_for_its_port(
    identity: Identity,
    tmp_path: Path,
    passing: Passing,
    caplog: pytest.LogCaptureFixture,
    until: Until,
) -> None:
    config = Config.fast_test(home=tmp_path, backend="fake", http_port=passing.port)
    waiting = daemon.Daemon(config, identity)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(waiting.run())
        await until(lambda: waits(caplog), 5, "it waits")
        waiting._signalled()
    assert running.result() == 0
    assert not (tmp_path / "models").exists(), "it went no further"


async def test_a_signal_ends_an_agent_whose_engines_are_still_asked_and_proven(
    identity: Identity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, ended = asyncio.Event(), asyncio.Event()

    async def for_ever(config: Config, refused: dict[str, str]) -> tuple[EngineProfile, ...]:
        try:
            asked.set()
            await asyncio.Event().wait()
        finally:
            ended.set()
        return ()

    monkeypatch.setattr(survey, "engines", for_ever)
    starting = daemon.Daemon(Config.fast_test(home=tmp_path, backend="fake"), identity)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(starting.run())
        await asked.wait()
        starting._signalled()
    assert running.result() == 0
    assert ended.is_set(), "nothing of it is left"
