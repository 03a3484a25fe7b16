"""`halka chat`: one answer, or a conversation, streamed from the agent on this machine."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Any

from peer.errors import CommandError
from peer.words.agent import Agent
from peer.words.screen import Screen, note, prose, write

Turn = dict[str, str]
INTERRUPTED = 130  # what shells expect of a program that Ctrl-C ended
WELCOME = "/new begins a new chat, Ctrl-C stops an answer, Ctrl-D ends"


@dataclass(slots=True)
class Measured:
    """One answer and its times as seen here. Seconds on the monotonic clock."""

    asked_s: float = field(default_factory=time.monotonic)
    first_s: float = 0.0
    last_s: float = 0.0
    pieces: int = 0
    tokens: int = 0  # the agent's count; 0: it gave none
    prompt_tokens: int = 0
    finish: str = ""
    text: str = ""

    def arrived(self, text: str) -> None:
        """A piece of the answer is here."""
        self.last_s = time.monotonic()
        self.first_s = self.first_s or self.last_s
        self.pieces += 1
        self.text += text

    @property
    def ttft_s(self) -> float:
        """Time to first token."""
        return self.first_s - self.asked_s if self.pieces else 0.0

    @property
    def tpot_s(self) -> float:
        """Time per output token, after the first."""
        after = max(self.tokens, self.pieces) - 1
        return (self.last_s - self.first_s) / after if after > 0 else 0.0

    def line(self) -> str:
        """The three numbers for people."""
        tokens = self.tokens or self.pieces
        rate = f" ({1 / self.tpot_s:.1f} tokens/s)" if self.tpot_s else ""
        return (
            f"TTFT {self.ttft_s * 1000:.0f} ms, TPOT {self.tpot_s * 1000:.1f} ms{rate}, "
            f"{tokens} tokens, prompt {self.prompt_tokens} tokens"
        )


def command(args: Namespace) -> int:
    """Returns 0, or 130 after Ctrl-C. Raises: CommandError, also where an answer is cut off."""
    agent = Agent(args.home, args.http)
    options = _options(args)
    options["model"] = args.model or _model(agent)
    question = args.question
    if question is None and not sys.stdin.isatty():
        question = sys.stdin.read()
    if question is None:
        return _conversation(agent, options, args.stats)
    if not question.strip():
        raise CommandError("there is no question", 'ask one: halka chat "Why is the sky blue?"', 2)
    try:
        answer = ask(agent, [{"role": "user", "content": question}], options)
    except KeyboardInterrupt:
        write("\n")
        return INTERRUPTED
    _ended(answer, args.stats)
    return 0


def ask(agent: Agent, turns: list[Turn], options: dict[str, Any]) -> Measured:
    """Stream one answer to standard output. Raises: CommandError, KeyboardInterrupt."""
    answer = Measured()
    try:
        for _ in _pieces(agent, turns, options, answer):
            pass
    except CommandError:
        if answer.text:
            write("\n")  # what went wrong stands on its own line
        raise
    if not answer.text.endswith("\n"):
        write("\n")
    if not answer.finish:
        raise CommandError(
            "the answer was cut off: the agent ended it without saying why",
            "ask again; halka status says what is wrong",
        )
    return answer


def _pieces(
    agent: Agent, turns: list[Turn], options: dict[str, Any], answer: Measured
) -> Iterator[None]:
    body = {
        **options,
        "messages": turns,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    with closing(agent.events("/v1/chat/completions", body)) as events:
        for event in events:
            text, finish = _delta(event)
            if text:
                answer.arrived(text)
                write(prose(text))
            answer.finish = finish or answer.finish
            if isinstance(usage := event.get("usage"), dict):
                answer.tokens = _number(usage.get("completion_tokens"))
                answer.prompt_tokens = _number(usage.get("prompt_tokens"))
            yield


def _delta(event: dict[str, Any]) -> tuple[str, str]:
    """Text and finish reason of one chunk; "" where it has none."""
    choices = event.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        return "", ""
    delta = choice.get("delta")
    text = delta.get("content") if isinstance(delta, dict) else None
    finish = choice.get("finish_reason")
    return text if isinstance(text, str) else "", finish if isinstance(finish, str) else ""


def _number(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _options(args: Namespace) -> dict[str, Any]:
    """Only what was typed: the agent's defaults hold for the rest."""
    given = {"temperature": args.temperature, "max_tokens": args.max_tokens, "seed": args.seed}
    return {key: value for key, value in given.items() if value is not None}


def _model(agent: Agent) -> str:
    model = agent.status().model
    if not model.id and model.why and not model.why.startswith("no model yet"):
        raise CommandError(f"nothing is served now: {model.why}", "halka status --watch", 4)
    if not model.id:
        raise CommandError("the cluster has no model yet", "get one: halka pull smollm2", 4)
    return model.id


def _ended(answer: Measured, stats: bool) -> None:
    if answer.finish == "length":
        note("(cut at the token limit)")
    if stats:
        note(answer.line())


def _conversation(agent: Agent, options: dict[str, Any], stats: bool) -> int:
    """Questions until Ctrl-D; a failed or stopped answer does not end it."""
    with suppress(ImportError):
        import readline  # noqa: F401 - gives input() its history and arrow keys
    screen = Screen.of(sys.stdout)
    note(f"{screen.clean(options['model'])}. {WELCOME}.")
    turns: list[Turn] = []
    while True:
        try:
            question = input(screen.pick("› ", "> "))
        except EOFError:
            write("\n")
            return 0
        except KeyboardInterrupt:
            write("\n")
            note("Ctrl-D ends")
            continue
        if question.strip() == "/new":
            turns = []
            note("a new chat")
        elif question.strip():
            turns = _exchange(
                agent, [*turns, {"role": "user", "content": question}], options, stats
            )


def _exchange(agent: Agent, turns: list[Turn], options: dict[str, Any], stats: bool) -> list[Turn]:
    """One question answered; returns the turns that the next question goes on from."""
    answer = Measured()
    try:
        answer = ask(agent, turns, options)
        _ended(answer, stats)
    except KeyboardInterrupt:
        write("\n")
        note("(stopped)")
        return turns[:-1]
    except CommandError as error:
        note(f"halka: {error}")
        if error.mend:
            note(f"  mend it: {error.mend}")
        return turns[:-1]
    return [*turns, {"role": "assistant", "content": answer.text}]
