"""What was proven is found again for the same versions, and for nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from peer.planning import verified
from peer.planning.proof import LayerFigure, LogitsFigure, Subject, Verdict
from peer.planning.verified import Verified

MLX = Subject("mlx", "metal", "Apple M2", "0.33.0")
PASSED = Verdict(
    "the built-in model", "passed", "", (LayerFigure(0, "F32", 1e-6),), LogitsFigure(0, 0, 1, 0)
)
WRONG = Verdict("the built-in model", "wrong", "its Q4_1 weights give wrong numbers")
DIED = Verdict("the built-in model", "failed", "it was ended by signal 11")


@pytest.mark.parametrize("verdict", [PASSED, WRONG])
def test_a_verdict_is_found_again_by_a_new_start(tmp_path: Path, verdict: Verdict) -> None:
    Verified(tmp_path / "home").keep(MLX, verdict, now_s=7.0)
    store = Verified(tmp_path / "home")
    assert store.find(MLX) == verdict
    assert [entry.proven_s for entry in store.entries()] == [7.0]
    assert "halka" in store.entries()[0].versions[0]
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["verified.json"]


@pytest.mark.parametrize(
    "change",
    [{"version": "0.33.1"}, {"device": "Apple M4"}, {"kind": "cpu"}, {"weights": "small"}],
)
def test_another_release_or_device_is_not_proven(tmp_path: Path, change: dict[str, str]) -> None:
    store = Verified(tmp_path)
    store.keep(MLX, PASSED)
    assert store.find(msgspec.structs.replace(MLX, **change)) is None


def test_another_release_of_halka_or_of_the_system_is_proven_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Verified(tmp_path)
    store.keep(MLX, PASSED)
    with monkeypatch.context() as changed:
        changed.setattr(verified, "VERSION", "99.0")
        assert store.find(MLX) is None
    with monkeypatch.context() as changed:
        changed.setattr(verified.platform, "release", lambda: "another kernel")
        changed.setattr(verified.platform, "mac_ver", lambda: ("", ("", "", ""), ""))
        assert store.find(MLX) is None
    assert store.find(MLX) == PASSED


def test_what_could_not_be_proven_is_shown_and_tried_again(tmp_path: Path) -> None:
    store = Verified(tmp_path)
    store.keep(MLX, DIED)
    assert store.find(MLX) is None
    assert [entry.verdict for entry in store.entries()] == [DIED]


def test_an_engine_that_is_wrong_with_the_model_in_use_is_wrong(tmp_path: Path) -> None:
    store = Verified(tmp_path)
    store.keep(MLX, PASSED, "d" * 64)
    assert store.find(MLX) is None, "of the built-in model nothing is known"
    store.keep(MLX, PASSED)
    assert store.find(MLX) == PASSED
    store.keep(MLX, WRONG, "e" * 64)
    assert store.find(MLX) == WRONG
    assert store.find(msgspec.structs.replace(MLX, version="0.33.1")) is None


def test_the_newest_verdict_counts_and_old_ones_make_room(tmp_path: Path) -> None:
    store = Verified(tmp_path)
    store.keep(MLX, WRONG)
    store.keep(MLX, PASSED)
    assert [entry.verdict for entry in store.entries()] == [PASSED]
    for number in range(verified.ENTRIES_MAX):
        store.keep(msgspec.structs.replace(MLX, version=str(number)), PASSED)
    assert len(store.entries()) == verified.ENTRIES_MAX
    assert store.find(MLX) is None


@pytest.mark.parametrize(
    "content",
    [b"", b"rubbish", b"[" * 100_000, b'{"format": 2}', b'{"format": 1, "entries": [{}]}',
     b"\xff\xfe", json.dumps({"format": 1, "entries": "no"}).encode(), b" " * (2 << 20)],
)  # fmt: skip
def test_an_odd_file_means_that_nothing_is_known(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "verified.json").write_bytes(content)
    store = Verified(tmp_path)
    assert store.entries() == ()
    assert store.find(MLX) is None
    store.keep(MLX, PASSED)
    assert store.find(MLX) == PASSED


def test_a_place_that_cannot_be_written_is_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "home").write_text("a file")
    Verified(tmp_path / "home").keep(MLX, PASSED)
    assert "verified=unsaved" in caplog.text
