"""Which headers MLX takes: each refusal is of a header in which one thing is another."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from backends.base import Header, TensorFact
from backends.mlx import archs, library, names, skeleton

_SIZES: dict[str, Any] = {
    "context_length": 4096,
    "embedding_length": 128,
    "block_count": 6,
    "feed_forward_length": 192,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
}
_MORE: dict[str, dict[str, Any]] = {
    "mixtral": {"expert_count": 8, "expert_used_count": 2},
    "qwen3moe": {"expert_count": 8, "expert_used_count": 2, "expert_feed_forward_length": 96},
    "gpt-oss": {"expert_count": 8, "expert_used_count": 2, "expert_feed_forward_length": 96,
                "attention.sliding_window": 128},
    "olmoe": {"expert_count": 8, "expert_used_count": 2},
    "gemma2": {"attention.sliding_window": 4096},
    "gemma3": {"attention.sliding_window": 512, "rope.freq_base": 1e6},
}  # fmt: skip
_ROWS = {**archs.TABLE, "mixtral": archs.MIXTRAL}


def header(name: str, more: dict[str, Any] | None = None, tensors: Any = ()) -> Header:
    """A header that a converter writes for this row. more: metadata, None takes a key away.
    tensors: names to add; with a "-" before it, to take away."""
    arch = "llama" if name == "mixtral" else name
    metadata = {"general.architecture": arch, "general.name": "tiny", "tokenizer.ggml.model": "x"}
    said = _SIZES | _MORE.get(name, {}) | (more or {})
    metadata |= {f"{arch}.{key}": value for key, value in said.items() if value is not None}
    layers = metadata.get(f"{arch}.block_count")
    found = {
        f"blk.{layer}.{tensor}"
        for layer in range(layers if isinstance(layers, int) and layers < 600 else 0)
        for tensor in _ROWS[name].layer.values()
    }
    found |= {names.EMBEDDING, names.NORM, names.OUTPUT}
    found |= {tensor for tensor in tensors if not tensor.startswith("-")}
    found -= {tensor[1:] for tensor in tensors if tensor.startswith("-")}
    facts = {tensor: TensorFact((128, 300), "F32", 128 * 300 * 4) for tensor in found}
    return Header(metadata, facts)


@pytest.mark.parametrize("name", _ROWS)
def test_every_row_takes_what_a_converter_writes(name: str) -> None:
    assert archs.refusal(header(name)) == ""
    more = {"vocab_size": 300, "rope.dimension_count": 32, "attention.key_length": 32,
            "attention.value_length": 32, "rope.freq_base": 5e5, "attention.causal": True,
            "rope.scaling.type": "none", "rope.scaling.attn_factor": 1.0}  # fmt: skip
    assert archs.refusal(header(name, more)) == ""


_BIASES = [f"blk.{n}.attn_{part}.bias" for n in range(6) for part in ("q", "k", "v", "output")]


@pytest.mark.parametrize(
    ("name", "more", "tensors"),
    [
        ("llama", {}, (names.ROPE_FREQS,)),
        ("llama", {}, _BIASES),
        ("llama", {}, ("-output.weight",)),
        ("llama", {"attention.key_length": 48, "attention.value_length": 48}, ()),
        ("llama", {"rope.scaling.type": "yarn", "rope.scaling.factor": 8.0}, ()),
        ("llama", {"rope.scaling.factor": 0.0}, ()),
        ("qwen3", {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, ()),
        ("phi3", {"rope.dimension_count": 24, "attention.sliding_window": 2047}, ()),
        ("gemma3", {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}, ()),
        ("gemma2", {"attention.sliding_window": None}, ()),  # 4096 then
        (
            "granite",
            {
                "attention.scale": 0.1,
                "embedding_scale": 12.0,
                "residual_scale": 0.2,
                "logit_scale": 8.0,
                "rope.scaling.finetuned": True,
            },
            (),
        ),
        ("glm4", {"rope.dimension_count": 16}, ()),
    ],
)
def test_what_a_row_may_have_is_taken(name: str, more: dict[str, Any], tensors: Any) -> None:
    assert archs.refusal(header(name, more, tensors)) == ""


@pytest.mark.parametrize(
    ("name", "more", "why"),
    [
        ("llama", {"attention.scale": 0.5}, "attention.scale = 0.5, which halka's MLX engine ign"),
        ("llama", {"attention.max_alibi_bias": 8.0}, "max_alibi_bias"),
        ("llama", {"attention.clamp_kqv": 1.0}, "clamp_kqv"),
        ("llama", {"attention.sliding_window": 4096}, "attention.sliding_window = 4096"),
        ("llama", {"logit_scale": 0.1}, "logit_scale"),
        ("llama", {"embedding_scale": 12.0}, "embedding_scale"),
        ("llama", {"residual_scale": 0.2}, "residual_scale"),
        ("llama", {"attention.causal": False}, "attention.causal = False"),
        ("llama", {"pooling_type": 3}, "pooling_type"),
        ("llama", {"something.new": "x" * 999}, r"something.new = x{40}, which"),
        ("llama", {"rope.scaling.attn_factor": 1.2}, "rope.scaling.attn_factor"),
        ("llama", {"rope.scaling.yarn_ext_factor": 1.0}, "yarn_ext_factor"),
        ("llama", {"rope.scaling.type": "longrope"}, "rotary scaling longrope"),
        ("llama", {"rope.scaling.type": ["yarn"]}, "rotary scaling"),
        ("llama", {"rope.scaling.factor": math.nan}, "make no sense"),
        ("llama", {"rope.scaling.factor": -2.0}, "make no sense"),
        ("llama", {"rope.freq_base": 0.5}, "make no sense"),
        ("llama", {"rope.freq_base": "many"}, "make no sense"),
        ("llama", {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
                   "rope.scaling.original_context_length": 0}, "make no sense"),
        ("llama", {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
                   "rope.scaling.yarn_beta_slow": 2.0}, "betas 32 and 2 are not those"),
        ("gpt-oss", {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, "none, and by 4"),
        ("llama", {"rope.dimension_count": 16}, "16 of a head's 32 values are rotated"),
        ("llama", {"rope.dimension_count": "all"}, "all of a head's 32"),
        ("llama", {"attention.value_length": 16}, "keys of 32 and values of 16"),
        ("llama", {"attention.key_length": 0}, "key_length = 0"),
        ("llama", {"attention.head_count": 0}, "head_count = 0: that is not one number from 1"),
        ("llama", {"attention.head_count": [4] * 6}, r"head_count = \[4, 4"),
        ("llama", {"attention.head_count_kv": 3}, "4 heads cannot share 3 heads"),
        ("llama", {"embedding_length": 1 << 40}, "embedding_length = 1099511627776: that is not"),
        ("llama", {"embedding_length": -1}, "embedding_length = -1"),
        ("llama", {"embedding_length": True}, "embedding_length = True"),
        ("llama", {"feed_forward_length": [192, 384] * 3}, "feed_forward_length"),
        ("llama", {"block_count": 0}, "block_count = 0"),
        ("llama", {"block_count": 100000}, "block_count = 100000"),
        ("llama", {"context_length": None}, "context_length = None"),
        ("llama", {"attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon"),
        ("llama", {"attention.layer_norm_rms_epsilon": math.inf}, "layer_norm_rms_epsilon"),
        ("llama", {"expert_count": "8"}, "expert_count = 8: that is not one number"),
        ("mixtral", {"expert_used_count": 9}, "expert_used_count = 9: that is not one"),
        ("mixtral", {"attention.key_length": 64, "attention.value_length": 64}, "as mlx_lm's mix"),
        ("mixtral", {"expert_weights_scale": 2.5}, "expert_weights_scale"),
        ("mistral3", {"rope.scaling.type": "yarn", "rope.scaling.factor": 16.0}, "scaling yarn"),
        ("mistral3", {"attention.temperature_scale": 0.1}, "temperature_scale"),
        ("qwen2", {"attention.key_length": 64, "attention.value_length": 64}, "as mlx_lm's qwen2"),
        ("qwen3", {"expert_count": 8}, "expert_count = 8"),
        ("qwen3moe", {"expert_shared_count": 1}, "expert_shared_count"),
        ("qwen3moe", {"expert_gating_func": 2}, "expert_gating_func"),
        ("qwen3moe", {"expert_feed_forward_length": 1 << 30}, "expert_feed_forward_length"),
        ("phi3", {"rope.dimension_count": 23}, "23 of a head's 32"),
        ("gemma2", {"attn_logit_softcapping": 0.0}, "bounds of its logits"),
        ("gemma2", {"attention.sliding_window": 0}, "which of its layers slide"),
        ("gemma3", {"attention.sliding_window": None}, "which of its layers slide"),
        ("gemma3", {"attention.sliding_window": 0}, "which of its layers slide"),
        ("gemma3", {"attention.sliding_window_pattern": [True]}, "which of its layers slide"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("gemma3", {"rope.freq_base_swa": 0.0}, "make no sense"),
        ("gemma3", {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0}, "scaling yarn"),
        ("gpt-oss", {"attention.sliding_window": None}, "which of its layers slide"),
        ("gpt-oss", {"rope.freq_base_swa": 1e4}, "freq_base_swa"),
        ("granite", {"rope.scaling.finetuned": False}, "positions were not trained"),
        ("granite", {"residual_scale": math.nan}, "scales make no sense"),
        ("olmo2", {"attention.sliding_window": 4096}, "attention.sliding_window"),
    ],
)  # fmt: skip
def test_what_a_row_does_not_compute_is_refused_by_name(
    name: str, more: dict[str, Any], why: str
) -> None:
    assert re.search(why, archs.refusal(header(name, more)))


@pytest.mark.parametrize(
    ("name", "tensors", "why"),
    [
        ("llama", ("rope_factors_long.weight",), "rope_factors_long.weight is computed with by ll"),
        ("llama", ("blk.2.attn_qkv.weight",), "blk.2.attn_qkv.weight is computed with by llama"),
        ("llama", ("blk.5.attn_q.scale",), "blk.5.attn_q.scale"),
        ("llama", ("blk.5.attn_q.bias",), "blk.5.attn_q.bias"),
        ("llama", ("blk.0.attn_q.bias",), "blk.0.attn_k.bias is missing"),
        ("llama", ("blk.6.attn_q.weight",), "blk.6.attn_q.weight"),
        ("llama", ("-blk.3.ffn_up.weight",), "blk.3.ffn_up.weight is missing"),
        ("llama", ("-output_norm.weight",), "output_norm.weight is missing"),
        ("llama", ("-token_embd.weight",), "token embedding is not a matrix"),
        ("llama", ("output.bias",), "output.bias"),
        ("llama", ("blk.x.attn_q.weight",), "blk.x.attn_q.weight"),
        ("mixtral", ("blk.0.ffn_gate.0.weight",), "blk.0.ffn_gate.0.weight"),
        ("qwen2", ("-blk.0.attn_q.bias",), "blk.0.attn_q.bias is missing"),
        ("qwen3", (names.ROPE_FREQS,), "rope_freqs.weight"),
        ("qwen3", ("cls.output.weight",), "cls.output.weight"),
        ("phi3", ("rope_factors_short.weight",), "rope_factors_short.weight"),
        ("gpt-oss", ("-output.weight",), "output.weight is missing"),
        ("gpt-oss", ("-blk.1.attn_sinks.weight",), "blk.1.attn_sinks.weight is missing"),
    ],
)
def test_tensors_that_a_row_does_not_use_are_refused_by_name(
    name: str, tensors: tuple[str, ...], why: str
) -> None:
    assert re.search(why, archs.refusal(header(name, tensors=tensors)))


@pytest.mark.parametrize("odd", ["x", [1, 2], math.nan, math.inf, -5, 0, True])
def test_a_context_that_only_yarn_asks_for_is_not_read_without_it(odd: Any) -> None:
    told = header("llama", {"rope.scaling.original_context_length": odd})
    assert not archs.refusal(told)
    rotation = skeleton.rotations(told)[0]
    assert rotation
    assert rotation.original == skeleton.arguments(told)["max_position_embeddings"]


def test_every_fourth_layer_of_smollm3_knows_no_positions() -> None:
    turned = [rotation is not None for rotation in skeleton.rotations(header("smollm3"))]
    assert turned == [True, True, True, False, True, True]


def test_an_unknown_architecture_is_refused() -> None:
    assert "no proof that MLX computes mamba" in archs.refusal(
        Header({"general.architecture": "mamba"}, {})
    )
    assert "this architecture" in archs.refusal(Header({}, {}))


def test_gemma_alternates_and_its_large_models_scale_otherwise() -> None:
    small, large = header("gemma3"), header("gemma3", {"block_count": 62})
    assert skeleton.windows(small) == (512, 512, 512, 512, 512, 0)
    assert [r.base for r in skeleton.rotations(small) if r] == [1e4] * 5 + [1e6]
    wide = {"attention.key_length": 64, "attention.value_length": 64}
    assert skeleton.arguments(header("gemma3", wide))["query_pre_attn_scalar"] == 64
    large = header("gemma3", {"block_count": 62, **wide})
    assert skeleton.arguments(large)["query_pre_attn_scalar"] == 32
    assert skeleton.windows(header("gemma2")) == (4096, 0) * 3
    assert skeleton.windows(header("gpt-oss")) == (128, 0) * 3
    assert skeleton.embedding_scale(small) == pytest.approx(math.sqrt(128))
    assert (skeleton.softcap(small), skeleton.softcap(header("gemma2"))) == (0.0, 30.0)


_PROGRAM = """
import resource, sys
from backends import load
from backends.base import Header
engine = load("mlx")
engine.can_run(Header({"general.architecture": "llama"}, {}))
assert not [name for name in sys.modules if name.split(".")[0] in ("mlx", "mlx_lm")]
before = resource.getrlimit(resource.RLIMIT_NOFILE)
from backends.mlx.library import library
library().model("llama", dict(model_type="llama", hidden_size=8, num_hidden_layers=1,
    intermediate_size=8, num_attention_heads=1, rms_norm_eps=1e-5, vocab_size=8))
assert resource.getrlimit(resource.RLIMIT_NOFILE) == before
assert "transformers" not in sys.modules
"""


def test_headers_import_no_mlx_and_its_classes_no_transformers() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_missing_or_untested_release_is_told_with_what_mends_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = {"mlx": "0.32.4", "mlx-lm": "0.33.0"}

    def version(name: str) -> str:
        if name not in found:
            raise library.importlib.metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(library.importlib.metadata, "version", version)
    with pytest.raises(ImportError, match=r"mlx-lm is of release 0.33.0; .*pip install 'halka\[m"):
        library.library.__wrapped__()
    found["mlx-lm"], found["mlx"] = "0.32.2", "0.32.1"
    with pytest.raises(ImportError, match=r"mlx is of release 0.32.1; halka works with 0.32.2 or"):
        library.library.__wrapped__()
    del found["mlx"]
    with pytest.raises(ImportError, match=r"mlx is not installed: pip install 'halka\[mlx\]'"):
        library.library.__wrapped__()
