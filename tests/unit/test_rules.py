"""backends.llama_cpp.rules, recipe and cache: answers from a header alone, without libllama."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.base import BackendFault, Header, Stub, TensorFact
from backends.llama_cpp import ENGINE
from backends.llama_cpp.rules import _KNOWN_WHOLE, _NO_TEXT, PER_LAYER, TABLE
from tests.rule_models import MODELS


def header(
    arch: str, layers: int = 8, *, untied: bool = False, tensors: int | None = None, **keys: Any
) -> Header:
    """A model of 64 hidden values, 4 heads and 100 words. Keys: dots as double underscores."""
    usual: dict[str, Any] = {
        "block_count": layers,
        "embedding_length": 64,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
    }
    usual |= {key.replace("__", "."): value for key, value in keys.items()}
    metadata = {f"{arch}.{key}": value for key, value in usual.items()}
    names = [f"blk.{i}.attn_norm.weight" for i in range(layers if tensors is None else tensors)]
    facts = {name: TensorFact((64,), "F32", 256) for name in names}
    facts["token_embd.weight"] = TensorFact((64, 100), "Q8_0", 6800)
    if untied:
        facts["output.weight"] = TensorFact((64, 100), "Q8_0", 6800)
    return Header({"general.architecture": arch, **metadata}, facts)


def test_the_table_answers_without_loading_libllama() -> None:
    code = (
        "import sys, backends.llama_cpp as l; from backends.base import Header;"
        "l.ENGINE.cuts(Header({'general.architecture': 'llama', 'llama.block_count': 4}, {}));"
        "assert not any('libllama' in m or m == 'llama_cpp' for m in sys.modules), sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_row_of_the_table_has_a_random_model_that_proves_it() -> None:
    assert {model.arch for model in MODELS.values()} == set(TABLE)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3moe", "phi3", "qwen2vl", "gpt2"])
def test_most_architectures_are_cut_before_any_layer(arch: str) -> None:
    cuts = ENGINE.cuts(header(arch))
    assert cuts.starts == tuple(range(8))
    assert cuts.groups == ()
    assert cuts.why == ""


@pytest.mark.parametrize(
    "arch", [*_KNOWN_WHOLE, *sorted(_NO_TEXT), "gemma4", "rwkv7", "t5", "bert", ""]
)
def test_whatever_has_no_proven_rule_stays_whole_and_says_why(arch: str) -> None:
    assert arch not in TABLE
    cuts = ENGINE.cuts(header(arch))
    assert cuts.starts == (0,)
    assert len(cuts.why) > 20
    assert cuts.refusal(0, 8) == ""
    assert cuts.refusal(0, 4) == cuts.why
    with pytest.raises(BackendFault, match=r"\w") as caught:
        ENGINE.recipe(header(arch), 4, 8)
    assert caught.value.kind == "refused"
    assert str(caught.value) == cuts.why


def test_an_odd_header_keeps_its_model_whole() -> None:
    odd = {
        "nextn": header("glm4moe", nextn_predict_layers=1),
        "its header speaks of 8 layers, its tensors of 9": header("llama", tensors=9),
        "of 7": header("llama", tensors=7),
        "has 7 values for 8 layers": header("openelm", attention__head_count=[4] * 7),
        "may hold one value a layer": header("llama", attention__new_thing=[1.0] * 8),
        "speaks of 0 layers": header("llama", 0),
        "speaks of 513 layers": header("llama", 513),
        "does not list which of its layers": header("mimo2"),
        "loops": header("nanbeige", num_loops=2),
    }
    for why, model in odd.items():
        assert why in ENGINE.cuts(model).why
        assert ENGINE.cuts(model).starts == (0,)


_KEYS = [*PER_LAYER, "attention.sliding_window", "attention.key_length", "embedding_length"]
_KEYS += ["block_count", "nextn_predict_layers", "full_attention_interval", "context_length"]
_KEYS += ["leading_dense_block_count", "interleave_moe_layer_step", "rope.dimension_sections"]
_ODD: Any = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 63), (1 << 64) - 1),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.one_of(st.booleans(), st.integers(-2, 9), st.floats()), max_size=9),
)


@given(arch=st.sampled_from(sorted(TABLE)), odd=st.dictionaries(st.sampled_from(_KEYS), _ODD))
def test_no_header_however_odd_breaks_an_answer(arch: str, odd: dict[str, Any]) -> None:
    given_header = header(arch, **{key.replace(".", "__"): value for key, value in odd.items()})
    if given_header.layers > 1000:  # a manifest allows no more than 4096
        given_header.metadata[f"{arch}.block_count"] = 1000  # type: ignore[index]
    cuts = ENGINE.cuts(given_header)
    assert 0 in cuts.starts
    assert len(ENGINE.kv_bytes_per_cell(given_header)) == max(0, given_header.layers)
    edges = [*cuts.starts, given_header.layers]
    for first, last in pairwise(edges):
        if cuts.refusal(first, last):
            continue
        recipe = ENGINE.recipe(given_header, first, last)
        for kind, value in recipe.write.values():
            assert not kind.startswith("array") or len(value) == last - first


def test_a_model_of_four_layers_keeps_its_four_rope_sections() -> None:
    model = header("qwen2vl", 4, rope__dimension_sections=[4, 6, 6, 0])
    assert ENGINE.cuts(model).starts == (0, 1, 2, 3)
    assert "qwen2vl.rope.dimension_sections" not in ENGINE.recipe(model, 1, 3).write


def test_numbers_of_layers_by_which_llama_cpp_knows_a_model_forbid_a_split() -> None:
    for arch, layers in [("baichuan", 32), ("baichuan", 40), ("exaone4", 64), ("command-r", 64)]:
        assert "llama.cpp" in ENGINE.cuts(header(arch, layers)).why
        assert ENGINE.cuts(header(arch, layers - 1)).why == ""
    for arch, layers in [("gemma2", 46), ("gemma3", 62)]:
        big = header(arch, layers, attention__key_length=32, attention__sliding_window=8)
        assert f"by its {layers} layers" in ENGINE.cuts(big).why
        same = header(arch, layers, attention__key_length=16, attention__sliding_window=8)
        assert ENGINE.cuts(same).why == ""


def test_no_window_has_a_number_of_layers_that_llama_cpp_takes_for_another_model() -> None:
    taken = {"deepseek2": {26, 27, 48}, "smallthinker": {4}}
    for arch, layers in [("deepseek2", 61), ("deepseek2", 60), ("smallthinker", 52)]:
        cuts = ENGINE.cuts(header(arch, layers, attention__sliding_window=8))
        assert len(cuts.starts) >= 3
        edges = [*cuts.starts, layers]
        apart = {b - a for a in edges for b in edges if b > a}
        assert not apart & taken[arch]


def test_every_window_of_a_sliding_model_holds_a_sliding_layer() -> None:
    for arch, first_full in [("gpt-oss", 1), ("cohere2", 3), ("cohere2moe", 0), ("gemma2", 1)]:
        cuts = ENGINE.cuts(header(arch))
        assert cuts.starts == tuple(range(8))
        assert first_full not in cuts.groups[0]
        assert "must hold at least one of the layers" in cuts.refusal(first_full, first_full + 1)
    named = header("mimo2", attention__sliding_window_pattern=[True, False, False, True] * 2)
    assert ENGINE.cuts(named).groups == ((0, 3, 4, 7),)
    assert ENGINE.cuts(named).refusal(1, 3)
    assert not ENGINE.cuts(named).refusal(1, 4)
    none = header("mimo2", attention__sliding_window_pattern=[False] * 8)
    assert ENGINE.cuts(none).starts == (0,)
    assert ENGINE.cuts(none).why


def test_a_model_without_a_sliding_window_needs_no_sliding_layer() -> None:
    assert ENGINE.cuts(header("gemma3")).groups == ()
    assert ENGINE.cuts(header("gemma3", attention__sliding_window=512)).groups != ()


def test_windows_of_a_hybrid_hold_both_kinds_of_layers() -> None:
    cuts = ENGINE.cuts(header("qwen3next"))
    assert cuts.groups == ((0, 1, 2, 4, 5, 6), (3, 7))
    assert cuts.refusal(0, 3)
    assert not cuts.refusal(0, 4)
    assert not cuts.refusal(2, 5)


def test_a_recipe_of_an_inner_window_has_no_words_and_its_own_slices() -> None:
    heads = [4, 4, 2, 2, 4, 4, 8, 8]
    model = header("openelm", attention__head_count=heads, leading_dense_block_count=3)
    recipe = ENGINE.recipe(model, 2, 5)
    assert recipe.write["openelm.block_count"] == ("uint32", 3)
    assert recipe.write["openelm.attention.head_count"] == ("array:uint32", [2, 2, 4])
    assert recipe.write["openelm.leading_dense_block_count"] == ("uint32", 1)
    assert recipe.write["openelm.attention.key_length"] == ("uint32", 16)  # of layer 0, not of 2
    assert recipe.write["tokenizer.ggml.model"] == ("string", "none")
    assert recipe.write["openelm.vocab_size"] == ("uint32", 1)
    assert "tokenizer." in recipe.drop
    assert recipe.stubs == (Stub("token_embd.weight", (64, 1)),)
    assert not recipe.embed
    assert not recipe.output


def test_a_last_window_takes_the_output_head_and_never_the_embedding_of_an_untied_model() -> None:
    tied = ENGINE.recipe(header("llama"), 4, 8)
    assert (tied.embed, tied.output, tied.stubs) == (True, False, ())
    untied = ENGINE.recipe(header("llama", untied=True), 4, 8)
    assert (untied.embed, untied.output, untied.stubs) == (False, True, ())
    assert untied.rename == {"output.weight": "token_embd.weight"}
    insists = ENGINE.recipe(header("gpt-oss", untied=True), 4, 8)
    assert (insists.embed, insists.output, insists.rename) == (False, True, {})
    assert insists.stubs == (Stub("token_embd.weight", (64, 100), "Q4_0"),)
    assert "tokenizer." not in untied.drop
    whole = ENGINE.recipe(header("llama", untied=True), 0, 8)
    assert (whole.embed, whole.output, dict(whole.write)) == (True, True, {})


def test_later_windows_add_no_positions_and_scale_nothing() -> None:
    model = header("gpt2")
    model.tensors["position_embd.weight"] = TensorFact((64, 32), "F32", 8192)  # type: ignore[index]
    assert ENGINE.recipe(model, 0, 4).without == ()
    later = ENGINE.recipe(model, 4, 8)
    assert later.without == ("position_embd.weight",)
    assert Stub("position_embd.weight", (64, 32)) in later.stubs
    scaled = header("granite", embedding_scale=12.0)
    assert "granite.embedding_scale" not in ENGINE.recipe(scaled, 0, 4).write
    assert ENGINE.recipe(scaled, 4, 8).write["granite.embedding_scale"] == ("float32", 0.0)


def test_what_llama_cpp_works_out_from_the_layers_is_written_down() -> None:
    kind, scale = ENGINE.recipe(header("minicpm", 40), 3, 9).write["minicpm.residual_scale"]
    assert kind == "float32"
    assert scale == np.float32(1.4) / np.sqrt(np.float32(40))
    given = ENGINE.recipe(header("minicpm", residual_scale=0.5), 0, 4).write
    assert "minicpm.residual_scale" not in given
    lite = header("deepseek2", 27)
    lite.tensors["blk.0.attn_q.weight"] = TensorFact((64, 64), "F32", 16384)  # type: ignore[index]
    write = ENGINE.recipe(lite, 0, 9).write
    assert write["deepseek2.attention.q_lora_rank"] == ("uint32", 0)
    assert write["deepseek2.expert_gating_func"] == ("uint32", 1)
    glm = header("deepseek2", 47, vocab_size=154880)
    assert ENGINE.cuts(glm).starts[:3] == (0, 4, 8)
    assert ENGINE.recipe(glm, 0, 8).write["deepseek2.expert_gating_func"] == ("uint32", 2)


def test_kv_cells_are_counted_in_float16_layer_by_layer() -> None:
    assert ENGINE.kv_bytes_per_cell(header("llama")) == (2 * 2 * 16 * 2,) * 8
    wide = header("llama", attention__key_length=32, attention__value_length=8)
    assert ENGINE.kv_bytes_per_cell(wide) == (2 * (32 + 8) * 2,) * 8
    uneven = header("openelm", 3, attention__head_count_kv=[1, 2, 0])
    assert ENGINE.kv_bytes_per_cell(uneven) == (64, 128, 0)
    assert ENGINE.kv_bytes_per_cell(header("mamba")) == (0,) * 8
    hybrid = ENGINE.kv_bytes_per_cell(header("qwen3next"))
    assert [size > 0 for size in hybrid] == [False, False, False, True] * 2
    mla = header(
        "deepseek2",
        attention__key_length=576,
        attention__value_length=512,
        attention__key_length_mla=192,
    )
    assert ENGINE.kv_bytes_per_cell(mla) == (576 * 2,) * 8  # V is worked out from K's row


def test_kv_cells_of_eight_bits_are_counted_in_blocks() -> None:
    plain = header("llama", attention__key_length=64, attention__value_length=32)
    assert ENGINE.kv_types(plain) == ("f16", "q8_0")
    assert ENGINE.kv_bytes_per_cell(plain, "q8_0") == (2 * (64 + 32) * 34 // 32,) * 8
    assert ENGINE.kv_types(header("llama")) == ("f16",)  # heads of 16 values are half a block
    assert ENGINE.kv_types(header("llama", attention__key_length=48)) == ("f16",)
    lengths = {"attention__key_length": 64, "attention__value_length": 64}
    assert ENGINE.kv_types(header("grok", **lengths)) == ("f16",)  # no flash attention for it


def test_indexers_keep_keys_beside_the_cache_where_there_are_any() -> None:
    keys = {
        "attention__key_length": 64,
        "attention__value_length": 64,
        "attention__indexer__key_length": 128,
    }
    usual = 2 * (64 + 64) * 2
    assert ENGINE.kv_bytes_per_cell(header("llama", **keys)) == (usual,) * 8
    assert ENGINE.kv_bytes_per_cell(header("deepseek32", **keys)) == (usual + 256,) * 8
    types = {"attention__indexer__types": [1, 0] * 4}
    some = ENGINE.kv_bytes_per_cell(header("glm-dsa", **keys, **types))
    assert some == (usual + 256, usual) * 4
    dense = header("minimax-m3", leading_dense_block_count=2, **keys)
    assert ENGINE.kv_bytes_per_cell(dense) == (usual,) * 2 + (usual + 256 + 128,) * 6


def test_only_recurrent_states_cannot_be_rewound() -> None:
    told = {arch: ENGINE.rewinds(header(arch)) for arch in ("llama", "gemma3", "deepseek2")}
    assert all(told.values())
    for arch in ("mamba", "mamba2", "falcon-h1", "qwen35", "qwen3next"):
        assert not ENGINE.rewinds(header(arch))
