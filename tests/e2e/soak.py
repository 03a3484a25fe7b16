"""Random faults under load, for minutes: `python -m tests.e2e.soak --minutes 30 [--seed N]`.

Real agents with the fake engine, all of which hold the model. A fault comes every few seconds: an
agent or a stage is killed or stopped for a while, an agent is stopped politely and started again;
at least two agents are left alone at any time. Meanwhile clients ask, at agents that are left
alone; every answer is compared with what the model file says. In the end, or every minute: memory
and open descriptors of agents that have run on, which must not grow. A seed tells who does what to
whom; when it happens is the machine's.
"""

from __future__ import annotations

import argparse
import os
import random
import secrets
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests import fake_models
from tests.e2e.agents import STAGE, TEXT, Agent, House, until
from tests.e2e.answers import Answer, told

PEERS = 4
CALM = 2  # agents that run on to the end, where clients ask: the last, so others coordinate first
QUESTIONS = tuple(f"q{n}" for n in range(12))
TOKENS = (5, 60, 250)
AT_ONCE = 4  # answers
FAULT_EVERY_S = (2.0, 9.0)
STOPPED_S = (0.5, 8.0)
DOWN_S = (0.5, 6.0)  # an agent that was killed
WARM_S = 20.0  # before memory and descriptors count
LOOK_S = 1.0
GROWTH_BYTES = 24 << 20  # of an agent from its first to its last third, at most
GROWTH_DESCRIPTORS = 12
SERVES_S = 90.0


@dataclass
class Result:
    """What came of it. wrong: answers that were not the truth or ended with an error."""

    seed: int
    answers: int = 0
    continued: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    memory: dict[int, list[tuple[float, int]]] = field(default_factory=dict)  # by pid: at, bytes
    descriptors: dict[int, list[tuple[float, int]]] = field(default_factory=dict)
    orphans: list[str] = field(default_factory=list)

    def grown(self) -> list[str]:
        """What is not flat, in words."""
        found = []
        for of, name, most in (
            (self.memory, "bytes of memory", GROWTH_BYTES),
            (self.descriptors, "descriptors", GROWTH_DESCRIPTORS),
        ):
            for pid, seen in of.items():
                more = rise([value for _, value in seen])
                if more > most:
                    found.append(f"process {pid} has {more:.0f} more {name} than at first")
        return found

    def told(self) -> str:
        """For a reader."""
        faults = ", ".join(f"{name} x{count}" for name, count in sorted(self.faults.items()))
        rises = [
            f"agent {pid}: {rise([v for _, v in self.memory[pid]]) / (1 << 20):+.1f} MiB, "
            f"{rise([v for _, v in self.descriptors[pid]]):+.0f} descriptors"
            for pid in self.memory
        ]
        return (
            f"seed {self.seed}: {self.answers} answers, {self.continued} times one went on; "
            f"{faults or 'no faults'}; {'; '.join(rises)}"
        )


def rise(values: Sequence[float]) -> float:
    """From the middle of the first third to the middle of the last; less hurried than a slope."""
    third = len(values) // 3
    if third == 0:
        return 0.0
    return statistics.median(values[-third:]) - statistics.median(values[:third])


