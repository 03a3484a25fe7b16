"""planning.random_layers: files like a model's, with numbers that crash no engine."""

from __future__ import annotations

from pathlib import Path

import gguf as reference
import numpy as np
import pytest

from backends.fake import ENGINE
from peer.models import disk, gguf
from peer.models.imports import import_gguf
from peer.models.manifest import Manifest
from peer.models.parts import load_header, shape_of
from peer.models.store import Store
from peer.planning import trials
from peer.planning.random_layers import RandomLayers, sweep, tile
from tests import fake_models


@pytest.fixture
def model(tmp_path: Path) -> tuple[Path, Manifest]:
    """A model of which only the manifest and head.gguf are here."""
    store = Store(tmp_path)
    manifest = import_gguf(fake_models.write(tmp_path / "m.gguf", layers=6, hidden=32), store)
    folder = store.folder(manifest.digest)
    for part in manifest.parts[1:]:
        (folder / part.file).unlink()
    return folder, manifest


def test_a_window_of_random_layers_looks_like_the_models_own(
    model: tuple[Path, Manifest],
) -> None:
    folder, manifest = model
    shape = shape_of(folder, ENGINE.cuts, ENGINE.kv_bytes_per_cell)
    header = load_header(folder, manifest)
    with RandomLayers(folder, manifest) as layers:
        for first, last in ((2, 5), (2, 3), (0, 2), (5, 6), (0, 6)):
            recipe = ENGINE.recipe(header, first, last)
            placed = layers.place(trials.itself(shape, first, last), recipe)
            names = set()
            for path in placed.files:
                reader = reference.GGUFReader(path)
                names |= {tensor.name for tensor in reader.tensors}
                assert all(np.isfinite(tensor.data).all() for tensor in reader.tensors)
            assert {f"blk.{i}.weight" for i in range(last - first)} <= names
            assert ("output.weight" in names) == (last == 6)
            assert (placed.embed is not None) == (first == 0 and last < 6)
    assert sorted(path.name for path in folder.iterdir()) == ["head.gguf", "manifest.json"]


def test_a_layer_may_be_a_copy_of_another_one(model: tuple[Path, Manifest]) -> None:
    folder, manifest = model
    recipe = ENGINE.recipe(load_header(folder, manifest), 1, 3)
    with RandomLayers(folder, manifest) as layers:
        placed = layers.place(trials.Trial(1, 3, (4, 4), (2,)), recipe)
        names = [t.name for path in placed.files[1:] for t in gguf.read(path).tensors]
        assert names == ["blk.0.weight", "blk.1.weight"]


def test_what_a_killed_measurement_left_is_removed_and_a_running_one_is_not(
    model: tuple[Path, Manifest],
) -> None:
    folder, manifest = model
    left = folder / ".measure-killed"
    left.mkdir()
    (left / "layer-000.gguf").write_bytes(b"x")
    with RandomLayers(folder, manifest) as running:
        assert not left.exists()
        sweep(folder)
        assert running.folder.exists()
        (folder / ".measure-link").symlink_to(folder.parent)
        sweep(folder)
        assert folder.parent.exists()
        (folder / ".measure-link").unlink()


def test_a_full_disk_is_a_reason_and_leaves_nothing(
    model: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, manifest = model
    shape = shape_of(folder, ENGINE.cuts, ENGINE.kv_bytes_per_cell)
    recipe = ENGINE.recipe(load_header(folder, manifest), 1, 2)

    def full(path: Path, needed: int) -> None:
        raise disk.no_space(path, needed)

    monkeypatch.setattr(disk, "require", full)
    with (
        pytest.raises(Exception, match="no space left"),
        RandomLayers(folder, manifest) as layers,
    ):
        layers.place(trials.itself(shape, 1, 2), recipe)
    assert not list(folder.glob(".measure-*"))


@pytest.mark.parametrize("kind", sorted(gguf.TYPES))
def test_random_numbers_of_every_type_are_finite_and_no_denormals(kind: str) -> None:
    data = tile(kind)
    _, per_block, block = gguf.TYPES[kind]
    assert len(data) % block == 0
    assert len(data) >= 1 << 19
    try:
        values = reference.quants.dequantize(
            np.frombuffer(data[: 64 * block], np.uint8).reshape(-1, block),
            reference.GGMLQuantizationType[kind],
        )
    except (KeyError, NotImplementedError):
        assert kind in {"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64", "Q1_0", "Q2_0"}, kind
        return
    assert np.isfinite(values).all()
    assert np.abs(values).max() < 10
    some = np.abs(values[values != 0])
    assert some.size, "not all of them are nothing"
    assert some.min() > 1e-9, "far from denormals"
    assert per_block


def test_head_is_linked_not_copied(model: tuple[Path, Manifest]) -> None:
    folder, manifest = model
    with RandomLayers(folder, manifest) as layers:
        assert (layers.folder / "head.gguf").samefile(folder / "head.gguf")
