"""models.store: what is present, what is served, and nothing outside of the store ever touched."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from peer.errors import ModelError, PartError
from peer.models import parts
from peer.models.manifest import Manifest
from peer.models.store import Store
from peer.protocol import CHUNK_BYTES_MAX
from tests import gguf_files


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


@pytest.fixture
def manifest(store: Store, tmp_path: Path) -> Manifest:
    """A model of about 350 KB in the store."""
    path = gguf_files.model(hidden=256, vocabulary=1200).write(tmp_path / "model.gguf")
    return parts.import_gguf(path, store)


UNTRUSTED = [
    "..", "/etc/passwd", "%2e%2e", "a\0b", "a/../../b", "", ".", "x" * 4096, "A" * 64, "f" * 63,
    "f" * 64 + "\n", "ｆ" * 64, "../" + "f" * 61, "layer-1", "layer-00٣", "head.gguf", "../head",
    "layer-000/../../x", "head\n", "HEAD", "layer-00000", ".lock", "manifest.json",
]  # fmt: skip


@pytest.mark.parametrize("text", UNTRUSTED, ids=ascii)
def test_untrusted_names_touch_nothing(text: str, store: Store, manifest: Manifest) -> None:
    digest = manifest.digest
    for attempt in (
        lambda: store.folder(text),
        lambda: store.manifest(text),
        lambda: store.read_chunk(text, "head", 0, 1),
        lambda: store.read_chunk(digest, text, 0, 1),
        lambda: store.verify(digest, text),
        lambda: store.adopt_manifest(text, manifest.data),
    ):
        with pytest.raises(PartError):
            attempt()
    assert not store.has(text, "head")
    assert not store.has(digest, text)
    assert store.missing(digest, [text]) == (text,)
    assert [entry.name for entry in store.root.iterdir()] == [digest]


def test_models_are_listed_newest_first_with_the_parts_that_are_here(
    store: Store, manifest: Manifest, tmp_path: Path
) -> None:
    other = parts.import_gguf(gguf_files.model(layers=2).write(tmp_path / "b.gguf"), store)
    os.utime(store.folder(other.digest) / "manifest.json", (1.0, 1.0))
    (store.folder(other.digest) / "layer-001.gguf").unlink()
    first, second = Store(store.root.parent).models()
    assert (first.digest, first.complete) == (manifest.digest, True)
    assert second.parts == ("head", "embed", "layer-000")
    assert (second.complete, second.pulled_s) == (False, 1.0)
    assert store.missing(other.digest, ["layer-001", "head"]) == ("layer-001",)
    assert not store.renew(other.digest)
    assert store.renew(manifest.digest)
    assert store.models()[0].digest == manifest.digest


def test_a_part_that_is_not_finished_is_not_present(store: Store, manifest: Manifest) -> None:
    folder = store.folder(manifest.digest)
    path = folder / "layer-001.gguf"
    path.rename(folder / ".layer-001.partial")
    assert not store.has(manifest.digest, "layer-001")
    with pytest.raises(PartError, match="not here"):
        store.read_chunk(manifest.digest, "layer-001", 0, 1)
    path.write_bytes(b"short")
    assert not store.has(manifest.digest, "layer-001")


def test_chunks_are_the_data_of_a_part_and_nothing_beyond(store: Store, manifest: Manifest) -> None:
    folder = store.folder(manifest.digest)
    for part in manifest.parts:
        data = (folder / part.file).read_bytes()[part.header_bytes :]
        size = len(data)
        length = min(size, CHUNK_BYTES_MAX)
        assert store.read_chunk(manifest.digest, part.name, 0, length) == data[:length]
        assert store.read_chunk(manifest.digest, part.name, size - 5, 5) == data[-5:]
        for offset, wanted in [
            (size, 1), (size - 5, 6), (-1, 1), (0, 0), (0, -1), (1 << 62, 1), (0, size + 1),
        ]:  # fmt: skip
            with pytest.raises(PartError):
                store.read_chunk(manifest.digest, part.name, offset, wanted)
    with pytest.raises(PartError):
        store.read_chunk(manifest.digest, "embed", 0, CHUNK_BYTES_MAX + 1)


def test_links_are_never_followed(store: Store, manifest: Manifest, tmp_path: Path) -> None:
    folder = store.folder(manifest.digest)
    real = folder / "layer-001.gguf"
    moved = real.rename(tmp_path / "outside.gguf")
    real.symlink_to(moved)
    assert not store.has(manifest.digest, "layer-001")
    for attempt in (
        lambda: store.read_chunk(manifest.digest, "layer-001", 0, 8),
        lambda: store.verify(manifest.digest, "layer-001"),
    ):
        with pytest.raises(ModelError):
            attempt()
    outside = folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(outside, target_is_directory=True)
    assert store.models() == []
    with pytest.raises(PartError):
        store.manifest(manifest.digest)


def test_a_manifest_must_have_the_hash_that_it_was_asked_for_by(
    manifest: Manifest, tmp_path: Path
) -> None:
    other = Store(tmp_path / "other")
    with pytest.raises(PartError):
        other.adopt_manifest("f" * 64, manifest.data)
    with pytest.raises(PartError):
        other.adopt_manifest(manifest.digest, manifest.data[:-1])
    assert list(other.root.iterdir()) == []
    assert other.adopt_manifest(manifest.digest, manifest.data) == manifest
    assert other.adopt_manifest(manifest.digest, manifest.data) == manifest
    assert other.models()[0].pulled_s == 0.0  # fetched for a plan, not pulled by a person
    assert other.models()[0].parts == ()


def test_a_damaged_part_is_found(store: Store, manifest: Manifest) -> None:
    path = store.folder(manifest.digest) / "layer-002.gguf"
    data = bytearray(path.read_bytes())
    store.verify(manifest.digest, "layer-002")
    data[100] ^= 1  # in the header: derived, so no damage
    path.write_bytes(data)
    store.verify(manifest.digest, "layer-002")
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(PartError, match=r"layer-002\.gguf is damaged"):
        store.verify(manifest.digest, "layer-002")


def test_a_folder_that_is_damaged_hides_no_other_model(
    store: Store, manifest: Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    broken = store.root / ("0" * 64)
    broken.mkdir()
    (broken / "manifest.json").write_bytes(b"\0" * 50)
    (store.root / "notes.txt").write_text("mine")
    (store.root / "backup").mkdir()
    assert [stored.digest for stored in store.models()] == [manifest.digest]
    assert "damaged" in caplog.text


def test_a_folder_without_its_manifest_has_no_parts(store: Store, manifest: Manifest) -> None:
    (store.folder(manifest.digest) / "manifest.json").unlink()
    fresh = Store(store.root.parent)
    assert not fresh.has(manifest.digest, "head")
    assert fresh.missing(manifest.digest, ["head"]) == ("head",)


def test_a_state_folder_that_cannot_be_written_is_said_in_one_line(tmp_path: Path) -> None:
    blocked = tmp_path / "home"
    blocked.write_text("a file")
    with pytest.raises(ModelError, match=str(blocked)):
        Store(blocked)
    code = (
        "import os, sys; from pathlib import Path; from peer.models.store import Store\n"
        "os.setuid(65534) if os.geteuid() == 0 else None\n"
        "try: Store(Path('/proc/halka'))\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("ModelError /proc/halka/models: ")
    assert done.stdout.count("\n") == 1
