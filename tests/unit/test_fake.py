"""The fake engine: the same tokens from any split, and errors for whatever a ring may do wrong."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
import pytest

import backends
from backends.base import BackendFault, Batch, Header, Settings, TensorFact, Window
from backends.fake import FakeBackend
from backends.fake_model import BOS, EOS
from peer.models.imports import import_gguf
from peer.models.parts import load_header, place
from peer.models.store import Store
from tests import fake_models
from tests.fake_models import truth

ENGINE = backends.load("fake")
SETTINGS = Settings(slots=4, kv_cells=2048, batch_tokens=64, threads=1)
PROMPT = [BOS, *b"Why is the sky blue, and the sea?"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return fake_models.write(tmp_path / "model.gguf", end_every=0)


def header_of(model: Path) -> Header:
    reader = gguf.GGUFReader(model)
    return Header(
        {key: field.contents() for key, field in reader.fields.items() if "." in key},
        {
            t.name: TensorFact(tuple(int(n) for n in t.shape), t.tensor_type.name, t.n_bytes)
            for t in reader.tensors
        },
    )


def window_of(model: Path, first: int, last: int, folder: Path, shift: int = 0) -> Window:
    """The window's files as the store writes them; `shift` takes the parts of other layers."""
    header = header_of(model)
    recipe = ENGINE.recipe(header, first, last)
    tensors = {t.name: t.data for t in gguf.GGUFReader(model).tensors}
    folder.mkdir(exist_ok=True)

    def save(name: str, held: dict[str, str], main: bool = False) -> Path:
        path = folder / f"{first}-{last}-{name}.gguf"
        writer = gguf.GGUFWriter(path, "fake")
        for key, (kind, value) in recipe.write.items() if main else ():
            getattr(writer, f"add_{kind}")(key, value)
        if main:
            writer.add_uint32("fake.end_every", header.metadata["fake.end_every"])
        for tensor, source in held.items():
            writer.add_tensor(tensor, np.asarray(tensors[source]))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    files = [save("main", {}, main=True)]
    for i in range(first, last):
        source = (i + shift) % header.layers
        files.append(save(f"layer-{i}", {f"blk.{i - first}.weight": f"blk.{source}.weight"}))
    embed = save("embed", {"token_embd.weight": "token_embd.weight"})
    if recipe.embed:
        files.append(embed)
    if recipe.output:
        files.append(save("output", {"output.weight": "output.weight"}))
    aside = embed if first == 0 and not recipe.embed else None
    return Window(first, last, header.layers, header, tuple(files), aside)


class Ring:
    """Windows in a row, each in a backend of its own, as stages would run them."""

    def __init__(self, windows: Sequence[Window], settings: Settings = SETTINGS) -> None:
        self.stages = [(ENGINE.open(settings), window) for window in windows]
        for backend, window in self.stages:
            backend.load(window)

    def run(self, rows: Sequence[tuple[int, int, int]]) -> np.ndarray:
        """Logits of the last row of each slot. rows: (slot, position, token)."""
        slots, positions, ids = (np.array(column, np.int32) for column in zip(*rows, strict=True))
        outputs = np.append(slots[1:] != slots[:-1], True)
        batch, x = Batch(slots, positions, outputs), ids
        for backend, window in self.stages:
            x = backend.run(window, batch, x)
        return x

    def continue_(self, slot: int, ids: Sequence[int], count: int, chunk: int) -> list[int]:
        """Greedy continuation; ids are given in chunks, at most `count` tokens come."""
        answer: list[int] = []
        for at in range(0, len(ids), chunk):
            part = ids[at : at + chunk]
            logits = self.run([(slot, at + i, token) for i, token in enumerate(part)])
        while (token := int(logits[0].argmax())) != EOS:
            answer.append(token)
            if len(answer) == count:
                break
            logits = self.run([(slot, len(ids) + len(answer) - 1, token)])
        return answer


def ring_of(model: Path, edges: Sequence[int], folder: Path) -> Ring:
    return Ring([window_of(model, a, b, folder) for a, b in pairwise(edges)])


