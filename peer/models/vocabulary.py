"""The text process of one model: `python -m peer.models.vocabulary`, started by `models.text`.

It renders the chat template and turns text into token ids, so that a hostile template or tokenizer
can crash, hang or fill only this process. It speaks `text_messages` over stdin and stdout and ends
when stdin does. Nothing that it loads can write into that channel: the real descriptors are taken
away first. Memory is bounded once the vocabulary is loaded, and a question that takes far too long
ends the process by itself, in case the agent that would end it is gone.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
from io import BufferedReader, FileIO
from pathlib import Path

import msgspec

import backends
from backends.base import BackendFault, Vocabulary
from peer.errors import GGUFError, RequestError
from peer.models import gguf, template
from peer.models.text_messages import (
    LENGTH,
    MESSAGE_BYTES_MAX,
    Answer,
    Done,
    Encode,
    Encoded,
    Facts,
    Failed,
    Open,
    Question,
    Render,
    Rendered,
    WantFacts,
    framed,
    packed,
    questions,
)

QUESTION_S = 90.0  # > every deadline of models.text
OPENING_BYTES_MAX = 4 << 30  # the engine's library and a vocabulary
WORKING_BYTES_MAX = 512 << 20  # what a template may add to that


class Words:
    """One model's vocabulary and template, opened by the first question."""

    def __init__(self) -> None:
        self._vocabulary: Vocabulary | None = None
        self._template: template.ChatTemplate | None = None

    def answer(self, question: Question) -> Answer:
        """Answer any question; what a model or a request can cause becomes Failed."""
        try:
            return self._answer(question)
        except RequestError as error:
            return Failed(question.request, str(error), True, error.code, error.param)
        except (BackendFault, GGUFError, ImportError, OSError) as error:
            return Failed(question.request, str(error) or type(error).__name__)
        except MemoryError:
            return Failed(question.request, "it needs more memory than a text process may use")

    def _answer(self, question: Question) -> Answer:
        if isinstance(question, Open):
            self._open(question.engine, Path(question.head))
            return Done(question.request)
        if self._vocabulary is None or self._template is None:
            return Failed(question.request, "no model is open yet")
        match question:
            case WantFacts():
                pieces, ends = self._vocabulary.pieces(), sorted(self._vocabulary.ends)
                return Facts(question.request, pieces, ends, self._template.name)
            case Render():
                text = self._template.render(question.messages, question.chars_max)
                return Rendered(question.request, text)
            case Encode():
                return Encoded(question.request, packed(_encode(self._vocabulary, question.text)))

    def _open(self, engine: str, head: Path) -> None:
        try:
            door = backends.load(engine)
        except KeyError:
            raise BackendFault(f"there is no engine `{engine}`") from None
        metadata = gguf.read(head).header().metadata
        self._vocabulary = door.vocabulary(head)
        self._template = template.choose(metadata, self._vocabulary.text_of)
        _bound_memory(_data_bytes() + WORKING_BYTES_MAX)


def _encode(vocabulary: Vocabulary, text: str) -> list[int]:
    """Ids with `starts_with` before them, once: many templates write BOS out themselves."""
    ids, start = vocabulary.encode(text, special=True), list(vocabulary.starts_with)
    return ids if ids[: len(start)] == start else start + ids


def _data_bytes() -> int:
    """Private writable memory of this process, 0 where the system does not say (macOS)."""
    with contextlib.suppress(OSError), Path("/proc/self/status").open(encoding="ascii") as status:
        for line in status:
            if line.startswith("VmData:"):
                return int(line.split()[1]) << 10
    return 0


def _bound_memory(most_bytes: int) -> None:
    """RLIMIT_DATA and not RLIMIT_AS: GPU libraries reserve address space that they never use."""
    with contextlib.suppress(OSError, ValueError):  # where the system has no such limit
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        most = most_bytes if hard == resource.RLIM_INFINITY else min(most_bytes, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (most, hard))


def _take_channel() -> tuple[BufferedReader, int]:
    """The real stdin and stdout; what others know as 0 is empty, as 1 is stderr."""
    source, sink = os.dup(0), os.dup(1)
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    os.dup2(2, 1)
    return BufferedReader(FileIO(source, "rb")), sink


def _read(source: BufferedReader) -> Question | None:
    """The next question; None when the agent is gone or talks nonsense."""
    length = source.read(LENGTH.size)
    if len(length) < LENGTH.size:
        return None
    (size,) = LENGTH.unpack(length)
    if size > MESSAGE_BYTES_MAX:
        return None
    data = source.read(size)
    try:
        return questions.decode(data) if len(data) == size else None
    except msgspec.MsgspecError:
        return None


def _write(sink: int, answer: Answer) -> None:
    try:
        data = memoryview(framed(answer))
    except ValueError as error:
        data = memoryview(framed(Failed(answer.request, str(error))))
    while data:
        data = data[os.write(sink, data) :]


def main() -> int:
    """Answer questions until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the agent, which then ends us
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the default ends the process, even inside C
    source, sink = _take_channel()
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold prompts
    _bound_memory(OPENING_BYTES_MAX)
    words = Words()
    while (question := _read(source)) is not None:
        signal.setitimer(signal.ITIMER_REAL, QUESTION_S)
        answer = words.answer(question)
        try:
            _write(sink, answer)
        except BrokenPipeError:
            break
        signal.setitimer(signal.ITIMER_REAL, 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
