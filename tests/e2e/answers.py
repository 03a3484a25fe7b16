"""Answers as clients read them: recorded event by event, and what they should have been."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from backends.fake import FakeVocabulary
from backends.fake_model import BOS
from tests.e2e.agents import Agent, until
from tests.fake_models import truth

FIRST_S = 30.0  # for an answer to begin, on a busy machine


def prompt_ids(question: str) -> list[int]:
    """The prompt of a chat of one question."""
    text = f"<|user|>{question}\n<|assistant|>"
    return [BOS, *FakeVocabulary().encode(text, special=True)]


def told(model: Path, question: str, tokens: int) -> str:
    """The whole greedy answer to a chat of one question, by the model file alone."""
    return bytes(truth(model, prompt_ids(question), tokens)).decode("utf-8", "replace")


def chat(question: str, tokens: int, **more: Any) -> dict[str, Any]:
    """A greedy chat request. The model is whatever is served, unless named."""
    messages = [{"role": "user", "content": question}]
    return {"messages": messages, "max_tokens": tokens, "temperature": 0, "model": ""} | more


class Answer(threading.Thread):
    """One streamed answer, read in a thread of its own until it ends in whatever way.

    texts: one a delta; arrived: when each came. finish: of the last choice. error: of an error
    event. done: [DONE] came. whole: the body ended as HTTP says it should; else broken says how it
    did.
    """

    def __init__(self, agent: Agent, question: str, tokens: int, **more: Any) -> None:
        super().__init__(name=f"answer of agent {agent.number}", daemon=True)
        self.texts: list[str] = []
        self.arrived: list[float] = []
        self.finish, self.error, self.broken, self.model = "", "", "", ""
        self.code, self.done, self.whole = 0, False, False
        self.ended_s = 0.0
        self._connection = http.client.HTTPConnection(*agent.address, timeout=120)
        self._body = json.dumps(chat(question, tokens, stream=True) | more)
        self._leaving = False
        self.start()

    @property
    def text(self) -> str:
        """So far."""
        return "".join(self.texts)

    @property
    def pause_s(self) -> float:
        """The longest wait between two deltas."""
        return max((b - a for a, b in pairwise(self.arrived)), default=0.0)

    @property
    def looks_finished(self) -> bool:
        """Whether any client could take this for a whole answer."""
        return bool(self.finish) or self.done or (self.whole and self.code == 200)

    def begun(self, deltas: int = 2) -> Answer:
        """Wait until it flows."""
        until(lambda: len(self.texts) >= deltas or self.ended_s, FIRST_S, "the answer flows")
        assert not self.ended_s, f"it ended: {self.code} {self.error} {self.broken}"
        return self

    def ended(self, within_s: float = 60.0) -> Answer:
        """Wait until it is over."""
        self.join(within_s)
        assert not self.is_alive(), f"the answer still runs after {within_s:g} s"
        return self

    def leave(self) -> None:
        """Break the connection, as a client that was closed does."""
        self._leaving = True
        sock = self._connection.sock
        if sock is not None:
            sock.shutdown(socket.SHUT_RDWR)
        self.join(10)

    def run(self) -> None:
        """Read to the end."""
        try:
            self._connection.request(
                "POST", "/v1/chat/completions", self._body, {"Content-Type": "application/json"}
            )
            response = self._connection.getresponse()
            self.code = response.status
            if self.code != 200:
                self.error = json.loads(response.read())["error"]["message"]
                return
            while line := response.readline():
                self._line(line)
            # http.client ends a body quietly where the connection broke between two chunks.
            self.whole = self.done
            self.broken = "" if self.done or self.error else "it was cut off"
        except (OSError, http.client.HTTPException, ValueError, AttributeError) as error:
            if not self._leaving:
                self.broken = f"{type(error).__name__}: {error}"
        finally:
            self._connection.close()
            self.ended_s = time.monotonic()

    def _line(self, line: bytes) -> None:
        if not line.startswith(b"data:"):
            return
        data = line[5:].strip()
        if data == b"[DONE]":
            self.done = True
            return
        event = json.loads(data)
        if "error" in event:
            self.error = event["error"]["message"]
            return
        self.model = event["model"]
        for choice in event["choices"]:
            if text := choice["delta"].get("content"):
                self.texts.append(text)
                self.arrived.append(time.monotonic())
            self.finish = choice["finish_reason"] or self.finish


def flowing(agents: list[Agent], each: int = 1, tokens: int = 3000) -> list[Answer]:
    """Long answers under way, `each` from each of these entries."""
    asked = [Answer(agent, f"q{i}", tokens) for agent in agents for i in range(each)]
    return [answer.begun() for answer in asked]
