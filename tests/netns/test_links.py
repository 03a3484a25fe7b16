"""Peers that come, go, and fall silent, over real cables: what the others see, and how soon; and
that answers go on, on both sides.

The small fake engine, so that the time measured is the cluster's own. Every test leaves three
machines that agree, as it found them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from peer.models.imports import import_gguf
from peer.models.store import Store
from tests import fake_models
from tests.e2e.answers import told
from tests.netns.stream import Stream
from tests.netns.world import Machine, World, agreement, members, world

NAMES = ["ash", "elm", "oak"]
FAKE = {"backend": "fake", "spread": "all"}
GONE_S = 15.0  # a peer that is stopped, once the others serve without it
NOTICED_S = 5.0  # a silent link
MODEL = "model.gguf"
AGREED_S = 30.0  # from a change to one plan that serves; busy machines take their time
LONG = 400  # tokens; some twenty seconds
QUESTION = "Tell all."


@pytest.fixture(autouse=True)
def nothing_left_behind() -> None:
    """The agents outlive a test and start stages in it; that they leave none is seen at the end
    of their world."""


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Three machines that each have the whole model, and serve it together."""
    folder = tmp_path_factory.mktemp("house")
    model = fake_models.write(folder / MODEL, end_every=0, delay_s=0.01)
    with world(folder) as made:
        for name in NAMES:
            machine = made.machine(name)
            import_gguf(model, Store(machine.home))
            machine.start(**FAKE)
        made.until(lambda: made.agree(NAMES), AGREED_S, "three peers agree")
        yield made


def coordinator(house: World, seen_by: str = NAMES[0]) -> str:
    """Name of the coordinator."""
    status = house.machines[seen_by].status()
    return str(next(peer["name"] for peer in status["peers"] if peer["coordinator"]))


def answer(machine: Machine) -> str:
    """A short greedy answer."""
    with Stream(machine, "Where does the river go?", max_tokens=24) as stream:
        machine.world.until(lambda: stream.ended, 30, "a short answer")
    assert stream.clean, f"{stream.error}\n{machine.world.story()}"
    return stream.text


def test_a_peer_that_starts_later_joins_and_one_that_leaves_is_soon_gone(house: World) -> None:
    before = agreement(house.machines[NAMES[0]].status())
    late = house.machine("fir")
    late.start(**FAKE)
    house.until(lambda: house.agree([*NAMES, "fir"]), AGREED_S, "four peers agree")
    after = agreement(late.status())
    assert after["coordinator"] == before["coordinator"]  # a newcomer deposes nobody
    assert after["term"] == before["term"]
    assert after["plan"] != before["plan"]
    assert len(after["layers"]) == 4
    assert len({answer(house.machines[name]) for name in ("oak", "fir")}) == 1

    others = [house.machines[name] for name in NAMES]
    late.terminate()
    took_s = house.until(
        lambda: all(members(m.status()) == NAMES for m in others), 20, "the fourth is gone"
    )
    assert late.stop() == 0
    assert took_s < GONE_S
    house.until(lambda: house.agree(NAMES), AGREED_S, "three peers agree again")
    for machine in others:
        (gone,) = [p for p in machine.status()["peers"] if p["state"] == "lost"]
        assert gone["name"] == "fir"
        assert "its agent was stopped" in gone["why"]
    assert len(agreement(others[0].status())["layers"]) == len(before["layers"])


@pytest.mark.parametrize(
    ("victim_coordinates", "silence", "sound"),
    [(False, Machine.unplug, Machine.plug), (True, Machine.mute, Machine.unmute)],
    ids=["a member's cable is pulled", "the coordinator's wire goes dead"],
)
def test_a_silent_link_is_noticed_answers_go_on_and_the_parts_grow_together_again(
    house: World,
    victim_coordinates: bool,
    silence: Callable[[Machine], None],
    sound: Callable[[Machine], None],
) -> None:
    house.until(lambda: house.agree(NAMES), AGREED_S, "three peers agree")
    first = coordinator(house)
    victim = first if victim_coordinates else next(n for n in NAMES if n != first)
    rest = [name for name in NAMES if name != victim]
    expected, before = answer(house.machines[victim]), agreement(house.machines[first].status())
    with ExitStack() as asked:
        streams = {
            name: asked.enter_context(Stream(machine, QUESTION, max_tokens=LONG))
            for name, machine in house.machines.items()
            if name in NAMES
        }
        house.until(lambda: all(s.text for s in streams.values()), 20, "answers are under way")
        silence(house.machines[victim])
        pulled = time.monotonic()
        house.until(
            lambda: not any(victim in members(house.machines[name].status()) for name in rest),
            10, f"the others notice that {victim} is silent",
        )  # fmt: skip
        assert time.monotonic() - pulled < NOTICED_S
        house.until(lambda: all(s.ended for s in streams.values()), 60, "answers in flight end")
    for name, stream in streams.items():
        assert stream.clean, f"{name}: {stream.error}\n{house.story()}"
        assert not stream.error
        assert stream.text == told(house.folder / MODEL, QUESTION, LONG), name
        assert "answer=continued" in house.machines[name].log()

    alone = house.machines[victim]
    house.until(lambda: house.agree(rest) and house.agree([victim]), AGREED_S, "both sides serve")
    assert agreement(alone.status())["coordinator"] == alone.status()["me"]["peer_id"]
    assert coordinator(house, rest[0]) in rest
    assert answer(alone) == answer(house.machines[rest[0]]) == expected

    sound(alone)
    house.until(lambda: house.agree(NAMES), AGREED_S, "one cluster again")
    after = agreement(alone.status())
    assert after["term"] > before["term"]
    assert len(after["layers"]) == 3
    assert {answer(house.machines[name]) for name in NAMES} == {expected}
