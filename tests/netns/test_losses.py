"""Real peers over real cables that are lost one way or another: who notices, how soon, and why.

Only the agents' cluster parts, so that the time measured is theirs; it is printed (pytest -s).
"""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from peer.cluster.listener import clock
from peer.cluster.membership import ENDED, LIVED_S
from peer.config import Timing
from tests.netns.world import Machine, World, world

NAMES = ["ash", "elm", "oak", "fir"]
PROGRAM = ("-m", "tests.netns.lookout")
TIMING = Timing()
AT_ONCE_S = 0.5  # measured: 0.01 to 0.02 s
SILENCE_S = TIMING.silence_s + 0.7
REACH_S = TIMING.silence_s + TIMING.doubt_s
MORE_S = 1.5  # on a busy machine
NOWHERE = "02:00:00:00:00:99"  # no machine has this hardware address


@pytest.fixture(autouse=True)
def nothing_left_behind() -> None:
    """The agents outlive a test; that none is left is seen at the end of their world."""


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with world(tmp_path_factory.mktemp("house")) as made:
        for name in NAMES:
            made.machine(name).start(program=PROGRAM)
        made.until(lambda: whole(made), 30, "four peers know each other")
        yield made


def told(machine: Machine, *what: str, since: float = 0.0) -> list[dict[str, Any]]:
    lines = machine.log().splitlines()
    lines = [line for line in lines if line.startswith("{") and line.endswith("}")]
    return [it for it in map(json.loads, lines) if it["what"] in what and it["at"] >= since]


def ids(house: World) -> dict[str, str]:
    """Peer id → name."""
    return {it["peer_id"]: m.name for m in house.machines.values() for it in told(m, "me")}


def seen(machine: Machine) -> set[str]:
    """Peer ids of its members."""
    found: set[str] = set()
    for it in told(machine, "me", "joined", "lost"):
        if it["what"] == "me":
            found.clear()
        else:
            (found.add if it["what"] == "joined" else found.discard)(it["peer_id"])
    return found


def whole(house: World) -> bool:
    """Everybody knows everybody."""
    names = ids(house)
    return len(names) == len(NAMES) and all(
        {names[it] for it in seen(machine)} == set(NAMES) - {machine.name}
        for machine in house.machines.values()
    )


def settled(house: World) -> bool:
    """Everybody has known everybody for long enough to be dialled at once when a link breaks."""
    joined = [it["at"] for machine in house.machines.values() for it in told(machine, "joined")]
    return whole(house) and clock() - max(joined) > 2 * LIVED_S


def lost(house: World, by: str, whom: str, since: float) -> dict[str, Any]:
    """How `by` lost `whom`; {} where it did not yet."""
    names = ids(house)
    losses = told(house.machines[by], "lost", since=since)
    return next((it for it in losses if names[it["peer_id"]] == whom), {})


def noticed(
    house: World, pairs: set[tuple[str, str]], began: float, within_s: float, what: str
) -> dict[tuple[str, str], dict[str, Any]]:
    """Wait until each of these pairs (by, whom) is lost; no other pair may be."""
    house.until(
        lambda: all(lost(house, by, whom, began) for by, whom in pairs), within_s + 10, what
    )
    found = {pair: lost(house, *pair, began) for pair in pairs}
    for pair, loss in found.items():
        loss["took_s"] = loss["at"] - began
        told_ = f"{what}: {pair[0]} lost {pair[1]} after {loss['took_s']:.2f} s: {loss['why']}"
        print(told_)  # noqa: T201
    assert max(loss["took_s"] for loss in found.values()) < within_s + MORE_S
    names = ids(house)
    all_ = {
        (machine.name, names[it["peer_id"]])
        for machine in house.machines.values()
        for it in told(machine, "lost", since=began)
    }
    assert all_ == pairs
    return found


def go_on(machine: Machine) -> None:
    assert machine.process is not None
    machine.process.send_signal(signal.SIGCONT)


def stop(machine: Machine) -> None:
    assert machine.process is not None
    machine.process.send_signal(signal.SIGSTOP)


def deaf(machine: Machine) -> None:
    machine.lose("received")


def dumb(machine: Machine) -> None:
    machine.lose("sent")


def toward(machine: Machine, other: Machine, *, cut: bool) -> None:
    """What the machine sends to this one goes nowhere, or arrives again."""
    words = ["replace", other.address, "lladdr", NOWHERE, "nud", "permanent"]
    words = ["neigh", *(words if cut else ["del", other.address]), "dev", "eth0"]
    done = machine.run(shutil.which("ip") or "ip", *words)
    assert done.returncode == 0, done.stderr


def test_an_agent_that_is_killed_is_noticed_at_once_and_comes_back(house: World) -> None:
    house.until(lambda: settled(house), 30, "four peers know each other")
    rest = set(NAMES) - {"oak"}
    began = clock()
    house.machines["oak"].kill()
    found = noticed(house, {(by, "oak") for by in rest}, began, AT_ONCE_S, "kill -9")
    assert {loss["why"] for loss in found.values()} == {ENDED}
    house.machines["oak"].start(program=PROGRAM)
    house.until(lambda: whole(house), 30, "it is back")


@pytest.mark.parametrize(
    ("fault", "mend"),
    [(stop, go_on), (Machine.unplug, Machine.plug), (deaf, Machine.lose_nothing),
     (dumb, Machine.lose_nothing)],
    ids=["it is stopped", "its cable is pulled", "it hears nothing", "it is not heard"],
)  # fmt: skip
def test_silence_is_noticed_by_all_in_time(
    house: World, fault: Callable[[Machine], None], mend: Callable[[Machine], None]
) -> None:
    house.until(lambda: settled(house), 30, "four peers know each other")
    rest = set(NAMES) - {"elm"}
    pairs = {(by, "elm") for by in rest}
    if fault is not stop:
        pairs |= {("elm", by) for by in rest}
    began = clock()
    fault(house.machines["elm"])
    try:
        found = noticed(house, pairs, began, SILENCE_S, fault.__name__)
        assert not any(loss["heard_by"] for loss in found.values())
        assert ENDED not in {loss["why"] for loss in found.values()}
    finally:
        mend(house.machines["elm"])
    house.until(lambda: whole(house), 30, "it is back")
    assert {it for it in pairs if it[0] == "elm"} or not told(
        house.machines["elm"], "lost", since=began
    )  # who slept accuses nobody


def test_two_that_cannot_reach_each_other_say_who_still_hears_whom(house: World) -> None:
    house.until(lambda: settled(house), 30, "four peers know each other")
    ash, fir = house.machines["ash"], house.machines["fir"]
    names = ids(house)
    began = clock()
    toward(ash, fir, cut=True)
    toward(fir, ash, cut=True)
    try:
        found = noticed(house, {("ash", "fir"), ("fir", "ash")}, began, REACH_S, "a cut")
        for loss in found.values():
            assert names[loss["heard_by"]] in ("elm", "oak")
            assert "still hear" in loss["why"]
    finally:
        toward(ash, fir, cut=False)
        toward(fir, ash, cut=False)
    house.until(lambda: whole(house), 40, "they find together again")
