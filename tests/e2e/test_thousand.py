"""The first seconds of `tests.bench.thousand`, in every run: many requests, many of them left."""

from __future__ import annotations

import asyncio
import secrets
import sys
from pathlib import Path

import pytest

from tests.bench.thousand import ENDS, Thousand, house_of

pytestmark = pytest.mark.timeout(200)

REQUESTS, SECONDS = 75, 18.0
LONGEST_S = 20.0  # for a first token, on a busy machine


def test_requests_that_come_and_go_leave_every_slot_free_and_no_one_waiting(
    tmp_path: Path,
) -> None:
    seed = secrets.randbelow(1 << 30)
    sys.stdout.write(f"seed {seed}\n")
    house, model = house_of(tmp_path, fake=True)
    try:
        assert house.agents[0].word("pull", str(model)).returncode == 0
        house.start()
        plan = house.serving()
        with house.watched():
            result = asyncio.run(Thousand(house, seed, model).run(REQUESTS, SECONDS))
        sys.stdout.write("\n".join(result.told()))
        assert not result.wrong, result.told()
        assert not result.grown()
        assert len(result.requests) == REQUESTS
        assert {request.end for request in result.requests} == ENDS.keys()
        assert result.longest_s < LONGEST_S
        assert house.serving() == plan, "the same ring serves as before"
        assert set(result.memory) >= {"agent 1", "agent 2", "stage 1", "stage 2"}
    finally:
        house.close()
