"""One stream of tokens: a ring of two pinned stages beside the whole model in one pinned process.

python -m tests.bench.one_stream [--cuts 15,17,20] [--turns N] [--tokens N] [--model GGUF]: stages
and the plain process are pinned to one core each and compute with one thread. In turns each makes a
short greedy answer to the same prompt, the plain one on either core; medians, and their ratio. The
ring's time is from token to token as a client of its head gets them, and where it goes is what the
stages say of themselves. A cut is how many layers the first stage has.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import IO

import llama_cpp.llama_cpp as llama
import msgspec
import numpy as np
import zmq
from msgspec.structs import replace

from backends.llama_cpp.library import library
from peer import children
from peer.models.imports import import_gguf
from peer.models.store import Store
from peer.planning.plan import Plan, PlanState
from peer.protocol import (
    Sampling,
    StageConnect,
    StageNews,
    StageOrder,
    StageStop,
    Submit,
    Tokens,
    decode_answering,
    encode,
)
from peer.ring.sockets import as_client
from tests.bench.pause import say
from tests.bench.streaming import commit, processor
from tests.e2e.rings import plan_of
from tests.plain_llama import PlainLlama
from tests.smollm2 import smollm2

CELLS, BATCH = 4096, 512
FIRST = 8  # tokens of each answer that are not timed
TEXT = "<|im_start|>user\nTell me a long story.<|im_end|>\n<|im_start|>assistant\n"
WAIT_S = 30.0


@contextlib.contextmanager
def pinned(core: int) -> Iterator[None]:
    """What begins meanwhile runs on this core only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Whole(PlainLlama):
    """The whole model, with nothing in its loop that is not needed."""

    def answer(self, prompt: Sequence[int], count: int) -> tuple[list[int], float]:
        """Greedy ids, and the median of seconds from one to the next."""
        self.clear()
        outputs = [False] * (len(prompt) - 1) + [True]
        token = int(self.step(prompt, range(len(prompt)), outputs=outputs)[-1].argmax())
        batch, at = self._batch, len(prompt)
        batch.n_tokens, batch.n_seq_id[0], batch.seq_id[0][0], batch.logits[0] = 1, 1, 0, True
        ids, times = [token], [time.perf_counter()]
        for position in range(at, at + count - 1):
            batch.token[0], batch.pos[0] = token, position
            assert llama.llama_decode(self._context, batch) == 0
            logits = llama.llama_get_logits(self._context)
            token = int(np.ctypeslib.as_array(logits, (self.words,)).argmax())
            ids.append(token)
            times.append(time.perf_counter())
        return ids, float(np.median(np.diff(times[FIRST:])))


def whole_process(path: Path) -> None:
    """Answers each line of numbers (core, count, prompt) with a line (seconds, ids)."""
    library()  # libllama's many words go to its journal
    with Whole(path, cells=CELLS, batch=BATCH) as whole:
        sys.stdout.write(" ".join(map(str, whole.tokenise(TEXT))) + "\n")
        sys.stdout.flush()
        for line in sys.stdin:
            core, count, *prompt = map(int, line.split())
            os.sched_setaffinity(0, {core})
            ids, tpot_s = whole.answer(prompt, count)
            sys.stdout.write(f"{tpot_s} {' '.join(map(str, ids))}\n")
            sys.stdout.flush()


class Stages:
    """The stages of a plan, one core each, and a plain client of their head."""

    def __init__(self, plan: Plan, folder: Path, cores: Sequence[int]) -> None:
        self.plan, self.news = plan, dict[str, StageNews]()
        public, secret = zmq.curve_keypair()
        state = PlanState(plan, "loading")
        self._stages = {}
        for i, peer in enumerate(plan.ring):
            with pinned(cores[i % len(cores)]):
                self._stages[peer] = subprocess.Popen(
                    children.command("peer.ring.stage"), env=children.environment(),
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                )  # fmt: skip
            order = StageOrder(
                state, peer, str(folder), 1, bind="127.0.0.1", admitted=(public.decode(),)
            )
            self._order(peer, order)
        self._until("ready")
        for i, peer in enumerate(plan.ring):
            after = self.news[plan.ring[(i + 1) % len(plan.ring)]]
            address = f"tcp://127.0.0.1:{after.ring_port}"
            before = self.news[plan.ring[i - 1]]
            self._order(peer, StageConnect(address, after.key, before.key))
        self._until("linked")
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.rcvtimeo = int(WAIT_S * 1000)
        head = self.news[plan.head]
        as_client(self._socket, head.key.encode(), public, secret, 1 << 20)
        self._socket.connect(f"tcp://127.0.0.1:{head.submit_port}")
        _give_way(True)  # at home the client has a core of its own

    def _order(self, peer: str, order: StageOrder | StageConnect | StageStop) -> None:
        into = self._stages[peer].stdin
        assert into is not None
        into.write(msgspec.json.encode(order) + b"\n")
        into.flush()

    def _read(self, peer: str) -> StageNews:
        out: IO[bytes] | None = self._stages[peer].stdout
        assert out is not None
        self.news[peer] = msgspec.json.decode(out.readline(), type=StageNews)
        assert self.news[peer].phase != "failed", self.news[peer].why
        return self.news[peer]

    def _until(self, phase: str) -> None:
        for peer in self.plan.ring:
            while self._read(peer).phase != phase:
                pass

    def answer(self, name: str, prompt: Sequence[int], count: int) -> tuple[list[int], float]:
        """Greedy ids, and the median of seconds from one to the next."""
        ids, times = list[int](), list[float]()
        data = np.array(prompt, np.int32).tobytes()
        asked = Submit(name, self.plan.id, data, Sampling(temperature=0.0), count)
        self._socket.send(encode(asked))
        while True:
            try:
                said = decode_answering(self._socket.recv())
            except zmq.Again:
                ended = {peer: stage.poll() for peer, stage in self._stages.items()}
                raise AssertionError(f"no token for {WAIT_S:.0f} s; exits: {ended}") from None
            assert isinstance(said, Tokens), said
            ids += said.ids
            times += [time.perf_counter()] * len(said.ids)
            if said.finish:
                return ids, float(np.median(np.diff(times[FIRST:])))

    def timed(self, steps: int) -> None:
        """Read what the stages say until they have told of so many steps, and what those took."""
        for peer in self.plan.ring:
            while self.news[peer].steps < steps or self.news[peer].timed is None:
                self._read(peer)

    def close(self) -> None:
        """End the processes."""
        _give_way(False)
        self._socket.close(0)
        self._context.term()
        for peer, stage in self._stages.items():
            self._order(peer, StageStop())
            stage.communicate(timeout=WAIT_S)


