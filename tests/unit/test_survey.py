"""What a machine says of itself: engines asked in their own process, memory really there."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import psutil
import pytest

from peer.config import SPARE_AUTO, Config
from peer.errors import BackendError, ModelError
from peer.models.imports import import_gguf
from peer.models.store import Store
from peer.planning import gpus, survey
from peer.planning.measure import MeasureOrder, measure
from peer.planning.profile import EngineProfile, Profile, Speed
from tests import fake_models

GIB = 1 << 30


def changed(config: Config, **changes: object) -> Config:
    return replace(config, **changes)  # type: ignore[arg-type]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config.fast_test(home=tmp_path, backend="fake")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A fake model in a store, as after `halka pull`."""
    store = Store(tmp_path)
    manifest = import_gguf(fake_models.write(tmp_path / "m.gguf", layers=5), store)
    return store.folder(manifest.digest)


async def test_the_process_answers_with_engines_and_shapes(config: Config, folder: Path) -> None:
    found = await survey.measure(config, [folder])
    assert found.faults == {}
    assert [(e.backend, e.kind) for e in found.engines] == [("fake", "cpu")]
    shape = found.shapes[str(folder)]
    assert (shape.layers, shape.hidden, shape.context) == (5, 8, 4096)
    assert shape.cut_starts == (0, 1, 2, 3, 4)
    assert shape.layer_kv_bytes == (64,) * 5
    assert shape == await survey.shape("fake", folder)


async def test_real_processors_are_found_where_llama_cpp_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    found = await survey.measure(Config.fast_test(home=tmp_path, backend="auto"))
    assert found.faults == {}
    cpu = [e for e in found.engines if e.kind == "cpu"]
    assert len(cpu) == 1
    assert cpu[0].backend == "llama_cpp"
    assert cpu[0].memory_total_bytes > GIB // 4


async def test_a_damaged_model_is_a_reason_and_not_a_crash(config: Config, folder: Path) -> None:
    (folder / "head.gguf").write_bytes(b"GGUF rubbish")
    found = await survey.measure(config, [folder, folder.parent / "nothing"])
    assert found.shapes == {}
    assert len(found.faults) == 2
    assert found.engines
    with pytest.raises(ModelError):
        await survey.shape("fake", folder)


async def test_a_backend_that_is_not_there_is_named(config: Config) -> None:
    found = await survey.measure(changed(config, backend="abacus"))
    assert found.engines == ()
    assert "abacus" in found.faults["abacus"]
    assert await survey.engines(changed(config, backend="abacus")) == ()


def found_in(folder: Path, *patterns: str) -> list[str]:
    """Names in a folder, sorted."""
    return sorted(path.name for pattern in patterns for path in folder.glob(pattern))


def script(folder: Path, body: str) -> str:
    """A Python that runs this instead of what it is told to."""
    path = folder / "python"
    path.write_text(f"#!{sys.executable}\nimport os, signal, sys, time\n{body}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("print('driver is ill', file=sys.stderr); sys.exit(3)", "ended with 3: driver is ill"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", f"signal {int(signal.SIGSEGV)}"),
        ("print('not json')", "gave no answer"),
        ("sys.exit(0)", "gave no answer"),
    ],
)
async def test_an_engine_that_crashes_is_an_error_in_words(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, why: str
) -> None:
    monkeypatch.setattr(sys, "executable", script(tmp_path, body))
    with pytest.raises(BackendError, match=why):
        await survey.measure(config)
    assert await survey.engines(config) == ()
    with pytest.raises(ModelError, match=why):
        await survey.shape("fake", tmp_path)