@pytest.mark.parametrize("edges", [(0, 12), (0, 5, 12), (0, 1, 2, 11, 12), tuple(range(13))])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_every_split_and_chunking_gives_the_same_tokens(
    model: Path, tmp_path: Path, edges: tuple[int, ...], chunk: int
) -> None:
    assert ring_of(model, edges, tmp_path / "w").continue_(0, PROMPT, 40, chunk) == truth(
        model, PROMPT, 40
    )


def test_sequences_in_one_batch_do_not_disturb_each_other(model: Path, tmp_path: Path) -> None:
    ring = ring_of(model, (0, 4, 12), tmp_path / "w")
    prompts = {2: [BOS, *b"one"], 0: [BOS, *b"another, longer"], 3: [BOS, *b"x"]}
    rows = [(slot, i, t) for slot, ids in prompts.items() for i, t in enumerate(ids)]
    answers: dict[int, list[int]] = {slot: [] for slot in prompts}
    for _ in range(12):
        logits = ring.run(rows)
        rows = []
        for slot, row in zip(prompts, logits, strict=True):
            answers[slot].append(int(row.argmax()))
            rows.append((slot, len(prompts[slot]) + len(answers[slot]) - 1, answers[slot][-1]))
    assert answers == {slot: truth(model, ids, 12) for slot, ids in prompts.items()}


def test_answers_depend_on_every_earlier_token_and_its_place(model: Path) -> None:
    answers = {
        tuple(truth(model, [BOS, *text], 12)) for text in (b"abc", b"bac", b"acb", b"abd", b"bc")
    }
    assert len(answers) == 5


def test_a_trimmed_or_copied_slot_goes_on_as_if_it_had_never_been_other(
    model: Path, tmp_path: Path
) -> None:
    ring = ring_of(model, (0, 6, 12), tmp_path / "w")
    expected = ring.continue_(0, PROMPT, 10, 64)
    for backend, _ in ring.stages:
        backend.copy(0, 3, len(PROMPT) - 1)
        backend.trim(0, len(PROMPT) - 1)
    for slot in (0, 3):
        logits = ring.run([(slot, len(PROMPT) - 1, PROMPT[-1])])
        assert int(logits[0].argmax()) == expected[0]
        again = ring.run([(slot, len(PROMPT), expected[0])])
        assert int(again[0].argmax()) == expected[1]


def test_parts_of_other_layers_give_other_tokens(model: Path, tmp_path: Path) -> None:
    wrong = Ring([window_of(model, 0, 12, tmp_path / "w", shift=1)])
    assert wrong.continue_(0, PROMPT, 20, 64) != truth(model, PROMPT, 20)


def test_a_missing_part_is_named(model: Path, tmp_path: Path) -> None:
    window = window_of(model, 3, 6, tmp_path / "w")
    short = Window(3, 6, 12, window.header, window.files[:-1])
    with pytest.raises(BackendFault, match=r"blk\.2\.weight"):
        ENGINE.open(SETTINGS).load(short)


def test_a_truncated_part_is_refused(model: Path, tmp_path: Path) -> None:
    window = window_of(model, 3, 6, tmp_path / "w")
    data = window.files[2].read_bytes()
    for size in (0, 3, 20, len(data) - 100):
        window.files[2].write_bytes(data[:size])
        with pytest.raises(BackendFault):
            ENGINE.open(SETTINGS).load(window)


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([(0, 1, 65)], "holds 0 positions"),  # a gap
        ([(0, 0, 65), (0, 0, 66)], "holds 0 positions"),  # twice the same
        ([(0, 0, 65), (1, 0, 66), (0, 1, 67)], "not together"),
        ([(4, 0, 65)], "slot 4 of 4"),
        ([(0, 0, 300)], "token ids"),
        ([(0, i, 65) for i in range(65)], "65 rows"),
    ],
)
def test_steps_that_no_scheduler_should_make_are_errors(
    model: Path, tmp_path: Path, rows: list[tuple[int, int, int]], why: str
) -> None:
    ring = ring_of(model, (0, 12), tmp_path / "w")
    with pytest.raises(BackendFault, match=why):
        ring.run(rows)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.5, -1.0, 2.0**24])