def _give_way(all_the_time: bool) -> None:
    """This process's threads compute only where nobody else wants to, or as anybody does."""
    policy = os.SCHED_IDLE if all_the_time else os.SCHED_OTHER
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setscheduler(int(thread.name), policy, os.sched_param(0))


def measure(
    stages: Stages, whole: subprocess.Popen[str], prompt: Sequence[int], turns: int, count: int
) -> tuple[list[float], list[float]]:
    """Medians of each turn: of the ring, and of the whole model."""
    ring, alone = [], []
    assert whole.stdin is not None
    assert whole.stdout is not None
    for turn in range(turns + 1):
        ids, ring_s = stages.answer(f"turn-{turn}", prompt, count)
        whole.stdin.write(f"{turn % 2} {count} {' '.join(map(str, prompt))}\n")
        whole.stdin.flush()
        alone_s, *others = whole.stdout.readline().split()
        if turn == 0:  # maps the weights; later ones find the prompt in their slot
            assert ids == [int(token) for token in others], "the ring answers otherwise"
        else:
            ring.append(ring_s)
            alone.append(float(alone_s))
    stages.timed((turns + 1) * count)
    return ring, alone


def report(plan: Plan, news: dict[str, StageNews], ring: list[float], alone: list[float]) -> float:
    """Print it; the ratio."""
    ring_s, alone_s = median(ring), median(alone)
    cut = "/".join(str(window.last - window.first) for window in plan.split.windows)
    say(
        f"  {cut:8} ring {ring_s * 1e3:.3f} ms ({1 / ring_s:.1f}/s)  whole {alone_s * 1e3:.3f} ms "
        f"({1 / alone_s:.1f}/s)  whole's time / ring's {alone_s / ring_s:.3f}"
    )
    computed_s = 0.0
    for peer in plan.ring:
        timed = news[peer].timed
        assert timed is not None
        computed_s += timed.decode_s
        say(
            f"    {peer[:4]} computes {timed.decode_s * 1e3:.3f} ms, waits "
            f"{timed.wait_s * 1e3:.3f}, sends {timed.send_s * 1e3:.3f}"
        )
    say(
        f"    computed {computed_s * 1e3:.3f} ms, around it {(ring_s - computed_s) * 1e3:.3f}; "
        f"computed - whole {(computed_s - alone_s) * 1e3:+.3f}"
    )
    return alone_s / ring_s


def main(words: Sequence[str]) -> int:
    """Measure each cut; print as they come."""
    reader = argparse.ArgumentParser(description=__doc__)
    reader.add_argument("--cuts", default="15,17,20")
    reader.add_argument("--turns", type=int, default=7)
    reader.add_argument("--tokens", type=int, default=128)
    reader.add_argument("--model", type=Path)
    reader.add_argument("--whole", type=Path, help=argparse.SUPPRESS)
    given = reader.parse_args(words)
    if given.whole:
        whole_process(given.whole)
        return 0
    path, cores = given.model or smollm2(), sorted(os.sched_getaffinity(0))
    say(f"{processor()}, {path.name}, commit {commit()}, {given.turns} turns, {given.tokens} new")
    with (
        tempfile.TemporaryDirectory() as home,
        subprocess.Popen(
            [sys.executable, "-m", "tests.bench.one_stream", "--whole", str(path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        ) as whole,
    ):  # fmt: skip
        store = Store(Path(home))
        with contextlib.redirect_stderr(None):
            manifest = import_gguf(path, store)
        assert whole.stdout is not None
        prompt = [int(token) for token in whole.stdout.readline().split()]
        for cut in (int(word) for word in given.cuts.split(",")):
            bounds = [cut] if cut else []
            plan = plan_of(store, manifest, bounds, "llama_cpp", kv_cells=CELLS)
            plan = replace(plan, split=replace(plan.split, speculation="off"))
            stages = Stages(plan, store.folder(manifest.digest), cores)
            try:
                ring, alone = measure(stages, whole, prompt, given.turns, given.tokens)
            finally:
                stages.close()
            report(plan, stages.news, ring, alone)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
