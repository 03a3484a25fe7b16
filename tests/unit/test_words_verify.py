"""What `halka verify` shows of proofs: made-up ones, of machines that are not here."""

from __future__ import annotations

import msgspec

from peer.planning.proof import MODEL, LayerFigure, LogitsFigure, Subject, Verdict
from peer.words.screen import Screen, cells_of
from peer.words.verify_show import Proof, Told, checklist, lines

METAL = Subject("mlx", "metal", "Apple M2", "0.33.0 0.32.2")
LLAMA = Subject("llama_cpp", "cpu", "Apple M2", "0.3.36")
LAYERS = (
    LayerFigure(0, "F32 and Q4_0 embedding", 2e-6),
    LayerFigure(1, "Q4_1", 3e-6, 0.01),
    LayerFigure(2, "Q4_K", 3e-6, 0.01),
    LayerFigure(3, "Q6_K", 4e-4, 0.02, rounded=True),
    LayerFigure(4, "MXFP4", 1e-6, 0.01),
)
RIGHT = Verdict(MODEL, "passed", "", LAYERS, LogitsFigure(1e-4, 1e-5, 1.0, 7e-9))
WHY = "its Q4_1 weights give wrong numbers (layer 1 of the built-in model: 12 % off)"
WRONG = Verdict(
    MODEL,
    "wrong",
    WHY,
    tuple(msgspec.structs.replace(f, error=0.12) if f.holds == "Q4_1" else f for f in LAYERS),
    LogitsFigure(2, 0.2, 0.5, 0.1),
)
HUNG = Verdict(MODEL, "failed", "it did not answer within 120 s (layer 2 of the built-in model)")


def shown(*proofs: Proof, system: str = "darwin", notes: tuple[str, ...] = ()) -> str:
    told = Told(proofs, checklist(proofs, system), (), notes)
    found = lines(told, Screen())
    assert max(map(cells_of, found)) <= 80
    return "\n".join(found)


def flat(text: str) -> str:
    return " ".join(text.split())


def test_right_engines_are_a_short_table_and_ticks() -> None:
    canary = Verdict("smollm2", "passed", "", (LayerFigure(3, "Q4_1", 7e-6, 0.04),))
    text = shown(Proof(LLAMA, RIGHT), Proof(METAL, RIGHT, canary, 16 << 30))
    assert "MLX 0.33.0        metal  built-in          Q6_K 0.04 %" in text
    assert "Q4_1 0.0007 %       -      -  passed" in text
    assert "[x] MLX on Metal reads MXFP4 as it should: 0.0001 % off" in flat(text)
    assert "[x] the GPU's share of the memory is told: 16.0 GiB" in text
    assert "WRONG" not in text
    assert "[!]" not in text
    assert "[ ] halka doctor, and a second Mac: Thunderbolt" in text


def test_a_wrong_engine_is_named_with_what_mends_it() -> None:
    proof = Proof(METAL, WRONG, None, 16 << 30)
    assert proof.wrong
    text = flat(shown(Proof(LLAMA, RIGHT), proof))
    assert f"! MLX 0.33.0 is refused: {WHY}; update it" in text
    assert "set backend = llama_cpp" in text
    assert "[!] MLX on Metal reads Q4_1 as it should: 12 % off" in text
    assert "[x] MLX on Metal reads Q4_K as it should" in text


def test_an_engine_that_hung_has_no_figures_and_a_reason() -> None:
    text = flat(shown(Proof(LLAMA, RIGHT), Proof(METAL, HUNG)))
    assert "FAILED" in text
    assert "could not be proven: it did not answer within 120 s" in text
    assert "[!] MLX on Metal computes in float32: it did not answer" in text


def test_elsewhere_the_list_says_what_only_a_mac_shows() -> None:
    cpu = msgspec.structs.replace(METAL, kind="cpu", device="AMD")
    text = flat(shown(Proof(cpu, RIGHT), system="linux", notes=("There is no model here yet.",)))
    assert "[ ] needs a Mac with an Apple chip: MLX on Metal computes in float32; MLX on" in text
    assert "[x] MLX 0.33.0 on AMD: F32, Q4_1, Q4_K, Q6_K, MXFP4" in text
    assert "There is no model here yet." in text


def test_a_model_that_an_engine_does_not_run_is_no_reason_against_it() -> None:
    skipped = Verdict("mamba", "skipped", "it does not run this model: no row for mamba")
    proof = Proof(METAL, RIGHT, skipped)
    assert not proof.wrong
    assert " skipped" in shown(proof)
    assert "MLX 0.33.0, mamba: it does not run this model: no row for mamba" in flat(shown(proof))


def test_llama_cpp_itself_is_mended_otherwise() -> None:
    gpu = msgspec.structs.replace(LLAMA, kind="cuda", device="RTX 3060")
    text = flat(shown(Proof(LLAMA, WRONG), Proof(gpu, WRONG)))
    assert "llama.cpp 0.3.36 itself does not compute rightly" in text
    assert "llama.cpp 0.3.36 does not compute rightly on RTX 3060" in text
