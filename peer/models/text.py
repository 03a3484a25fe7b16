"""Text into token ids, from the agent's side: the client of one model's text process.

Each model that this peer answers for has one text process (`models.vocabulary`). It is asked one
question at a time, each with a deadline; one that is late is killed, one that died is started anew,
and neither ever harms the agent: the request that met it gets an error or a second try.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from peer import children
from peer.errors import ModelError, NoPlan, RequestError
from peer.models.text_messages import (
    LENGTH,
    MESSAGE_BYTES_MAX,
    Done,
    Encode,
    Encoded,
    Facts,
    Failed,
    Message,
    Open,
    Render,
    Rendered,
    WantFacts,
    answers,
    framed,
    unpacked,
)

log = logging.getLogger("halka.text")

COMMAND = children.command("peer.models.vocabulary")
OPEN_S = 60.0  # a cold disk and an engine's library
RENDER_S = 2.0  # a template takes milliseconds
ENCODE_S = 2.0
EXIT_S = 1.0  # from the end of its pipe to the end of the process
ENCODE_CHAR_S = 20e-6  # llama.cpp takes 0.5 to 2.4 on a slow core
CHARS_A_TOKEN = 16  # no text is so dense that it has more characters a token
CHARS_SLACK = 4096  # so that short contexts still get an exact count
TOKENS_MAX = 1 << 20  # pieces and ids that we take from a text process

T = TypeVar("T", bound=Message)


class _Gone(Exception):
    """The process ended, or was ended for being late or incomprehensible."""

    def __init__(self, why: str, late: bool = False) -> None:
        self.late = late
        super().__init__(why)


class Text:
    """A model's words. pieces: the bytes of every id. ends: ids that end an answer."""

    def __init__(self, engine: str, head: Path, command: Sequence[str] = COMMAND) -> None:
        self.pieces: list[bytes] = []
        self.ends: frozenset[int] = frozenset()
        self.template = ""
        self._engine, self._head, self._command = engine, head, tuple(command)
        self._process: Process | None = None
        self._turn = asyncio.Lock()
        self._asked = 0
        self._closed = False

    @classmethod
    async def open(cls, engine: str, head: Path, *, command: Sequence[str] = COMMAND) -> Text:
        """Start the text process of the model whose head.gguf this is.

        Raises: ModelError, saying why the engine cannot read its words.
        """
        text = cls(engine, head, command)
        try:
            await text._start()
            facts = await text._exchange(WantFacts(text._number()), Facts, OPEN_S)
        except _Gone as gone:
            raise ModelError(f"the words of {head} cannot be read: {gone}") from None
        except BaseException:
            await text.close()
            raise
        if not 0 < len(facts.pieces) <= TOKENS_MAX:
            await text.close()
            raise ModelError(f"{head} has {len(facts.pieces)} tokens; that cannot be")
        text.pieces, text.ends, text.template = facts.pieces, frozenset(facts.ends), facts.template
        return text

    async def ids_of_chat(
        self, messages: Sequence[dict[str, Any]], *, context_tokens: int
    ) -> list[int]:
        """Token ids of a chat: [{"role", "content"}, …], asking for the assistant's next message.

        Raises: RequestError, when the template refuses, fails or hangs, or the text cannot fit;
        ModelError, when the tokenizer does not work at all; NoPlan, when this was closed.
        """
        chars_max = _chars_max(context_tokens)
        _fits(sum(len(str(m.get("content", ""))) for m in messages), context_tokens, "messages")
        async with self._turn:
            question = Render(self._number(), list(messages), 2 * chars_max)
            text = (await self._ask(question, Rendered, RENDER_S, "messages")).text
            _fits(len(text), context_tokens, "messages")
            return await self._encode(text, "messages")

    async def ids_of_prompt(self, text: str, *, context_tokens: int) -> list[int]:
        """Token ids of a text as it is. Raises: RequestError, when it cannot fit."""
        _fits(len(text), context_tokens, "prompt")
        async with self._turn:
            return await self._encode(text, "prompt")

    async def close(self) -> None:
        """End the process, for good: who still waits for an answer gets NoPlan."""
        self._closed = True
        await self._end()
        async with self._turn:  # one that was just being started
            await self._end()

    async def _encode(self, text: str, param: str) -> list[int]:
        deadline_s = ENCODE_S + len(text) * ENCODE_CHAR_S
        answer = await self._ask(Encode(self._number(), text), Encoded, deadline_s, param)
        try:
            ids = unpacked(answer.ids)
        except ValueError:
            ids = [-1]
        if ids and not 0 <= min(ids) <= max(ids) < len(self.pieces):
            raise ModelError("the model's tokenizer gave ids that the model does not have")
        return ids

    async def _ask(self, question: Message, kind: type[T], deadline_s: float, param: str) -> T:
        """One answer, with a second try where the process died without being late."""
        for last in (False, True):
            if self._closed:
                raise NoPlan("another model is served from now on; ask again")
            try:
                if self._process is None or self._process.returncode is not None:
                    await self._start()
                return await self._exchange(question, kind, deadline_s)
            except _Gone as gone:
                log.warning("text process gone model=%s because=%s", self._head.parent.name, gone)
                if last or gone.late:
                    raise self._failure(gone, param) from None
        raise AssertionError

    def _failure(self, gone: _Gone, param: str) -> RequestError:
        if param == "messages":
            return RequestError(
                f"the model's chat template (`{self.template}`) did not work: {gone}. Ask "
                "/v1/completions with a prompt, or pull another build of the model",
                param=param,
                code="template_failed",
            )
        return RequestError(
            f"the model's tokenizer did not work on this text: {gone}",
            param=param,
            code="tokenizer_failed",
        )

    async def _start(self) -> None:
        """A new process with the model opened. Raises _Gone, ModelError."""
        await self._end()
        try:
            # Its stderr is not kept: what a template or tokenizer writes may hold prompts.
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=PIPE,
                stdout=PIPE,
                stderr=DEVNULL,
                start_new_session=True,  # Ctrl-C in a terminal is for the agent alone
                env=children.environment(),
            )
        except OSError as error:
            raise _Gone(f"it cannot be started: {error.strerror}") from None
        try:
            if self._closed:
                raise NoPlan("another model is served from now on; ask again")
            await self._exchange(Open(self._number(), self._engine, str(self._head)), Done, OPEN_S)
        except (ModelError, NoPlan):
            await self._end()
            raise

    async def _exchange(self, question: Message, kind: type[T], deadline_s: float) -> T:
        """Ask and wait. Raises: _Gone; RequestError, ModelError by what it answers."""
        try:
            async with asyncio.timeout(deadline_s):
                answer = await self._answer_to(question)
        except asyncio.CancelledError:
            await self._end()  # else its answer would come to the next who asks
            raise
        except TimeoutError:
            await self._end()
            raise _Gone(f"it did not finish within {deadline_s:.0f} s", late=True) from None
        except EOFError:  # its pipe closed: its exit code is there in a moment
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(EXIT_S):
                    if self._process is not None:
                        await self._process.wait()
            raise _Gone(f"its process ended ({await self._end()})") from None
        except (OSError, msgspec.MsgspecError, ValueError, RecursionError) as error:
            code = await self._end()
            raise _Gone(f"its process ended ({code})" if code else f"{error}") from None
        if isinstance(answer, Failed):
            if answer.client:
                raise RequestError(answer.why, code=answer.code, param=answer.param)
            raise ModelError(f"the words of {self._head} cannot be read: {answer.why}")
        if not isinstance(answer, kind):
            await self._end()
            raise _Gone("it answered something else")
        return answer

    async def _answer_to(self, question: Message) -> Message:
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise EOFError("it is not running")
        process.stdin.write(framed(question))
        await process.stdin.drain()
        (length,) = LENGTH.unpack(await process.stdout.readexactly(LENGTH.size))
        if length > MESSAGE_BYTES_MAX:
            raise ValueError(f"it says {length} bytes at once")
        answer = answers.decode(await process.stdout.readexactly(length))
        if answer.request != question.request:
            raise ValueError("it answered another question")
        return answer

    async def _end(self) -> int | None:
        """Kill the process if it runs; its exit status, where it had ended by itself."""
        process, self._process = self._process, None
        if process is None:
            return None
        ended = process.returncode
        try:
            if ended is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        finally:
            # Its pipes close by themselves only when they are read to their end.
            process._transport.close()  # type: ignore[attr-defined]
        return ended

    def _number(self) -> int:
        self._asked += 1
        return self._asked


def _chars_max(context_tokens: int) -> int:
    return CHARS_A_TOKEN * context_tokens + CHARS_SLACK


def _fits(chars: int, context_tokens: int, param: str) -> None:
    """Refuse, before any work, a text that cannot fit the context."""
    if chars > _chars_max(context_tokens):
        raise RequestError(
            f"the prompt has {chars} characters, which is more than the context of "
            f"{context_tokens} tokens can hold. Shorten it",
            param=param,
            code="context_length_exceeded",
        )
