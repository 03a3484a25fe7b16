"""Machines that answer together while one of them is taken away: what the test and the benchmark
share.

A `Home` is a world of four machines with the real model, of which each runs some layers. A fault
is done to one of them while the `openai` client reads a stream on another. Whatever was broken is
mended again for the next case. What the client should have read is told by `tests.netns.truth`.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from peer.models.imports import import_gguf
from peer.models.store import Store
from tests.netns.stream import Reader
from tests.netns.world import STAGE, Machine, World, world
from tests.smollm2 import smollm2

NAMES = ("oak", "elm", "ash", "fir")
QUESTION = "Tell a long story about a river, a mill and a girl who wants to see the sea."
TOKENS = 260
SETTINGS = {"spread": "all", "threads": "1", "backend": "llama_cpp"}
WHOLE_S = 90.0  # for four machines to serve together again; a busy machine takes its time
ANSWER_S = 90.0
PLACES = ("head", "middle", "tail", "coordinator")
COORDINATES = re.compile(r"halka\.\w+ role=coordinator term=\d+ ")


def kill_stage(machine: Machine) -> None:
    """kill -9 of the stage of the plan that serves, alone."""
    os.kill(machine.stages()[machine.status()["model"]["plan"]], signal.SIGKILL)


def kill_both(machine: Machine) -> None:
    """kill -9 of everything that runs there, as when the power goes."""
    machine.signal(signal.SIGKILL)
    machine.kill()


STAGE_ALONE = "kill -9 of its stage"
FAULTS: dict[str, Callable[[Machine], None]] = {
    "kill -9 of the agent": Machine.kill,
    STAGE_ALONE: kill_stage,
    "kill -9 of both": kill_both,
    "SIGSTOP": lambda machine: machine.signal(signal.SIGSTOP),
    "link down": Machine.unplug,
    "all it sends is lost": lambda machine: machine.lose("sent"),
    "all it is sent is lost": lambda machine: machine.lose("received"),
}
SILENT = ("SIGSTOP", "link down", "all it sends is lost", "all it is sent is lost")


@dataclass(frozen=True)
class Case:
    """A fault, done to the peer at a place of the ring once so many pieces of text came."""

    fault: str
    place: str
    after: int

    def __str__(self) -> str:
        return f"{self.fault}, {self.place}, token {self.after}"


@dataclass(frozen=True)
class Line:
    """Of an agent's log. at_s: of the monotonic clock of this machine."""

    machine: str
    at_s: float
    text: str


@dataclass(frozen=True)
class Seen:
    """What came of a case. fault_s: when; starts: after how many tokens the answer went on; what
    every agent wrote from the fault until the answer's end."""

    case: Case
    victim: str
    entry: str
    reader: Reader
    fault_s: float
    starts: tuple[int, ...]
    lines: tuple[Line, ...]

    @property
    def pause(self) -> tuple[float, float]:
        """The longest wait for a piece of text since the fault: how long, and when it came."""
        waits = [(b - a, b) for a, b in pairwise(self.reader.times_s) if b > self.fault_s]
        return max(waits, default=(0.0, self.fault_s))

    def matching(self, pattern: str, *, by: str = "") -> list[Line]:
        """Such lines since the fault, of this machine or of any on the entry's side."""
        gone = "" if self.case.fault == STAGE_ALONE else self.victim
        return [
            line
            for line in self.lines
            if line.at_s > self.fault_s
            and (line.machine == by if by else line.machine != gone)
            and re.search(pattern, line.text)
        ]


