"""Why a stage's process ended, in a sentence: its exit code and the telling ones of its last lines.

Pure. A crash of an engine leaves dozens of lines on stderr; the one who reads the reason at night
wants the two or three that name the cause, and none that names folders of this machine.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence

LINES_MAX = 3
WORDS_MAX = 600  # characters

_ENGINE = re.compile(
    r"GGML_ASSERT|ggml_abort|(CUDA|ROCm|HIP|MUSA|Metal|Vulkan)\w* error|vk::\w*Error"
)
_FATAL = re.compile(r"Fatal Python error")
_FRAME = re.compile(r'^\s*File "(?P<file>[^"]*)", line (?P<line>\d+),? in (?P<name>.+)$')
_TRACE = re.compile(r"^Traceback \(most recent call last\)")
_NOISE = re.compile(
    r"^\s*(File \"|Traceback|Extension modules:|(Current )?[Tt]hread |Stack \(|#\d+ |\[0x|\^+|~+)"
    r"|\[0x[0-9a-f]+\]\s*$"
)
_FOLDERS = re.compile(r"(?<![\w:/])(?:/[^\s/:\"'()]+)+/(?=[^\s/:\"'()]+)")


def why_ended(
    code: int, lines: Sequence[str], *, loading: bool = False, memory_ran_out: bool = False
) -> str:
    """The reason. code: as subprocess gives it, negative for a signal. lines: its last ones.

    loading: it was not ready yet. memory_ran_out: the kernel counted a process that it killed.
    """
    while_loading = " while it loaded" if loading else ""
    words = last_words(lines, only_telling=code == -signal.SIGKILL)
    if code == -signal.SIGKILL and memory_ran_out:
        why = (
            f"its process was killed{while_loading} because memory ran out: a smaller `memory` in "
            "config.toml leaves more to other programs"
        )
    elif code < 0:
        why = f"its process was ended by {_signal_name(-code)}{while_loading}"
        if code == -signal.SIGKILL:
            why += " (by hand, or because memory ran out)"
    else:
        why = f"its process ended with code {code}{while_loading}"
    return why + (f"; last words: {words}" if words else "")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def last_words(lines: Sequence[str], *, only_telling: bool = False) -> str:
    """The lines that tell most. only_telling: rather none than just the last ones."""
    found = [line for line in lines if _ENGINE.search(line)][-LINES_MAX:]
    found = found or _fatal(lines) or _raised(lines)
    if not found and not only_telling:
        found = [line for line in lines if line.strip() and not _NOISE.search(line)][-LINES_MAX:]
    return " | ".join(_FOLDERS.sub("", line.strip()) for line in found)[:WORDS_MAX]


def _fatal(lines: Sequence[str]) -> list[str]:
    """Of faulthandler's dump: what happened, and in which two functions. Innermost comes first."""
    at = next((i for i, line in enumerate(lines) if _FATAL.search(line)), None)
    if at is None:
        return []
    frames = [said for line in lines[at:] if (said := _frame(line))]
    return [lines[at], *frames[:2]]


def _raised(lines: Sequence[str]) -> list[str]:
    """Of an exception that nobody caught: what it says, and where. Innermost comes last."""
    starts = [i for i, line in enumerate(lines) if _TRACE.search(line)]
    if not starts:
        return []
    inside = lines[starts[-1] + 1 :]
    ends = [line for line in inside if line[:1].strip() and not _NOISE.search(line)]
    frames = [said for line in inside if (said := _frame(line))]
    return [*ends[:1], *frames[-1:]] if ends else []


def _frame(line: str) -> str:
    """A line of a stack, without folders; "" for other lines."""
    if not (found := _FRAME.match(line)):
        return ""
    file = re.split(r"[/\\]", found["file"])[-1]
    return f"in {found['name']} ({file}:{found['line']})"
