"""What a ring of two peers is worth: every ratio that the ring is to show, on this machine.

python -m tests.bench.fast [ROW…] [--turns N] [--json FILE] [--large GGUF]: two peers on loopback,
one core and one thread each, beside the same engine with the whole model in one process on one
core; SmolLM2-135M unless a row says otherwise. Runs go in turns, medians are compared. Rows: see
`--help`; all of them take about ten minutes. `gigabit` needs root. Exit code 1: a ratio is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from peer.models.imports import import_gguf
from peer.models.store import Store
from tests.bench import fast_rows as rows
from tests.bench.fast_ring import Model, Row
from tests.bench.pause import say
from tests.bench.random_1b import write
from tests.bench.streaming import commit, processor
from tests.bench.uneven import used
from tests.smollm2 import smollm2

ROWS: dict[str, Callable[[Model, int], Awaitable[Row]]] = {
    "one-stream": rows.one_stream,
    "one-stream-1b": rows.one_stream_large,
    "prefill": rows.prefill,
    "eight-streams": rows.eight_streams,
    "second-turn": rows.second_turn,
    "lookup": rows.lookup,
    "failing-drafts": rows.failing_drafts,
    "gap": rows.gap,
    "gigabit": rows.gigabit,
}
LARGE = {"one-stream-1b"}
QUIET = 0.1  # cores that may be busy for others


@dataclass
class Models:
    """SmolLM2, and the large one once a row wants it."""

    home: Path
    large: Path | None

    def of(self, name: str) -> Model:
        """The model of a row, imported."""
        path = smollm2()
        if name in LARGE:
            path = self.large or write(self.home / "random-1b.gguf")
        home = self.home / ("large" if name in LARGE else "small")
        store = Store(home)
        cores = tuple(sorted(os.sched_getaffinity(0), reverse=True))[:2]  # 0 has interrupts
        return Model(path, store, import_gguf(path, store), cores)


def line(row: Row) -> str:
    """A row of the table."""
    sign = "≤" if row.most else "≥"
    told = "holds" if row.holds else "MISSED"
    return f"  {row.name:15} {row.ratio:7.3f}  {sign} {row.wanted:<5g} {told:7} {row.what}"


def detail(row: Row) -> list[str]:
    """Its runs."""

    def runs(values: Sequence[float]) -> str:
        return " ".join(f"{value:.4g}" for value in values)

    return [f"    {runs(row.one)} ÷ {runs(row.other)} {row.unit}", *(f"    {n}" for n in row.notes)]


def main(words: Sequence[str]) -> int:
    """0: every ratio holds."""
    reader = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    reader.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(ROWS))
    reader.add_argument("--turns", type=int, default=7)
    reader.add_argument("--json", type=Path, help="write all runs to this file, too")
    reader.add_argument("--large", type=Path, help="a GGUF instead of the random model of 1 B")
    given = reader.parse_args(words)
    if unknown := [name for name in given.rows if name not in ROWS]:
        reader.error(f"there is no row {unknown[0]}; rows: {', '.join(ROWS)}")
    machine = f"{processor()}, commit {commit()}, {datetime.now(UTC).date()}"
    say(f"{machine}; two peers, one core each; medians of {given.turns} runs in turns")
    found: list[Row] = []
    with tempfile.TemporaryDirectory() as home:
        models = Models(Path(home), given.large)
        for name in given.rows or ROWS:
            row = asyncio.run(_row(models, name, given.turns))
            found.append(row)
            say("\n".join([line(row), *detail(row)]))
    say("\n" + "\n".join(line(row) for row in found))
    if given.json:
        told = {"machine": machine, "turns": given.turns, "rows": [row.plain() for row in found]}
        given.json.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    return 0 if all(row.holds for row in found) else 1


async def _row(models: Models, name: str, turns: int) -> Row:
    model = await asyncio.to_thread(models.of, name)
    before = used([])
    row = await ROWS[name](model, turns)
    busy = used([]).since(before)  # all of ours have ended by now, and are counted as ours
    if busy > QUIET:
        row.notes.append(f"others kept {busy:.2f} cores busy meanwhile: measure on a quiet machine")
    return row


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
