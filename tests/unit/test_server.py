"""api.server, api.guard: who may come in, how long they may take, and what ends when they leave."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from peer.api.limits import Limits
from peer.api.server import Server
from peer.api.service import Piece, ServedModel
from peer.errors import ConfigError
from tests.conftest import Until
from tests.fake_service import CONTEXT, MODEL, Asked, FakeService, serving

CHAT = "/v1/chat/completions"
BODY = json.dumps({"messages": [{"role": "user", "content": "hi"}]}).encode()
STREAM = json.dumps({"stream": True, "messages": [{"role": "user", "content": "hi"}]}).encode()


def post(body: bytes, *headers: str, path: str = CHAT, host: str = "localhost") -> bytes:
    lines = [f"POST {path} HTTP/1.1", f"Host: {host}", "Content-Type: application/json", *headers]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


@asynccontextmanager
async def dialled(
    server: Server,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection(server.host, server.port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def answered(reader: asyncio.StreamReader) -> tuple[int, dict[str, Any]]:
    """Status and JSON of one HTTP answer."""
    head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)).decode()
    length = int(head.lower().split("content-length:")[1].split()[0])
    assert "application/json" in head
    body = json.loads(await reader.readexactly(length))
    return int(head.split()[1]), body


async def said(server: Server, data: bytes) -> tuple[int, dict[str, Any]]:
    async with dialled(server) as (reader, writer):
        writer.write(data)
        return await answered(reader)


async def freed(server: Server) -> None:
    """Returns once a connection is let in; fails when none is within 5 s."""
    async with asyncio.timeout(5):
        while (await said(server, post(BODY)))[0] != 200:
            pass


async def closed_within(reader: asyncio.StreamReader, seconds: float) -> bool:
    """Whether the other side ends the connection in time."""
    try:
        async with asyncio.timeout(seconds):
            while await reader.read(1 << 16):
                pass
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True


def endless(asked: Asked) -> AsyncGenerator[Piece, None]:
    async def pieces() -> AsyncGenerator[Piece, None]:
        while True:
            yield Piece((97,))
            await asyncio.sleep(0)

    return pieces()


def silent(asked: Asked) -> AsyncGenerator[Piece, None]:
    async def pieces() -> AsyncGenerator[Piece, None]:
        await asyncio.Event().wait()
        yield Piece((97,))

    return pieces()


async def test_the_default_limits_keep_the_promise_of_15_seconds() -> None:
    limits = Limits()
    assert limits.head_s < 15
    assert limits.body_s + limits.linger_s < 15


SLOW: dict[str, Callable[[int], bytes]] = {
    "silent": lambda i: b"",
    "slow head": lambda i: b"GET / HTTP/1.1\r\nHost: localhost\r\nX: yyyyyyyyyyyyyyyyy"[i : i + 1],
    "endless head": lambda i: b"GET / HTTP/1.1\r\n" if i == 0 else b"X-%d: y\r\n" % i,
    "slow body": lambda i: post(BODY)[:-20] if i == 0 else b" ",
    "idle after an answer": lambda i: (
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" if i == 0 else b""
    ),
}


@pytest.mark.parametrize("how", SLOW)
async def test_a_connection_that_does_not_get_to_the_point_is_ended(how: str) -> None:
    async with (
        serving(FakeService(), head_s=0.4, body_s=0.3, linger_s=0.1) as server,
        dialled(server) as (reader, writer),
    ):
        ended = asyncio.ensure_future(closed_within(reader, 5))
        for i in range(200):
            if ended.done() or writer.is_closing():
                break
            writer.write(SLOW[how](i))
            await asyncio.wait({ended}, timeout=0.02)
        assert i < 100, "dripping kept it alive"
        assert await ended


async def test_300_slow_connections_do_not_hinder_another_client() -> None:
    async with serving(FakeService(), head_s=2) as server:
        slow = [await asyncio.open_connection(server.host, server.port) for _ in range(300)]
        for _, writer in slow:
            writer.write(b"POST / HTTP/1.1\r\nX-")
        before = time.monotonic()
        status, _ = await said(server, post(BODY))
        assert status == 200
        assert time.monotonic() - before < 2  # when the slow ones would be thrown out
        ended = await asyncio.gather(*(closed_within(reader, 10) for reader, _ in slow))
        assert all(ended)
        for _, writer in slow:
            writer.transport.abort()


async def test_a_connection_too_many_hears_why_and_places_come_free_again() -> None:
    async with serving(FakeService(), connections=2) as server:
        async with dialled(server) as (one, first), dialled(server) as (two, second):
            for reader, writer in ((one, first), (two, second)):
                writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert (await answered(reader))[0] == 200
            status, body = await said(server, post(BODY))
            assert (status, body["error"]["type"]) == (503, "overloaded")
        await freed(server)


async def test_more_answers_than_there_are_places_for_are_refused_at_once(until: Until) -> None:
    service = FakeService(silent)
    async with serving(service, answers=2) as server:
        async with dialled(server) as (_, one), dialled(server) as (_, two):
            one.write(post(BODY))
            two.write(post(STREAM))
            await until(lambda: service.running == 2, 5, "two answers run")
            status, body = await said(server, post(BODY))
            assert (status, body["error"]["code"]) == (503, "busy")
        await until(lambda: service.running == 0, 5, "both ended")
        async with dialled(server) as (_, one):
            one.write(post(BODY))
            await until(lambda: service.running == 1, 5, "there is room again")


@pytest.mark.parametrize("body", [BODY, STREAM], ids=["whole", "stream"])
@pytest.mark.parametrize("script", [silent, endless], ids=["prefill", "decode"])
async def test_a_client_that_leaves_ends_its_answer_at_once(
    body: bytes, script: Callable[[Asked], AsyncGenerator[Piece, None]], until: Until
) -> None:
    service = FakeService(script)
    async with serving(service) as server:
        async with dialled(server) as (reader, writer):
            writer.write(post(body))
            await until(lambda: service.running == 1, 5, "the answer runs")
            if body == STREAM and script is endless:
                await reader.readuntil(b"content")
            before = time.monotonic()
        await until(lambda: service.running == 0, 5, "the answer ended")
        assert time.monotonic() - before < 2


async def test_a_client_that_does_not_read_is_dropped_and_little_is_kept_for_it(
    until: Until,
) -> None:
    given = 0

    def flood(asked: Asked) -> AsyncGenerator[Piece, None]:
        async def pieces() -> AsyncGenerator[Piece, None]:
            nonlocal given
            while True:
                given += 1
                yield Piece((97,) * 10_000)

        return pieces()

    service = FakeService(flood)
    async with serving(service, write_s=0.3) as server:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(client, (server.host, server.port))
            await loop.sock_sendall(client, post(STREAM))
            await until(lambda: service.running == 1, 5, "the answer runs")
            await until(lambda: service.running == 0, 5, "it was dropped")
        assert given < 2000  # 20 MB; what the kernel's own buffers hold, and no more
        assert (await said(server, b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"))[0] == 403


async def test_a_whole_answer_that_nobody_reads_does_not_hold_its_connection() -> None:
    class Talkative(FakeService):
        def status(self) -> dict[str, Any]:
            return {"peers": "x" * (30 << 20)}

    async with serving(Talkative(), connections=1, head_s=0.4) as server:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(client, (server.host, server.port))
            await loop.sock_sendall(
                client, b"GET /halka/status HTTP/1.1\r\nHost: localhost\r\n\r\n"
            )
            assert (await said(server, post(BODY)))[0] == 503
            await freed(server)


HOSTS = {
    "localhost": 200, "LOCALHOST:42552": 200, "127.0.0.1:1": 200, "[::1]:80": 200, "[::1]": 200,
    socket.gethostname(): 200, f"{socket.gethostname()}.local:42552": 200, "localhost.": 200,
    "evil.example": 403, "127.0.0.1.evil.example": 403, "localhost.evil.example": 403, "": 403,
    "192.168.1.5": 403, "evil.local": 403, "[::1": 403, "user@localhost@evil": 403, "0.0.0.0": 403,
}  # fmt: skip


async def test_only_our_own_host_names_are_answered() -> None:
    async with serving(FakeService()) as server:
        for host, wanted in HOSTS.items():
            status, body = await said(server, post(BODY, host=host))
            assert status == wanted, (host, body)
        status, _ = await said(server, b"GET /health HTTP/1.1\r\n\r\n")
        assert status in (400, 403)
        status, _ = await said(server, b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n")
        assert status in (400, 403)


PAGES: list[tuple[list[str], int]] = [
    ([], 200),
    (["Origin: http://localhost"], 200),
    (["Sec-Fetch-Site: same-origin", "Origin: http://localhost"], 200),
    (["Sec-Fetch-Site: none"], 200),
    (["Origin: http://evil.example"], 403),
    (["Origin: http://localhost:3000"], 403),
    (["Origin: null"], 403),
    (["Sec-Fetch-Site: cross-site"], 403),
    (["Sec-Fetch-Site: same-site"], 403),
    (["Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate"], 403),
]


async def test_pages_of_other_sites_may_not_ask_and_may_not_read() -> None:
    async with serving(FakeService()) as server:
        for headers, wanted in PAGES:
            status, body = await said(server, post(BODY, *headers))
            assert status == wanted, (headers, body)
        simple = post(BODY, "Origin: http://evil.example").replace(
            b"application/json", b"text/plain"
        )
        assert (await said(server, simple))[0] == 403
        get = b"GET / HTTP/1.1\r\nHost: localhost\r\nSec-Fetch-Site: cross-site\r\n"
        assert (await said(server, get + b"\r\n"))[0] == 403
        assert (await said(server, get + b"Sec-Fetch-Mode: navigate\r\n\r\n"))[0] == 200
        async with dialled(server) as (reader, writer):
            writer.write(post(BODY))
            head = await reader.readuntil(b"\r\n\r\n")
            assert b"access-control" not in head.lower()
        preflight = b"OPTIONS %b HTTP/1.1\r\nHost: localhost\r\nOrigin: http://evil\r\n\r\n"
        assert (await said(server, preflight % CHAT.encode()))[0] == 403


NOT_HTTP = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 70_000 + b"\r\n\r\n",
    b"GET /" + b"y" * 70_000 + b" HTTP/1.1\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nX-\xff\x00: y\r\n\r\n",
    b"hello\r\n\r\n",
]


async def test_what_is_not_http_gets_a_400_in_the_known_shape() -> None:
    async with serving(FakeService()) as server:
        for data in NOT_HTTP:
            status, body = await said(server, data)
            assert status == 400, data[:40]
            assert body["error"]["type"] == "invalid_request_error"


async def test_a_body_over_the_limit_is_a_413_however_it_comes() -> None:
    async with (
        serving(FakeService(), body_bytes=1000) as server,
        aiohttp.ClientSession(server.url) as http,
    ):

        async def chunks() -> AsyncGenerator[bytes, None]:
            for _ in range(100):
                yield b"x" * 100

        for data in (b"x" * 100_000, chunks()):
            headers = {"Content-Type": "application/json"}
            async with http.post(CHAT, data=data, headers=headers) as response:
                assert response.status == 413
                assert (await response.json())["error"]["code"] == "body_too_large"


async def test_unknown_paths_and_methods_are_answered_in_the_known_shape() -> None:
    async with serving(FakeService()) as server, aiohttp.ClientSession(server.url) as http:
        for method, path, wanted in (
            ("GET", "/nothing", 404), ("POST", "/v1/embeddings", 404), ("GET", CHAT, 405),
            ("DELETE", f"/v1/models/{MODEL}", 405), ("PUT", "/%2e%2e/etc/passwd", 404),
        ):  # fmt: skip
            async with http.request(method, path) as response:
                assert response.status == wanted
                assert (await response.json())["error"]["type"] == "invalid_request_error"


async def test_health_status_plan_and_the_root_say_how_things_are() -> None:
    service = FakeService()
    async with serving(service) as server, aiohttp.ClientSession(server.url) as http:

        async def get(path: str) -> tuple[int, Any]:
            async with http.get(path) as response:
                return response.status, await response.json()

        assert await get("/health") == (200, {"status": "ok"})
        assert await get("/halka/status") == (200, {"peers": 1})
        assert await get("/halka/plan") == (200, {"windows": []})
        assert await get("/halka/profiles") == (200, {"profiles": []})
        status, root = await get("/")
        assert (status, root["name"], root["models"]) == (200, "halka", [MODEL])
        async with http.head("/") as response:
            assert (response.status, await response.read()) == (200, b"")
        service.served = [ServedModel(MODEL, 0, CONTEXT, False, "oak is missing")]
        service.the_plan = None
        assert await get("/health") == (503, {"status": "degraded", "why": "oak is missing"})
        assert await get("/halka/plan") == (200, None)  # as `halka plan` expects it


async def test_a_taken_port_is_a_setting_to_mend() -> None:
    async with serving(FakeService()) as server:
        with pytest.raises(ConfigError, match=rf"{server.port}.*HALKA_HTTP=127.0.0.1:"):
            await Server.start(FakeService(), "127.0.0.1", server.port)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "example.org", ""])
async def test_http_listens_on_loopback_only_until_there_is_a_key(host: str) -> None:
    with pytest.raises(ConfigError, match=r"HALKA_HTTP.*use 127.0.0.1:8080"):
        await Server.start(FakeService(), host, 8080)


async def test_closing_tells_running_answers_why_and_ends_them_without_a_clean_end(
    until: Until,
) -> None:
    service = FakeService(endless)
    server = await Server.start(service, "localhost", 0)
    async with dialled(server) as (reader, writer):
        writer.write(post(STREAM))
        await reader.readuntil(b"content")
        await server.close()
        rest = await reader.read()
    assert service.running == 0
    assert b"this peer is stopping" in rest
    assert b"[DONE]" not in rest
    assert not rest.endswith(b"0\r\n\r\n")
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(server.host, server.port)


async def test_closing_does_not_wait_for_clients_that_do_not_read(until: Until) -> None:
    service = FakeService(endless)
    server = await Server.start(service, "127.0.0.1", 0)
    async with dialled(server) as (_, writer):
        writer.write(post(STREAM))
        writer.transport.pause_reading()
        await until(lambda: service.running == 1, 5, "the answer runs")
        before = time.monotonic()
        await server.close()
        assert time.monotonic() - before < 4
        assert service.running == 0
