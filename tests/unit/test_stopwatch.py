"""planning.stopwatch: windows of random layers are run and timed, within time and memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from backends.base import BackendFault, Batch, Device, Settings, Window
from backends.fake import ENGINE, FakeBackend
from peer.models.imports import import_gguf
from peer.models.kinds import layer_families
from peer.models.manifest import load
from peer.models.parts import load_header, shape_of
from peer.models.store import Store
from peer.planning import stopwatch, trust
from peer.planning.profile import ModelShape, Speed
from peer.planning.random_layers import RandomLayers
from peer.planning.stopwatch import Stopwatch, Terms
from peer.planning.trials import Sample
from tests import fake_models

CPU = Device("CPU", "cpu", 1 << 30, 1 << 30)


def folder_of(home: Path, layers: int = 8, delay_s: float = 0.0) -> Path:
    """A model of which only the manifest and head.gguf are here."""
    store = Store(home)
    path = fake_models.write(home / "m.gguf", layers, delay_s=delay_s)
    manifest = import_gguf(path, store)
    folder = store.folder(manifest.digest)
    for part in manifest.parts[1:]:
        (folder / part.file).unlink()
    return folder


def terms(**changes: object) -> Terms:
    usual = Terms(1, 1.0, 1 << 30, time.monotonic() + 30)
    return replace(usual, **changes)  # type: ignore[arg-type]


def measured(folder: Path, wanted: Terms, device: Device = CPU, **changes: object) -> Speed:
    shape: ModelShape = shape_of(folder, ENGINE.cuts, ENGINE.kv_bytes_per_cell)
    shape = msgspec.structs.replace(shape, **changes)
    manifest = load(folder)
    header = load_header(folder, manifest)
    with RandomLayers(folder, manifest) as layers:
        watch = Stopwatch(ENGINE, device, header, shape, layers, wanted)
        return watch.speed("fake", layer_families(manifest))


def test_what_each_window_waits_is_around_its_layers(tmp_path: Path) -> None:
    began_s = time.monotonic()
    speed = measured(folder_of(tmp_path, delay_s=0.02), terms())
    assert time.monotonic() - began_s < 6
    assert speed.window_s == pytest.approx(0.02, rel=0.25)
    assert 0 < speed.decode_s[0] < 0.01
    assert 0 < speed.prefill_s[0] < 0.1
    assert speed.prefill_tokens == 512
    assert 0 < speed.output_s < 0.02
    assert (speed.kind, speed.threads, speed.backend) == ("cpu", 1, "fake")


def test_a_model_that_must_stay_whole_is_measured_whole(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    speed = measured(folder, terms(), whole_why="it is one piece")
    assert speed.decode_s[0] > 0
    assert speed.output_s > 0
    with pytest.raises(BackendFault, match="it is one piece"):
        measured(folder, terms(memory_bytes=4000), whole_why="it is one piece")


def test_where_no_layer_fits_or_time_is_up_the_reason_is_told(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    with pytest.raises(BackendFault, match="more than can be tried out here"):
        measured(folder, terms(memory_bytes=0))
    gpu = Device("GPU", "cuda", 0, 1 << 30)
    with pytest.raises(BackendFault, match="more than can be tried out here"):
        measured(folder, terms(), gpu)
    with pytest.raises(BackendFault, match="too long to be measured"):
        measured(folder, terms(until_s=time.monotonic()))
    assert sorted(path.name for path in folder.iterdir()) == ["head.gguf", "manifest.json"]


def test_layers_go_to_the_processor_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path)
    asked: set[Settings] = set()

    def opened(settings: Settings) -> FakeBackend:
        asked.add(settings)
        return FakeBackend(settings)

    monkeypatch.setattr(ENGINE, "open", opened)
    measured(folder, terms(threads=3))
    assert {(s.gpu_layers, s.threads, s.slots) for s in asked} == {(0, 3, 1)}
    asked.clear()
    assert measured(folder, terms(), Device("G", "cuda", 1 << 30, 1 << 30)).kind == "cuda"
    assert {s.gpu_layers for s in asked} == {-1}


def test_on_a_busy_machine_a_shorter_window_tells_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path, layers=20)
    ran: list[int] = []
    run = FakeBackend.run

    def noted(self: FakeBackend, window: Window, batch: Batch, x: Any) -> Any:
        if len(batch.slots) == 1:
            ran.append(window.last - window.first)
        return run(self, window, batch, x)

    def busy(step: Callable[[], object]) -> Sample:
        step()
        layers = ran[-1]
        return Sample(layers * 0.01 if layers < 8 else layers * 5.0, held=layers >= 8)

    monkeypatch.setattr(FakeBackend, "run", noted)
    monkeypatch.setattr(stopwatch, "timed", busy)
    speed = measured(folder, terms())
    assert max(ran) >= 8, "the long one was tried"
    assert speed.decode_s == (pytest.approx(0.01),)
    assert speed.window_s == pytest.approx(0)


def test_under_a_quota_each_long_step_begins_with_a_full_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path, delay_s=0.01)
    rests: list[float] = []
    really = time.sleep

    def sleep(seconds: float) -> None:
        """The engine's own delay takes its time; rests are only noted."""
        rests.append(seconds)
        really(seconds if 0.009 < seconds < 0.011 else 0)

    monkeypatch.setattr(stopwatch.time, "sleep", sleep)
    measured(folder, terms(cpu_share=0.25))
    assert stopwatch._PERIOD_S in rests
    rests.clear()
    measured(folder, terms())
    assert stopwatch._PERIOD_S not in rests


