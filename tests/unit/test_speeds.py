"""planning.speeds: what was measured is found again, for the same tensors on the same hardware."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace as replace_in

from peer.config import Config
from peer.models.imports import import_gguf
from peer.models.parts import shape_of
from peer.models.store import Store
from peer.planning import hardware, speeds
from peer.planning.profile import EngineProfile, Fit, ModelShape, Speed
from peer.planning.speeds import Speeds
from tests import fake_models

ENGINES = (EngineProfile("fake", "CPU", "cpu"),)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config.fast_test(home=tmp_path, backend="fake", threads=2)


def model(config: Config, layers: int = 3, seed: int = 0) -> ModelShape:
    from backends.fake import ENGINE

    store = Store(config.home)
    path = fake_models.write(config.home / f"{seed}.gguf", layers, seed=seed, name=f"m{seed}")
    manifest = import_gguf(path, store)
    return shape_of(store.folder(manifest.digest), ENGINE.cuts, ENGINE.kv_bytes_per_cell)


def measured(shape: ModelShape, kind: str = "cpu") -> Speed:
    return Speed(shape.digest, "fake", kind, 2, (0.1,), (0.2,), 512)


def test_what_was_kept_is_found_after_a_restart(config: Config) -> None:
    shape = model(config)
    kept = Speeds(config.home)
    assert kept.find(config, shape, ENGINES) is None
    kept.keep(config, shape, ENGINES, [measured(shape)])
    assert Speeds(config.home).find(config, shape, ENGINES) == (measured(shape),)
    assert [path.name for path in config.home.glob("*speeds*")] == ["speeds.json"]


def test_a_model_with_the_same_tensors_is_as_fast_and_another_one_is_not(config: Config) -> None:
    shape, same, other = model(config), model(config, seed=1), model(config, layers=4)
    kept = Speeds(config.home)
    kept.keep(config, shape, ENGINES, [measured(shape)])
    assert same.digest != shape.digest
    assert kept.find(config, same, ENGINES) == (measured(same),)
    assert kept.find(config, other, ENGINES) is None


def test_other_hardware_threads_or_releases_are_measured_again(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = model(config)
    kept = Speeds(config.home)
    kept.keep(config, shape, ENGINES, [measured(shape)])
    card = EngineProfile("fake", "RTX", "vulkan")
    assert kept.find(config, shape, (*ENGINES, card)) is None
    assert kept.find(replace(config, threads=3), shape, ENGINES) is None
    with monkeypatch.context() as patch:
        patch.setattr(hardware, "_fixed", lambda: ("another processor",))
        assert kept.find(config, shape, ENGINES) is None
    with monkeypatch.context() as patch:
        patch.setattr(hardware, "version", lambda backend: "999")
        assert kept.find(config, shape, ENGINES) is None
    assert kept.find(config, shape, ENGINES)


def test_an_engine_that_repacks_is_measured_for_each_way_that_it_does(config: Config) -> None:
    shape = model(config)
    fits = (
        Fit("fake", "auto", "approximate", "rounded", (8,) * shape.layers),
        Fit("fake", "small", "approximate", "requantised", (6,) * shape.layers),
    )
    shape, kept = replace_in(shape, fits=fits), Speeds(config.home)
    kept.keep(config, shape, ENGINES, [measured(shape)])
    assert kept.find(config, shape, ENGINES)
    assert kept.find(replace(config, weights="small"), shape, ENGINES) is None
    other = replace_in(fits[0], layer_bytes=(7,) * shape.layers)
    assert kept.find(config, replace_in(shape, fits=(other, fits[1])), ENGINES) is None
    assert kept.find(config, replace_in(shape, fits=(fits[0],)), ENGINES)
    assert kept.find(config, replace_in(shape, fits=()), ENGINES) is None


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[1]", b"\xff", b'{"format":2}', b'{"format":1,"entries":[{"key":1}]}']
)
def test_a_file_that_cannot_be_read_is_an_empty_one(config: Config, data: bytes) -> None:
    shape = model(config)
    (config.home / "speeds.json").write_bytes(data)
    kept = Speeds(config.home)
    assert kept.find(config, shape, ENGINES) is None
    kept.keep(config, shape, ENGINES, [measured(shape)])
    assert Speeds(config.home).find(config, shape, ENGINES)


@pytest.mark.parametrize(
    "wrong",
    [
        {"decode_s": [1e10]},
        {"decode_s": []},
        {"prefill_tokens": 0},
        {"correction": 0.0},
        {"correction": 1e6},
        {"backend": "another"},
    ],
)
def test_a_speed_that_others_would_refuse_is_measured_again(
    config: Config, wrong: dict[str, object]
) -> None:
    shape = model(config)
    Speeds(config.home).keep(config, shape, ENGINES, [measured(shape)])
    path = config.home / "speeds.json"
    told = json.loads(path.read_bytes())
    told["entries"][0]["speeds"][0].update(wrong)
    path.write_text(json.dumps(told))
    kept = Speeds(config.home)
    assert kept.find(config, shape, ENGINES) is None
    kept.keep(config, shape, ENGINES, [measured(shape)])
    assert Speeds(config.home).find(config, shape, ENGINES) == (measured(shape),)


def test_a_place_that_cannot_be_written_is_no_error(
    config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    shape = model(config)
    (config.home / "speeds.json").mkdir()
    kept = Speeds(config.home)
    kept.keep(config, shape, ENGINES, [measured(shape)])
    assert kept.find(config, shape, ENGINES) == (measured(shape),)
    assert "speeds=unsaved" in caplog.text
    assert [path.name for path in config.home.glob("*speeds*")] == ["speeds.json"]


def test_only_the_entries_used_last_are_kept(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speeds, "ENTRIES_MAX", 2)
    kept = Speeds(config.home)
    shapes = [model(config, layers=n) for n in (1, 2, 3)]
    for shape in shapes[:2]:
        kept.keep(config, shape, ENGINES, [measured(shape)])
    assert kept.find(config, shapes[0], ENGINES), "used again, so the other one is the older"
    kept.keep(config, shapes[2], ENGINES, [measured(shapes[2])])
    again = Speeds(config.home)
    assert [bool(again.find(config, shape, ENGINES)) for shape in shapes] == [True, False, True]


def test_corrections_are_kept_with_what_they_correct(config: Config) -> None:
    shape = model(config)
    kept = Speeds(config.home)
    kept.correct(shape.digest, "fake", "cpu", 2.0)  # of nothing
    kept.keep(config, shape, ENGINES, [measured(shape), measured(shape, "vulkan")])
    kept.correct(shape.digest, "fake", "cpu", 1.5)
    found = Speeds(config.home).find(config, shape, ENGINES)
    assert found
    assert [speed.correction for speed in found] == [1.5, 1.0]


def test_a_model_that_left_the_store_is_known_by_its_digest(config: Config) -> None:
    shape = msgspec.structs.replace(model(config), digest="f" * 64)
    kept = Speeds(config.home)
    kept.keep(config, shape, ENGINES, [measured(shape)])
    assert kept.find(config, shape, ENGINES) == (measured(shape),)


def test_a_machine_is_told_by_its_processor_and_its_software(tmp_path: Path) -> None:
    here = hardware.machine(ENGINES, 2)
    assert here == hardware.machine(ENGINES, 2)
    assert (here.backend, here.threads, here.engines) == ("fake", 2, (("cpu", "CPU"),))
    assert all(here.hardware)
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: Abacus 3000\n\nprocessor\t: 1\n")
    assert hardware.processor(info).endswith("Abacus 3000")
    info.write_text("CPU implementer\t: 0x41\nCPU part\t: 0xd0b\n")
    assert hardware.processor(info).endswith("0x41 0xd0b")
    assert hardware.processor(tmp_path / "none")
    assert hardware.version("nothing") == hardware.version("fake")


def test_a_new_release_of_any_library_of_an_engine_is_a_new_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    releases = {"mlx": "0.32.4", "mlx-lm": "0.32.2"}

    def version(package: str) -> str:
        if package not in releases:
            raise metadata.PackageNotFoundError(package)
        return releases[package]

    monkeypatch.setattr(metadata, "version", version)
    assert hardware.version("mlx") == "0.32.4 0.32.2"
    assert hardware.version("llama_cpp") == ""
    del releases["mlx-lm"]
    assert hardware.version("mlx") == ""
