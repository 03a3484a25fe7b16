"""The draft model on the fake engine: guesses that are right, slots, reading a little at a time."""

from __future__ import annotations

import logging
import time
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import backends
from backends.base import Ability, BackendFault, Batch, Header, Settings, Weights, Window
from backends.fake import FakeBackend, FakeEngine
from backends.fake_model import EOS
from peer.models.imports import import_gguf
from peer.models.store import Store
from peer.planning import drafts
from peer.planning.plan import PlanState
from peer.protocol import StageOrder
from peer.ring import drafting
from peer.ring.drafting import DraftModel, load
from tests import fake_models
from tests.e2e.rings import plan_of
from tests.plans import PEERS

FAKE = backends.load("fake")
PROMPT = list(b"the quick brown fox")


class Counting(FakeEngine):
    """The fake engine; rows: of every step that it ran."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.faults = False
        self.nonsense = False
        self.settings: Settings | None = None

    def open(self, settings: Settings) -> FakeBackend:
        engine = self
        self.settings = settings

        class Backend(FakeBackend):
            def run(
                self, window: Window, batch: Batch, x: NDArray[np.int32]
            ) -> NDArray[np.float32]:
                if engine.faults:
                    raise BackendFault("the card fell off the bus")
                engine.rows.append(len(x))
                found = super().run(window, batch, x)
                return found * np.nan if engine.nonsense else found

        return Backend(settings)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


def stored(home: Path, name: str = "fake", seed: int = 0, **changes: int) -> tuple[Path, Path]:
    """A fake model as a file, and its folder in the store."""
    path = home / f"{name}-{seed}-{'-'.join(map(str, changes.values()))}.gguf"
    fake_models.write(path, layers=3, seed=seed, name=name, **({"end_every": 0} | changes))
    store = Store(home)
    return path, store.folder(import_gguf(path, store).digest)


@pytest.fixture
def engine() -> Counting:
    return Counting()


@pytest.fixture
def model(home: Path, engine: Counting) -> Iterator[tuple[Path, DraftModel]]:
    path, folder = stored(home)
    drafter = load(engine, folder, folder, threads=1, kv_cells=1 << 20)
    engine.rows.clear()
    yield path, drafter
    drafter.close()


def test_it_guesses_what_its_model_says(model: tuple[Path, DraftModel], engine: Counting) -> None:
    path, drafter = model
    truth = fake_models.truth(path, PROMPT, 12)
    assert drafter.draft("a", array("i", PROMPT), 5) == tuple(truth[:5])
    assert engine.rows == [len(PROMPT), 1, 1, 1, 1]
    engine.rows.clear()
    # Three of them were right; a fourth one came from the ring.
    assert drafter.draft("a", PROMPT + truth[:6], 4) == tuple(truth[6:10])
    assert engine.rows == [2, 1, 1, 1]


def test_a_guess_that_was_wrong_is_taken_back(
    model: tuple[Path, DraftModel], engine: Counting
) -> None:
    path, drafter = model
    truth = fake_models.truth(path, PROMPT, 1)
    drafter.draft("a", PROMPT, 6)
    other = [*PROMPT, truth[0], 7, 8]
    engine.rows.clear()
    assert drafter.draft("a", other, 3) == tuple(fake_models.truth(path, other, 3))
    assert engine.rows == [2, 1, 1]
    # The same again: nothing is new, and only the last id is read once more.
    engine.rows.clear()
    assert drafter.draft("a", other, 3) == tuple(fake_models.truth(path, other, 3))
    assert engine.rows == [1, 1, 1]
    shorter = PROMPT[:6]
    assert drafter.draft("a", shorter, 2) == tuple(fake_models.truth(path, shorter, 2))


def test_more_answers_than_slots_are_followed_by_turns(
    model: tuple[Path, DraftModel], engine: Counting
) -> None:
    path, drafter = model
    answers = [[*PROMPT, i] for i in range(drafts.SLOTS + 2)]
    for _ in range(2):
        for number, ids in enumerate(answers):
            assert drafter.draft(number, ids, 3) == tuple(fake_models.truth(path, ids, 3))
    drafter.forget(len(answers) - 1)
    drafter.forget("never heard of")
    engine.rows.clear()
    drafter.draft(len(answers) - 2, answers[-2], 1)
    drafter.draft(len(answers) - 1, answers[-1], 1)
    assert engine.rows == [1, len(PROMPT) + 1]


def test_an_answer_that_is_too_long_for_it_makes_room_or_is_left_alone(home: Path) -> None:
    path, folder = stored(home, context=64)
    drafter = load(FAKE, folder, folder, threads=1, kv_cells=4096)
    ids = [i % 250 for i in range(60)]
    assert drafter.draft("a", ids, 9) == tuple(fake_models.truth(path, ids, 5))
    assert drafter.draft("b", ids[1:], 2) == tuple(fake_models.truth(path, ids[1:], 2))
    assert drafter.draft("a", ids * 2, 4) == ()
    assert drafter.draft("a", ids[:50], 4) == tuple(fake_models.truth(path, ids[:50], 4))
    assert drafter.why == ""
    drafter.close()


def test_a_long_prompt_is_read_a_little_at_a_time(
    model: tuple[Path, DraftModel], engine: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, drafter = model
    ids = [i % 250 for i in range(30)]
    clock = iter(range(1000))
    monkeypatch.setattr(drafting, "READ_S", 1.5)  # two looks at a clock that goes by seconds
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    drafter._row_s = 1.0
    said: list[tuple[int, ...]] = []
    while not said or said[-1] == ():
        said.append(drafter.draft("a", ids, 4))
    assert len(said) > 2
    assert max(engine.rows) == drafting._READ_LEAST
    assert sum(engine.rows) == 30 + 3
    assert said[-1] == tuple(fake_models.truth(path, ids, 4))


def test_nothing_is_guessed_after_the_end_of_an_answer(home: Path) -> None:
    path, folder = stored(home, end_every=5)
    drafter = load(FAKE, folder, folder, threads=1, kv_cells=4096)
    guess = drafter.draft("a", PROMPT, 60)
    assert guess == (*fake_models.truth(path, PROMPT, 60), EOS)
    drafter.close()


@pytest.mark.parametrize("how", ["faults", "nonsense"])
def test_an_engine_that_fails_ends_the_guessing_and_nothing_else(
    model: tuple[Path, DraftModel], engine: Counting, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    _, drafter = model
    assert drafter.draft("a", PROMPT, 2)
    setattr(engine, how, True)
    with caplog.at_level(logging.WARNING, "halka.stage"):
        for _ in range(3):
            assert drafter.draft("a", [*PROMPT, 1], 4) == ()
            drafter.forget("a")
    assert len(caplog.records) == 1
    assert "draft=dropped" in caplog.text
    assert drafter.why in ("the card fell off the bus", "its numbers are not finite")


def test_what_a_guess_costs_is_measured_from_the_start(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = stored(home)
    monkeypatch.setenv("HALKA_FAKE_DELAY_S", "0.004")
    drafter = load(FAKE, folder, folder, threads=1, kv_cells=4096)
    assert 0.004 <= drafter.seconds_each < 0.1
    drafter.draft("a", PROMPT, 3)
    assert drafter.seconds_each >= 0.004
    drafter.close()


def test_a_model_of_another_tokenizer_does_not_load(home: Path) -> None:
    path, folder = stored(home)
    renamed = home / "renamed.gguf"
    data = path.read_bytes()
    assert data.count(b"<0x41>") == 1
    renamed.write_bytes(data.replace(b"<0x41>", b"<0x4A>"))
    store = Store(home)
    other = store.folder(import_gguf(renamed, store).digest)
    with pytest.raises(BackendFault, match="cannot draft: token 65 is '<0x4A>' to it") as caught:
        load(FAKE, other, folder, threads=1, kv_cells=4096)
    assert caught.value.kind == "refused"


def test_a_model_that_cannot_go_back_does_not_load(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(_self: FakeEngine, _header: Header) -> bool:
        return False

    monkeypatch.setattr(FakeEngine, "rewinds", never)
    _, folder = stored(home)
    with pytest.raises(BackendFault, match="cannot take a wrong guess back"):
        load(FAKE, folder, folder, threads=1, kv_cells=4096)


def test_a_model_drafts_on_the_plain_engine_where_that_of_the_stage_cannot_run_it(
    home: Path, engine: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = stored(home)
    store = Store(home)
    plan, asked = plan_of(store, store.manifest(folder.name), [], "fake"), []
    state = PlanState(plan, "loading")
    order = StageOrder(state, PEERS[0], str(folder), 1, draft_folder=str(folder), weights="small")

    def loaded(name: str) -> Counting:
        asked.append(name)
        return engine

    class Other(FakeEngine):
        def can_run(self, header: Header, weights: Weights = "auto") -> Ability:
            told.append(weights)
            return Ability("no", "it has no IQ4_XS")

        def open(self, settings: Settings) -> FakeBackend:
            raise AssertionError("it cannot run it")

    told: list[Weights] = []
    found = drafting.of_head(Other(), order, loaded)
    assert found is not None
    found.close()
    assert (asked, told) == (["llama_cpp"], ["small"])
    assert engine.settings is not None
    assert engine.settings.weights == "small"

    def missing(name: str) -> Counting:
        raise ImportError("no llama_cpp here")

    assert drafting.of_head(Other(), order, missing) is None  # and the plan goes on


def test_a_head_goes_on_without_a_model_that_cannot_be_loaded(
    home: Path, engine: Counting, caplog: pytest.LogCaptureFixture
) -> None:
    _, folder = stored(home)
    store = Store(home)
    plan = plan_of(store, store.manifest(folder.name), [1], "fake")

    def order(peer: str, draft: Path | str) -> StageOrder:
        return StageOrder(PlanState(plan, "loading"), peer, str(folder), 2, draft_folder=str(draft))

    found = drafting.of_head(engine, order(PEERS[0], folder), backends.load)
    assert found is not None
    assert engine.settings == Settings(drafts.SLOTS, 4096, drafts.BATCH_TOKENS, 2, 0)
    found.close()
    assert drafting.of_head(engine, order(PEERS[0], ""), backends.load) is None
    assert drafting.of_head(engine, order(PEERS[1], folder), backends.load) is None  # not the head
    assert caplog.text == ""
    assert (
        drafting.of_head(engine, order(PEERS[0], home / "models" / ("0" * 64)), backends.load)
        is None
    )
    assert "draft=none" in caplog.text
