"""The ring drawn in a terminal: a line a peer, its layers as a stretch of the model's whole length.

    ╭▸ desk           ██████████················   0–11      serving        212.0 MiB
    │  attic          ··········████████········  12–20      fetching 43%    12.1 MiB
    ╰─ mini           ··················████████  21–29      loading

Used by `status` and by `plan`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from peer.words.screen import PALETTE, Screen

_STYLE = {"serving": "green", "failed": "red", "fetching": "yellow", "loading": "yellow"}


@dataclass(frozen=True, slots=True)
class Row:
    """One peer of the ring. `windows`: [first, last) in rounds' order; `done`: 0 to 1.

    gpu: of the windows, the stretches on a GPU; streamed: those that do not stay in memory.
    """

    name: str
    windows: tuple[tuple[int, int], ...]
    phase: str = ""
    done: float = 1.0
    right: str = ""
    why: str = ""
    gpu: tuple[tuple[int, int], ...] = ()
    streamed: tuple[tuple[int, int], ...] = ()


def draw(screen: Screen, layers: int, rows: Sequence[Row]) -> list[str]:
    """The ring, head first, each line at most as wide as the screen."""
    width = max(6, screen.width - 54)
    lines = []
    for index, row in enumerate(rows):
        colour = PALETTE[index % len(PALETTE)]
        phase = screen.clean(f"{row.phase} {row.done:.0%}" if row.done < 1 else row.phase)
        lines.append(
            "  "
            + screen.paint(_edge(screen, index, len(rows)), "dim")
            + " "
            + screen.paint(screen.fit(screen.clean(row.name), 14), "bold")
            + " "
            + _bar(screen, layers, row, width, colour)
            + " "
            + screen.fit(spans(screen, row.windows), 9)
            + " "
            + screen.paint(screen.fit(phase, 13), *_styles(row.phase))
            + " "
            + f"{row.right:>9}"
        )
        lines[-1] = lines[-1].rstrip()
        if row.why:
            lines += screen.wrap(row.why, "       ")
    return lines


def legend(screen: Screen, rows: Sequence[Row]) -> list[str]:
    """What the bars are made of, where it is more than one thing."""
    kinds = []
    if any(_layers(row.windows) > _layers(row.gpu + row.streamed) for row in rows):
        kinds.append(f"{_glyph(screen, 'cpu')} on the CPU")
    if any(row.gpu for row in rows):
        kinds.append(f"{_glyph(screen, 'gpu')} on a GPU")
    if any(row.streamed for row in rows):
        kinds.append(f"{_glyph(screen, 'streamed')} read from disk again for each token")
    plain = not any(row.gpu or row.streamed for row in rows)
    return [] if plain else [screen.paint(f"     {'   '.join(kinds)}", "dim")]


def _layers(stretches: Sequence[tuple[int, int]]) -> int:
    return sum(last - first for first, last in stretches)


def _glyph(screen: Screen, kind: str) -> str:
    fine, plain = {"cpu": ("█", "#"), "gpu": ("▓", "@"), "streamed": ("░", "%")}[kind]
    return screen.pick(fine, plain)


def spans(screen: Screen, windows: Sequence[tuple[int, int]]) -> str:
    """Layers as people count them, both ends included: 0–11, and 0–4+10–14 for two rounds."""
    dash = screen.pick("–", "-")
    parts = [f"{a}{dash}{b - 1}" if b - a > 1 else str(a) for a, b in windows]
    text = "+".join(parts)
    return text if len(text) <= 9 or len(parts) == 1 else f"{parts[0]}+{len(parts) - 1}"


def in_ring_order(windows: Sequence[tuple[int, int]]) -> int:
    """Sorts peers by their first layer."""
    return min((first for first, _ in windows), default=1 << 30)


def _styles(phase: str) -> tuple[str, ...]:
    return (_STYLE[phase],) if phase in _STYLE else ()


def _edge(screen: Screen, index: int, count: int) -> str:
    if count == 1:
        return screen.pick("⟳ ", "o ")
    if index == 0:
        return screen.pick("╭▸", ",>")
    if index == count - 1:
        return screen.pick("╰─", "'-")
    return screen.pick("│ ", "| ")


def _bar(screen: Screen, layers: int, row: Row, width: int, colour: str) -> str:
    """Cells of the model's length: this peer's own filled as far as they are done."""
    full, part, empty = _glyph(screen, "cpu"), screen.pick("▒", "-"), screen.pick("·", ".")
    cells = [empty] * width
    other = {
        cell: _glyph(screen, kind)
        for kind, stretches in (("gpu", row.gpu), ("streamed", row.streamed))
        for stretch in stretches
        for cell in _cells(stretch, layers, width)
    }
    own = sorted({cell for window in row.windows for cell in _cells(window, layers, width)})
    filled = round(len(own) * max(0.0, min(1.0, row.done)))
    for index, cell in enumerate(own):
        cells[cell] = other.get(cell, full) if index < filled else part
    return "".join(
        screen.paint("".join(run), "dim" if glyph == empty else colour)
        for glyph, run in groupby(cells)
    )


def _cells(window: tuple[int, int], layers: int, width: int) -> range:
    """Columns of one window; a window thinner than a column still shows."""
    if layers <= 0:
        return range(0)
    first = min(window[0] * width // layers, width - 1)
    return range(first, min(max(window[1] * width // layers, first + 1), width))