async def test_an_engine_that_hangs_is_ended_with_all_that_it_started(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = "import subprocess\nsubprocess.Popen(['sleep', '600'])\ntime.sleep(600)"
    monkeypatch.setattr(sys, "executable", script(tmp_path, body))
    before = {p.pid for p in psutil.process_iter()}
    with pytest.raises(BackendError, match="did not answer within 1 s"):
        await survey.measure(config, timeout_s=1)
    left = [
        p
        for p in psutil.process_iter(["cmdline"])
        if p.pid not in before and "600" in (p.info["cmdline"] or [])
    ]
    assert left == []


async def test_a_cancelled_survey_leaves_no_process(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, until: Callable
) -> None:
    pid = tmp_path / "pid"
    body = f"open({str(pid)!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)"
    monkeypatch.setattr(sys, "executable", script(tmp_path, body))
    task = asyncio.create_task(survey.measure(config))
    await until(lambda: pid.exists() and pid.stat().st_size, 10, "it runs")
    number = int(await asyncio.to_thread(pid.read_text))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not psutil.pid_exists(number)


async def test_speeds_are_measured_from_the_header_alone(config: Config, folder: Path) -> None:
    for name in found_in(folder, "layer-*", "embed*", "output*"):
        (folder / name).unlink()
    shape = await survey.shape("fake", folder)
    (speed,) = await survey.speeds(changed(config, threads=3), folder, shape)
    assert (speed.digest, speed.backend, speed.kind) == (shape.digest, "fake", "cpu")
    assert speed.threads == 3
    assert len(speed.decode_s) == len(speed.prefill_s) == 1
    assert min(speed.decode_s[0], speed.prefill_s[0], speed.output_s) > 0
    assert found_in(folder, "*") == ["head.gguf", "manifest.json"]


async def test_a_speed_that_cannot_be_measured_is_a_reason(config: Config, folder: Path) -> None:
    shape = await survey.shape("fake", folder)
    with pytest.raises(BackendError, match="more than can be tried out here"):
        await survey.speeds(changed(config, memory=1), folder, shape)
    (folder / "head.gguf").unlink()
    with pytest.raises(BackendError, match="missing"):
        await survey.speeds(config, folder, shape)
    with pytest.raises(BackendError, match="abacus"):
        await survey.speeds(changed(config, backend="abacus"), folder, shape)


async def test_an_answer_that_comes_ends_measuring_at_once(
    config: Config, folder: Path, monkeypatch: pytest.MonkeyPatch, until: Callable
) -> None:
    monkeypatch.setenv("HALKA_FAKE_DELAY_S", "5")
    shape = await survey.shape("fake", folder)
    task = asyncio.create_task(survey.speeds(config, folder, shape))
    await until(lambda: found_in(folder, ".measure-*/layer-*"), 20, "layers are written")
    task.cancel()
    began_s = asyncio.get_running_loop().time()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert asyncio.get_running_loop().time() - began_s < 1
    assert found_in(folder, ".measure-*"), "killed: it could not clean up"
    monkeypatch.delenv("HALKA_FAKE_DELAY_S")
    await survey.speeds(config, folder, shape)
    assert not found_in(folder, ".measure-*"), "the next one did"


async def test_the_disk_is_measured_in_the_process_too(config: Config, tmp_path: Path) -> None:
    assert await survey.disk_read_bytes_per_s(tmp_path) > 1e6
    assert not found_in(tmp_path, ".disk*")


async def test_a_disk_that_hangs_counts_as_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", script(tmp_path, "time.sleep(600)"))
    monkeypatch.setattr(survey, "DISK_S", 0.2)
    assert await survey.disk_read_bytes_per_s(tmp_path) == 0.0


def test_measuring_many_models_takes_the_shapes_of_the_good_ones(folder: Path) -> None:
    found = measure(MeasureOrder(("none", "fake"), (str(folder), "/nowhere")))
    assert set(found.shapes) == {str(folder)}
    assert set(found.faults) == {"none", "/nowhere"}


def test_a_profile_is_a_profile(config: Config) -> None:
    engines = (EngineProfile("fake", "CPU", "cpu", 8 * GIB, 8 * GIB),)
    profile = survey.profile(changed(config, spread="all", context=99), "a" * 16, engines)
    assert msgspec.convert(msgspec.to_builtins(profile), Profile) == profile
    assert 0 < profile.memory_available_bytes < profile.memory_total_bytes
    assert profile.cores >= 1
    assert profile.disk_free_bytes > 0
    assert (profile.spread_all, profile.context_wanted) == (True, 99)
    wishes = {"objective": "throughput", "kv_type": "q8_0", "flash": "on", "speculation": "off"}
    wishing = survey.profile(changed(config, **wishes), "a" * 16, engines)
    assert {name: getattr(wishing, name) for name in wishes} == wishes
    capped = survey.profile(changed(config, memory=1 << 20), "a" * 16, engines)
    assert capped.memory_available_bytes == 1 << 20
    assert capped.engines[0].memory_free_bytes == 1 << 20


def test_a_profile_tells_what_a_stage_gets(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "processors", lambda: 1.0)
    speed = Speed("0" * 64, "fake", "cpu", 4, (0.1,), (0.2,), 512)
    profile = survey.profile(
        changed(config, threads=4), "a" * 16, (), disk_read_bytes_per_s=5e8, speeds=[speed] * 40
    )
    assert (profile.threads, profile.cpu_share) == (4, 0.25)
    assert profile.disk_read_bytes_per_s == 5e8
    assert profile.speeds == (speed,) * 32
    assert survey.profile(config, "a" * 16, ()).threads == survey.cores()


def test_free_memory_of_cards_is_asked_anew(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpus, "cards", lambda: ((gpus.Card("RTX", 3 * GIB, 8 * GIB),), "1"))
    card = EngineProfile("llama_cpp", "RTX", "cuda", 7 * GIB, 8 * GIB)
    assert survey.profile(config, "a" * 16, [card]).engines[0].memory_free_bytes == 3 * GIB


def test_memory_is_unified_where_every_gpu_uses_the_machines() -> None:
    cpu = EngineProfile("llama_cpp", "CPU", "cpu")
    inside = EngineProfile("llama_cpp", "Iris", "vulkan", integrated=True)
    card = EngineProfile("llama_cpp", "RTX", "cuda")
    assert survey._unified([cpu], "darwin", "arm64")
    assert not survey._unified([cpu], "darwin", "x86_64")
    assert not survey._unified([cpu], "linux", "aarch64")
    assert survey._unified([cpu, inside], "linux", "x86_64")
    assert not survey._unified([cpu, inside, card], "linux", "x86_64")


@pytest.mark.parametrize(
    ("setting", "free", "group", "available"),
    [
        (0, 16 * GIB, None, 16 * GIB * 9 // 10),
        (0, 4 * GIB, None, 4 * GIB - (512 << 20)),
        (0, 1000, None, 900),
        (0, 16 * GIB, 1000, 900),
        (0, 1000, 16 * GIB, 900),
        (500, 1000, None, 500),
        (5000, 1000, None, 900),
        (0, 1000, 0, 0),
    ],
)
def test_available_is_the_least_of_all_limits_less_a_headroom(
    setting: int, free: int, group: int | None, available: int
) -> None:
    assert survey.available_bytes(setting, free, group) == pytest.approx(available, abs=1)


def write_group(folder: Path, limit: str, used: int, files: int, version: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {files}\n")


@pytest.mark.parametrize(("version", "line"), [(1, "4:cpu,memory:/a/b"), (2, "0::/a/b")])
def test_the_tightest_control_group_above_counts(tmp_path: Path, version: int, line: str) -> None:
    own = tmp_path / "cgroup"
    own.write_text(f"7:cpuset:/x\n{line}\n")
    mounted = tmp_path / "sys"
    root = mounted / "memory" if version == 1 else mounted
    none = str(0x7FFFFFFFFFFFF000) if version == 1 else "max"
    write_group(root / "a" / "b", none, 10, 0, version)
    assert survey.control_group_bytes(own, mounted) is None
    write_group(root / "a", "1000", 700, 50, version)
    assert survey.control_group_bytes(own, mounted) == 350
    write_group(root / "a" / "b", "200", 190, 5, version)
    assert survey.control_group_bytes(own, mounted) == 15
    write_group(root / "a" / "b", "200", 900, 5, version)
    assert survey.control_group_bytes(own, mounted) == 0


def test_a_container_sees_its_own_group_at_the_root(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    own.write_text("0::/the/path/on/the/host\n")
    write_group(tmp_path / "sys", "1000", 100, 0, 2)
    assert survey.control_group_bytes(own, tmp_path / "sys") == 900
    assert survey.control_group_bytes(tmp_path / "absent", tmp_path / "sys") is None


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("kitchen.local", "kitchen"),
        ("", "unnamed"),
        ("a\x1b[31mb\n", "a[31mb"),
        ("x" * 500, "x" * 64),
        ("Küche", "Küche"),
    ],
)
def test_machine_names_are_fit_to_be_shown(text: str, name: str) -> None:
    assert survey.clean_name(text) == name


INSTALLED = {"llama_cpp": object(), "mlx": object(), "mlx_lm": object()}


@pytest.mark.parametrize(
    ("system", "missing", "backends"),
    [
        ("darwin", (), ("mlx", "llama_cpp")),
        ("darwin", ("mlx_lm",), ("llama_cpp",)),
        ("darwin", ("mlx",), ("llama_cpp",)),
        ("darwin", ("llama_cpp",), ("mlx",)),
        ("linux", (), ("llama_cpp",)),
        ("linux", ("llama_cpp",), ()),
    ],
)
def test_mlx_is_preferred_on_a_mac_where_all_of_it_is_installed_and_taken_nowhere_else(
    config: Config,
    monkeypatch: pytest.MonkeyPatch,
    system: str,
    missing: tuple[str, ...],
    backends: tuple[str, ...],
) -> None:
    there = {name: found for name, found in INSTALLED.items() if name not in missing}
    monkeypatch.setattr(survey, "find_spec", there.get)
    assert survey.backends_of(changed(config, backend="auto"), system) == backends
    assert survey.backends_of(changed(config, backend="mlx"), system) == ("mlx",)
    assert survey.backends_of(changed(config, backend="llama_cpp"), system) == ("llama_cpp",)


def test_what_is_to_be_installed_is_told_for_the_system() -> None:
    assert "pip install 'halka[llama,mlx]'" in survey.no_engine("darwin")
    assert "pip install 'halka[llama]'" in survey.no_engine("linux")


def test_llama_cpp_tells_of_models_where_it_is_among_the_engines() -> None:
    assert survey.teller(("mlx", "llama_cpp")) == "llama_cpp"
    assert survey.teller(("mlx",)) == "mlx"
    assert survey.teller(("fake",)) == "fake"


def test_the_fake_engine_is_never_chosen_by_itself(config: Config) -> None:
    automatic = survey.backends_of(changed(config, backend="auto"))
    assert automatic in ((), ("llama_cpp",))
    assert survey.backends_of(config) == ("fake",)


GIB = 1 << 30


@pytest.mark.parametrize(
    ("setting", "free", "held", "offered"),
    [
        (SPARE_AUTO, 100 * GIB, 0, 50 * GIB),  # half
        (SPARE_AUTO, 80 * GIB, 20 * GIB, 50 * GIB),  # the same while spare parts arrive
        (SPARE_AUTO, 6 * GIB, 0, 2 * GIB),  # 4 GiB stay free
        (SPARE_AUTO, 3 * GIB, 0, 0),
        (SPARE_AUTO, 100 * GIB + 7, 0, 50 * GIB),  # in steps
        (0, 100 * GIB, 20 * GIB, 0),
        (20 * GIB, 100 * GIB, 0, 20 * GIB),
        (20 * GIB, 11 * GIB, 0, 10 * GIB),  # what is set is kept to, not a full disk
        (20 * GIB, GIB, 5 * GIB, 5 * GIB),
        (1000, 100 * GIB, 0, 1000),
    ],
)
def test_room_for_spare_parts_leaves_the_disk_usable(
    setting: int, free: int, held: int, offered: int
) -> None:
    assert survey.spare_bytes(setting, free, held) == offered


def test_a_profile_offers_room_as_it_is_set(tmp_path: Path) -> None:
    config = Config(home=tmp_path / "not" / "there", backend="fake", spare=1000)
    found = survey.profile(config, "a" * 16, ())
    assert found.disk_free_bytes > 0
    assert found.spare_bytes == (1000 if found.disk_free_bytes > GIB else 0)
