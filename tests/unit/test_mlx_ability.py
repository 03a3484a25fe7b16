"""What MLX says of a model from its header alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from backends.base import Ability, Header, TensorFact, Weights
from backends.mlx import ability, archs, blocks, repack
from peer.models.gguf import tensor_bytes
from peer.models.manifest import part_of

HIDDEN, FEED_FORWARD, WORDS = 256, 512, 1024


@pytest.fixture(autouse=True)
def _every_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archs, "refusal", lambda header: "")


def fact(type_name: str, *shape: int) -> TensorFact:
    return TensorFact(shape, type_name, tensor_bytes(type_name, shape))


def header(types: Mapping[str, str] | None = None, layers: Any = 3, output: str = "Q8_0") -> Header:
    """A model of Q4_0. types: of other matrices, by name without the layer, or whole. output: ""
    for a tied one."""
    types = types or {}
    shapes = {"attn_q": (HIDDEN, HIDDEN), "ffn_down": (FEED_FORWARD, HIDDEN)}
    tensors = {
        "token_embd.weight": fact(types.get("token_embd", "Q4_0"), HIDDEN, WORDS),
        "output_norm.weight": fact("F32", HIDDEN),
        "rope_freqs.weight": fact("F32", 16),
    }
    if output:
        tensors["output.weight"] = fact(output, HIDDEN, WORDS)
    for layer in range(layers if isinstance(layers, int) and 0 < layers < 5000 else 1):
        tensors[f"blk.{layer}.attn_norm.weight"] = fact("F32", HIDDEN)
        for name, shape in shapes.items():
            type_name = types.get(f"{name}.{layer}", types.get(name, "Q4_0"))
            tensors[f"blk.{layer}.{name}.weight"] = fact(type_name, *shape)
    metadata = {"general.architecture": "llama", "llama.block_count": layers}
    return Header(metadata, tensors)


def test_a_model_in_types_of_mlx_is_exact() -> None:
    found = ability.can_run(header())
    assert (found.how, found.why) == ("exact", "")
    norm = HIDDEN * 4
    matrices = HIDDEN * (HIDDEN + FEED_FORWARD) * 5 // 8  # 4 bits, a scale and a bias for 32: 5
    assert found.layer_bytes == (norm + matrices,) * 3
    assert found.embed_bytes == HIDDEN * WORDS * 5 // 8
    assert found.output_bytes == HIDDEN * WORDS * 9 // 8


def test_a_model_that_weighs_in_memory_what_its_file_does_says_no_sizes() -> None:
    types = {"token_embd": "F16", "attn_q": "F32", "ffn_down": "Q4_1"}
    assert ability.can_run(header(types, output="MXFP4")) == Ability("exact")


def test_a_tied_model_has_no_output_of_its_own() -> None:
    found = ability.can_run(header(output=""))
    assert found.output_bytes == 0
    assert found.embed_bytes > 0


@pytest.mark.parametrize("weights", ["auto", "small"])
def test_tensors_are_counted_in_the_parts_that_hold_them(weights: Weights) -> None:
    model = header({"ffn_down": "Q6_K", "attn_q.1": "Q4_K", "token_embd": "Q3_K"}, output="Q5_K")
    extra = {
        "output.bias": fact("F32", WORDS),
        "per_layer_token_embd.weight": fact("Q8_0", 64, WORDS),
        "blk.2.ffn_up_exps.weight": fact("MXFP4", HIDDEN, FEED_FORWARD, 4),
    }
    model = Header(model.metadata, {**model.tensors, **extra})
    parts = dict.fromkeys(("head", "embed", "output", "layer-000", "layer-001", "layer-002"), 0)
    for name, one in model.tensors.items():
        parts[part_of(name, 3)] += repack.memory_bytes(one.type, one.shape, weights)
    found = ability.can_run(model, weights)
    assert found.layer_bytes == (parts["layer-000"], parts["layer-001"], parts["layer-002"])
    assert (found.embed_bytes, found.output_bytes) == (parts["embed"], parts["output"])


def test_types_that_mlx_rounds_are_approximate_and_larger() -> None:
    model = header({"ffn_down": "Q6_K"})
    plain, kept, small = (
        ability.can_run(header()), ability.can_run(model), ability.can_run(model, "small"),
    )  # fmt: skip
    assert (kept.how, kept.why) == ("approximate", "3 tensors of Q6_K are kept as float16")
    assert small.how == "approximate"
    assert small.why == "3 tensors of Q6_K are requantised to 8 bits"
    four, eight, sixteen = (
        HIDDEN * FEED_FORWARD * bits // 8 for bits in (5, 9, 16)
    )  # with scales and biases
    assert kept.layer_bytes[0] - plain.layer_bytes[0] == sixteen - four
    assert small.layer_bytes[0] - plain.layer_bytes[0] == eight - four


def test_several_roundings_are_all_told() -> None:
    model = header({"ffn_down": "Q6_K", "attn_q": "Q3_K", "attn_q.1": "Q2_K"})
    assert ability.can_run(model).why == (
        "3 tensors of Q6_K, 2 tensors of Q3_K and 1 tensor of Q2_K are kept as float16"
    )
    assert ability.can_run(model, "small").why == (
        "3 tensors of Q6_K are requantised to 8 bits and 2 tensors of Q3_K and 1 tensor of Q2_K "
        "are kept as float16"
    )
    assert ability.can_run(header({"attn_q.1": "Q6_K"})).why == (
        "1 tensor of Q6_K is kept as float16"
    )


def test_exactness_that_is_asked_for_keeps_mlx_off_rounded_types() -> None:
    assert ability.can_run(header(), "exact").how == "exact"
    assert ability.can_run(header({"ffn_down": "Q6_K"}), "exact") == Ability(
        "no",
        'MLX has no Q6_K, which 3 of its tensors are; the setting weights = "auto" lets it keep '
        "these as float16",
    )


def test_types_that_mlx_has_not_are_named_and_counted() -> None:
    model = header({"ffn_down": "IQ4_XS", "attn_q.2": "TQ2_0"})
    for weights in ("auto", "small"):
        assert ability.can_run(model, weights) == Ability(
            "no",
            "MLX has no IQ4_XS or TQ2_0, which 4 of its tensors are",
        )


def test_many_missing_types_are_told_in_a_short_sentence() -> None:
    types = ("IQ1_S", "IQ2_XS", "IQ3_S", "IQ4_NL", "TQ1_0", "NVFP4")
    found = ability.can_run(header({f"attn_q.{i}": name for i, name in enumerate(types)}, 6))
    assert found.how == "no"
    assert found.why == (
        "MLX has no IQ1_S, IQ2_XS, IQ3_S, IQ4_NL or 2 other types, which 6 of its tensors are"
    )


def test_an_architecture_that_mlx_does_not_run_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archs, "refusal", lambda header: f"no {header.architecture} here")
    assert ability.can_run(header({"attn_q": "IQ1_S"})) == Ability("no", "no llama here")


@pytest.mark.parametrize("layers", [0, -1, 4097, 1 << 62, True, "7", None])
def test_a_number_of_layers_that_cannot_be_is_no_model(layers: Any) -> None:
    assert ability.can_run(header(layers=layers)).how == "no"


@pytest.mark.parametrize(
    ("name", "odd", "why"),
    [
        ("blk.1.x.weight", TensorFact((32, 4), "Q8_0", 5), "blk.1.x.weight has 5 bytes instead of"),
        ("blk.1.x.weight", TensorFact((31, 4), "Q8_0", 132), "blk.1.x.weight: rows of 31 values"),
        ("x", TensorFact((0,), "F32", 0), r"x: [0] is not the shape of a tensor"),
    ],
)
def test_a_header_that_contradicts_itself_is_not_run(name: str, odd: TensorFact, why: str) -> None:
    model = header()
    found = ability.can_run(Header(model.metadata, {**model.tensors, name: odd}))
    assert found.how == "no"
    assert found.why.startswith(f"its header is not to be trusted: {why}")


@pytest.mark.parametrize(
    "name",
    ["blk.3.x", "blk.-1.x", "blk.²", "blk.99999999999999999999.x", "blk.", "blk", "other.1.x"],
)
def test_tensors_of_no_layer_are_in_none(name: str) -> None:
    model = header()
    found = ability.can_run(Header(model.metadata, {**model.tensors, name: fact("F16", 64)}))
    assert found == ability.can_run(model)


def test_all_4096_layers_that_a_planner_knows_are_counted() -> None:
    found = ability.can_run(header(layers=4096))
    assert len(found.layer_bytes) == 4096
    assert len(set(found.layer_bytes)) == 1


def test_every_type_of_the_format_has_an_answer() -> None:
    from peer.models.gguf import TYPES

    answers = {name: ability.can_run(header({"attn_q.0": name})).how for name in TYPES}
    assert {name for name, how in answers.items() if how == "no"} == TYPES.keys() - blocks.TYPES
    assert {name for name, how in answers.items() if how == "approximate"} == {
        "Q2_K", "Q3_K", "Q6_K",
    }  # fmt: skip


def test_the_question_imports_no_mlx() -> None:
    program = (
        "import sys, backends.mlx.ability, backends.mlx.reader\n"
        "print([name for name in sys.modules if name.partition('.')[0] in ('mlx', 'mlx_lm')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
