"""What a terminal can show: its width, colour, characters; text made harmless; sizes for people.

Names and reasons come from other peers, so nothing is written before `clean` took out what a
terminal would obey. Bytes and seconds become GiB and minutes here and nowhere else.
"""

from __future__ import annotations

import os
import shutil
import sys
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TextIO

WIDTH_MIN, WIDTH_MAX = 60, 100
_COLOURS = {
    "bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "blue": "34",
    "magenta": "35", "cyan": "36",
}  # fmt: skip
PALETTE = ("cyan", "magenta", "green", "yellow", "blue", "red")
"""One colour a peer, in ring order."""


@dataclass(frozen=True, slots=True)
class Screen:
    """How to write on one terminal, or on a file or pipe that was put in its place."""

    width: int = 80
    colour: bool = False
    unicode: bool = True

    @classmethod
    def of(cls, stream: TextIO, environment: Mapping[str, str] | None = None) -> Screen:
        """The screen behind `stream`: colour only on a terminal and where NO_COLOR is not set."""
        environment = os.environ if environment is None else environment
        tty = stream.isatty()
        plain = bool(environment.get("NO_COLOR")) or environment.get("TERM") == "dumb"
        width = shutil.get_terminal_size((80, 24)).columns if tty else 80
        return cls(
            width=max(WIDTH_MIN, min(WIDTH_MAX, width)),
            colour=tty and not plain,
            unicode=_speaks_utf8(stream, environment),
        )

    def paint(self, text: str, *styles: str) -> str:
        """The text in colour, or as it is where there is none."""
        if not self.colour or not text:
            return text
        return f"\x1b[{';'.join(_COLOURS[style] for style in styles)}m{text}\x1b[0m"

    def pick(self, fine: str, plain: str) -> str:
        """A character for screens with Unicode, and the one for those without."""
        return fine if self.unicode else plain

    def clean(self, text: str) -> str:
        """Text from elsewhere on one line, without anything that a terminal would obey."""
        kept = "".join(" " if c.isspace() else c if _harmless(c) else "?" for c in text)
        return kept if self.unicode else kept.encode("ascii", "replace").decode("ascii")

    def fit(self, text: str, cells: int) -> str:
        """Exactly `cells` wide: cut with a mark, or filled with spaces."""
        if cells_of(text) > cells:
            mark = self.pick("…", "~")
            while text and cells_of(text) > cells - 1:
                text = text[:-1]
            text += mark
        return text + " " * (cells - cells_of(text))

    def wrap(self, text: str, first: str, rest: str = "") -> list[str]:
        """Cleaned text in lines of the screen's width, led by `first` and then by `rest`."""
        rest = rest or " " * len(first)
        lines, line = [], first
        for word in self.clean(text).split():
            if cells_of(line) + 1 + cells_of(word) > self.width and line.strip():
                lines.append(line)
                line = rest
            line += word if line in (first, rest) else " " + word
        return [*lines, line]


def _speaks_utf8(stream: TextIO, environment: Mapping[str, str]) -> bool:
    # Python speaks UTF-8 in the C locale too (PEP 540); the terminal that asked for C may not.
    if "utf" not in (stream.encoding or "").lower():
        return False
    names = (environment.get(key, "") for key in ("LC_ALL", "LC_CTYPE", "LANG"))
    locale = next((name for name in names if name), "")
    return not locale or "utf" in locale.lower()


def _harmless(character: str) -> bool:
    # C*: control, format (bidi overrides among them), surrogates; Zl, Zp: line separators.
    category = unicodedata.category(character)
    return category[0] != "C" and category not in ("Zl", "Zp")


def prose(text: str) -> str:
    """A model's answer: newlines and tabs stay, what else a terminal would obey is taken out."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs"))


def cells_of(text: str) -> int:
    """Columns that the text takes: wide characters two, combining ones none."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def size(count_bytes: float) -> str:
    """Bytes for people: 812 B, 3.4 MiB, 15.6 GiB."""
    if count_bytes < 1024:
        return f"{count_bytes:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        count_bytes /= 1024
        if count_bytes < 1023.95:
            return f"{count_bytes:.1f} {unit}"
    return f"{count_bytes / 1024:.1f} TiB"


def moment(seconds: float) -> str:
    """Seconds for people where they are few: 0.31 ms, 8.9 ms, 412 ms, 2.4 s, 3 min 20 s."""
    if seconds >= 59.95:
        return duration(seconds)
    if seconds >= 0.9995:
        return f"{seconds:.1f} s"
    thousandths = seconds * 1e3
    digits = 0 if thousandths >= 99.5 else 1 if thousandths >= 0.995 else 2
    return f"{thousandths:.{digits}f} ms"


def duration(seconds: float) -> str:
    """Seconds for people, in the two largest units: 4 s, 3 min 20 s, 2 h 5 min, 3 d 4 h."""
    whole = max(0, int(seconds))
    for unit_s, name, part_s, part_name in (
        (86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s"),
    ):  # fmt: skip
        if whole >= unit_s:
            rest = whole % unit_s // part_s
            return f"{whole // unit_s} {name}" + (f" {rest} {part_name}" if rest else "")
    return f"{whole} s"


def count(number: int, word: str) -> str:
    """1 peer, 2 peers."""
    return f"{number} {word}" + ("" if number == 1 else "s")


def say(text: str = "") -> None:
    """A line to standard output, at once."""
    write(text + "\n")


def write(text: str) -> None:
    """Text to standard output, at once; characters that it cannot show become question marks."""
    _put(sys.stdout, text)


def note(text: str) -> None:
    """A line to standard error: progress, hints, errors."""
    _put(sys.stderr, text + "\n")


def _put(stream: TextIO, text: str) -> None:
    encoding = stream.encoding or "ascii"
    stream.write(text.encode(encoding, "replace").decode(encoding))
    stream.flush()
