"""The first seconds of a soak, in every run: random faults, no wrong token, nothing that grows."""

from __future__ import annotations

import secrets
import sys
from pathlib import Path

import pytest

from tests.e2e.soak import Soak

pytestmark = pytest.mark.timeout(300)

SECONDS = 20.0


def test_random_faults_under_load_cost_no_token_and_leave_nothing_behind(tmp_path: Path) -> None:
    seed = secrets.randbelow(1 << 31)
    sys.stdout.write(f"seed {seed}\n")
    soak = Soak(tmp_path, seed, lambda line: None)
    with soak.house.watched():
        result = soak.run(SECONDS)
    sys.stdout.write(result.told())
    assert not result.wrong, result.told()
    assert not result.orphans
    assert not result.grown()
    assert result.answers > 5
    assert result.faults
