"""The daemon's look at the store: what failed to be measured is tried again. And its end: a first
signal lets others take over, a second one does not wait."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from peer import daemon
from peer.config import Config
from peer.errors import ModelError, NoPlan
from peer.leaving import REFUSED
from peer.models.imports import import_gguf
from peer.models.store import Store
from peer.planning import survey
from peer.planning.leaving import Reason
from peer.planning.profile import EngineProfile, ModelOffer, ModelShape, Profile
from tests import fake_models
from tests.conftest import Until

CPU = EngineProfile("fake", "CPU", "cpu")


class OneAgent:
    """What the daemon sees of an agent."""

    me = "a" * 16

    def __init__(self, *engines: EngineProfile) -> None:
        self.profiles = {self.me: Profile(self.me, "oak", "linux", 2, 1 << 30, 1 << 30)}
        self.introduce(self._with(*engines))
        self.unusable: dict[str, str] = {}
        self.refused_engines: dict[str, str] = {}
        self.offered: list[str] = []

    def _with(self, *engines: EngineProfile) -> Profile:
        return Profile(self.me, "oak", "linux", 2, 1 << 30, 1 << 30, engines=engines)

    def introduce(self, profile: Profile) -> None:
        self.profiles[self.me] = profile

    def announce(self, offers: Sequence[ModelOffer]) -> None:
        self.offered = [offer.shape.model for offer in offers]


class NoIdentity:
    peer_id = OneAgent.me


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """One model, and a daemon in a hurry."""
    monkeypatch.setattr(daemon, "STORE_S", 0.01)
    monkeypatch.setattr(daemon, "MEASURE_AGAIN_S", 0.2)
    store = Store(tmp_path / "home")
    import_gguf(fake_models.write(tmp_path / "a.gguf", name="elm"), store)
    return store


@contextlib.asynccontextmanager
async def watching(agent: OneAgent, store: Store) -> Any:
    watcher: Any = daemon.Daemon(Config.loopback(backend="fake"), NoIdentity())  # type: ignore[arg-type]
    task = asyncio.create_task(watcher._watch_store(agent, store))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_model_whose_measurement_was_killed_is_offered_later(
    store: Store, monkeypatch: pytest.MonkeyPatch, until: Until
) -> None:
    measure, tries = survey.shape, 0

    async def killed_once(backend: str, folder: Path) -> ModelShape:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise ModelError("measuring fake was ended by signal 9")
        return await measure(backend, folder)

    monkeypatch.setattr(survey, "shape", killed_once)
    agent = OneAgent(CPU)
    async with watching(agent, store):
        await until(lambda: agent.unusable, 10, "the failure is told")
        (why,) = agent.unusable.values()
        assert why == "elm-f32: measuring fake was ended by signal 9"
        assert agent.offered == []
        await until(lambda: agent.offered == ["elm-f32"], 20, "it is offered after all")
        assert agent.unusable == {}
    assert tries == 2


async def test_an_engine_that_did_not_start_is_looked_for_again(
    store: Store, monkeypatch: pytest.MonkeyPatch, until: Until
) -> None:
    async def found(config: Config, refused: dict[str, str]) -> tuple[EngineProfile, ...]:
        refused["mlx"] = "MLX 0.33.0 is refused"
        return (CPU,)

    monkeypatch.setattr(survey, "engines", found)
    agent = OneAgent()
    agent.introduce(replace(agent.profiles[agent.me], leaving=True))
    async with watching(agent, store):
        await until(lambda: agent.offered == ["elm-f32"], 20, "the model is offered")
    assert agent.profiles[agent.me].engines == (CPU,)
    assert agent.refused_engines == {"mlx": "MLX 0.33.0 is refused"}
    assert agent.profiles[agent.me].leaving, "finding an engine takes no wish back"


class Wishes:
    """A parting that takes its time: it is over when the test says so."""

    def __init__(self, the_daemon: daemon.Daemon, refuses: str = "") -> None:
        self.reasons: list[Reason] = []
        self.refuses = refuses
        the_daemon.parting = self  # type: ignore[assignment]

    def wish(self, reason: Reason) -> None:
        self.reasons.append(reason)


@pytest.fixture
def ending(monkeypatch: pytest.MonkeyPatch) -> daemon.Daemon:
    """A daemon; what it tells systemd goes nowhere."""
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    return daemon.Daemon(Config.loopback(backend="fake"), NoIdentity())  # type: ignore[arg-type]


async def test_the_first_signal_hands_over_and_the_second_ends_at_once(
    ending: daemon.Daemon,
) -> None:
    wishes = Wishes(ending)
    ending._signalled()
    assert wishes.reasons == ["stop"]
    assert not ending.stop.is_set()
    ending._signalled()
    assert ending.stop.is_set()


async def test_a_signal_before_there_is_anything_to_hand_over_ends_at_once(
    ending: daemon.Daemon,
) -> None:
    ending._signalled()
    assert ending.stop.is_set()


@pytest.mark.parametrize(("reason", "ends"), [("stop", True), ("leave", True), ("sleep", False)])
async def test_only_a_peer_that_sleeps_lives_on(
    ending: daemon.Daemon, reason: Reason, ends: bool
) -> None:
    ending._may_go(reason)
    assert ending.stop.is_set() == ends


async def test_new_answers_are_refused_while_the_peer_goes_away(ending: daemon.Daemon) -> None:
    asked: list[str] = []

    class Asked:
        class serving:
            models = text = context = None

            @staticmethod
            def answer(request_id: str, *args: object) -> None:
                asked.append(request_id)

    service: Any = daemon._Service(Asked(), ending)  # type: ignore[arg-type]
    question = ("model", [1], None, 5, ())
    service.answer("early", *question)
    assert service.leaving() == ""
    wishes = Wishes(ending)
    service.answer("now", *question)
    wishes.refuses = REFUSED
    with pytest.raises(NoPlan, match="going away; ask another"):
        service.answer("late", *question)
    assert (asked, service.leaving()) == (["early", "now"], REFUSED)
