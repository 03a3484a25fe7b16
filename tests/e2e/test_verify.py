"""Engines are proven before they are trusted: real ones, wrong ones, ones that die or hang."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from peer import children
from peer.config import Config
from peer.planning import proving
from peer.planning.profile import EngineProfile
from peer.planning.proof import Subject
from peer.planning.proving import Builtin, Workplace, trusted
from peer.planning.verified import Verified
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
