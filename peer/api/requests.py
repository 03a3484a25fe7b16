"""What a client may ask in OpenAI's dialect, checked once: JSON becomes typed wishes or a 400.

Unknown parameters are ignored, absurd values and wishes that cannot be met are refused by name:
a client that asks for tools must not get prose that looks like an answer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from peer.errors import RequestError
from peer.protocol import Sampling

STOPS_MAX = 16
STOP_CHARS_MAX = 256
CHOICES_MAX = 16  # prompts times n
BIASES_MAX = 1024  # as Sampling.logit_bias
_I63 = (1 << 63) - 1

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

_NUMBERS = (
    # name, Sampling's field, lowest, highest
    ("temperature", "temperature", 0.0, 100.0),
    ("top_p", "top_p", 0.0, 1.0),
    ("min_p", "min_p", 0.0, 1.0),
    ("repetition_penalty", "repeat_penalty", 0.01, 100.0),
    ("repeat_penalty", "repeat_penalty", 0.01, 100.0),
    ("frequency_penalty", "frequency_penalty", -100.0, 100.0),
    ("presence_penalty", "presence_penalty", -100.0, 100.0),
)


@dataclass(frozen=True, slots=True)
class Wish:
    """What chats and completions have in common. seed None: draw one. tokens_max None: no limit.

    endless: an end token does not end an answer: what measures wants as many tokens as it asks for.
    """

    model: str
    sampling: Sampling
    seed: int | None
    tokens_max: int | None
    stops: tuple[str, ...]
    choices: int
    stream: bool
    include_usage: bool
    endless: bool = False


@dataclass(frozen=True, slots=True)
class ChatWish:
    """A chat: messages as {"role", "content"}, content one text."""

    common: Wish
    messages: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class CompletionWish:
    """Prompts, as texts or as token ids."""

    common: Wish
    prompts: tuple[str | list[int], ...]


def chat(body: dict[str, Any]) -> ChatWish:
    """A request to /v1/chat/completions. Raises RequestError, naming the parameter."""
    for name in ("tools", "functions"):
        if body.get(name):
            raise _cannot(name, "call tools")
    choice = body.get("tool_choice")
    if choice not in (None, "none", "auto"):
        raise _cannot("tool_choice", "call tools")
    if body.get("logprobs"):
        raise _cannot("logprobs", "give log probabilities")
    if body.get("audio") or [m for m in _list(body, "modalities") if m != "text"]:
        raise _cannot("modalities", "give anything but text")
    tokens_max = _integer(body, "max_completion_tokens", 1, 1 << 31)
    if tokens_max is None:
        tokens_max = _integer(body, "max_tokens", 1, 1 << 31)
    else:
        _integer(body, "max_tokens", 1, 1 << 31)
    return ChatWish(_common(body, tokens_max), _messages(body))


def completion(body: dict[str, Any]) -> CompletionWish:
    """A request to /v1/completions. Raises RequestError, naming the parameter."""
    if body.get("logprobs") is not None and body["logprobs"] is not False:
        raise _cannot("logprobs", "give log probabilities")
    if body.get("suffix"):
        raise _cannot("suffix", "fill in the middle")
    if body.get("echo"):
        raise _cannot("echo", "repeat the prompt")
    common = _common(body, _integer(body, "max_tokens", 1, 1 << 31))
    best = _integer(body, "best_of", 1, CHOICES_MAX)
    if best is not None and best != common.choices:
        raise _cannot("best_of", "choose the best of several answers")
    prompts = _prompts(body)
    if len(prompts) * common.choices > CHOICES_MAX:
        raise _wrong("prompt", f"asks for more than {CHOICES_MAX} answers at once")
    return CompletionWish(common, prompts)


def _common(body: dict[str, Any], tokens_max: int | None) -> Wish:
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise _wrong("model", "is the name of a model")
    form = body.get("response_format")
    if form is not None and form != {"type": "text"}:
        raise _cannot("response_format", "hold an answer to a format")
    if body.get("top_logprobs"):
        raise _cannot("top_logprobs", "give log probabilities")
    stream = _boolean(body, "stream")
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise _wrong("stream_options", "is an object")
    seed = _integer(body, "seed", -(1 << 63), _I63)
    return Wish(
        model=model or "",
        sampling=_sampling(body),
        seed=None if seed is None else seed & _I63,  # below 0 is a seed too, for OpenAI
        tokens_max=tokens_max,
        stops=_stops(body),
        choices=_integer(body, "n", 1, CHOICES_MAX) or 1,
        stream=stream,
        include_usage=_boolean(options or {}, "include_usage", "stream_options.include_usage"),
        endless=_boolean(body, "ignore_eos"),  # as other servers call it
    )


def _sampling(body: dict[str, Any]) -> Sampling:
    """How to sample, all but the seed."""
    given: dict[str, Any] = {}
    for name, field, low, high in _NUMBERS:
        if (number := _number(body, name, low, high)) is not None:
            given[field] = number
    if (top_k := _integer(body, "top_k", -1, 1 << 20)) is not None:
        given["top_k"] = max(0, top_k)  # -1 means all, too
    if (last := _integer(body, "repeat_last_n", -1, 1 << 20)) is not None:
        given["repeat_last_n"] = last
    return Sampling(**given, logit_bias=_biases(body))


def _biases(body: dict[str, Any]) -> tuple[tuple[int, float], ...]:
    """logit_bias: {"token id": -100 … 100}."""
    biases = body.get("logit_bias")
    if biases is None:
        return ()
    if not isinstance(biases, dict) or len(biases) > BIASES_MAX:
        raise _wrong("logit_bias", f"is an object of at most {BIASES_MAX} token ids")
    pairs = []
    for token, bias in biases.items():
        if not (token.isascii() and token.isdecimal() and len(token) <= 9):
            raise _wrong("logit_bias", "has token ids as its keys")
        if not _is_number(bias) or not -100 <= bias <= 100:
            raise _wrong("logit_bias", "has values from -100 to 100")
        pairs.append((int(token), float(bias)))
    return tuple(pairs)


def _stops(body: dict[str, Any]) -> tuple[str, ...]:
    stop = body.get("stop")
    stops = [stop] if isinstance(stop, str) else _list(body, "stop", STOPS_MAX)
    for text in stops:
        if not isinstance(text, str) or len(text) > STOP_CHARS_MAX:
            raise _wrong(
                "stop", f"is one or a list of texts of at most {STOP_CHARS_MAX} characters"
            )
    return tuple(text for text in stops if text)


def _messages(body: dict[str, Any]) -> list[dict[str, Any]]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _wrong("messages", "is a list of at least one message")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise _wrong(where, "is an object with role and content")
    role = message.get("role")
    if role in ("tool", "function") or message.get("tool_calls") or message.get("function_call"):
        raise _cannot(where, "call tools")
    if not isinstance(role, str) or role not in ROLES:
        raise _wrong(f"{where}.role", f"is one of {', '.join(ROLES)}")
    content = message.get("content")
    if content is None and role == "assistant":
        content = ""
    if isinstance(content, list):
        content = "\n".join(_part(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    if not isinstance(content, str):
        raise _wrong(f"{where}.content", "is a text or a list of parts")
    return {"role": ROLES[role], "content": content}


def _part(part: Any, where: str) -> str:
    """A content part's text. They are joined by newlines, as other servers do."""
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise _wrong(where, "is an object with a type")
    if part["type"] != "text":
        raise _cannot(where, f"read {part['type'][:40]}: the model that is served reads text")
    if not isinstance(part.get("text"), str):
        raise _wrong(f"{where}.text", "is a text")
    text: str = part["text"]
    return text


