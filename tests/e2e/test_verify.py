"""Engines are proven before they are trusted: real ones, wrong ones, ones that die or hang."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from peer import children, cli
from peer.config import Config
from peer.models.imports import import_gguf
from peer.models.manifest import Manifest
from peer.models.store import Store
from peer.planning import proving, survey
from peer.planning.canary import Canary
from peer.planning.profile import EngineProfile
from peer.planning.proof import MODEL, Subject, Verdict
from peer.planning.proving import Builtin, Workplace, trusted
from peer.planning.verified import Verified
from tests import random_models
from tests.e2e.agents import START_S, House, until
from tests.mlx_models import tiny
from tests.random_models import Model, Shapes
from tests.wrong_engine import CHILD_S

MLX = EngineProfile("mlx", "CPU", "cpu")
LLAMA = EngineProfile("llama_cpp", "CPU", "cpu")
Break = Callable[[str], None]


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX would run g++ for each of its kernels."""
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")


@pytest.fixture
def break_mlx(monkeypatch: pytest.MonkeyPatch) -> Break:
    """Processes of ours have an MLX with this fault from now on."""

    def broken(fault: str) -> None:
        words = (sys.executable, "-P", "-m", "tests.wrong_engine", fault)
        monkeypatch.setattr(children, "command", lambda module: (*words, module))

    return broken


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config.fast_test(home=tmp_path / "home")


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Path]:
    with Workplace(tmp_path / "home") as folder:
        yield folder


def left(home: Path) -> list[str]:
    return sorted(path.name for path in home.iterdir())


async def test_both_engines_compute_the_built_in_model_rightly(work: Path) -> None:
    proofs = Builtin(work)
    verdict = await proofs.prove(Subject("mlx", "cpu"))
    assert (verdict.how, verdict.why) == ("passed", "")
    exact = [figure for figure in verdict.layers if not figure.rounded]
    assert len(exact) == 11
    assert max(figure.error for figure in exact) < 1e-5
    assert verdict.logits is not None
    assert verdict.logits.top1 == 1.0
    assert verdict.logits.kl < 1e-6
    plain = await proofs.prove(Subject("llama_cpp", "cpu"))
    assert plain.how == "passed"
    assert all(figure.error == figure.own for figure in plain.layers), "it is its own measure"
    assert plain.logits == verdict.own


async def test_a_proven_engine_is_offered_and_not_proven_again(
    config: Config, break_mlx: Break
) -> None:
    refused = {"mlx": "by an earlier start"}
    assert await trusted(config, (MLX, LLAMA), refused) == (MLX, LLAMA)
    assert refused == {}
    assert left(config.home) == ["verified.json"]
    break_mlx("crash")  # nobody would notice without running it
    assert await trusted(config, (MLX, LLAMA), refused) == (MLX, LLAMA)


