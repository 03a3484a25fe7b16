"""A plain HTTP client of the API: posts JSON, reads JSON or events, hides nothing."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from tests.fake_service import FakeService, serving

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


class Client:
    """Posts JSON and reads what comes back."""

    def __init__(self, http: aiohttp.ClientSession) -> None:
        self.http = http

    async def ask(self, path: str, body: Any) -> tuple[int, dict[str, Any]]:
        async with self.http.post(path, json=body) as response:
            assert response.content_type == "application/json"
            return response.status, await response.json()

    async def chat(self, text: str = "hi", **body: Any) -> tuple[int, dict[str, Any]]:
        messages = [{"role": "user", "content": text}]
        return await self.ask(CHAT, {"messages": messages, **body})

    async def stream(self, path: str = CHAT, **body: Any) -> list[Any]:
        """The stream's events as they are: JSON, "[DONE]", or ":" for a comment."""
        body.setdefault(
            *("messages", [{"role": "user", "content": "hi"}]) if path == CHAT else ("prompt", "hi")
        )
        events: list[Any] = []
        async with self.http.post(path, json={"stream": True, **body}) as response:
            assert (response.status, response.content_type) == (200, "text/event-stream")
            assert response.headers["X-Accel-Buffering"] == "no"
            assert "no-cache" in response.headers["Cache-Control"]
            async for line in response.content:
                if line.startswith(b"data: "):
                    data = line[6:].strip()
                    events.append("[DONE]" if data == b"[DONE]" else json.loads(data))
                elif line.startswith(b":"):
                    events.append(":")
        return events


@asynccontextmanager
async def client(service: FakeService, **limits: Any) -> AsyncIterator[Client]:
    async with (
        serving(service, **limits) as server,
        aiohttp.ClientSession(server.url) as http,
    ):
        yield Client(http)
