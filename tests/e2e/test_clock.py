"""The wall clock is set a year forward, then back, under a cluster that answers: nothing happens.

Every process of the agents, their stages too, takes the date from a file that the test writes: a
`sitecustomize` on their path adds it to what `time` and `datetime` tell. The monotonic clock is
nobody's to set.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import fake_models
from tests.e2e.agents import STAGE, TEXT, Agent, House, until
from tests.e2e.answers import Answer, chat, told

YEAR_S = 365 * 86400
TOKENS = 300
SHIFT = """
import datetime, mmap, os, struct, time

with open(os.environ["TEST_CLOCK"], "rb") as file:
    shift = mmap.mmap(file.fileno(), 8, access=mmap.ACCESS_READ)

def shift_s():
    return struct.unpack("q", shift[:8])[0]

class Clock:  # no function: it may become an attribute of a class, as in `logging`
    def __init__(self, tell):
        self.tell = tell

    def __call__(self, *given):
        return self.tell(*given)

def of_now(told):
    return Clock(lambda *given: told(*(given or (time.time(),))))

first, first_ns = time.time, time.time_ns
time.time = Clock(lambda: first() + shift_s())
time.time_ns = Clock(lambda: first_ns() + shift_s() * 10**9)
time.localtime, time.gmtime = of_now(time.localtime), of_now(time.gmtime)

class Shifted(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.fromtimestamp(time.time(), tz)

    @classmethod
    def utcnow(cls):
        return cls.fromtimestamp(time.time(), datetime.timezone.utc).replace(tzinfo=None)

    @classmethod
    def today(cls):
        return cls.now()

datetime.datetime = Shifted
"""


class Dated(House):
    """Three agents whose date the test sets."""

    def __init__(self, folder: Path) -> None:
        self._clock = folder / "clock"
        self.set(0)
        (folder / "sitecustomize.py").write_text(SHIFT)
        super().__init__(folder, 3, TEST_CLOCK=str(self._clock))
        for agent in self.agents:
            agent.environment["PYTHONPATH"] += f"{os.pathsep}{folder}"
        self.model = fake_models.write(
            folder / "dated.gguf", end_every=0, delay_s=0.008, name="dated"
        )

    def set(self, ahead_s: int) -> None:
        """For all processes, at once."""
        with self._clock.open("r+b" if self._clock.exists() else "wb") as file:
            file.write(struct.pack("q", ahead_s))

    def pids(self) -> list[tuple[int, list[int], list[int]]]:
        """Of agents, stages and text processes."""

        def of(agent: Agent, module: str) -> list[int]:
            return sorted(process.pid for process in agent.processes(module))

        return [(agent.pid, of(agent, STAGE), of(agent, TEXT)) for agent in self.agents]

    def year(self, agent: Agent) -> int:
        """That an agent tells its clients: of the time at which an answer was made."""
        _, body = agent.post("/v1/chat/completions", chat("When?", 1))
        return round((int(body["created"]) - self._clock.stat().st_mtime) / YEAR_S)


@pytest.fixture
def dated(tmp_path: Path) -> Iterator[Dated]:
    house = Dated(tmp_path)
    try:
        for agent in house.agents:
            assert agent.word("pull", str(house.model)).returncode == 0
        house.start()
        yield house
    finally:
        house.close()


def test_a_clock_that_jumps_a_year_ahead_and_a_year_back_disturbs_nothing(dated: Dated) -> None:
    plan = dated.serving()
    term = dated.agents[0].status()["cluster"]["term"]
    with dated.watched():
        for agent in dated.agents:  # a text process each, before they are counted
            assert agent.post("/v1/chat/completions", chat("Hello?", 1))[0] == 200
        until(
            lambda: all(len(agent.processes(STAGE)) == 1 for agent in dated.agents),
            20, "older plans are over",
        )  # fmt: skip
        before, texts = dated.pids(), [len(agent.text()) for agent in dated.agents]
        answers = [Answer(agent, "q", TOKENS).begun() for agent in dated.agents]
        for years in (1, 0, -1, 0):
            dated.set(years * YEAR_S)
            seen = [len(answer.texts) for answer in answers]
            assert [dated.year(agent) for agent in dated.agents] == [years] * 3
            until(
                lambda seen=seen: all(  # type: ignore[misc]
                    len(a.texts) > n + 25 or a.ended_s for a, n in zip(answers, seen, strict=True)
                ),
                30, "the answers flow",
            )  # fmt: skip
        for answer in answers:
            answer.ended()
            assert (answer.finish, answer.done, answer.error) == ("length", True, "")
            assert answer.text == told(dated.model, "q", TOKENS)
        assert dated.pids() == before
        assert dated.serving() == plan
        assert dated.agents[0].status()["cluster"]["term"] == term
        for agent, mark in zip(dated.agents, texts, strict=True):
            assert not re.search("lost=|ended=plan|continued|role=", agent.text()[mark:])
