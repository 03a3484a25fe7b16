"""Who is not in the ring may come, go and die, the coordinator too: the ring notices nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.answers import told
from tests.netns.undisturbed import FIRST, QUESTION, quiet

pytestmark = pytest.mark.timeout(300)

TOKENS = 1000
GAP_MAX_S = 0.5  # of tokens that take 25 ms; cores that others use are late at times


def test_the_ring_goes_on_while_others_join_leave_and_die(tmp_path: Path) -> None:
    with quiet(tmp_path) as home:
        before = home.still()
        coordinator = home.machine(FIRST).status()
        assert coordinator["cluster"]["coordinator"] == coordinator["me"]["peer_id"]
        with home.ask(TOKENS) as reader:
            for what, happens in home.happenings().items():
                came = reader.came
                reader.wait(came + 20, 30)
                happens()
                assert not reader.ended, f"too early: {what}"
                assert home.still() == before, f"{what}\n{home.world.story()}"
            reader.wait(TOKENS + 1, 60)
        assert (reader.error, reader.finish, reader.tokens) == ("", "length", TOKENS)
        assert reader.text == told(home.model, QUESTION, TOKENS)
        assert home.still() == before
        assert not home.continued()
        assert max(reader.gaps_s) < GAP_MAX_S, home.world.story()
