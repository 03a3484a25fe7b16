"""How long the solver takes, and how that grows: python -m tests.bench.solve [runs].

Random but realistic clusters: some GPUs of their own and unified ones, some disks that can stream,
some throttled peers, some on Wi-Fi; a model that is about as large as half to all of their memory.
One run is a cluster and a solve of it, tables and the choice of rounds included.
"""

from __future__ import annotations

import datetime
import platform
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from peer.planning import costs, halda
from peer.planning.costs import Problem
from peer.planning.profile import EngineProfile, Link, ModelShape, Profile, Speed
from tests.clusters import peer_id
from tests.plans import shape

SIZES = (
    (2, 32), (4, 32), (4, 80), (8, 32), (8, 80), (8, 126), (12, 80), (16, 80), (16, 126),
    (24, 126), (32, 80), (32, 126), (48, 126), (64, 80), (64, 126),
)  # fmt: skip
RUNS = 9
GOALS = {(8, 80): 0.1, (32, 126): 2.0}


def cluster(draw: random.Random, peers: int, layers: int) -> Problem:
    """So many machines of a house, or of an office, and a model for them."""
    layer = int(draw.choice([60, 120, 250, 480])) << 20
    kinds = tuple(int(draw.random() < 0.1) for _ in range(layers))
    model = shape(
        layers, hidden=4096, layer_bytes=tuple(layer + kind * layer // 7 for kind in kinds),
        layer_kinds=kinds, layer_kv_bytes=(4096,) * layers, embed_bytes=300 << 20,
        output_bytes=400 << 20, vocabulary=32000,
    )  # fmt: skip
    each = sum(model.layer_bytes) / peers
    profiles = [_profile(draw, i, each, layer, model) for i in range(peers)]
    far = [draw.random() < 0.3 for _ in range(peers)]  # on Wi-Fi
    for i, profile in enumerate(profiles):
        links = tuple(
            Link(
                other.peer_id,
                draw.uniform(3e-4, 1e-3) + 3e-3 * (far[i] + far[j]),
                3e7 if far[i] or far[j] else 1.1e8,
            )
            for j, other in enumerate(profiles)
            if j > i
        )
        profiles[i] = msgspec.structs.replace(profile, links=links)
    return costs.problem(profiles, model, costs.Size(4096, 8192, 512))


def _profile(
    draw: random.Random, index: int, each: float, layer: int, model: ModelShape
) -> Profile:
    ram = int(each * draw.choice([0.3, 0.6, 1, 1.5, 2.5, 4])) + (700 << 20)
    engines = [EngineProfile("llama_cpp", "CPU", "cpu")]
    speeds = [_speed(model, "cpu", layer, draw.choice([6e9, 1e10, 2e10, 4e10]), 1e11)]
    kind = draw.choice(["cuda", "cuda", "metal"]) if draw.random() < 0.4 else ""
    if kind:
        free = int(ram * 0.7) if kind == "metal" else int(each * draw.choice([0.5, 1, 2]))
        free += costs.GPU_HEADROOM_BYTES if kind == "cuda" else 0
        engines.append(EngineProfile("llama_cpp", "GPU", kind, free))
        speeds.append(_speed(model, kind, layer, draw.choice([1e11, 2e11, 4e11]), 3e12))
    return Profile(
        peer_id(index), f"peer{index}", "linux", 8, ram, ram, engines=tuple(engines),
        unified_memory=kind == "metal", speeds=tuple(speeds),
        disk_read_bytes_per_s=draw.choice([5e8, 2e9, 5e9]) if draw.random() < 0.5 else 0,
        cpu_share=draw.choice([0.25, 0.5]) if draw.random() < 0.15 else 1.0,
    )  # fmt: skip


def _speed(model: ModelShape, kind: str, layer: int, rate: float, operations: float) -> Speed:
    decode = (layer / rate, 8 * layer / 7 / rate)
    chunk = tuple(1.7 * 2 * 512 * size / operations for size in (layer, 8 * layer / 7))
    return Speed(model.digest, "llama_cpp", kind, 4, decode, chunk, 512, 1e-4, 4e8 / rate)


def main() -> None:
    """The table."""
    runs = max(RUNS, int(sys.argv[1]) if len(sys.argv) > 1 else RUNS)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    day = datetime.datetime.now(datetime.UTC).date()
    out = sys.stdout.write
    out(f"{_processor()}, Python {platform.python_version()}, commit {commit}, {day}\n")
    out(f"{'peers':>5} {'layers':>6} {'median':>10} {'worst':>10} {'CPU':>10}  {'goal':>8}  how\n")
    for peers, layers in SIZES:
        took, used, exact, none = [], [], 0, 0
        for seed in range(runs):
            of = cluster(random.Random(seed), peers, layers)
            began, began_cpu = time.perf_counter(), time.process_time()
            found, was_exact = halda.searched(of)
            took.append(time.perf_counter() - began)
            used.append(time.process_time() - began_cpu)
            exact += was_exact
            none += found is None
        goal = f"{GOALS[peers, layers] * 1e3:.0f} ms" if (peers, layers) in GOALS else ""
        out(
            f"{peers:5} {layers:6} {statistics.median(took) * 1e3:7.0f} ms"
            f" {max(took) * 1e3:7.0f} ms {statistics.median(used) * 1e3:7.0f} ms  {goal:>8}"
            f"  exact {exact} of {runs}" + (f", nothing fits {none}" if none else "") + "\n"
        )
        sys.stdout.flush()


def _processor() -> str:
    """Its name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
