"""Many answers at once from the agent, each streamed on a thread of its own, all ended together.

Ctrl-C, or the end of their time, closes the connections, which ends the answers in every stage.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from typing import Any

from peer.errors import CommandError
from peer.words.agent import Agent
from peer.words.bench_figures import Heard

_LOOK_S = 0.2  # between looks whether somebody typed Ctrl-C: a join would not hear it
_ENDED_S = 5.0  # for a thread whose connection is closed to be gone


class _Listener(threading.Thread):
    """One answer."""

    def __init__(self, agent: Agent, path: str, body: Mapping[str, Any]) -> None:
        super().__init__(name="answer")
        self._agent, self._path, self._body = agent, path, body
        self._socket: socket.socket | None = None
        self._ending = threading.Event()
        self.heard = Heard()

    def run(self) -> None:
        heard = self.heard
        heard.asked_s = time.monotonic()
        try:
            with closing(self._agent.events(self._path, self._body, self._opened)) as events:
                for event in events:
                    _take(event, heard)
        except CommandError as error:
            heard.why = "" if self._ending.is_set() else str(error)
        heard.ended_s = time.monotonic()
        heard.cut = self._ending.is_set() and not heard.finish
        if not (heard.finish or heard.cut or heard.why):
            heard.why = "the answer was cut off"

    def _opened(self, connection: socket.socket) -> None:
        self._socket = connection
        if self._ending.is_set():
            self.end()

    def end(self) -> None:
        """Hang up."""
        self._ending.set()
        if self._socket is not None:
            with suppress(OSError):  # it has ended by itself
                self._socket.shutdown(socket.SHUT_RDWR)


def _take(event: Mapping[str, Any], heard: Heard) -> None:
    """One event of the stream."""
    choices = event.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if isinstance(choice, dict):
        delta = choice.get("delta")
        text = delta.get("content") if isinstance(delta, dict) else choice.get("text")
        if isinstance(text, str) and text:
            heard.at_s.append(time.monotonic())
            heard.text += text
        if isinstance(finish := choice.get("finish_reason"), str):
            heard.finish = finish
    usage = event.get("usage")
    if isinstance(usage, dict):
        heard.tokens = _number(usage.get("completion_tokens"))
        heard.prompt_tokens = _number(usage.get("prompt_tokens"))


def _number(value: object) -> int:
    return value if type(value) is int and value > 0 else 0


def ask(
    agent: Agent, path: str, bodies: Sequence[Mapping[str, Any]], limit_s: float
) -> list[Heard]:
    """All of these at once, in the order of `bodies`. limit_s: then those that still run are cut.

    Raises: CommandError where every one failed, with the first reason; KeyboardInterrupt.
    """
    common = {"stream": True, "stream_options": {"include_usage": True}}
    listeners = [_Listener(agent, path, {**common, **body}) for body in bodies]
    until_s = time.monotonic() + limit_s
    begun: list[_Listener] = []
    try:
        for listener in listeners:
            begun.append(listener)
            listener.start()
        for listener in begun:
            while listener.is_alive() and time.monotonic() < until_s:
                listener.join(min(_LOOK_S, max(0.0, until_s - time.monotonic())))
    finally:
        for listener in begun:
            listener.end()
        for listener in begun:
            if listener.ident is not None:
                listener.join(_ENDED_S)
    answers = [listener.heard for listener in listeners]
    if all(heard.why for heard in answers):
        raise CommandError(answers[0].why, "look at it: halka status")
    return answers
