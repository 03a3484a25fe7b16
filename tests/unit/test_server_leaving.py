"""api.server: a peer's going away, as programs ask for it and hear of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from tests.api_client import client
from tests.fake_service import FakeService

WHY = "this peer is going away; ask another"


async def test_going_away_is_told_step_by_step_and_health_says_so() -> None:
    steps = [{"phase": "asking"}, {"phase": "gone"}]
    async with client(FakeService(steps=steps)) as api:

        async def health() -> tuple[int, Any]:
            async with api.http.get("/health") as response:
                return response.status, await response.json()

        assert await health() == (200, {"status": "ok"})
        assert await api.stream("/halka/leave") == [*steps, "[DONE]"]
        assert await health() == (503, {"status": "leaving", "why": WHY})
        assert await api.ask("/halka/stay", {}) == (200, {"leaving": ""})
        assert await health() == (200, {"status": "ok"})


async def test_whoever_stops_listening_takes_nothing_back() -> None:
    service, left = FakeService(), asyncio.Event()

    async def leave() -> AsyncGenerator[dict[str, Any], None]:
        service.going = WHY
        try:
            yield {"phase": "asking"}
            await asyncio.Event().wait()
        finally:
            left.set()

    service.leave = leave  # type: ignore[method-assign]
    async with client(service) as api:
        async with api.http.post("/halka/leave") as response:
            assert b"asking" in await response.content.readline()
            response.close()
        await asyncio.wait_for(left.wait(), 10)
        assert service.going == WHY


@pytest.mark.parametrize("path", ["/halka/leave", "/halka/stay"])
async def test_no_web_page_sends_a_peer_away(path: str) -> None:
    service = FakeService(steps=[{"phase": "gone"}])
    async with client(service) as api:
        for header in ({"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
            async with api.http.post(path, headers=header) as response:
                assert response.status == 403
        async with api.http.get(path) as response:
            assert response.status == 405, "a link or an image changes nothing"
        assert service.going == ""
