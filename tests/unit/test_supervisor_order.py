"""What a stage is told when it begins, line by line."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import pytest

from peer.protocol import StageOrder
from peer.ring import supervisor
from peer.ring.supervisor import Supervisor
from tests.conftest import Until
from tests.plans import PEERS, plan, state

ECHO = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text(sys.stdin.readline())"


async def test_the_order_has_this_peers_setting_of_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, until: Until
) -> None:
    """The settings of others, the coordinator's among them, are none of this stage's business."""
    heard = tmp_path / "heard"
    monkeypatch.setattr(
        supervisor.children, "command", lambda module: (sys.executable, "-c", ECHO, str(heard))
    )
    ends: list[str] = []
    found = Supervisor(lambda _plan, _news: None, lambda _plan, why: ends.append(why))
    try:
        await found.start(
            state(plan(4, 12)), PEERS[1], tmp_path, threads=2, step_s=7.0, bind="127.0.0.1",
            admitted=(), weights="small",
        )  # fmt: skip
        await until(lambda: ends, 20, "it wrote what it heard, and ended")
    finally:
        await found.close()
    order = msgspec.json.decode(heard.read_bytes(), type=StageOrder)
    assert (order.weights, order.threads, order.step_s) == ("small", 2, 7.0)
    assert order.peer_id == PEERS[1]