def test_activations_that_no_window_gives_are_errors(
    model: Path, tmp_path: Path, bad: float
) -> None:
    backend, window = ring_of(model, (0, 6, 12), tmp_path / "w").stages[1]
    x = np.ones((1, 8), np.float32)
    x[0, 3] = bad
    batch = Batch(np.zeros(1, np.int32), np.zeros(1, np.int32), np.ones(1, np.bool_))
    with pytest.raises(BackendFault, match="no fake window"):
        backend.run(window, batch, x)


def test_the_kv_cells_are_shared_by_all_slots_and_their_end_is_a_memory_fault(
    model: Path, tmp_path: Path
) -> None:
    settings = Settings(slots=2, kv_cells=10, batch_tokens=8, threads=1)
    ring = Ring([window_of(model, 0, 12, tmp_path / "w")], settings)
    ring.run([(0, i, 65) for i in range(6)])
    ring.run([(1, i, 65) for i in range(4)])
    with pytest.raises(BackendFault, match="10 of 10 KV cells") as fault:
        ring.run([(1, 4, 65)])
    assert fault.value.kind == "memory"
    ring.stages[0][0].trim(0, 5)
    ring.run([(1, 4, 65)])


def test_answers_end_within_the_bound_and_are_text(tmp_path: Path) -> None:
    model = fake_models.write(tmp_path / "ends.gguf", end_every=10)
    lengths = set()
    for seed in range(8):
        ids = [BOS, *f"{random.Random(seed).random()}".encode()]
        answer = truth(model, ids, 200)
        assert len(answer) <= 80
        lengths.add(len(answer))
        bytes(answer).decode("utf-8", "strict")
    assert len(lengths) > 3
    assert len(truth(fake_models.write(tmp_path / "no.gguf", end_every=0), PROMPT, 300)) == 300


def test_steps_can_be_made_slow(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr("backends.fake.time.sleep", slept.append)
    monkeypatch.setenv("HALKA_FAKE_DELAY_S", "0.25")
    ring_of(model, (0, 6, 12), tmp_path / "w").run([(0, 0, 65)])
    assert slept == [0.25, 0.25]


def test_other_architectures_are_refused_by_name() -> None:
    header = Header({"general.architecture": "llama", "llama.block_count": 4}, {})
    assert "llama" in ENGINE.cuts(header).refusal(0, 2)
    with pytest.raises(BackendFault, match="llama") as fault:
        ENGINE.recipe(header, 0, 4)
    assert fault.value.kind == "refused"


def test_words_come_back_as_they_went_in(model: Path) -> None:
    words = ENGINE.vocabulary(model)
    text = "<|user|>çay — 👍</s>"
    ids = words.encode(text, special=True)
    assert ids[0] == 259
    assert ids[-1] == EOS
    assert EOS in words.ends
    assert "".join(map(words.text_of, ids[:1])) == "<|user|>"
    pieces = words.pieces()
    assert b"".join(pieces[i] for i in ids).decode() == "çay — 👍"
    assert b"".join(pieces[i] for i in words.encode(text, special=False)).decode() == text


@pytest.fixture(autouse=True)
def _no_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HALKA_FAKE_DELAY_S", raising=False)


def test_footprint_counts_what_is_held(model: Path, tmp_path: Path) -> None:
    window = window_of(model, 0, 12, tmp_path / "w")
    backend = ENGINE.open(SETTINGS)
    assert isinstance(backend, FakeBackend)
    footprint = backend.load(window)
    assert footprint.kv_bytes == 2048 * sum(ENGINE.kv_bytes_per_cell(window.header))


@pytest.mark.parametrize("edges", [(0, 12), (0, 5, 12), (0, 1, 7, 12)])
def test_windows_placed_from_stored_parts_give_the_same_tokens(
    model: Path, tmp_path: Path, edges: tuple[int, ...]
) -> None:
    store = Store(tmp_path)
    manifest = import_gguf(model, store)
    folder = store.folder(manifest.digest)
    header = load_header(folder)
    windows = []
    for first, last in pairwise(edges):
        recipe = ENGINE.recipe(header, first, last)
        into = tmp_path / f"window-{first}"
        into.mkdir()
        placed = place(folder, manifest, recipe, first, last, into)
        windows.append(Window(first, last, 12, header, placed.files, placed.embed, placed.places))
    assert Ring(windows).continue_(1, PROMPT, 20, 16) == truth(model, PROMPT, 20)
