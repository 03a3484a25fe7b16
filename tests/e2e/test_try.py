"""install/try.sh's trial as a stranger meets it: an answer from a ring, and nothing left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from peer.models.imports import import_gguf
from peer.models.pull import PACKAGED
from peer.models.store import Store
from peer.words.agent import Agent
from tests.smollm2 import smollm2

pytestmark = pytest.mark.llama

ROUNDED_BYTES = 0.05 * (1 << 20)  # sizes are shown in tenths of MiB
BESIDES_BYTES = 64 << 10  # a home's key, speeds and addresses; a layer of the model has 2.1 MiB


@pytest.fixture
def trial(tmp_path: Path, checkout: Path) -> Iterator[Trial]:
    """The trial with a temporary folder of its own, which it must leave as it found it."""
    cache = Store(checkout / ".cache" / "try")
    if not cache.renew(PACKAGED["smollm2"].digest):
        import_gguf(smollm2(), cache)
    yield Trial(tmp_path, checkout)
    assert list(tmp_path.iterdir()) == []
    assert started_in(tmp_path) == []


class Trial:
    """Starts install/trial.py, which try.sh hands over to."""

    def __init__(self, temporary: Path, checkout: Path) -> None:
        self.temporary = temporary
        self.command = [sys.executable, str(checkout / "install" / "trial.py"), "--peers", "2"]
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HALKA_")}
        self.environment = kept | {"TMPDIR": str(temporary), "PYTHONPATH": str(checkout)}

    def start(self) -> subprocess.Popen[str]:
        """With both outputs on one pipe."""
        return subprocess.Popen(
            [*self.command, "Say hello."],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def homes(self) -> list[Path]:
        """Of the peers of the trial that runs."""
        (folder,) = self.temporary.glob("halka-try-*")
        return [folder / f"peer-{number}" for number in (1, 2)]

    def plans_of_both(self) -> set[str]:
        """Numbers of the plans that were made with both peers in the ring."""
        logs = "".join(home.with_suffix(".log").read_text() for home in self.homes())
        return set(re.findall(r"plan (\S+) for .*\b2 peers share", logs))

    def agents(self) -> list[psutil.Process]:
        """The agents that run now."""
        return [p for p in started_in(self.temporary) if p.cmdline()[-2:] == ["peer", "run"]]


@dataclass(frozen=True)
class Looked:
    """A peer's share: windows [first, end) by its own word, and the parts on its disk, with what
    belongs to them, in bytes."""

    windows: list[tuple[int, int]]
    parts: set[str]
    bytes: int

    @classmethod
    def at(cls, home: Path) -> Looked:
        """Of the agent that runs there."""
        status = Agent(home=str(home)).status()
        (me,) = [peer for peer in status.peers if peer.peer_id == status.me.peer_id]
        files = [file for file in (home / "models").rglob("*") if file.is_file()]
        parts = {file.stem for file in files if file.suffix == ".gguf"}
        return cls([(a, b) for a, b in me.layers], parts, sum(f.stat().st_size for f in files))


@contextmanager
def stopped(process: subprocess.Popen[str]) -> Iterator[None]:
    """It does nothing meanwhile."""
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


def started_in(folder: Path) -> list[psutil.Process]:
    """Processes, whoever is their parent now, that were told of a home in this folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("HALKA_HOME", "").startswith(str(folder)):
                found.append(process)
        except psutil.Error:
            continue
    return found


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """What it writes up to the line with this text."""
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"it ended without {text!r}:\n{seen}")


def test_a_ring_shows_its_plan_and_answers_with_its_times(trial: Trial) -> None:
    with trial.start() as process:
        assert process.stdout is not None
        seen = process.stdout.read()
        assert process.wait(60) == 0, seen
    assert re.search(r"Plan \d+\.\d+ for smollm2-135m-instruct-q4_1, serving", seen)
    assert re.search(r"╭▸ .* 0–\d+ +head ", seen)
    assert re.search(r"╰─ .* \d+–29 +tail ", seen)
    assert "asking peer 2, over its own HTTP: Say hello." in seen
    answer, stats = seen.rstrip().splitlines()[-2:]
    assert re.search("[a-z]{3}", answer)
    assert re.match(r"TTFT \d+ ms, TPOT \d+\.\d ms .* tokens, prompt \d+ tokens$", stats)


def test_the_peer_without_the_model_holds_its_own_layers_only(trial: Trial) -> None:
    # Parts of a plan that was replaced stay on the disk: where the peers' speeds were not known in
    # time. They are kept from trial to trial, so that the next one needs no second plan.
    for _ in range(3):
        with trial.start() as process:
            seen = read_until(process, "on disk: ")
            with stopped(process):  # its agents go on
                first, second = (Looked.at(home) for home in trial.homes())
                plans = trial.plans_of_both()
            assert process.stdout is not None
            seen += process.stdout.read()
            assert process.wait(60) == 0, seen
        if len(plans) == 1:
            break
    assert len(plans) == 1, plans
    layers = [layer for begin, end in second.windows for layer in range(begin, end)]
    assert 0 < len(layers) < 30, seen
    # The head embeds; the tail's output matrix is the embedding, too: the model ties them.
    ends = {"embed"} if {0, 29} & set(layers) else set()
    assert second.parts == {"head", *ends, *(f"layer-{layer:03d}" for layer in layers)}, seen
    shown = re.search(r"peer 1 (\d+\.\d) MiB, peer 2 (\d+\.\d) MiB$", seen, re.MULTILINE)
    assert shown, seen
    for megabytes, held in zip(shown.groups(), (first, second), strict=True):
        besides = float(megabytes) * (1 << 20) - held.bytes
        assert -ROUNDED_BYTES <= besides <= BESIDES_BYTES + ROUNDED_BYTES, seen


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["fetching the model", "peer 1 is starting", "finding each"])
def test_interrupted_at_any_moment_it_ends_what_it_started(
    trial: Trial, number: signal.Signals, moment: str
) -> None:
    with trial.start() as process:
        read_until(process, moment)
        process.send_signal(number)
        assert process.stdout is not None
        rest = process.stdout.read()
        assert process.wait(60) == 130, rest
    assert "Traceback" not in rest


def test_an_agent_that_dies_is_named_with_the_end_of_its_log(trial: Trial) -> None:
    with trial.start() as process:
        read_until(process, "finding each")
        deadline_s = time.monotonic() + 30
        while len(agents := trial.agents()) < 2:
            assert time.monotonic() < deadline_s
        agents[1].kill()
        assert process.stdout is not None
        rest = process.stdout.read()
        assert process.wait(60) == 1, rest
    assert re.search(r"halka: the trial failed: peer \d ended with exit code -9", rest)
    assert "the log of peer 2 ends with" in rest
