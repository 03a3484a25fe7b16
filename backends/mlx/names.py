"""Which tensor of a layer fills which parameter of mlx_lm's layer class.

Parameter path inside a layer → tensor name behind "blk.N.". A window is loaded strictly by these
tables: every parameter once, every tensor of the layer once. Written down, not derived: a name map
that merely covers a file proves nothing about what its tensors mean.
"""

from __future__ import annotations

from collections.abc import Mapping

Names = Mapping[str, str]

EMBEDDING, NORM, OUTPUT = "token_embd.weight", "output_norm.weight", "output.weight"
ROPE_FREQS = "rope_freqs.weight"  # rotary wavelengths' factors (Llama 3), for all layers


def _weights(**paths: str) -> dict[str, str]:
    """`a__b="t"` for {"a.b.weight": "t.weight"}."""
    return {
        f"{path.replace('__', '.')}.weight": f"{tensor}.weight" for path, tensor in paths.items()
    }


def _biases(**paths: str) -> dict[str, str]:
    return {f"{path.replace('__', '.')}.bias": f"{tensor}.bias" for path, tensor in paths.items()}


_QKV = {"self_attn__q_proj": "attn_q", "self_attn__k_proj": "attn_k", "self_attn__v_proj": "attn_v"}
_QKVO = {**_QKV, "self_attn__o_proj": "attn_output"}
_QK_NORMS = {"self_attn__q_norm": "attn_q_norm", "self_attn__k_norm": "attn_k_norm"}
_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_FFN = {"mlp__gate_proj": "ffn_gate", "mlp__up_proj": "ffn_up", "mlp__down_proj": "ffn_down"}


def _experts(gate: str, experts: str) -> dict[str, str]:
    """The router and the three stacks of expert matrices, where a class calls them so."""
    return {
        gate: "ffn_gate_inp",
        f"{experts}__gate_proj": "ffn_gate_exps",
        f"{experts}__up_proj": "ffn_up_exps",
        f"{experts}__down_proj": "ffn_down_exps",
    }


_GPT_OSS = {**_QKVO, **_experts("mlp__router", "mlp__experts")}

LLAMA: Names = _weights(**_QKVO, **_NORMS, **_FFN)
ATTENTION_BIASES: Names = _biases(**_QKVO)
MLP_BIASES: Names = _biases(**_FFN)
MIXTRAL: Names = _weights(
    **_QKVO, **_NORMS, **_experts("block_sparse_moe__gate", "block_sparse_moe__switch_mlp")
)
QWEN2: Names = {**LLAMA, **_biases(**_QKV)}
QWEN3: Names = _weights(**_QKVO, **_QK_NORMS, **_NORMS, **_FFN)
QWEN3_MOE: Names = _weights(
    **_QKVO, **_QK_NORMS, **_NORMS, **_experts("mlp__gate", "mlp__switch_mlp")
)
PHI3: Names = _weights(
    self_attn__qkv_proj="attn_qkv",
    self_attn__o_proj="attn_output",
    mlp__gate_up_proj="ffn_up",
    mlp__down_proj="ffn_down",
    **_NORMS,
)
GEMMA2: Names = _weights(
    **_QKVO,
    **_FFN,
    input_layernorm="attn_norm",
    post_attention_layernorm="post_attention_norm",
    pre_feedforward_layernorm="ffn_norm",
    post_feedforward_layernorm="post_ffw_norm",
)
GEMMA3: Names = {**GEMMA2, **_weights(**_QK_NORMS)}
GPT_OSS: Names = {
    **_weights(
        **_GPT_OSS,
        input_layernorm="attn_norm",
        post_attention_layernorm="post_attention_norm",
    ),
    **_biases(**_GPT_OSS),
    "self_attn.sinks": "attn_sinks.weight",
}

_POST_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
OLMO2: Names = _weights(**_QKVO, **_QK_NORMS, **_POST_NORMS, **_FFN)
OLMOE: Names = _weights(**_QKVO, **_QK_NORMS, **_NORMS, **_experts("mlp__gate", "mlp__switch_mlp"))
SEED_OSS: Names = {
    **_weights(
        **_QKVO,
        **_FFN,
        input_layernorm="attn_norm",
        post_attention_layernorm="post_attention_norm",
    ),
    **_biases(**_QKV),
}
GLM4: Names = _weights(
    **_QKVO,
    mlp__gate_up_proj="ffn_up",
    mlp__down_proj="ffn_down",
    input_layernorm="attn_norm",
    post_self_attn_layernorm="post_attention_norm",
    post_attention_layernorm="ffn_norm",
    post_mlp_layernorm="post_ffw_norm",
)
HUNYUAN: Names = _weights(
    **_QKVO,
    **_NORMS,
    **_FFN,
    self_attn__query_layernorm="attn_q_norm",
    self_attn__key_layernorm="attn_k_norm",
)
