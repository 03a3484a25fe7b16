"""Agents whose stages hang, crash or compute nonsense: the answer on the screen goes on.

Three agents on the fake engine, one of which has the trouble; each answer ends whole and right.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import fake_models
from tests.e2e.agents import STAGE, House, until
from tests.e2e.answers import flowing, told

TOKENS = 600
PAUSE_S = 10.0  # after silence


class Troubled(House):
    """Three agents with one model; each has a file that switches faults of its stages on."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, 3)
        self.model = fake_models.write(
            folder / "steady.gguf", end_every=0, delay_s=0.004, name="steady"
        )
        for agent in self.agents:
            agent.environment["HALKA_FAKE_FAULT"] = str(agent.home / "fault")
            done = agent.word("pull", str(self.model))
            assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Troubled]:
    """Shared by the tests, each of which troubles another agent."""
    troubled = Troubled(tmp_path_factory.mktemp("house"))
    try:
        troubled.start()
        yield troubled
    finally:
        troubled.close()


@pytest.mark.parametrize(
    ("number", "trouble", "reason"),
    [
        (0, "SIGSTOP", "hung: it neither computed nor answered for 5 s"),
        (1, "crash", "last words: Fatal Python error: Segmentation fault | in string_at"),
        (2, "infinite", "it computed numbers that are not finite, answer after answer"),
    ],
)
def test_answers_go_on_around_a_stage_in_trouble(
    house: Troubled, number: int, trouble: str, reason: str
) -> None:
    house.serving()
    until(lambda: all(len(a.processes(STAGE)) == 1 for a in house.agents), 15, "one plan is left")
    plan, owner = house.serving(), house.agents[number]
    fault, stage = owner.home / "fault", owner.stage(plan)
    with house.watched():
        answers = flowing(house.others(owner), tokens=TOKENS)
        if trouble == "SIGSTOP":
            os.kill(stage.pid, signal.SIGSTOP)
        else:
            fault.write_text(f"{trouble} any")
        try:
            until(lambda: not stage.is_running(), 15, "the stage in trouble is gone")
        finally:
            fault.unlink(missing_ok=True)
            with contextlib.suppress(ProcessLookupError):
                os.kill(stage.pid, signal.SIGCONT)
        for answer in answers:
            answer.ended()
            assert not answer.error, answer.error
            assert answer.text == told(house.model, "q0", TOKENS)
            assert answer.pause_s < PAUSE_S
        assert owner.runs
        assert any(reason in agent.text() for agent in house.agents), "nobody says what it was"
        assert house.serving(within_s=60.0) != plan, "all three serve again, with another plan"