class Soak:
    """One run."""

    def __init__(self, folder: Path, seed: int, say: Callable[[str], None]) -> None:
        self._random, self._say = random.Random(seed), say
        self.result = Result(seed)
        self._model = fake_models.write(
            folder / "soaked.gguf", end_every=0, delay_s=0.004, name="soaked"
        )
        self._truths: dict[tuple[str, int], str] = {}
        self._over = threading.Event()
        self.house = House(folder, PEERS)

    def run(self, seconds: float) -> Result:
        """Faults, load and looks until the time is over; then wait for a whole ring again."""
        house = self.house
        try:
            for agent in house.agents:
                assert agent.word("pull", str(self._model)).returncode == 0
            house.start()
            house.serving()
            clients = [threading.Thread(target=self._client, args=(n,)) for n in range(AT_ONCE)]
            for thread in clients:
                thread.start()
            try:
                self._break(time.monotonic() + seconds)
            finally:
                self._over.set()
                for thread in clients:
                    thread.join(120)
            self._count()
            until(
                self._rests, SERVES_S, "all are back and serve one plan, with a stage at most each"
            )
            self._orphans()
        finally:
            house.close()
        return self.result

    # Faults ---------------------------------------------------------------------------------------

    def _break(self, until_s: float) -> None:
        began_s = told_s = time.monotonic()
        next_s = began_s + self._random.uniform(*FAULT_EVERY_S)
        while (now := time.monotonic()) < until_s:
            if now >= next_s:
                self._fault()
                next_s = time.monotonic() + self._random.uniform(*FAULT_EVERY_S)
            if now - began_s > WARM_S:
                self._look()
            if now - told_s > 60:
                told_s = now
                self._count()
                self._say(self.result.told())
            if self.result.wrong:
                return
            self._over.wait(LOOK_S)

    def _fault(self) -> None:
        victim = self._random.choice(self.house.agents[:-CALM])
        faults: dict[str, Callable[[Agent], None]] = {
            "agent killed": self._kill,
            "agent stopped for a while": self._pause,
            "stage killed": lambda agent: self._of_stage(agent, signal.SIGKILL),
            "stage stopped for a while": lambda agent: self._of_stage(agent, signal.SIGSTOP),
            "stage of a calm peer killed": lambda _: self._of_stage(
                self._random.choice(self.house.agents[-CALM:]), signal.SIGKILL
            ),
            "agent left": self._leave,
        }
        name = self._random.choice(sorted(faults))
        self.result.faults[name] = self.result.faults.get(name, 0) + 1
        faults[name](victim)

    def _kill(self, agent: Agent) -> None:
        agent.kill()
        self._over.wait(self._random.uniform(*DOWN_S))
        self._again(agent)

    def _leave(self, agent: Agent) -> None:
        assert agent.process is not None
        agent.process.terminate()
        code = agent.process.wait(40)
        if code != 0:
            self.result.wrong.append(f"agent {agent.number} left with exit code {code}")
        self._over.wait(self._random.uniform(*DOWN_S))
        self._again(agent)

    def _again(self, agent: Agent) -> None:
        until(lambda: not agent.processes("peer"), 10, "nothing outlives its agent")
        self.house.start(agent)

    def _pause(self, agent: Agent) -> None:
        stopped = [agent.pid, *(process.pid for process in agent.processes(STAGE))]
        self._stop(stopped)

    def _of_stage(self, agent: Agent, number: signal.Signals) -> None:
        pids = [process.pid for process in agent.processes(STAGE)]
        if number == signal.SIGSTOP:
            self._stop(pids)
            return
        for pid in pids[-1:]:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def _stop(self, pids: Sequence[int]) -> None:
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            if number == signal.SIGSTOP:
                self._over.wait(self._random.uniform(*STOPPED_S))

    # Load -----------------------------------------------------------------------------------------

    def _client(self, number: int) -> None:
        asks = random.Random(self.result.seed * 1000 + number)
        while not self._over.is_set() and not self.result.wrong:
            agent = self.house.agents[-1 - asks.randrange(CALM)]
            question, tokens = asks.choice(QUESTIONS), asks.choice(TOKENS)
            answer = Answer(agent, question, tokens)
            answer.join(240)
            if wrong := self._wrong(answer, question, tokens):
                self.result.wrong.append(f"at agent {agent.number}, {question} {tokens}: {wrong}")
            self.result.answers += 1

    def _wrong(self, answer: Answer, question: str, tokens: int) -> str:
        if answer.is_alive():
            return "it does not end"
        if answer.error or answer.broken:
            return answer.error or answer.broken
        if (answer.finish, answer.done) != ("length", True):
            return f"it ended with {answer.finish!r}"
        key = question, tokens
        truth = self._truths.get(key) or told(self._model, question, tokens)
        self._truths[key] = truth
        return "" if answer.text == truth else f"{answer.text!r} is not {truth!r}"

    # Looks ----------------------------------------------------------------------------------------

    def _look(self) -> None:
        now = time.monotonic()
        for agent in self.house.agents[-CALM:]:
            with suppress(psutil.Error):
                process = psutil.Process(agent.pid)
                seen = self.result.memory.setdefault(agent.pid, [])
                seen.append((now, process.memory_info().rss))
                seen = self.result.descriptors.setdefault(agent.pid, [])
                seen.append((now, process.num_fds()))

    def _count(self) -> None:
        texts = (agent.text() for agent in self.house.agents)
        self.result.continued = sum(text.count("answer=continued") for text in texts)

    def _rests(self) -> bool:
        """Whether all are members again and follow one plan that serves. A peer whose stage was
        killed too often may still be done without."""
        agents = self.house.agents
        statuses = [agent.status() for agent in agents]
        everybody = {agent.peer_id for agent in agents}
        return (
            all(s.get("model", {}).get("phase") == "serving" for s in statuses)
            and len({s["model"]["plan"] for s in statuses}) == 1
            and all(agent.members() == everybody for agent in agents)
            and all(len(agent.processes(STAGE)) <= 1 for agent in agents)
        )

    def _orphans(self) -> None:
        """Of each kind of process an agent has one at most."""
        for agent in self.house.agents:
            for kind in (STAGE, TEXT, "peer run"):
                if len(agent.processes(kind)) > 1:
                    self.result.orphans.append(f"agent {agent.number} has several of {kind}")


def main(words: Sequence[str]) -> int:
    """0: nothing was wrong, and nothing grew."""
    reader = argparse.ArgumentParser(description=__doc__)
    reader.add_argument("--minutes", type=float, default=30.0)
    reader.add_argument("--seed", type=int, default=None)
    given = reader.parse_args(words)
    seed = secrets.randbelow(1 << 31) if given.seed is None else given.seed

    def say(line: str) -> None:
        print(line, flush=True)  # noqa: T201

    say(f"seed {seed}, {given.minutes:g} minutes")
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder), seed, say)
        result = soak.run(60 * given.minutes)
        say(result.told())
        faults = [*result.wrong, *result.orphans, *result.grown()]
        for line in faults:
            say(f"WRONG: {line}")
        if faults:
            for agent in soak.house.agents:
                say(f"--- agent {agent.number} ({agent.peer_id})\n{agent.text()[-6000:]}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
