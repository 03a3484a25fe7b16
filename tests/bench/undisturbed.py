"""What a ring notices of peers that come, go and die beside it: p99 of the time between tokens.

python -m tests.bench.undisturbed [--runs N]: as root, on Linux. Two machines in network namespaces
answer with 500 tokens of the fake engine, 10 ms a step on each; alone, and while a peer that is not
in the ring joins, leaves and dies, and while the coordinator dies. Wanted: at most 1.2 times the
p99 of an answer during which nothing happens, the same stages, and the same plan. What joins is a
program that starts on the same cores, which a real peer's is not.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from tests.bench.pause import middle, say, share
from tests.bench.streaming import commit, processor
from tests.netns.undisturbed import FIRST, Quiet, quiet

TOKENS = 500
AFTER = 60  # tokens, something happens


def answer(home: Quiet, what: str) -> list[float]:
    """Seconds between the tokens of one answer, during which this happens; "": nothing."""
    before = home.still()
    with home.ask(TOKENS) as reader:
        reader.wait(AFTER, 30)
        if what:
            home.happenings()[what]()
        reader.wait(TOKENS + 1, 60)
    assert (reader.error, reader.finish, reader.tokens) == ("", "length", TOKENS), reader.error
    assert home.still() == before
    assert not home.continued()
    return reader.gaps_s[5:]


def main(words: Sequence[str]) -> int:
    """0: nothing was disturbed by more than it may."""
    reader = argparse.ArgumentParser(description=__doc__)
    reader.add_argument("--runs", type=int, default=1)
    runs = reader.parse_args(words).runs
    say(f"{processor()}, fake engine, commit {commit()}, {datetime.now(UTC).date()}")
    found: dict[str, list[float]] = {}
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as folder, quiet(Path(folder)) as home:
            for what in ("", *home.happenings()):
                found.setdefault("", []).extend(answer(home, "") if what else [])
                found.setdefault(what, []).extend(answer(home, what))
            assert home.machine(FIRST).process is None
    worst = 0.0
    alone_s = share(found[""], 0.99)
    for what, gaps in found.items():
        ratio = share(gaps, 0.99) / alone_s
        worst = max(worst, ratio)
        say(
            f"  {what or 'nothing happens':26} p50 {middle(gaps) * 1e3:5.1f} ms  "
            f"p99 {share(gaps, 0.99) * 1e3:5.1f} ms  max {max(gaps) * 1e3:5.1f} ms  x{ratio:.2f}"
        )
    say(f"worst p99: {worst:.2f} times an undisturbed one's (wanted: 1.20)")
    return 0 if worst <= 1.2 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
