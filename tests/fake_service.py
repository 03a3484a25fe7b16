"""A service for the API's tests: a vocabulary of bytes, and answers that a test writes itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from peer.api.limits import Limits
from peer.api.server import Server
from peer.api.service import Piece, ServedModel
from peer.errors import RequestError
from peer.protocol import Sampling

END = 256
MODEL = "tiny/model-q8"
CONTEXT = 2000


@dataclass(frozen=True)
class Asked:
    """What the service was asked to answer."""

    request_id: str
    model_id: str
    ids: list[int]
    sampling: Sampling
    tokens_max: int
    ends: tuple[int, ...]

    @property
    def prompt(self) -> str:
        return bytes(i for i in self.ids if i < 256).decode()


Script = Callable[[Asked], AsyncGenerator[Piece, None]]


async def says(text: str, finish: str = "stop", tokens: int = 1) -> AsyncGenerator[Piece, None]:
    """An answer: `text` in byte tokens, so many in each piece."""
    data = tuple(text.encode())
    for at in range(0, len(data), tokens):
        yield Piece(data[at : at + tokens])
        await asyncio.sleep(0)
    yield Piece((), finish)  # type: ignore[arg-type]


class ByteWords:
    """Words of one byte each, and an end. A chat is its roles and contents."""

    pieces = (*(bytes([i]) for i in range(256)), b"")
    ends = frozenset({END})

    async def ids_of_chat(
        self, messages: Sequence[dict[str, Any]], *, context_tokens: int
    ) -> list[int]:
        if any(message["content"] == "template!" for message in messages):
            raise RequestError("the template `x` failed", param="messages", code="template_failed")
        text = "".join(f"<{m['role']}>{m['content']}" for m in messages)
        return list(text.encode())

    async def ids_of_prompt(self, text: str, *, context_tokens: int) -> list[int]:
        return list(text.encode())


@dataclass
class FakeService:
    """Answers by `script`. running: answers under way; asked: all that were ever asked for."""

    script: Script = field(default=lambda asked: says("Hello"))
    served: list[ServedModel] = field(
        default_factory=lambda: [ServedModel(MODEL, 1_700_000_000, CONTEXT, True)]
    )
    the_plan: dict[str, Any] | None = field(default_factory=lambda: {"windows": []})
    asked: list[Asked] = field(default_factory=list)
    running: int = 0
    going: str = ""  # why new answers are refused
    steps: list[dict[str, Any]] = field(default_factory=list)  # of `leave`

    def models(self) -> list[ServedModel]:
        return self.served

    async def text(self, model_id: str) -> ByteWords:
        return ByteWords()

    def context(self, model_id: str) -> int:
        return CONTEXT

    async def answer(
        self,
        request_id: str,
        model_id: str,
        ids: Sequence[int],
        sampling: Sampling,
        tokens_max: int,
        ends: tuple[int, ...],
    ) -> AsyncGenerator[Piece, None]:
        asked = Asked(request_id, model_id, list(ids), sampling, tokens_max, ends)
        self.asked.append(asked)
        self.running += 1
        pieces = self.script(asked)
        try:
            async for piece in pieces:
                yield piece
        finally:
            self.running -= 1
            await pieces.aclose()

    def status(self) -> Mapping[str, Any]:
        return {"peers": 1}

    def plan(self) -> Mapping[str, Any] | None:
        return self.the_plan

    def profiles(self) -> Mapping[str, Any]:
        return {"profiles": []}

    def leaving(self) -> str:
        return self.going

    async def leave(self) -> AsyncGenerator[Mapping[str, Any], None]:
        self.going = "this peer is going away; ask another"
        for step in self.steps:
            yield step
            await asyncio.sleep(0)

    def stay(self) -> None:
        self.going = ""


@asynccontextmanager
async def serving(service: FakeService, **limits: Any) -> AsyncIterator[Server]:
    """The real HTTP endpoint over this service."""
    server = await Server.start(service, "127.0.0.1", 0, Limits(**limits))
    try:
        yield server
    finally:
        await server.close()
        assert service.running == 0, "an answer outlived its endpoint"
