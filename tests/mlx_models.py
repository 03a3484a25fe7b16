"""Tiny random models for the rows of MLX's table, and windows of two engines in one chain."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.base import Backend, Batch, Window
from tests.random_models import Model, Shapes, metadata, write

HIDDEN, HEADS, KV_HEADS, FFN, LAYERS, SLIDING = 128, 4, 2, 192, 6, 16
PREFILL, DECODE = 40, 24  # tokens; sliding layers lose sight of the first ones

_KEYS: dict[str, Any] = {
    "context_length": 256,
    "embedding_length": HIDDEN,
    "block_count": LAYERS,
    "feed_forward_length": FFN,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.layer_norm_rms_epsilon": 1e-5,
}
_MOE = {"expert_count": 6, "expert_used_count": 2, "expert_feed_forward_length": 96}
_MIXTRAL = {"expert_count": 6, "expert_used_count": 2}
_YARN = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 64,
}
_WIDE = {"attention.key_length": 48, "attention.value_length": 48}
_SLIDES = {"attention.sliding_window": SLIDING}
_SCALES = {
    "attention.scale": 0.1,
    "embedding_scale": 12.0,
    "residual_scale": 0.3,
    "logit_scale": 0.25,
}
_LINEAR = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
_CAPS = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}
_GLOBAL = {"rope.freq_base": 1e6}
_GPT_OSS = {**_MOE, **_WIDE, **_SLIDES, "rope.freq_base": 150000.0}


def tiny(
    arch: str, *, label: str = "", tied: bool = False, quantised: str = "", **more: Any
) -> Model:
    """A model with just these metadata, as a converter writes them (`__` for a dot in a key)."""
    wanted = _KEYS | {key.replace("__", "."): value for key, value in more.items()}
    plain = Model(arch, moe="expert_count" in wanted)
    extra: dict[str, Any] = dict.fromkeys(metadata(plain))
    return Model(
        arch,
        moe=plain.moe,
        tied=tied,
        quantised=quantised,
        layers=wanted["block_count"],
        extra=extra | wanted,
        label=label,
    )


_ALL = [
    tiny("llama"),
    tiny("llama", tied=True),
    tiny("llama", label="wide", **_WIDE),
    tiny("llama", label="base", rope__freq_base=500000.0),
    tiny("llama", label="linear", **_LINEAR),
    tiny("llama", label="factor-alone", **{"rope.scaling.factor": 2.0}),
    tiny("llama", label="yarn", **_YARN),
    tiny("llama", label="factors"),
    tiny("llama", label="biases"),
    tiny("llama", **_MIXTRAL),
    tiny("mistral3"),
    tiny("qwen2", tied=True),
    tiny("qwen3", **_WIDE),
    tiny("qwen3", label="yarn", **_YARN),
    tiny("qwen3moe", **_MOE),
    tiny("qwen3moe", label="yarn", **_MOE, **_YARN),
    tiny("gemma2", **_SLIDES),
    tiny("gemma2", label="caps", **_SLIDES, **_CAPS),
    tiny("gemma3", **_SLIDES, **_GLOBAL),
    tiny("gemma3", label="scaled", **_SLIDES, **_GLOBAL, **_LINEAR),
    tiny("phi3"),
    tiny("phi3", label="part", **{"rope.dimension_count": 24, "attention.sliding_window": 2047}),
    tiny("gpt-oss", **_GPT_OSS),
    tiny("gpt-oss", label="yarn", **_GPT_OSS, **_YARN),
    tiny("granite", tied=True, logit_scale=1.0),
    tiny("granite", label="scales", **_SCALES),
    tiny("smollm3", tied=True, block_count=12),
    tiny("olmo2"),
    tiny("olmoe", **_MIXTRAL, **{"attention.head_count_kv": HEADS}),
    tiny("seed_oss", **_WIDE),
    tiny("ernie4_5", tied=True),
    tiny("glm4", **{"rope.dimension_count": 16}),
    tiny("hunyuan-dense", tied=True, **_WIDE),
]
_LABELLED = {"factors": (r"^rope_freqs",), "biases": (r"\.bias$",)}
MODELS = {model.name: model for model in _ALL}

_QKV_BIAS = r"attn_[qkv]\.bias$"
_BIASED = {
    "qwen2": _QKV_BIAS,
    "seed_oss": _QKV_BIAS,
    "gpt-oss": r"\.bias$",
}  # which of them have which
_ODD = re.compile(r"scale$|\.bias$|^rope_f|^cls|^output\.bias$")  # optional, and rare in files


def written(name: str, path: Path) -> Path:
    """The file of a model of MODELS, with the tensors that converters write."""
    model = MODELS[name]
    kept = [_BIASED.get(model.arch, "(?!)"), *_LABELLED.get(model.label, ())]

    def change(shapes: Shapes) -> Shapes:
        found = {
            tensor: shape
            for tensor, shape in shapes.items()
            if not _ODD.search(tensor) or any(re.search(pattern, tensor) for pattern in kept)
        }
        return _fused(found) if model.arch == "phi3" else found

    return write(model, path, change=change)


def _fused(shapes: Shapes) -> Shapes:
    """Q, K and V as the one matrix that phi3's converter writes."""
    found: Shapes = {}
    for name, shape in shapes.items():
        stem = re.sub(r"attn_[qkv]\.weight$", "attn_qkv.weight", name)
        rows = found[stem][1] if stem in found else 0
        found[stem] = (shape[0], rows + shape[1]) if stem != name else shape
    return found


def edges(name: str) -> tuple[int, int]:
    """Where the model is cut into three windows."""
    return (4, 8) if name.startswith("smollm3") else (2, 4)


class Chain:
    """Windows in order, each with the backend that runs it. Steps as tests.windows.Ring's."""

    def __init__(self, windows: Sequence[tuple[Backend, Window]]) -> None:
        self.windows = windows

    def step(
        self,
        ids: Sequence[int],
        positions: Sequence[int],
        *,
        slots: Sequence[int] | None = None,
        outputs: Sequence[bool] | None = None,
    ) -> NDArray[np.float32]:
        """Logits [rows with outputs, vocabulary] of one step; all rows by default."""
        rows = len(ids)
        batch = Batch(
            np.array(slots if slots is not None else [0] * rows, dtype=np.int32),
            np.array(positions, dtype=np.int32),
            np.array(outputs if outputs is not None else [True] * rows, dtype=np.bool_),
        )
        x: NDArray[Any] = np.array(ids, dtype=np.int32)
        for backend, window in self.windows:
            x = backend.run(window, batch, x).copy()  # as over a wire
        return x
