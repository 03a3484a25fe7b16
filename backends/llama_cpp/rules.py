"""Which models libllama can run in windows, and by which rule: one row for each architecture.

A window is loaded as a small model of its own. That is exact where a layer's computation depends
on nothing but its input, its weights and its metadata; every other dependence needs a rule. The
rows were found by comparing windows with the whole model, with random models of six layers, and by
reading what each architecture of the pinned llama.cpp does with its number of layers (six layers
cannot show that: `counts`). tests/e2e/test_windows_are_exact.py proves a row wherever a
random model of the architecture can be written. Anything that is not here stays whole: a wrong
guess aborts the process or, worse, answers nonsense.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np

from backends.base import Cuts, Header


class Scale(Enum):
    """What an architecture multiplies its input by, before the first layer."""

    NONE = 0
    KEY = 1  # any input, by `embedding_scale`: later windows write 0, which switches it off
    ROOT = 2  # any input, by √hidden, hard-coded: later windows overwrite the product
    ROOT_TOKENS = 3  # token ids only, by √hidden: a first window fed with embeddings multiplies


@dataclass(frozen=True, slots=True)
class Sliding:
    """Sliding-window layers. period: layer i slides unless i % period is its last (or first) place.

    period 0: the pattern must be an array in the header. optional: only where the header has a
    `sliding_window` above 0.
    """

    period: int = 0
    full_first: bool = False
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Rule:
    """One row. counts: numbers of layers at which llama.cpp computes differently."""

    sliding: Sliding | None = None
    scale: Scale = Scale.NONE
    adds_positions: bool = False  # position_embd is added in every graph: zeroed in later windows
    recurrent: bool = False  # recurrent and attention layers alternate; a window holds both
    period: int = 1  # windows begin at multiples of it
    period_key: str = ""  # … or of this key's value
    head_required: bool = False  # the loader does not take token_embd for a missing output.weight
    counts: tuple[int, ...] = ()
    special: Callable[[Header], str] | None = None  # further reasons against a split


def plain(header: Header, key: str) -> Any:
    """`<arch>.<key>` as it stands in the header, or None."""
    return header.metadata.get(f"{header.architecture}.{key}")


def number(header: Header, key: str, default: int = 0) -> int:
    """`<arch>.<key>` where it is a natural number, else `default`."""
    value = plain(header, key)
    return value if isinstance(value, int) and 0 <= value < 1 << 32 else default


def per_layer(header: Header, key: str) -> list[int]:
    """`<arch>.<key>` as one natural number a layer; 0 where the header has none."""
    value = plain(header, key)
    if not isinstance(value, list):
        return [number(header, key)] * header.layers
    kept = [v if isinstance(v, int) and 0 <= v < 1 << 32 else 0 for v in value[: header.layers]]
    return kept + [0] * (header.layers - len(kept))


def is_lite(header: Header) -> bool:
    """A deepseek2 without the low-rank Q."""
    return "blk.0.attn_q.weight" in header.tensors


def sliding_layers(header: Header) -> list[bool] | None:
    """Which layers slide, or None where the architecture (or this model) has no sliding window."""
    rule = TABLE.get(header.architecture)
    sliding = rule.sliding if rule else None
    if sliding is None or (sliding.optional and not number(header, "attention.sliding_window")):
        return None
    listed = plain(header, "attention.sliding_window_pattern")
    if isinstance(listed, list):
        return [bool(slides) for slides in listed]
    pattern = number(header, "attention.sliding_window_pattern", sliding.period)
    if pattern == 0:
        return [True] * header.layers
    full = 0 if sliding.full_first else pattern - 1
    return [layer % pattern != full for layer in range(header.layers)]


def recurrent_layers(header: Header) -> list[bool] | None:
    """Which layers are recurrent in a model that alternates them with attention, else None."""
    rule = TABLE.get(header.architecture)
    if rule is None or not rule.recurrent:
        return None
    flags = plain(header, "attention.recurrent_layers")
    if isinstance(flags, list):
        return [bool(flag) for flag in flags]
    interval = number(header, "full_attention_interval", 4)
    return [(layer + 1) % max(1, interval) != 0 for layer in range(header.layers)]


LAYERS_MAX = 512  # llama-hparams.h: LLAMA_MAX_LAYERS; more abort the process

# Metadata arrays with one value a layer; a window gets its own slice of them.
PER_LAYER = frozenset(
    {
        "attention.head_count",
        "attention.head_count_kv",
        "attention.indexer.types",
        "attention.recurrent_layers",
        "attention.rope_pattern",
        "attention.sliding_window_pattern",
        "expert_feed_forward_length",
        "expert_used_count",
        "feed_forward_length",
        "swiglu_clamp_exp",
        "swiglu_clamp_shexp",
    }
)
# Arrays that have nothing to do with layers, whatever their length.
_NOT_PER_LAYER = frozenset({"rope.dimension_sections", "deepstack_mapping"})


def cuts(header: Header) -> Cuts:
    """Where the model may be cut, from its header alone. See backends.base.Cuts."""
    layers = header.layers
    if why := _whole_because(header):
        return Cuts(layers, (0,), why=why)
    rule = TABLE[header.architecture]
    period = number(header, rule.period_key, 1) if rule.period_key else rule.period
    starts = _starts(header, max(1, int(period)), _avoided(header, rule))
    groups: list[tuple[int, ...]] = []
    for kinds in (sliding_layers(header), recurrent_layers(header)):
        if kinds is not None:
            groups.append(tuple(i for i, kind in enumerate(kinds) if kind))
    if (kinds := recurrent_layers(header)) is not None:
        groups.append(tuple(i for i, kind in enumerate(kinds) if not kind))
    if header.architecture == "minimax-m3":  # sparse layers have a cache that must not be empty
        groups.append(tuple(range(number(header, "leading_dense_block_count"), layers)))
    if not all(groups):
        return Cuts(layers, (0,), why="its header names no layer of a kind that it must have")
    if starts == (0,) and layers > 1:
        return Cuts(layers, (0,), why="no layer of it can begin a window")
    return Cuts(layers, starts, tuple(groups))


def _starts(header: Header, period: int, sizes: frozenset[int]) -> tuple[int, ...]:
    """Multiples of the period, thinned out until no two edges are `sizes` layers apart."""
    for step in range(1, 9):
        starts = [s for s in range(0, header.layers, period * step) if _may_begin(header, s)]
        starts = [s for s in starts if s == 0 or header.layers - s not in sizes]
        edges = [*starts, header.layers]
        apart = {b - a for a in edges for b in edges if b > a and b - a != header.layers}
        if not apart & sizes:
            return tuple(starts)
    return (0,)


def _avoided(header: Header, rule: Rule) -> frozenset[int]:
    """Sizes of windows that llama.cpp would take for another model."""
    arch = header.architecture
    if arch == "smallthinker" and sliding_layers(header) is None:
        return frozenset()
    if arch == "deepseek2" and is_lite(header):
        return frozenset()
    return frozenset(size for size in rule.counts if size < header.layers)


def _may_begin(header: Header, layer: int) -> bool:
    """Whether a window may begin (and the one before it end) at this layer."""
    if layer == 0:
        return True
    heads, ffn = per_layer(header, "attention.head_count"), per_layer(header, "feed_forward_length")
    if header.architecture == "deci" and (heads[layer] == 0 or ffn[layer - 1] == 0):
        return (
            False  # the head size is read from the first layer; a layer without FFN has no output
        )
    if header.architecture in (
        "glm-dsa",
        "dots3note",
    ):  # others reuse the choice of the last full one
        full = per_layer(header, "attention.indexer.types")
        return bool(full[layer]) or plain(header, "attention.indexer.types") is None
    return True


def _whole_because(header: Header) -> str:
    """Why the model must stay whole, or ""."""
    architecture, layers = header.architecture, header.layers
    if architecture in _NO_TEXT:
        return f"{architecture} is a diffusion model: halka writes token by token"
    rule = TABLE.get(architecture)
    if rule is None:
        known = _KNOWN_WHOLE.get(architecture)
        return known or f"no rule is known by which {architecture or 'this model'} could be split"
    if not 1 <= layers <= LAYERS_MAX:
        return f"its header speaks of {layers} layers, and llama.cpp takes 1 to {LAYERS_MAX}"
    if number(header, "nextn_predict_layers"):
        return "it carries layers that predict further tokens (nextn), which no window can run"
    if header.tensors and (why := _odd_layers(header)):
        return why
    for key, value in header.metadata.items():
        name = key.removeprefix(f"{architecture}.")
        if name == key or not isinstance(value, list) or name in _NOT_PER_LAYER:
            continue
        if name in PER_LAYER and len(value) != layers:
            return f"{key} has {len(value)} values for {layers} layers"
        if name not in PER_LAYER and len(value) == layers:
            return f"{key} may hold one value a layer, which this version does not know"
    if layers in rule.counts and not _counts_agree(header):
        return (
            f"llama.cpp tells this model by its {layers} layers, and would compute a window of "
            f"fewer layers in another way"
        )
    listed = isinstance(plain(header, "attention.sliding_window_pattern"), list)
    if rule.sliding and not rule.sliding.period and not listed:
        return "its header does not list which of its layers have a sliding window"
    return rule.special(header) if rule.special else ""


def _odd_layers(header: Header) -> str:
    """Tensors of layers that the header does not count, or layers without tensors."""
    found = {name.split(".", 2)[1] for name in header.tensors if name.startswith("blk.")}
    if found != {str(layer) for layer in range(header.layers)}:
        return f"its header speaks of {header.layers} layers, its tensors of {len(found)}"
    return ""


def _counts_agree(header: Header) -> bool:
    """Whether a special number of layers changes nothing for this very model."""
    if header.architecture in ("gemma2", "gemma3"):
        # The 27B models scale attention by hidden / heads, all others by the head's size.
        heads = per_layer(header, "attention.head_count")[0] or 1
        hidden = number(header, "embedding_length")
        return bool(hidden // heads == number(header, "attention.key_length", hidden // heads))
    if header.architecture == "smallthinker":
        return True  # its four layers count only in windows
    return header.architecture == "deepseek2"  # recipe() writes what it would be told by


def _tall_command_r(header: Header) -> str:
    tall = header.layers >= 64  # only then does the loader look for the norms of Q and K
    return "llama.cpp loads command-r of 64 and more layers in another way" if tall else ""


def _looped(header: Header) -> str:
    looped = number(header, "num_loops", 1) > 1
    return "it runs its layers in loops" if looped else ""


def _unlisted_indexers(header: Header) -> str:
    """GLM 5.2 without the list of its indexers: the loader would use a built-in one, by place."""
    listed = isinstance(plain(header, "attention.indexer.types"), list)
    if not listed and number(header, "context_length") >= 1 << 20:
        return "its header does not list which layers have an indexer"
    return ""


def token_scale(header: Header) -> float:
    """The factor for embeddings that a first window is fed with (float32, as llama.cpp's)."""
    rule = TABLE.get(header.architecture, Rule())
    if rule.scale is not Scale.ROOT_TOKENS:
        return 1.0
    return float(np.float32(math.sqrt(number(header, "embedding_length"))))


def overwritten(header: Header, first: int) -> str:
    """The tensor of the window's graph that must be overwritten with its input, or ""."""
    rule = TABLE.get(header.architecture, Rule())
    return "inp_scaled" if first > 0 and rule.scale is Scale.ROOT else ""


_EXACT = Rule()  # exact at any cut
_HEAD = Rule(head_required=True)
_RECURRENT = Rule(recurrent=True)


def _each(names: str, rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


TABLE: dict[str, Rule] = {
    # Exact at any cut.
    **_each("arcee arctic chatglm deepseek deepseek32 ernie4_5 exaone falcon falcon-h1", _EXACT),
    **_each("grovemoe hunyuan-dense hunyuan-moe hy_v3 jais2 llama maincoder mamba mamba2", _EXACT),
    **_each("mistral3 mistral4 olmo openelm pangu-embedded phi3 pockettts qwen2", _EXACT),
    **_each("qwen3 qwen3moe refact seed_oss starcoder2", _EXACT),
    **_each("bailingmoe bailingmoe2 codeshell dbrx dots1 gptneox internlm2 jais minimax-m2", _HEAD),
    **_each("nemotron olmoe orion phi2 phimoe plamo qwen qwen2moe stablelm xverse", _HEAD),
    # M-RoPE: the engine asks libllama for the rope type and gives four positions a token.
    **_each("glm4 glm4moe hunyuan_vl paddleocr qwen2vl qwen3vl qwen3vlmoe", _EXACT),
    # … unless llama.cpp reads more than the layers' number out of it.
    "baichuan": Rule(head_required=True, counts=(32, 40)),  # 7B: RoPE, 13B: ALiBi, else neither
    "command-r": Rule(special=_tall_command_r),
    "deci": _EXACT,
    "deepseek2": Rule(counts=(26, 27, 48)),  # taken for a lite model, without the low-rank Q
    "exaone4": Rule(counts=(64,)),  # only the 32B slides
    "glm-dsa": Rule(special=_unlisted_indexers),
    "nanbeige": Rule(special=_looped),
    # Sliding window: a window without one sliding layer aborts the process (is_swa_any).
    "cohere2": Rule(Sliding(4)),
    "cohere2moe": Rule(Sliding(4, full_first=True)),
    "exaone-moe": Rule(Sliding(4), head_required=True),
    "gpt-oss": Rule(Sliding(2), head_required=True),
    "granite_swa": Rule(Sliding(), scale=Scale.KEY),
    "laguna": Rule(Sliding(4, full_first=True, optional=True)),
    "maple": Rule(Sliding(), head_required=True),
    "mellum": Rule(Sliding(4, optional=True), head_required=True),
    "mimo2": Rule(Sliding(), head_required=True),
    "olmo2": Rule(Sliding(4, optional=True), head_required=True),
    "plamo3": Rule(Sliding(8, optional=True)),
    "spark2_5": Rule(Sliding()),
    # Input scale.
    "gemma": Rule(scale=Scale.ROOT),
    "gemma2": Rule(Sliding(2), scale=Scale.ROOT, counts=(46,)),
    "gemma3": Rule(Sliding(6, optional=True), scale=Scale.ROOT_TOKENS, counts=(62,)),
    "granite": Rule(scale=Scale.KEY),
    "granitemoe": Rule(scale=Scale.KEY),
    "grok": Rule(scale=Scale.KEY),
    "minicpm": Rule(scale=Scale.KEY),
    # Absolute positions.
    "gpt2": Rule(adds_positions=True),
    "mpt": Rule(adds_positions=True),
    "starcoder": Rule(adds_positions=True),
    # Hybrids, and other periods.
    "qwen35": _RECURRENT,
    "qwen35moe": _RECURRENT,
    "qwen3next": _RECURRENT,
    "dots3note": Rule(Sliding()),
    "ernie4_5-moe": Rule(period_key="interleave_moe_layer_step"),
    "minimax-m3": _HEAD,
    "smallthinker": Rule(Sliding(4, full_first=True, optional=True), period=4, counts=(4,)),
    "smollm3": Rule(period=4),  # every fourth layer has no RoPE
}

_NO_TEXT = frozenset({"dream", "llada", "llada-moe", "rnd1"})
_BOTH_KINDS = "a window of it would have to hold both kinds of its layers: no rule is proven yet"
_DISAGREES = "windows of this architecture were tried and did not agree with the whole model"


def _why(names: str, why: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), why)


_KNOWN_WHOLE = {
    **_why("granitehybrid jamba kimi-linear lfm2 lfm2moe nemotron_h nemotron_h_moe", _BOTH_KINDS),
    **_why("plamo2", _BOTH_KINDS),
    **_why("afmoe bloom cogvlm deepseek4 glm5-next hrm_text hy_v4 kimi-k3 llama4", _DISAGREES),
    **_why("minicpm3 minimax-01 muse-glimmer qwen3tts qwen4exp talkie", _DISAGREES),
}
