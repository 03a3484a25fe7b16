"""How long an answer pauses when a peer of its ring is taken away, and where the pause goes.

python -m tests.bench.pause [--runs N] [--fault WORDS] [--short]: as root, on Linux. Four machines
in network namespaces share the cores of this one and run SmolLM2 together. Every kind of fault is
done to the head, a middle, the tail and the coordinator at tokens 5, 40 and 200 of an answer that
`openai` reads; then once more where survivors lack parts and fetch them. Says, for each kind, when
the others noticed, when the next plan was made, when it served, and when the next token came; every
answer is compared with one llama.cpp context. --short: one moment instead of three.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tests.bench.streaming import commit, processor
from tests.netns.truth import Truth, truth
from tests.netns.unbroken import (
    FAULTS,
    NAMES,
    PLACES,
    QUESTION,
    SILENT,
    TOKENS,
    Case,
    Home,
    Seen,
    home,
)

MOMENTS = (5, 40, 200)
MIB = 1 << 20
NOTICED = r"lost=|ended=plan"
PLANNED = r"role=coordinator term=\d+ plan \S+ for "
SERVES = r"role=coordinator term=\d+ plan \S+ serves on"
FETCHING = ("kill -9 of both", "link down")
# A peer can run 13 layers of the 30 then, so those who are left all take some more.
FETCHING_MEMORY = "360MiB"
TARGET_S = {False: 5.0, True: 10.0}  # after a kill, after silence


@dataclass(frozen=True)
class Figures:
    """Of one fault. noticed_s, planned_s, served_s, token_s: from the fault until the entry had
    noticed, the plan that the answer went on on was made, served, and gave the next token."""

    seen: Seen
    noticed_s: float
    planned_s: float
    served_s: float
    token_s: float
    fetched_bytes: int
    whole: bool

    @property
    def pause_s(self) -> float:
        """Of the client."""
        return self.seen.pause[0]


def figures(seen: Seen, wrong: str, fetched_bytes: int) -> Figures:
    """What the logs say. wrong: why the answer is not right, "" where it is."""
    reader = seen.reader
    went_on = [line.at_s for line in seen.matching("answer=continued", by=seen.entry)]
    until_s = (went_on[-1] if went_on else math.inf) + 0.1

    def since(line_s: float) -> float:
        return line_s - seen.fault_s

    def last(pattern: str) -> float:
        lines = [line.at_s for line in seen.matching(pattern) if line.at_s < until_s]
        return since(lines[-1]) if lines else math.nan

    noticed = [line.at_s for line in seen.matching(NOTICED, by=seen.entry)]
    return Figures(
        seen, since(noticed[0]) if noticed else math.nan, last(PLANNED), last(SERVES),
        since(seen.pause[1]), fetched_bytes,
        not reader.error and reader.finish == "length" and reader.tokens == TOKENS
        and not wrong and bool(seen.starts),
    )  # fmt: skip


def matrix(faults: Sequence[str], places: Sequence[str], moments: Sequence[int]) -> Iterator[Case]:
    """Every case."""
    for fault, place, moment in itertools.product(faults, places, moments):
        yield Case(fault, place, moment)


@contextmanager
def start(holders: Sequence[str], **settings: str) -> Iterator[tuple[Home, Truth, int]]:
    """A home without spare parts, what it should say, and how much of a prompt it reads at once."""
    with (
        tempfile.TemporaryDirectory() as folder,
        home(Path(folder), holders, spare="off", **settings) as four,
    ):
        (head,) = (four.machine(NAMES[0]).home / "models").glob("*/head.gguf")
        split = four.machine(NAMES[0]).get("/halka/plan")["split"]
        chunk = int(split["chunk_tokens"] or split["batch_tokens"])
        with truth(head, [QUESTION]) as one:
            yield four, one, chunk


def of(four: Home, one: Truth, case: Case, chunk: int) -> Figures:
    """Run a case on a whole home, and mend it."""
    received = {m.name: m.received_bytes() for m in four.world.machines.values()}
    seen = four.run(case)
    fetched = sum(m.received_bytes() - received[m.name] for m in four.world.machines.values())
    wrong = one.wrong(QUESTION, seen.reader.text, TOKENS, chunk, seen.starts)
    found = figures(seen, wrong, fetched)
    say(
        f"  {case}: noticed {found.noticed_s:.2f} s, planned {found.planned_s:.2f}, serves "
        f"{found.served_s:.2f}, token {found.token_s:.2f}; pause {found.pause_s:.2f} s, "
        f"{fetched / MIB:.0f} MiB went over cables" + ("" if found.whole else "  WRONG")
    )
    if not found.whole or found.pause_s > TARGET_S[case.fault in SILENT]:
        say(f"    error={seen.reader.error!r} tokens={seen.reader.tokens} starts={seen.starts}")
        for line in seen.lines:
            if line.at_s > seen.fault_s - 0.1:
                say(f"    {line.at_s - seen.fault_s:6.2f} {line.machine} {line.text[:160]}")
    four.mend()
    return found


def table(title: str, found: Sequence[Figures]) -> None:
    """One line a kind of fault."""
    say(f"\n{title}")
    say(f"  {'fault':26} runs  noticed p50/max  pause p50 /  p95 /  max   where it goes (p50)")
    kinds = dict.fromkeys(f.seen.case.fault for f in found)
    for kind in kinds:
        some = [f for f in found if f.seen.case.fault == kind]
        noticed = [f.noticed_s for f in some]
        pauses = [f.pause_s for f in some]
        parts = [
            ("noticed", middle(noticed)),
            ("planned", middle([f.planned_s - f.noticed_s for f in some])),
            ("loaded", middle([f.served_s - f.planned_s for f in some])),
            ("token", middle([f.token_s - f.served_s for f in some])),
        ]
        say(
            f"  {kind:26} {len(some):4}  {middle(noticed):6.2f} {max(noticed):6.2f} s"
            f"  {middle(pauses):8.2f} {share(pauses):6.2f} {max(pauses):6.2f} s"
            f"  {' + '.join(f'{name} {took_s:.2f}' for name, took_s in parts)}"
        )
    for silent, words in ((False, "after a kill"), (True, "after silence")):
        pauses = [f.pause_s for f in found if (f.seen.case.fault in SILENT) == silent]
        if pauses:
            say(
                f"  {words}: pause p95 {share(pauses):.2f} s of {len(pauses)} "
                f"(wanted: {TARGET_S[silent]:.0f} s)"
            )


def middle(values: Sequence[float]) -> float:
    """The median of what is known."""
    return statistics.median([v for v in values if not math.isnan(v)] or [math.nan])


def share(values: Sequence[float], of: float = 0.95) -> float:
    """The value that this share of them does not exceed."""
    return sorted(values)[max(0, math.ceil(of * len(values)) - 1)]


def say(line: str) -> None:
    """Print it now."""
    print(line, flush=True)  # noqa: T201


def main(words: Sequence[str]) -> int:
    """0: every answer was right."""
    reader = argparse.ArgumentParser(description=__doc__)
    reader.add_argument("--runs", type=int, default=1)
    reader.add_argument("--fault", default="", help="only faults whose name has these words")
    reader.add_argument("--short", action="store_true")
    given = reader.parse_args(words)
    faults = [name for name in FAULTS if given.fault in name]
    moments = MOMENTS[1:2] if given.short else MOMENTS
    say(
        f"{processor()}, four peers on its cores, SmolLM2-135M Q4_1, {TOKENS} tokens, "
        f"commit {commit()}, {datetime.now(UTC).date()}"
    )
    found = []
    with start(NAMES) as (four, one, chunk):
        for case in [*matrix(faults, PLACES, moments)] * given.runs:
            found.append(of(four, one, case, chunk))
    table("Every peer has all parts", found)
    fetching = []
    with start(NAMES[:2], memory=FETCHING_MEMORY) as (four, one, chunk):
        for case in [*matrix(FETCHING, PLACES[:3], MOMENTS[1:2])] * given.runs:
            if case.fault not in faults:
                continue
            four.forget(NAMES[2:])
            fetching.append(of(four, one, case, chunk))
    if fetching:
        table("Two peers have all parts, the others fetch what they lack", fetching)
    right = all(f.whole for f in [*found, *fetching])
    say("every answer was whole and right" if right else "WRONG answers, see above")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
