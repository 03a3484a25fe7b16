"""Which models MLX runs, and how: one row for each architecture of GGUF. Pure, from headers alone.

A row names mlx_lm's model class and everything in which a file of llama.cpp's differs from what
that class was written for: the rotary layout, norms that are stored plus one, sliding layers, what
is multiplied. `refusal` is strict on purpose: a metadata key or a tensor that a row does not know
may change the computation, and a fluent wrong answer is worse than another engine. Rows are proven
by tests/e2e/test_mlx_conformance.py, against llama.cpp; what it cannot prove is not here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from backends.base import Header
from backends.llama_cpp.rules import plain, sliding_layers
from backends.mlx import names
from backends.mlx.names import Names
from backends.mlx.sizes import Sizes, decimal, odd_sizes, scaling_of, sizes

# Keys (without the architecture) that every row understands.
_COMMON = frozenset(
    {
        "vocab_size",
        "context_length",
        "embedding_length",
        "block_count",
        "feed_forward_length",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_rms_epsilon",
        "rope.freq_base",
        "rope.dimension_count",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
        "rope.scaling.finetuned",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
    }
)
_EXPERTS = frozenset({"expert_count", "expert_used_count"})
_SLIDING = frozenset({"attention.sliding_window", "attention.sliding_window_pattern"})
# Values at which a key that no row knows changes nothing.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_shared_count": (0,),
    "expert_weights_norm": (True,),
    "expert_weights_scale": (0.0, 1.0),
    "nextn_predict_layers": (0,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (-1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "rope.scale_linear": (1.0,),
    "attention.temperature_scale": (0.0,),
    "tensor_data_layout": ("Meta AI original pth",),
}

Arguments = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """One architecture. model: mlx_lm's module. layer: its parameters' tensors (see names).

    optional: groups of them that a file has whole or not at all, with the argument that asks the
    class for them. keys: metadata beside the common ones. more: ModelArgs beside the common ones.
    traditional: ggml's rotary layout NORM. own_head: the head's size may be another than hidden /
    heads. part_rotary: heads may be rotated in part. yarn: that scaling may be used. factors:
    rope_freqs.weight may be there. tied: whether the head may be the embedding. norm_offset: added
    to norms' weights. softcap: of the logits, where the file does not say.
    sliding_base: of the rotation of sliding layers, 0 for that of all. unrotated: every so many-th
    layer knows no positions. fused: whether the class
    leaves attention to MLX's own function.
    """

    model: str
    layer: Names
    optional: Mapping[str, Names] = field(default_factory=dict)
    keys: frozenset[str] = frozenset()
    more: Callable[[Header, Sizes], Arguments] = lambda _header, _sizes: {}
    traditional: bool = False
    own_head: bool = True
    part_rotary: bool = False
    yarn: bool = True
    factors: bool = False
    tied: bool = True
    norm_offset: float = 0.0
    scales_embedding: bool = False
    softcap: float = 0.0
    sliding_base: float = 0.0
    sliding_default: int = 0
    unrotated: int = 0
    experts: bool = False
    fused: bool = True
    special: Callable[[Header], str] | None = None


def row(header: Header) -> Row | None:
    """The header's row, or None."""
    if header.architecture == "llama" and plain(header, "expert_count"):
        return MIXTRAL
    return TABLE.get(header.architecture)


def refusal(header: Header) -> str:
    """Why MLX does not run this model, or "" where it does. Types of tensors: see ability."""
    found = row(header)
    arch = header.architecture
    if found is None:
        return f"halka has no proof that MLX computes {arch or 'this architecture'} as llama.cpp"
    if why := odd_sizes(header, experts=found.experts):
        return why
    return (
        _odd_keys(header, found)
        or _odd_head(header, found)
        or _odd_rotation(header, found)
        or _odd_tensors(header, found)
        or (found.special(header) if found.special else "")
    )


def _odd_keys(header: Header, found: Row) -> str:
    prefix = f"{header.architecture}."
    for key, value in header.metadata.items():
        name = key.removeprefix(prefix)
        if name == key or name in _COMMON or name in found.keys:
            continue
        if name not in _NEUTRAL or value not in _NEUTRAL[name]:
            return f"its header says {key} = {str(value)[:40]}, which halka's MLX engine ignores"
    return ""


def _odd_head(header: Header, found: Row) -> str:
    of = sizes(header)
    if of.value != of.head:
        return f"keys of {of.head} and values of {of.value} are computed by llama.cpp only"
    if not found.own_head and of.head * of.heads != of.hidden:
        return f"heads of {of.head} do not make up {of.hidden}, as mlx_lm's {found.model} insists"
    return ""