class Home:
    """Four machines with one model between them. Mends what a case broke."""

    def __init__(self, made: World, settings: dict[str, str]) -> None:
        self.world, self._settings = made, settings

    def machine(self, name: str) -> Machine:
        """One of them."""
        return self.world.machines[name]

    def mend(self) -> None:
        """Undo every fault, start what was killed, and wait until all four serve one plan."""
        for machine in self.world.machines.values():
            machine.signal(signal.SIGCONT)
            machine.plug()
            machine.lose_nothing()
            if machine.process is not None and machine.process.poll() is not None:
                machine.process = None
            if machine.process is None:
                self.world.until(lambda m=machine: not m.processes(), 15, "its stages are gone")  # type: ignore[misc]
                machine.start(**self._settings)
        self.world.until(self.is_whole, WHOLE_S, "all four serve one plan, and no stage is left")

    def restart(self, **settings: str) -> None:
        """End all agents politely, and start them with other settings."""
        for machine in self.world.machines.values():
            machine.terminate()
        for machine in self.world.machines.values():
            assert machine.stop() == 0
        self._settings |= settings
        self.mend()

    def empty(self) -> None:
        """Another ring, whose slots keep nothing of earlier answers."""
        plan = self.machine(NAMES[0]).status()["model"]["plan"]
        kill_stage(self.at("tail"))
        self.world.until(
            lambda: self.is_whole() and self.machine(NAMES[0]).status()["model"]["plan"] != plan,
            WHOLE_S, "all four serve another plan",
        )  # fmt: skip

    def forget(self, names: Sequence[str]) -> None:
        """These machines lose all parts that they have, and fetch those that they need again."""
        for name in names:
            machine = self.machine(name)
            machine.terminate()
            machine.stop()
            shutil.rmtree(machine.home / "models")
        self.mend()

    def is_whole(self) -> bool:
        """Whether all serve, and of older plans nothing is left."""
        return self.world.agree(NAMES) and all(
            len(m.processes(STAGE)) == 1 for m in self.world.machines.values()
        )

    def ring(self) -> list[str]:
        """Names, in ring order."""
        peers = [p for p in self.machine(NAMES[0]).status()["peers"] if p["layers"]]
        return [p["name"] for p in sorted(peers, key=lambda p: min(p["layers"]))]

    def coordinator(self) -> str:
        """Its name."""
        peers = self.machine(NAMES[0]).status()["peers"]
        return str(next(p["name"] for p in peers if p["coordinator"]))

    def at(self, place: str) -> Machine:
        """The machine at a place of the ring; a middle that does not coordinate, where one is."""
        ring, first = self.ring(), self.coordinator()
        middle = sorted(ring[1:-1], key=lambda name: name == first)[0]
        return self.machine(
            {"head": ring[0], "middle": middle, "tail": ring[-1], "coordinator": first}[place]
        )

    def entry(self, victim: Machine) -> Machine:
        """Where to ask: not at the victim, nor at the coordinator."""
        others = [name for name in NAMES if name not in (victim.name, self.coordinator())]
        return self.machine(others[0])

    def ask(self, entry: Machine, tokens: int = TOKENS, **settings: Any) -> Reader:
        """The story, read by `openai` on this machine."""
        model = entry.status()["model"]["id"]
        return Reader(entry, model, QUESTION, max_tokens=tokens, **settings)

    def run(self, case: Case, victim: Machine | None = None, **settings: Any) -> Seen:
        """Do it, on a whole home, and wait until the answer is over. victim: whoever is at the
        case's place, unless named."""
        victim = victim or self.at(case.place)
        entry = self.entry(victim)
        marks = {name: len(m.log()) for name, m in self.world.machines.items()}
        with self.ask(entry, **settings) as reader:
            self.world.until(
                lambda: reader.came >= case.after or reader.ended, 40, f"the answer flows: {case}"
            )
            fault_s = time.monotonic()
            FAULTS[case.fault](victim)
            self.world.until(lambda: reader.ended, ANSWER_S, f"the answer is over: {case}")
        lines = self.lines(marks)
        return Seen(case, victim.name, entry.name, reader, fault_s, starts(lines, entry), lines)

    def lines(self, marks: dict[str, int]) -> tuple[Line, ...]:
        """What all have written since their logs had these lengths, in order of time."""
        found = []
        ahead_s = time.time() - time.monotonic()
        for name, mark in marks.items():
            for text in self.machine(name).log()[mark:].splitlines():
                with suppress(ValueError):
                    at = datetime.strptime(text[:23], "%Y-%m-%d %H:%M:%S,%f").astimezone()
                    found.append(Line(name, at.timestamp() - ahead_s, text[24:]))
        return tuple(sorted(found, key=lambda line: line.at_s))


def starts(lines: Sequence[Line], entry: Machine) -> tuple[int, ...]:
    """After how many tokens the entry's answers went on, as it says itself."""
    found = (re.search(r"answer=continued plan=\S+ tokens=(\d+)", line.text)
             for line in lines if line.machine == entry.name)  # fmt: skip
    return tuple(int(match[1]) for match in found if match)


@contextmanager
def home(folder: Path, holders: Sequence[str] = NAMES, **settings: str) -> Iterator[Home]:
    """Four machines that serve. holders: those that have the whole model from the beginning."""
    with world(folder) as made:
        for name in NAMES:
            made.machine(name)
        first = made.machines[holders[0]].home
        import_gguf(smollm2(), Store(first))
        for name in holders[1:]:
            shutil.copytree(first, made.machines[name].home, dirs_exist_ok=True)
        built = Home(made, SETTINGS | settings)
        try:
            built.mend()
            yield built
        finally:
            for machine in made.machines.values():
                machine.signal(signal.SIGCONT)
