"""A model's chat template, rendered: messages become the one text that the model learnt to read.

Templates come with models and are hostile until proven otherwise. This module is pure and runs in
the text process (`models.vocabulary`), which a template may crash, hang or fill: jinja2's immutable
sandbox keeps it from reaching anything, the bounds here and that process's limits keep it small.
What a template is given, and how jinja2 is set up, is what Hugging Face's transformers does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from peer.errors import RequestError

SOURCE_CHARS_MAX = 128 << 10  # the longest that we met have 30,000; compiling takes 1 s a megabyte
TEXT_CHARS_MAX = 32 << 20  # > 16 characters a token of a context of 1 Mi tokens

KEY = "tokenizer.chat_template"
GENERIC = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML, for models that carry no template at all: the format most widely trained on."""

_FAILURES = (
    TemplateError, ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError,
    RuntimeError, TypeError, ValueError,
)  # fmt: skip
"""What a template can raise by itself. Anything else ends the text process, and is reported so."""


class Refused(TemplateError):
    """The template's own `raise_exception("…")`: it does not allow these messages."""


class ChatTemplate:
    """One template, compiled at its first use. `name`: its metadata key, for people."""

    def __init__(self, name: str, source: str, bos: str = "", eos: str = "") -> None:
        self.name, self.source = name, source
        self._tokens = {"bos_token": bos, "eos_token": eos}
        self._compiled: Template | None = None

    def render(self, messages: Sequence[Mapping[str, Any]], chars_max: int = TEXT_CHARS_MAX) -> str:
        """The text that asks for the next message of the assistant.

        messages: each with `role` and `content`, both strings.
        Raises: RequestError, when the template refuses the messages, fails, or writes too much.
        """
        pieces: list[str] = []
        left = chars_max
        if len(self.source) > SOURCE_CHARS_MAX:
            raise self._failed(f"has {len(self.source)} characters, more than {SOURCE_CHARS_MAX}")
        try:
            if self._compiled is None:
                self._compiled = _environment().from_string(self.source)
            for piece in self._compiled.generate(
                messages=list(messages),
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._tokens,
            ):
                left -= len(piece)
                if left < 0:
                    raise self._failed(f"writes more than {chars_max} characters")
                pieces.append(piece)
            text = "".join(pieces)
            text.encode()  # a lone surrogate is not text
        except Refused as refusal:
            raise RequestError(
                f"the model's chat template does not allow these messages: {refusal}",
                param="messages",
                code="template_refused",
            ) from None
        except _FAILURES as error:
            raise self._failed(f"fails: {type(error).__name__}: {str(error)[:300]}") from None
        return text

    def _failed(self, how: str) -> RequestError:
        return RequestError(
            f"the model's chat template (`{self.name}`) {how}. Ask /v1/completions with a prompt, "
            "or pull another build of the model",
            param="messages",
            code="template_failed",
        )


def choose(metadata: Mapping[str, Any], text_of: Callable[[int], str]) -> ChatTemplate:
    """The template for plain chats, from a model's metadata.

    `tokenizer.chat_template`, else the named one `.default`, else the first named one; GENERIC only
    where there is none of them. text_of: a token's spelling, for bos_token and eos_token.
    """
    named = sorted(key for key in metadata if key.startswith(KEY + "."))
    for key in (KEY, f"{KEY}.default", *named):
        source = metadata.get(key)
        if isinstance(source, str) and source:
            break
    else:
        key, source = "none: the generic one", GENERIC
    bos, eos = (_token(metadata, which, text_of) for which in ("bos", "eos"))
    return ChatTemplate(key, source, bos, eos)


def _token(metadata: Mapping[str, Any], which: str, text_of: Callable[[int], str]) -> str:
    token = metadata.get(f"tokenizer.ggml.{which}_token_id")
    return text_of(token) if isinstance(token, int) and token >= 0 else ""


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks what to train on; we want its inside."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as an instance attribute)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The nodes between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, with bounds on the two operators that make much out of little."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """left `operator` right, or OverflowError where the result would be huge."""
        if operator == "*":
            for text, times in ((left, right), (right, left)):
                many = isinstance(text, str | bytes | list | tuple) and isinstance(times, int)
                if many and len(text) * times > TEXT_CHARS_MAX:
                    raise OverflowError(f"a text repeated {times} times")
        elif isinstance(right, int) and abs(right) > 1024:
            raise OverflowError(f"a number to the power of {right}")
        return super().call_binop(context, operator, left, right)


def _environment() -> _Sandbox:
    environment = _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _Generation],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without jinja2's HTML escapes."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: object) -> None:
    raise Refused(str(message)[:300])


def _strftime_now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)