def _prompts(body: dict[str, Any]) -> tuple[str | list[int], ...]:
    """One text, several texts, one list of token ids, or several."""
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return (prompt,)
    if isinstance(prompt, list) and prompt:
        if _is_ids(prompt):
            return (prompt,)
        if len(prompt) > CHOICES_MAX:
            raise _wrong("prompt", f"has at most {CHOICES_MAX} texts")
        if all(isinstance(p, str) or (isinstance(p, list) and p and _is_ids(p)) for p in prompt):
            return tuple(prompt)
    raise _wrong("prompt", "is a text, a list of token ids, or a list of one of them")


def _is_ids(prompt: list[Any]) -> bool:
    return all(type(token) is int and 0 <= token < 1 << 31 for token in prompt)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, int) or math.isfinite(value)


def _number(body: dict[str, Any], name: str, low: float, high: float) -> float | None:
    value = body.get(name)
    if value is None:
        return None
    if not _is_number(value) or not low <= value <= high:
        raise _wrong(name, f"is a number from {low:g} to {high:g}")
    return float(value)


def _integer(body: dict[str, Any], name: str, low: int, high: int) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer() and abs(value) < 1 << 53:
        value = int(value)  # 100.0 is how some languages write 100
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise _wrong(name, f"is a whole number from {low} to {high}")
    return value


def _boolean(body: dict[str, Any], name: str, where: str = "") -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise _wrong(where or name, "is true or false")
    return bool(value)


def _list(body: dict[str, Any], name: str, most: int = 16) -> list[Any]:
    value = body.get(name)
    if value is None:
        return []
    if not isinstance(value, list) or len(value) > most:
        raise _wrong(name, f"is a list of at most {most}")
    return value


def _wrong(name: str, what: str) -> RequestError:
    return RequestError(f"`{name}` {what}", param=name, code="invalid_value")


def _cannot(name: str, what: str) -> RequestError:
    return RequestError(
        f"`{name}`: halka cannot {what} yet", param=name, code="unsupported_parameter"
    )
