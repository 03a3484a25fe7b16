"""Whether what the planner says is true here: predicted beside measured, on uneven peers.

python -m tests.bench.true_here [--clusters 1,3] [--trials] [--json FILE] [--answers N]
[--patience S]: as root, on Linux. For each cluster (`clusters.py`): the peers measure themselves,
`split.solve` plans, the plan's stages are started in the peers' namespaces, and SmolLM2 answers.
With --trials every other split on a coarse grid is run, too. The machine may not be ours alone:
what is timed counts only at the pace at which the peers measured themselves (`pace.py`), the faster
half of the answers counts, and the pace and how busy others were are shown.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import msgspec

from backends.llama_cpp.library import library
from peer.models.imports import import_gguf
from peer.models.store import Store
from peer.planning import costs
from peer.planning import split as planner
from peer.planning.plan import Forecast, Plan, PlanId, Split
from peer.planning.profile import ModelShape, Profile
from tests.bench.clusters import CLUSTERS, Cluster
from tests.bench.pace import CELLS, Pace
from tests.bench.surveyed import peer_ids, surveyed
from tests.bench.trying import Tried, others_than, try_out
from tests.bench.uneven import House, Used, house, used
from tests.bench.uneven_ring import Measured, Rings, rings, summed
from tests.plain_llama import PlainLlama
from tests.smollm2 import smollm2

CONTEXT = 2048
PROMPT_TOKENS, TOKENS = 64, 128  # many periods of a quota, whose first one the prompt used up
LONG_TOKENS = costs.PROMPT_TOKENS
LONG_ANSWERS = 3  # to the long prompt, for the TTFT
TRUE = 0.20  # predicted and measured TPOT may be apart
TEXT = "".join(f"In the year {year} a new ring was forged in the mountains. " for year in range(99))


@dataclass(frozen=True)
class Result:
    """One cluster: its plan, what was said of it and what it did. busy: cores that others used
    while the peers measured themselves."""

    number: int
    what: str
    plan: str
    predicted_s: float
    measured: Measured
    predicted_ttft_s: float
    ttft_s: float
    busy: float
    tried: Tried | None = None

    @property
    def ratio(self) -> float:
        """Measured to predicted TPOT."""
        return self.measured.tpot_s / self.predicted_s

    @property
    def true(self) -> bool:
        """Whether the prediction was good: as a share of what was measured."""
        return abs(self.predicted_s / self.measured.tpot_s - 1) <= TRUE


def wishes(cluster: Cluster) -> planner.Wishes:
    """What the planner is asked for."""
    return planner.Wishes(context=CONTEXT, spread_all=cluster.everyone)


def words(split: Split, profiles: Sequence[Profile]) -> str:
    """As in `desk 20 + attic 10`."""
    names = {profile.peer_id: profile.name for profile in profiles}
    return " + ".join(f"{names[w.peer_id]} {w.last - w.first}" for w in split.windows)


async def measured(
    cluster: Cluster,
    made: House,
    folder: Path,
    known: tuple[list[Profile], ModelShape],
    pace: Pace,
    given: argparse.Namespace,
) -> tuple[Split, Forecast, Measured, float, Tried | None]:
    """Plan, run, ask; with trials, also all others."""
    profiles, shape = known
    split = planner.solve(profiles, shape, wishes(cluster))
    forecast = costs.forecast(profiles, shape, split)
    assert forecast is not None, "the planner's own split has no forecast"
    names = {peer_id: name for name, peer_id in peer_ids(made).items()}
    async with rings(made, folder, pace, given.patience) as running:
        plan = Plan(PlanId(1, 1), split.windows[0].peer_id, shape, split)
        ring = await running.start(plan, names)
        await running.ask(ring, given.prompt[:PROMPT_TOKENS], TOKENS)  # maps the weights
        answers = [
            await running.ask(ring, given.prompt[:PROMPT_TOKENS], TOKENS)
            for _ in range(given.answers)
        ]
        ttft_s = await long_ttft_s(running, ring.plan, given.prompt)
        tried = None
        if given.trials and cluster.tried:
            await running.end(ring)
            others = others_than(split, profiles, shape, cluster.everyone)
            tried = await try_out(running, plan, others, names, given.prompt[:PROMPT_TOKENS])
    return split, forecast, summed(answers), ttft_s, tried


async def long_ttft_s(running: Rings, plan: Plan, prompt: Sequence[int]) -> float:
    """The median for the long prompt; each begins otherwise, so that none is known already."""
    found = []
    for i in range(LONG_ANSWERS):
        ids = [i + 20, *prompt[1:LONG_TOKENS]]
        found.append((await running.ask(running.ring(plan.id), ids, 2)).ttft_s)
    return statistics.median(found)


def run(number: int, cluster: Cluster, given: argparse.Namespace) -> Result:
    """Build the cluster, and all of the above."""
    with tempfile.TemporaryDirectory() as top:
        store = Store(Path(top) / "home")
        with contextlib.redirect_stderr(None):
            manifest = import_gguf(smollm2(), store)
        folder = store.folder(manifest.digest)
        with house(Path(top) / "world", cluster.peers) as made:
            before: Used = used(())
            pace = Pace(given.whole, given.prompt, {peer.core for peer in cluster.peers})
            known = surveyed(made, folder, pace)
            busy = used(()).since(before)
            with made.asking():
                split, forecast, tpot, ttft_s, tried = asyncio.run(
                    measured(cluster, made, folder, known, pace, given)
                )
    if given.profiles:
        given.profiles.mkdir(parents=True, exist_ok=True)
        (given.profiles / f"{number}.json").write_bytes(msgspec.json.encode(known))
    return Result(
        number, cluster.what, words(split, known[0]), forecast.tpot_s, tpot,
        forecast.ttft_s, ttft_s, busy, tried,
    )  # fmt: skip


def line(result: Result) -> str:
    """A row of the table."""
    m = result.measured
    text = (
        f"{result.number:>2} {result.what:<36} {result.plan:<28} "
        f"{result.predicted_s * 1e3:7.2f} {m.tpot_s * 1e3:7.2f} {result.ratio:5.2f} "
        f"{'yes' if result.true else 'NO ':<4} {m.spread:6.2f} {m.others:6.2f} {m.pace:5.2f} "
        f"{result.predicted_ttft_s:7.2f} {result.ttft_s:6.2f}"
    )
    if result.tried:
        tried = result.tried
        text += (
            f"\n   {tried.count} other splits run; the fastest: {tried.fastest}, "
            f"{abs(tried.gain):.1%} {'faster' if tried.gain > 0 else 'slower'} than the plan"
        )
    return text


HEAD = (
    f"{'#':>2} {'cluster':<36} {'plan (layers)':<28} {'said ms':>7} {'was ms':>7} {'ratio':>5} "
    f"{'true':<4} {'spread':>6} {'others':>6} {'pace':>5} {'TTFT s':>7} {'was s':>6}"
)


def main() -> int:
    """Run the clusters that are asked for, print as they come, keep what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clusters", default="", help="numbers, as in 1,3; without: all")
    parser.add_argument("--trials", action="store_true")
    parser.add_argument("--answers", type=int, default=5)
    parser.add_argument("--patience", type=float, default=60.0, help="seconds of waiting for the "
                        "machine's pace, for each cluster")  # fmt: skip
    parser.add_argument("--json", type=Path)
    parser.add_argument("--profiles", type=Path, help="a folder for the profiles of each cluster")
    given = parser.parse_args()
    chosen = [int(n) for n in given.clusters.split(",") if n] or range(1, len(CLUSTERS) + 1)
    library()  # libllama's many words go to its journal
    with PlainLlama(smollm2(), cells=CELLS, batch=64) as given.whole:
        given.prompt = given.whole.tokenise(TEXT)
        machine = f"{date.today()} {platform.machine()} {os.cpu_count()} cores"  # noqa: DTZ011
        what = f"smollm2, prompt {PROMPT_TOKENS}, {TOKENS} new, {given.answers} answers"
        print(f"{machine}, {what}\n{HEAD}", flush=True)  # noqa: T201
        results = []
        for number in chosen:
            results.append(run(number, CLUSTERS[number - 1], given))
            print(line(results[-1]), flush=True)  # noqa: T201
            if given.json:
                rows = [asdict(r) | {"ratio": r.ratio, "true": r.true} for r in results]
                given.json.write_bytes(msgspec.json.format(msgspec.json.encode(rows)))
    print(f"true for {sum(r.true for r in results)} of {len(results)}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
