"""How long `halka status` takes against a ring of three agents, and what an idle agent costs.

python -m tests.bench.status [RUNS]: prints the median and the slowest of RUNS (20) runs of the
whole command, and the share of a core that an agent used meanwhile doing nothing.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tests import fake_models
from tests.e2e.agents import STAGE, House

IDLE_S = 20.0


def timed(house: House, runs: int) -> list[float]:
    """Seconds of each run of the command."""
    seconds = []
    for _ in range(runs):
        began = time.monotonic()
        done = house.agents[1].word("status")
        seconds.append(time.monotonic() - began)
        assert done.returncode == 0, done.stdout + done.stderr
    return seconds


def idle_shares(house: House) -> list[tuple[str, float]]:
    """Of a core, over IDLE_S, for each agent and stage."""
    watched = [(f"agent {a.number}", psutil.Process(a.pid)) for a in house.agents]
    watched += [(f"stage {a.number}", a.processes(STAGE)[0]) for a in house.agents]
    before = [sum(process.cpu_times()[:2]) for _, process in watched]
    until_s = time.monotonic() + IDLE_S
    while (left_s := until_s - time.monotonic()) > 0:
        time.sleep(left_s)
    return [
        (name, (sum(process.cpu_times()[:2]) - was) / IDLE_S)
        for (name, process), was in zip(watched, before, strict=True)
    ]


def main() -> None:
    """Print the numbers."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    with tempfile.TemporaryDirectory(prefix="halka-bench-") as folder:
        house = House(Path(folder), 3)
        try:
            model = fake_models.write(Path(folder) / "elm.gguf", name="elm")
            assert house.agents[0].word("pull", str(model)).returncode == 0
            house.start()
            house.serving()
            seconds = timed(house, runs)
            shares = idle_shares(house)
        finally:
            house.close()
    sys.stdout.write(
        f"halka status, {runs} runs: median {statistics.median(seconds) * 1000:.0f} ms, "
        f"slowest {max(seconds) * 1000:.0f} ms\n"
    )
    for name, share in shares:
        sys.stdout.write(f"idle {name}: {share * 100:.2f} % of a core\n")


if __name__ == "__main__":
    main()