def _odd_rotation(header: Header, found: Row) -> str:
    of = sizes(header)
    dims = plain(header, "rope.dimension_count")
    dims = of.head if dims is None else dims
    whole = isinstance(dims, int) and (dims == of.head or (found.part_rotary and dims < of.head))
    if not whole or not isinstance(dims, int) or dims < 2 or dims % 2:
        return f"{dims} of a head's {of.head} values are rotated, which halka's MLX engine does not"
    scaling = scaling_of(header)
    if scaling not in ("none", "linear", *(("yarn",) if found.yarn else ())):
        return f"rotary scaling {scaling} of this architecture is computed by llama.cpp only"
    factor = decimal(header, "rope.scaling.factor", 1.0)
    told = plain(header, "rope.scaling.type")
    if told == "none" and factor not in (0.0, 1.0):  # llama.cpp scales sliding layers still
        return f"its header says rotary scaling none, and by {factor:g}"
    bases = [decimal(header, f"rope.freq_base{of}", 10000.0) for of in ("", "_swa")]
    fast = decimal(header, "rope.scaling.yarn_beta_fast", 32.0)
    slow = decimal(header, "rope.scaling.yarn_beta_slow", 1.0)
    original = decimal(header, "rope.scaling.original_context_length", 1.0)
    scaled = 0.0 < factor < 1e6 and 0.0 < slow < fast < 1e6 and 1.0 <= original < 1 << 31
    if not all(1.0 < base < 1e12 for base in bases) or not (scaled or scaling == "none"):
        return "its header's rotary base or scaling make no sense"
    if scaling == "yarn" and (fast, slow) != (32.0, 1.0):  # llama.cpp's, whatever a header says
        return f"yarn's betas {fast:g} and {slow:g} are not those that llama.cpp computes with"
    return ""


def _odd_tensors(header: Header, found: Row) -> str:
    per_layer: list[set[str]] = [set() for _ in range(header.layers)]
    known = {names.EMBEDDING, names.NORM, names.OUTPUT}
    known |= {names.ROPE_FREQS} if found.factors else set()
    for name in header.tensors:
        head, _, rest = name.partition(".")
        number, _, tail = rest.partition(".")
        if head == "blk" and number.isdecimal() and len(number) < 5 and int(number) < header.layers:
            per_layer[int(number)].add(tail)
        elif name not in known:
            return f"its tensor {name[:80]} is computed with by llama.cpp only"
    for name in (names.EMBEDDING, names.NORM, *(() if found.tied else (names.OUTPUT,))):
        if name not in header.tensors:
            return f"its tensor {name} is missing"
    wanted = set(layer_names(header).values())
    for layer, present in enumerate(per_layer):
        if odd := sorted(present ^ wanted):
            what = "is missing" if odd[0] in wanted else "is computed with by llama.cpp only"
            return f"its tensor blk.{layer}.{odd[0][:80]} {what}"
    return ""


def layer_names(header: Header) -> Names:
    """Parameter → tensor of every layer of this model, groups that are optional included."""
    found = row(header)
    if found is None:
        return {}
    return dict(found.layer) | {
        path: tensor
        for group in present(header, found)
        for path, tensor in found.optional[group].items()
    }


def present(header: Header, found: Row) -> list[str]:
    """Arguments of the optional groups of which layer 0 has a tensor."""
    return [
        argument
        for argument, group in found.optional.items()
        if any(f"blk.0.{tensor}" in header.tensors for tensor in group.values())
    ]


def _mixtral(_header: Header, of: Sizes) -> Arguments:
    return {"num_local_experts": of.experts, "num_experts_per_tok": of.experts_used}


def _qwen3_moe(_header: Header, of: Sizes) -> Arguments:
    return {
        "num_experts": of.experts,
        "num_experts_per_tok": of.experts_used,
        "moe_intermediate_size": of.expert,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,  # build_moe_ffn(…, norm_w = true)
    }


def _gemma(header: Header, of: Sizes) -> Arguments:
    # The 27B models, which llama.cpp tells by their layers, scale by another size of heads.
    large = header.layers == {"gemma2": 46, "gemma3": 62}[header.architecture]
    return {
        "query_pre_attn_scalar": of.hidden // of.heads if large else of.head,
        "attn_logit_softcapping": decimal(header, "attn_logit_softcapping", 50.0),
        "sliding_window": 1,  # windows() says how far
        "sliding_window_pattern": 1,
    }


def _gpt_oss(header: Header, of: Sizes) -> Arguments:
    # The class looks for a layer of each kind; which layer is which, windows() says.
    kinds = ["sliding_attention", "full_attention"] * header.layers
    return _mixtral(header, of) | {
        "layer_types": kinds[: max(2, header.layers)],
        "intermediate_size": of.expert,
    }


def _slides(header: Header) -> str:
    listed = sliding_layers(header) or []
    size = plain(header, "attention.sliding_window")
    size = getattr(row(header), "sliding_default", 0) if size is None else size
    if len(listed) < header.layers or not isinstance(size, int) or not 1 <= size < 1 << 31:
        return "its header does not say which of its layers slide, and how far they see"
    return ""