def test_what_short_chunks_take_more_for_each_row_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path)
    ran: list[tuple[int, int]] = []
    middles: dict[int, set[float]] = {}
    run = FakeBackend.run

    def noted(self: FakeBackend, window: Window, batch: Batch, x: Any) -> Any:
        rows = len(batch.slots)
        ran.append((rows, window.last - window.first))
        middles.setdefault(rows, set()).add(batch.positions.mean())
        return run(self, window, batch, x)

    def eight_more(row_s: float) -> Callable[[Callable[[], object]], Sample]:
        """As long as eight rows more, whatever a chunk has."""

        def timed(step: Callable[[], object]) -> Sample:
            step()
            rows, layers = ran[-1]
            return Sample((rows + 8) * layers * row_s)

        return timed

    monkeypatch.setattr(FakeBackend, "run", noted)
    for row_s, rows in ((1e-4, (16, 64, 128, 256)), (1e-3, (16, 64))):
        monkeypatch.setattr(stopwatch, "timed", eight_more(row_s))
        speed = measured(folder, terms())
        assert speed.prefill_tokens == 512
        wanted = [(at, (at + 8) / at / (520 / 512)) for at in rows]
        assert [at for at, _ in speed.short_chunks] == list(rows)
        assert [each for _, each in speed.short_chunks] == [
            pytest.approx(each, abs=0.01) for _, each in wanted
        ]
        assert not any(trust.of_speed(speed))
    assert {255.5}.issubset(middles[64] & middles[128] & middles[256] & middles[512])
    assert measured(folder, terms(), context=20).short_chunks == (), "none is half as long"


def test_no_position_lies_beyond_the_models_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path)
    highest: list[int] = []
    run = FakeBackend.run

    def noted(self: FakeBackend, window: Window, batch: Batch, x: Any) -> Any:
        highest.append(int(batch.positions.max()))
        return run(self, window, batch, x)

    monkeypatch.setattr(FakeBackend, "run", noted)
    assert measured(folder, terms(), context=20).prefill_tokens == 20
    assert max(highest) == 19


def test_a_chunk_fits_between_two_throttlings(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    assert measured(folder, terms(cpu_share=0.0001)).prefill_tokens == 16
