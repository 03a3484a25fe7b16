"""Which models an island can share out, from the header alone, and what a rank's share weighs."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import gguf
import pytest

from backends.base import Header, TensorFact
from backends.mlx import ability, archs, shares


def header(
    arch: str = "llama", *, heads: int = 8, kv_heads: int = 4, head: int = 64, ffn: int = 1536,
    type_name: str = "Q4_1", layers: int = 2, **more: Any
) -> Header:  # fmt: skip
    """As a converter writes it; ggml's order of extents, the fastest first."""
    hidden = heads * head
    metadata = {
        "general.architecture": arch,
        f"{arch}.block_count": layers,
        f"{arch}.embedding_length": hidden,
        f"{arch}.feed_forward_length": ffn,
        f"{arch}.attention.head_count": heads,
        f"{arch}.attention.head_count_kv": kv_heads,
        f"{arch}.context_length": 4096,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
    } | {f"{arch}.{key}": value for key, value in more.items()}
    matrices = {
        "attn_q": (hidden, hidden), "attn_k": (hidden, kv_heads * head),
        "attn_v": (hidden, kv_heads * head), "attn_output": (hidden, hidden),
        "ffn_gate": (hidden, ffn), "ffn_up": (hidden, ffn), "ffn_down": (ffn, hidden),
    }  # fmt: skip
    tensors = {"token_embd.weight": fact(type_name, hidden, 1000)}
    tensors["output_norm.weight"] = fact("F32", hidden)
    for layer in range(layers):
        for name, shape in matrices.items():
            tensors[f"blk.{layer}.{name}.weight"] = fact(type_name, *shape)
        for name in ("attn_norm", "ffn_norm"):
            tensors[f"blk.{layer}.{name}.weight"] = fact("F32", hidden)
    return Header(metadata, tensors)


def fact(type_name: str, *shape: int) -> TensorFact:
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]]
    count = 1
    for extent in shape:
        count *= extent
    return TensorFact(shape, type_name, count // block * size)


def smollm2() -> Header:
    """The sizes of SmolLM2-135M."""
    return header(heads=9, kv_heads=3, head=64, ffn=1536, layers=30)


def test_heads_that_do_not_divide_are_named() -> None:
    assert shares.shardable(smollm2(), 2) == (
        "its 9 attention heads cannot be divided among 2 peers"
    )
    assert shares.shardable(smollm2(), 3) == ""
    assert shares.shardable(header(kv_heads=1), 2).startswith("its 1 heads of keys and values")
    assert shares.shardable(header(), 2) == ""
    assert shares.shardable(header(), 4) == ""
    assert "4 heads of keys" in shares.shardable(header(), 8)


def test_the_planner_is_told_how_many_peers_may_share_a_layer() -> None:
    """By what the engine says of the header, for every policy."""
    for weights in ("auto", "exact", "small"):
        assert ability.can_run(smollm2(), weights).ranks == (3,)  # type: ignore[arg-type]
        assert ability.can_run(header(), weights).ranks == (2, 4)  # type: ignore[arg-type]
    assert ability.can_run(header(kv_heads=1)).ranks == ()


def test_quantised_rows_are_cut_between_groups_only() -> None:
    narrow = header(ffn=32 * 5)
    assert shares.shardable(narrow, 2) == (
        "the 160 columns of blk.0.ffn_down.weight (Q4_1) cannot be divided among 2 peers in "
        "groups of 32"
    )
    assert shares.shardable(header(ffn=32 * 5, type_name="F16"), 2) == ""
    assert shares.shardable(header(ffn=32 * 6), 2) == ""
    odd = header(ffn=161, type_name="F32")
    assert shares.shardable(odd, 2) == "the 161 rows of blk.0.ffn_gate.weight cannot be divided" + (
        " among 2 peers"
    )


@pytest.mark.parametrize("ranks", [0, 1, 9])
def test_an_island_has_a_few_ranks(ranks: int) -> None:
    assert "2 to 8 peers" in shares.shardable(header(heads=72, kv_heads=72), ranks)


def test_classes_that_cannot_be_shared_are_named() -> None:
    for other in (header("gemma3"), header("phi3"), header("mamba")):
        assert "cannot share the layers" in shares.shardable(other, 2)
    assert "cannot share" in shares.shardable(header(expert_count=8, expert_used_count=2), 2)


def test_the_table_says_of_every_class_what_mlx_lm_has() -> None:
    """Its Model has shard(), or has not: a new release, or a new row, changes this on purpose."""
    pytest.importorskip("mlx.core", reason="the engine is not installed: pip install halka[mlx]")
    from backends.mlx.library import library

    library()
    for row in (*archs.TABLE.values(), archs.MIXTRAL):
        model = importlib.import_module(f"mlx_lm.models.{row.model}").Model
        assert hasattr(model, "shard") == (row.model in shares.SHARDED), row.model


def test_a_share_is_its_part_of_the_matrices_and_all_of_the_rest() -> None:
    whole = shares.share_bytes(header(), 1)
    norms = 2 * 8 * 64 * 4
    assert shares.share_bytes(header(), 2) == tuple((size - norms) // 2 + norms for size in whole)
    assert shares.share_bytes(header(), 4) == tuple((size - norms) // 4 + norms for size in whole)
    assert shares.share_kv_bytes((1024, 2048), 2) == (512, 1024)


def test_biases_of_rows_are_shared_and_of_results_are_not() -> None:
    plain = header("qwen2")
    biases = {"blk.0.attn_q.bias": fact("F32", 512), "blk.0.attn_output.bias": fact("F32", 512)}
    biased = replace(plain, tensors={**plain.tensors, **biases})
    before, after = shares.share_bytes(plain, 2)[0], shares.share_bytes(biased, 2)[0]
    assert after - before == 512 * 4 // 2 + 512 * 4