def _softcaps(header: Header) -> str:
    caps = ("attn_logit_softcapping", "final_logit_softcapping")
    if not all(0.0 < decimal(header, cap, 1.0) < 1e6 for cap in caps):
        return "the bounds of its logits make no sense"
    return _slides(header)


def _granite(header: Header, of: Sizes) -> Arguments:
    return {
        "attention_multiplier": decimal(header, "attention.scale", 0.0) or of.head**-0.5,
        "embedding_multiplier": 1.0,  # skeleton.embedding_scale
        "residual_multiplier": decimal(header, "residual_scale", 0.0) or 1.0,
        "logits_scaling": 1.0,  # skeleton.logits_divisor
        "attention_bias": False,
        "mlp_bias": False,
    }


def _odd_scales(header: Header) -> str:
    scales = ("attention.scale", "embedding_scale", "residual_scale", "logit_scale")
    if not all(0.0 <= decimal(header, scale, 0.0) < 1e6 for scale in scales):
        return "its header's scales make no sense"
    if plain(header, "rope.scaling.finetuned") is False:  # llama.cpp: without any positions then
        return "its header says that its positions were not trained"
    return ""


def _olmoe(_header: Header, of: Sizes) -> Arguments:
    return {
        "num_experts": of.experts,
        "num_experts_per_tok": of.experts_used,
        "norm_topk_prob": False,
        "intermediate_size": of.ffn,
    }


_BIASES = {"attention_bias": names.ATTENTION_BIASES, "mlp_bias": names.MLP_BIASES}

LLAMA = Row("llama", names.LLAMA, optional=_BIASES, traditional=True, factors=True)
MIXTRAL = Row(
    "mixtral",
    names.MIXTRAL,
    keys=_EXPERTS,
    more=_mixtral,
    traditional=True,
    own_head=False,
    factors=True,
    experts=True,
)

TABLE: dict[str, Row] = {
    "llama": LLAMA,
    # Ministral's yarn and temperature of attention were not compared.
    "mistral3": Row("llama", names.LLAMA, traditional=True, yarn=False, factors=True),
    "qwen2": Row("qwen2", names.QWEN2, own_head=False),
    "qwen3": Row("qwen3", names.QWEN3),
    "qwen3moe": Row(
        "qwen3_moe",
        names.QWEN3_MOE,
        keys=_EXPERTS | {"expert_feed_forward_length"},
        more=_qwen3_moe,
        experts=True,
    ),
    "phi3": Row(  # llama.cpp reads its sliding window and does without it
        "phi3",
        names.PHI3,
        keys=frozenset({"attention.sliding_window"}),
        own_head=False,
        part_rotary=True,
    ),
    "gemma2": Row(
        "gemma2",
        names.GEMMA2,
        keys=_SLIDING | {"attn_logit_softcapping", "final_logit_softcapping"},
        more=_gemma,
        yarn=False,
        norm_offset=-1.0,
        scales_embedding=True,
        softcap=30.0,
        sliding_default=4096,
        fused=False,
        special=_softcaps,
    ),
    "gemma3": Row(
        "gemma3_text",
        names.GEMMA3,
        keys=_SLIDING | {"rope.freq_base_swa"},
        more=_gemma,
        yarn=False,
        norm_offset=-1.0,
        scales_embedding=True,
        sliding_base=10000.0,
        special=_slides,
    ),
    "gpt-oss": Row(
        "gpt_oss",
        names.GPT_OSS,
        keys=_SLIDING | _EXPERTS | {"expert_feed_forward_length"},
        more=_gpt_oss,
        tied=False,
        experts=True,
        special=_slides,
    ),
    "granite": Row(
        "granite",
        names.LLAMA,
        keys=frozenset({"attention.scale", "embedding_scale", "residual_scale", "logit_scale"}),
        more=_granite,
        traditional=True,
        own_head=False,
        special=_odd_scales,
    ),
    "smollm3": Row("llama", names.LLAMA, traditional=True, unrotated=4),
    "olmo2": Row("olmo2", names.OLMO2),
    "olmoe": Row("olmoe", names.OLMOE, keys=_EXPERTS, more=_olmoe, experts=True),
    "seed_oss": Row(
        "seed_oss", names.SEED_OSS, more=lambda _header, _sizes: {"attention_bias": True}
    ),
    "ernie4_5": Row(
        "ernie4_5",
        names.LLAMA,
        more=lambda _header, _sizes: {"use_bias": False},
        traditional=True,
    ),
    "glm4": Row(
        "glm4",
        names.GLM4,
        more=lambda _header, _sizes: {"attention_bias": False, "partial_rotary_factor": 1.0},
        traditional=True,
        part_rotary=True,
    ),
    "hunyuan-dense": Row("hunyuan_v1_dense", names.HUNYUAN),
}
