"""What streaming costs: TPOT of a ring whose first peer has too little memory, told and measured.

python -m tests.bench.streaming [--disk MB/s] [--tokens N]: as root, on Linux. Two stages share a
model of 207 MB; the first may keep 98 MiB less an excess, in a control group of memory, and reads
its disk at the machine's own speed or, with control groups of version 1, at --disk. The second one
computes as if on a slower processor: it rests for a while in each of its layers. For one, two and
four rounds: what `peer.planning.costs` expects, from the compute times of the same ring with enough
memory, and what was measured; then the same without reading ahead, and without giving up.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from peer.planning import costs, disk
from peer.planning.plan import Plan
from peer.protocol import Sampling
from tests.e2e import limited
from tests.e2e.limited import Large
from tests.e2e.rings import Ring, plan_of, running
from tests.plans import PEERS

MIB = 1 << 20
ENOUGH_BYTES = 4 << 30
BESIDES_BYTES = 48 * MIB  # Python, KV cache, scratch memory, and what the kernel reads ahead
EXCESS_BYTES = 40 * MIB
WARM = 6  # tokens before what stays is in memory
PROMPT = (1, 150, 7, 9)
GREEDY = Sampling(temperature=0.0)
ROUNDS = (1, 2, 4)
LAYERS = 8


@dataclass(frozen=True)
class Case:
    """One ring. slow_s: the second peer rests so long in each layer."""

    rounds: int
    excess_bytes: int
    slow_s: float
    disk_bytes_per_s: float  # 0: the machine's own
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Seen:
    """What a ring did, once warm. busy_s: computing for a token, of each stage."""

    ids: tuple[int, ...]
    tpot_s: float
    read_bytes: float
    busy_s: tuple[float, ...]


def plan(model: Large, case: Case) -> Plan:
    """The layers shared evenly, in so many rounds."""
    bounds = [LAYERS * i // (2 * case.rounds) for i in range(1, 2 * case.rounds)]
    made = plan_of(model.store, model.manifest, bounds, "llama_cpp", peers=2, context=512,
                   kv_cells=512, batch_tokens=32, slots=1)  # fmt: skip
    streamed = case.excess_bytes // case.rounds
    windows = tuple(
        msgspec.structs.replace(window, streamed_bytes=streamed * (window.peer_id == PEERS[0]))
        for window in made.split.windows
    )
    return msgspec.structs.replace(made, split=msgspec.structs.replace(made.split, windows=windows))


async def run(model: Large, case: Case, tokens: int) -> Seen:
    """The case in control groups."""
    model.forget()
    made = plan(model, case)
    weights = sum(made.shape.layer_bytes[: LAYERS // 2])
    room = weights - case.excess_bytes + BESIDES_BYTES if case.excess_bytes else ENOUGH_BYTES
    with contextlib.ExitStack() as stack:
        first = str(stack.enter_context(limited.group("small", room)))
        if case.disk_bytes_per_s:
            rate = int(case.disk_bytes_per_s)
            first += f",{stack.enter_context(limited.slow_disk('disk', model.folder, rate))}"
        stack.enter_context(
            limited.stages_in({0: first, 1: ""}, *case.words, f"slow={case.slow_s}:1")
        )
        async with running(made, model.folder) as ring:
            return await ask(ring, tokens)


async def ask(ring: Ring, tokens: int) -> Seen:
    """One long answer."""
    (pid,) = ring.supervisors[PEERS[0]].pids().values()
    ids: list[int] = []
    times, read = [], []
    async for given in ring.answer(PROMPT, tokens + WARM, GREEDY):
        ids += given.ids
        times += [time.perf_counter()] * len(given.ids)
        read += [limited.read_bytes(pid)] * len(given.ids)
    while not all(busy_s := [_busy_s(ring, peer) for peer in PEERS[:2]]):
        ring.changed.clear()
        await asyncio.wait_for(ring.changed.wait(), 20)
    gaps = [b - a for a, b in zip(times[WARM:], times[WARM + 1 :], strict=False)]
    return Seen(
        tuple(ids),
        statistics.median(gaps),
        (read[-1] - read[WARM]) / len(gaps),
        tuple(busy_s),
    )


def _busy_s(ring: Ring, peer: str) -> float:
    timed = ring.news[peer].timed
    return timed.decode_s if timed else 0.0


def expected_s(case: Case, enough: Seen, weights: int) -> float:
    """As `costs.evaluate` says, for stages that compute as long as those with enough memory did."""
    hops_s = max(0.0, enough.tpot_s - sum(enough.busy_s))
    read_s = case.excess_bytes / case.disk_bytes_per_s
    room_s = (weights - case.excess_bytes) / case.disk_bytes_per_s
    return costs.token_s(
        case.rounds, hops_s, enough.busy_s, enough.busy_s, [read_s, 0.0], [room_s, 0.0]
    )


async def compare(model: Large, excess: int, slow_s: float, rate: float, tokens: int) -> None:
    """Lines for one excess, all rounds."""
    own = disk.read_bytes_per_s(model.folder.parents[1])
    weights = sum(plan(model, Case(1, 0, 0, 0)).shape.layer_bytes[: LAYERS // 2])
    disk_told = f"{rate / 1e6:.0f} MB/s by control group" if rate else f"{own / 1e6:.0f} MB/s"
    say(
        f"{excess / MIB:.0f} MiB too many, disk {disk_told}, the second peer rests "
        f"{slow_s * 1e3:.0f} ms a layer"
    )
    for rounds in ROUNDS:
        enough = await run(model, Case(rounds, 0, slow_s, 0), tokens)
        told_s = expected_s(Case(rounds, excess, slow_s, rate or own), enough, weights)
        line = f"  k={rounds} all in memory {enough.tpot_s * 1e3:6.1f} ms, expected "
        line += f"{told_s * 1e3:6.1f}, measured"
        for words in ((), ("no-ahead",), ("keep", "no-ahead")):
            seen = await run(model, Case(rounds, excess, slow_s, rate, words), tokens)
            assert seen.ids == enough.ids, "not the tokens of a ring with enough memory"
            name = {0: "", 1: "not read ahead ", 2: "left to the kernel "}[len(words)]
            line += f" {name}{seen.tpot_s * 1e3:6.1f} ({seen.read_bytes / MIB:3.0f} MiB),"
            if not words:
                line += f" x{seen.tpot_s / told_s:.2f},"
        say(line.rstrip(","))


def commit() -> str:
    """Of this checkout."""
    words = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def processor() -> str:
    """Its name and cores."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.machine()


def say(line: str) -> None:
    """At once: the next line may take a while."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> int:
    """Build, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--disk", type=float, default=250.0)
    parser.add_argument("--tokens", type=int, default=16)
    given = parser.parse_args()
    if why := limited.why_not():
        say(why)
        return 1
    say(f"{processor()}, Linux {platform.release()}, commit {commit()}, {datetime.now(UTC).date()}")
    with tempfile.TemporaryDirectory() as folder:
        model = limited.large(Path(folder))
        for slow_s, rate in ((0.025, given.disk * 1e6), (0.1, given.disk * 1e6), (0.025, 0.0)):
            asyncio.run(compare(model, EXCESS_BYTES, slow_s, rate, given.tokens))
    return 0


if __name__ == "__main__":
    sys.exit(main())