async def test_an_engine_with_wrong_q4_1_weights_is_refused_by_name(
    config: Config, break_mlx: Break, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_mlx("q4_1")
    refused: dict[str, str] = {}
    assert await trusted(config, (MLX, LLAMA), refused) == (LLAMA,)
    why = refused["mlx"]
    assert why.startswith("MLX 0.")
    assert "is refused: its Q4_1 weights give wrong numbers (layer 2 of the built-in model: " in why
    assert why.endswith("or set backend = llama_cpp")
    (entry,) = Verified(config.home).entries()
    worst = entry.verdict.worst
    assert worst is not None
    assert (worst.holds, worst.error > 0.05) == ("Q4_1", True)
    others = [figure.error for figure in entry.verdict.layers if figure.holds != "Q4_1"]
    assert max(others) < 1e-3, "it is wrong where it is wrong, and nowhere else"
    monkeypatch.undo()  # the same release is wrong the next time, too
    assert await trusted(config, (MLX, LLAMA), refused) == (LLAMA,)
    assert refused["mlx"] == why


async def test_an_engine_that_crashes_is_refused_and_tried_again(
    config: Config, break_mlx: Break, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context():
        break_mlx("crash")
        refused: dict[str, str] = {}
        assert await trusted(config, (MLX, LLAMA), refused) == (LLAMA,)
        where = "(layer 2 of the built-in model, Q4_1 weights)"
        assert f"could not be proven: it was ended by signal 11 {where}" in refused["mlx"]
        assert left(config.home) == ["verified.json"]
    monkeypatch.undo()
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")
    assert await trusted(config, (MLX, LLAMA), refused) == (MLX, LLAMA)


async def test_an_engine_that_hangs_is_ended_with_what_it_started(
    work: Path, break_mlx: Break
) -> None:
    proofs = Builtin(work)
    assert (await proofs.prove(Subject("llama_cpp", "cpu"))).how == "passed"
    break_mlx("hang")
    verdict = await proofs.prove(Subject("mlx", "cpu"), within_s=4.0)
    assert verdict.how == "failed"
    assert "did not answer within 4 s (layer 2 of the built-in model" in verdict.why
    started = [p for p in psutil.process_iter(["cmdline"]) if CHILD_S in (p.info["cmdline"] or ())]
    assert started == []


async def test_an_engine_that_gives_up_is_refused_with_its_own_words(
    work: Path, break_mlx: Break
) -> None:
    break_mlx("busy")
    verdict = await Builtin(work).prove(Subject("mlx", "cpu"))
    assert verdict.how == "failed"
    assert verdict.why == "the GPU is busy (layer 2 of the built-in model, Q4_1 weights)"


async def test_without_llama_cpp_nothing_can_be_proven(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proving.proof, "TRUSTED", "absent")
    refused: dict[str, str] = {}
    assert await trusted(config, (MLX,), refused) == ()
    assert "there is nothing to compare it with: llama.cpp, which is trusted" in refused["mlx"]


async def test_what_a_killed_proof_left_is_removed(config: Config) -> None:
    (config.home / ".verify-left").mkdir(parents=True)
    (config.home / ".verify-left" / "x.npy").write_bytes(b"x")
    with Workplace(config.home) as first:
        assert not (config.home / ".verify-left").exists()
        with Workplace(config.home) as second:
            assert first.exists(), "one that still works holds a lock"
        assert not second.exists()
    assert left(config.home) == []


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    """One agent that prefers MLX, not started."""
    house = House(tmp_path, 1, HALKA_BACKEND="mlx")
    try:
        with house.watched():
            yield house
    finally:
        house.close()


def test_an_agent_says_which_engine_it_refuses_and_why(house: House) -> None:
    (agent,) = house.agents
    seen = asyncio.run(survey.measure(Config.fast_test(home=agent.home, backend="mlx")))
    subject = proving.subject_of(seen.engines[0], "auto")
    why = "its Q4_1 weights give wrong numbers (layer 2 of the built-in model: 12 % off)"
    Verified(agent.home).keep(subject, Verdict(MODEL, "wrong", why))
    house.start()
    problems = until(lambda: agent.status()["problems"], START_S, "it has something to say")
    told = [problem for problem in problems if problem["what"].startswith("MLX 0.")]
    assert f"is refused: {why}; update it" in told[0]["what"]
    assert told[0]["mend"] == "halka verify"
    shown = agent.word("status")
    assert "its Q4_1 weights give wrong numbers" in " ".join(shown.stdout.split())
    assert f"engine=refused because={subject.name} is refused: {why}" in agent.text()


# The model in use --------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Model], Path]:
    """Random models, each written once."""
    folder = tmp_path_factory.mktemp("models")

    def file(model: Model) -> Path:
        path = folder / f"{model.name}.gguf"
        return path if path.exists() else random_models.write(model, path, change=_usual)

    return file


def _usual(shapes: Shapes) -> Shapes:
    """Without tensors that an architecture may have and files do not."""
    return {n: s for n, s in shapes.items() if not re.search(r"scale$|\.bias$|^rope_f|^cls", n)}


Q4_1 = tiny("llama", quantised="Q4_1")
EXPERTS = tiny("llama", quantised="Q8_0", expert_count=6, expert_used_count=2)
GELU = tiny("gemma3", quantised="Q8_0", **{"attention.sliding_window": 16, "rope.freq_base": 1e6})


def canary(
    home: Path, work: Path, path: Path, held: set[str] | None = None, memory_bytes: int = 1 << 30
) -> tuple[Canary, Manifest]:
    store = Store(home)
    manifest = import_gguf(path, store)
    parts = {part.name for part in manifest.parts} if held is None else held
    folder = store.folder(manifest.digest)
    for part in manifest.parts:
        if part.name not in parts | {"head"}:
            (folder / part.file).unlink()
    return Canary(folder, manifest, parts, work, 1, memory_bytes), manifest


@pytest.mark.parametrize("model", [Q4_1, EXPERTS, GELU], ids=lambda model: model.name)
async def test_engines_agree_on_the_model_in_use_and_on_its_truth(
    config: Config, work: Path, files: Callable[[Model], Path], model: Model
) -> None:
    bird, _ = canary(config.home, work, files(model))
    for subject in (Subject("mlx", "cpu"), Subject("llama_cpp", "cpu")):
        verdict = await bird.prove(subject)
        assert (verdict.how, verdict.why) == ("passed", "")
        assert [figure.layer for figure in verdict.layers] == [1, 2, 3, 4]
        assert all(figure.own > 1e-3 for figure in verdict.layers), "llama.cpp rounds activations"
        assert verdict.logits is not None
        assert verdict.own is not None
        if subject.backend == "mlx":
            assert max(figure.error for figure in verdict.layers) < 1e-3
            assert verdict.logits.error < verdict.own.error / 3
    assert bird.untold == ""


async def test_of_a_part_of_the_model_its_layers_are_compared(
    config: Config, work: Path, files: Callable[[Model], Path]
) -> None:
    held = {"layer-002", "layer-003"}
    bird, _ = canary(config.home, work, files(Q4_1), held)
    verdict = await bird.prove(Subject("mlx", "cpu"))
    assert verdict.how == "passed"
    assert [(f.layer, f.holds, f.copied) for f in verdict.layers] == [
        (2, "Q4_1", True), (3, "Q4_1", True),
    ]  # fmt: skip
    assert verdict.logits is None
    assert "only some layers are compared" in bird.untold


async def test_with_little_memory_less_is_compared(
    config: Config, work: Path, files: Callable[[Model], Path]
) -> None:
    bird, manifest = canary(config.home, work, files(Q4_1), memory_bytes=1 << 20)
    verdict = await bird.prove(Subject("mlx", "cpu"))
    assert verdict.how == "passed"
    assert [figure.layer for figure in verdict.layers] == [1, 2], "as many copies as there is room"
    assert verdict.logits is not None
    assert verdict.own is None, "no copy of the whole"
    held = {part.name for part in manifest.parts}
    folder = config.home / "models" / manifest.digest
    least = await Canary(folder, manifest, held, work, 1, 1 << 17).prove(Subject("mlx", "cpu"))
    assert least.how == "skipped"
    assert "fits into memory" in least.why


async def test_a_wrong_engine_is_caught_on_the_model_in_use(
    config: Config, work: Path, files: Callable[[Model], Path], break_mlx: Break
) -> None:
    break_mlx("q4_1")
    bird, manifest = canary(config.home, work, files(Q4_1))
    verdict = await bird.prove(Subject("mlx", "cpu"))
    assert verdict.how == "wrong"
    assert "its Q4_1 weights give wrong numbers (layer " in verdict.why
    assert manifest.model in verdict.why


async def test_a_model_that_an_engine_does_not_run_is_not_compared(
    config: Config, work: Path, files: Callable[[Model], Path]
) -> None:
    bird, _ = canary(config.home, work, files(Model("mpt")))
    verdict = await bird.prove(Subject("mlx", "cpu"))
    assert verdict.how == "skipped"
    assert verdict.why.startswith("it does not run this model: ")


# The command -------------------------------------------------------------------------------------


def test_the_command_proves_all_engines_and_keeps_it(
    config: Config,
    files: Callable[[Model], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HALKA_THREADS", "1")
    import_gguf(files(Q4_1), Store(config.home))
    assert cli.main(["verify", "--home", str(config.home)]) == 0
    told = capsys.readouterr()
    assert told.out.count(" passed") == 4
    assert "What was checked on this machine" in told.out
    assert "start it again" not in told.out
    assert "the built-in model …" in told.err
    assert len(Verified(config.home).entries()) == 4
    assert left(config.home) == ["models", "verified.json"]


def test_the_command_says_which_engine_is_wrong(
    config: Config, break_mlx: Break, capsys: pytest.CaptureFixture[str]
) -> None:
    break_mlx("q4_1")
    assert cli.main(["verify", "--json", "--home", str(config.home)]) == 1
    told = json.loads(capsys.readouterr().out)
    hows = {proof["subject"]["backend"]: proof["builtin"]["how"] for proof in told["proofs"]}
    assert hows == {"llama_cpp": "passed", "mlx": "wrong"}
    assert "There is no model here yet" in told["notes"][0]
    assert "goes on with that engine: start it again" in told["notes"][1]
    mlx = next(c for c in told["checklist"] if c["what"].startswith("MLX 0."))
    assert mlx["state"] == "no"
