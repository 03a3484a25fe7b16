"""Errors and answers in the shapes that OpenAI's clients know."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from aiohttp import web

from peer.errors import AnswerFailed, HalkaError, NoPlan, RequestError

AGAIN_S = 3  # Retry-After: a new plan is serving about so long after a loss


@dataclass(frozen=True, slots=True)
class Problem:
    """An error as clients see it."""

    status: int
    message: str
    kind: str
    param: str | None = None
    code: str | None = None

    def body(self) -> bytes:
        """{"error": {message, type, param, code}}"""
        error = {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }
        return msgspec.json.encode({"error": error})

    def response(self) -> web.Response:
        """The whole answer. 503 and 429 say when to come again; many clients then do."""
        response = json_response(self.body(), self.status)
        if self.status in (429, 503):
            response.headers["Retry-After"] = str(AGAIN_S)
        return response


def problem_of(error: HalkaError) -> Problem:
    """How an error of ours is told to clients."""
    match error:
        case RequestError():
            return Problem(error.status, str(error), error.kind, error.param, error.code)
        case NoPlan():
            return Problem(503, str(error), "overloaded", code="no_plan")
        case AnswerFailed():
            return Problem(503, str(error), "server_error", code="answer_failed")
        case _:
            return Problem(500, str(error), "server_error")


def json_response(body: bytes, status: int = 200) -> web.Response:
    """JSON that nobody keeps."""
    headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
    return web.Response(body=body, status=status, content_type="application/json", headers=headers)


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request: of all its prompts, and of all its answers."""

    prompt: int
    completion: int

    def plain(self) -> dict[str, int]:
        """As clients know it."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
        }


@dataclass(frozen=True, slots=True)
class Finished:
    """One whole answer. first_s: when its first piece came (monotonic)."""

    index: int
    text: str
    finish: str
    tokens: int
    first_s: float


class Shape(ABC):
    """One request's answers, whole or in chunks. Subclasses say what a choice looks like."""

    prefix = kind = kind_chunk = ""

    def __init__(self, request: str, model: str, created_s: int) -> None:
        self.id = f"{self.prefix}-{request}"
        self._model, self._created_s = model, created_s

    @abstractmethod
    def first(self, index: int) -> dict[str, Any] | None:
        """The choice of a chunk that opens an answer, None where there is none."""

    @abstractmethod
    def delta(self, index: int, text: str) -> dict[str, Any]:
        """The choice of a chunk with text."""

    @abstractmethod
    def last(self, index: int, finish: str) -> dict[str, Any]:
        """The choice of the chunk that ends an answer."""

    @abstractmethod
    def choice(self, answer: Finished) -> dict[str, Any]:
        """A whole answer."""

    def chunk(self, choices: Sequence[Mapping[str, Any]], **more: Any) -> bytes:
        """A chunk of a stream, as JSON."""
        return self._body(self.kind_chunk, choices, more)

    def whole(self, answers: Sequence[Finished], usage: Usage) -> bytes:
        """The answer to a request that is not streamed, as JSON."""
        return self._body(self.kind, [self.choice(a) for a in answers], {"usage": usage.plain()})

    def _body(self, kind: str, choices: Sequence[Mapping[str, Any]], more: dict[str, Any]) -> bytes:
        body = {"id": self.id, "object": kind, "created": self._created_s, "model": self._model}
        return msgspec.json.encode({**body, "choices": choices, **more})


class Chat(Shape):
    """/v1/chat/completions"""

    prefix, kind, kind_chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def first(self, index: int) -> dict[str, Any] | None:
        return _chat_choice(index, {"role": "assistant", "content": ""}, None)

    def delta(self, index: int, text: str) -> dict[str, Any]:
        return _chat_choice(index, {"content": text}, None)

    def last(self, index: int, finish: str) -> dict[str, Any]:
        return _chat_choice(index, {}, finish)

    def choice(self, answer: Finished) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        return {
            "index": answer.index,
            "message": message,
            "logprobs": None,
            "finish_reason": answer.finish,
        }


def _chat_choice(index: int, delta: dict[str, str], finish: str | None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}


class Completion(Shape):
    """/v1/completions"""

    prefix, kind, kind_chunk = "cmpl", "text_completion", "text_completion"

    def first(self, index: int) -> dict[str, Any] | None:
        return None

    def delta(self, index: int, text: str) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": None}

    def last(self, index: int, finish: str) -> dict[str, Any]:
        return {"index": index, "text": "", "logprobs": None, "finish_reason": finish}

    def choice(self, answer: Finished) -> dict[str, Any]:
        return {
            "index": answer.index,
            "text": answer.text,
            "logprobs": None,
            "finish_reason": answer.finish,
        }
