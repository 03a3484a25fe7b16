"""The tail: guesses are verified one after another, and never change what is answered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import backends
from backends.base import Batch, Settings, Weights
from backends.fake import FakeBackend, FakeEngine
from peer.models.imports import import_gguf
from peer.models.store import Store
from peer.protocol import Sampling
from peer.ring.frames import Draft, Fault, Open
from peer.ring.windows import Windows
from tests import fake_models
from tests.e2e.rings import plan_of
from tests.plans import PEERS

GREEDY = Sampling(temperature=0.0)
WORDS = 8


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> Windows:
    """Of a peer alone; nothing is loaded, for only its samplers are asked."""
    home: Path = tmp_path_factory.mktemp("home")
    store = Store(home)
    manifest = import_gguf(fake_models.write(home / "fake.gguf"), store)
    return Windows(backends.load("fake"), plan_of(store, manifest, [], "fake"), PEERS[0], 1)


@pytest.mark.parametrize("weights", ["auto", "exact", "small"])
def test_the_engine_is_opened_with_the_setting_of_weights(weights: Weights, tmp_path: Path) -> None:
    class Watched(FakeEngine):
        def open(self, settings: Settings) -> FakeBackend:
            opened.append(settings)
            return super().open(settings)

    opened: list[Settings] = []
    store = Store(tmp_path)
    manifest = import_gguf(fake_models.write(tmp_path / "fake.gguf"), store)
    plan = plan_of(store, manifest, [], "fake")
    found = Windows(Watched(), plan, PEERS[0], 1, weights)
    found.load(store.folder(manifest.digest))
    found.close()
    assert [settings.weights for settings in opened] == [weights]


def peaks(*tokens: int) -> NDArray[np.float32]:
    """Rows whose likeliest tokens these are, by a little over the next one."""
    logits = np.zeros((len(tokens), WORDS), np.float32)
    for row, token in enumerate(tokens):
        logits[row, token], logits[row, (token + 1) % WORDS] = 2.0, 1.5
    return logits


def batch(*slots: tuple[int, int, int]) -> Batch:
    """(slot, first position, rows), all of them answered."""
    rows = [(slot, first + i) for slot, first, count in slots for i in range(count)]
    return Batch(
        np.array([slot for slot, _ in rows], np.int32),
        np.array([position for _, position in rows], np.int32),
        np.ones(len(rows), np.bool_),
    )


def draft(slot: int, *ids: int) -> Draft:
    return Draft(slot, np.array(ids, np.int32).tobytes())


def sample(windows: Windows, *args: Any, faults: list[Fault] | None = None) -> Any:
    return windows.sample(args[0], args[1], [] if faults is None else faults, *args[2:])


@pytest.mark.parametrize(
    ("guessed", "found"),
    [((2, 3), [2, 3, 5]), ((2, 4), [2, 3]), ((3, 3), [2]), ((7, 5), [2])],
)
def test_what_is_taken_ends_with_the_first_token_that_was_not_guessed(
    windows: Windows, guessed: tuple[int, int], found: list[int]
) -> None:
    windows.apply((Open(0, GREEDY),))
    tokens, taken = sample(windows, batch((0, 5, 3)), peaks(2, 3, 5), (draft(0, *guessed),))
    assert list(tokens) == found
    assert taken == (() if len(found) == 1 else (len(found),))


def test_slots_with_guesses_and_without_share_a_step(windows: Windows) -> None:
    windows.apply((Open(0, GREEDY), Open(1, GREEDY), Open(2, GREEDY)))
    rows = batch((2, 9, 1), (0, 5, 3), (1, 0, 1))
    tokens, taken = sample(windows, rows, peaks(6, 2, 3, 5, 1), (draft(0, 2, 7),))
    assert (tokens, taken) == ((6, 2, 3, 1), (1, 2, 1))


def test_only_the_answered_rows_of_a_step_have_logits(windows: Windows) -> None:
    windows.apply((Open(0, GREEDY), Open(1, GREEDY)))
    rows = batch((0, 0, 4), (1, 7, 1))
    rows.outputs[:2] = False
    tokens, taken = sample(windows, rows, peaks(4, 5, 6), (draft(0, 4),))
    assert (tokens, taken) == ((4, 5, 6), (2, 1))


@given(
    st.lists(st.integers(0, WORDS - 1), max_size=6),
    st.integers(0, 1 << 32),
    st.sampled_from([0.0, 0.8]),
    st.sampled_from([1.0, 1.7]),
)
def test_guesses_change_how_many_tokens_come_and_never_which(
    windows: Windows, guessed: list[int], seed: int, temperature: float, penalty: float
) -> None:
    """Drawn ones too, and with penalties, which count what was taken and nothing else."""
    sampling = Sampling(temperature=temperature, seed=seed, repeat_penalty=penalty)
    logits = np.random.default_rng(seed).normal(size=(8, WORDS)).astype(np.float32)
    history = np.array([1, 2, 3], np.int32).tobytes()
    windows.apply((Open(0, sampling, history), Open(1, sampling, history)))
    plain = [
        sample(windows, batch((1, at, 1)), logits[at : at + 1].copy())[0][0] for at in range(8)
    ]
    drafts = (draft(0, *guessed),) if guessed else ()
    count = 1 + len(guessed)
    tokens, _ = sample(windows, batch((0, 0, count)), logits[:count].copy(), drafts)
    right = next((i for i, g in enumerate(guessed) if g != plain[i]), len(guessed))
    assert list(tokens) == plain[: right + 1]
    at = len(tokens)
    after = sample(windows, batch((0, at, 1)), logits[at : at + 1].copy())[0]
    assert after == (plain[at],), "the penalties count otherwise afterwards"


def test_logits_after_a_wrong_guess_are_not_looked_at(windows: Windows) -> None:
    windows.apply((Open(0, GREEDY),))
    logits = peaks(2, 3, 5)
    logits[1:] = np.nan
    faults: list[Fault] = []
    assert sample(windows, batch((0, 5, 3)), logits, (draft(0, 7, 3),), faults=faults)[0] == (2,)
    assert faults == []


def test_numbers_that_are_not_finite_are_a_fault_and_one_token_that_nobody_gets(
    windows: Windows,
) -> None:
    windows.apply((Open(0, GREEDY), Open(1, GREEDY)))
    logits = peaks(2, 3, 5, 6)
    logits[1] = -np.inf
    faults: list[Fault] = []
    rows = batch((0, 5, 3), (1, 0, 1))
    tokens, taken = sample(windows, rows, logits, (draft(0, 2, 3),), faults=faults)
    assert (tokens, taken) == ((0, 6), ())
    assert faults == [Fault(0, PEERS[0])]


def test_a_slot_whose_numbers_were_bad_before_keeps_the_peer_that_made_them(
    windows: Windows,
) -> None:
    windows.apply((Open(0, GREEDY),))
    faults = [Fault(0, PEERS[2])]
    rows = (batch((0, 5, 2)), np.full((2, WORDS), np.nan, np.float32), (draft(0, 1),))
    assert sample(windows, *rows, faults=faults) == ((0,), ())
    assert faults == [Fault(0, PEERS[2])]
