"""How the main file of a window differs from the model's own header: the rules, written down."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from backends.base import BackendFault, Header, Recipe, Stub
from backends.llama_cpp.rules import (
    PER_LAYER,
    TABLE,
    Scale,
    cuts,
    is_lite,
    number,
    per_layer,
    plain,
    recurrent_layers,
    sliding_layers,
)

_POSITIONS = "position_embd.weight"
_SOFTMAX, _SIGMOID = 1, 2  # llama-hparams.h: LLAMA_EXPERT_GATING_FUNC_TYPE_*


def recipe(header: Header, first: int, last: int) -> Recipe:
    """The recipe of the window [first, last). Raises BackendFault (refused), saying why."""
    if why := cuts(header).refusal(first, last):
        raise BackendFault(why, "refused")
    untied = "output.weight" in header.tensors
    if (first, last) == (0, header.layers):
        return Recipe(write={}, embed=True, output=untied)
    arch = header.architecture
    rule = TABLE[arch]
    write: dict[str, tuple[str, Any]] = {f"{arch}.block_count": ("uint32", last - first)}
    write |= _sliced(header, first, last)
    write |= _told_by_layers(header)
    without: tuple[str, ...] = ()
    stubs: tuple[Stub, ...] = ()
    if first > 0:
        if rule.scale is Scale.KEY:
            write[f"{arch}.embedding_scale"] = ("float32", 0.0)
        if rule.adds_positions and _POSITIONS in header.tensors:
            without += (_POSITIONS,)
            stubs += (Stub(_POSITIONS, header.tensors[_POSITIONS].shape),)
    drop = (f"{arch}.deepstack_mapping",)  # image features beside the tokens: none in text
    if number(header, "n_deepstack_layers"):
        write[f"{arch}.n_deepstack_layers"] = ("uint32", 0)
    if last < header.layers:
        return _open_ended(header, write, drop, without, stubs)
    rename: dict[str, str] = {}
    if untied and rule.head_required:
        # The loader maps it whole: of small words, or a tail would hold gigabytes of zeros.
        shape = header.tensors["token_embd.weight"].shape
        stubs += (Stub("token_embd.weight", shape, "F32" if shape[0] % 32 else "Q4_0"),)
    elif untied:  # libllama uses a tied embedding as the head, and embeds nothing here
        rename = {"output.weight": "token_embd.weight"}
    return Recipe(write, drop, without, stubs, embed=not untied, output=untied, rename=rename)


def _open_ended(
    header: Header,
    write: dict[str, tuple[str, Any]],
    drop: tuple[str, ...],
    without: tuple[str, ...],
    stubs: tuple[Stub, ...],
) -> Recipe:
    """A window that is not the last: no tokenizer, and a vocabulary of one word."""
    hidden = number(header, "embedding_length")
    write |= {
        "tokenizer.ggml.model": ("string", "none"),
        f"{header.architecture}.vocab_size": ("uint32", 1),
    }
    stubs += (Stub("token_embd.weight", (hidden, 1)),)
    if "output.weight" in header.tensors:
        stubs += (Stub("output.weight", (hidden, 1)),)
    if "output.bias" in header.tensors:
        stubs += (Stub("output.bias", (1,)),)
    return Recipe(write, (*drop, "tokenizer."), without, stubs)


def _sliced(header: Header, first: int, last: int) -> dict[str, tuple[str, Any]]:
    """What the header says layer by layer, for the window's layers."""
    arch = header.architecture
    write: dict[str, tuple[str, Any]] = {}
    for name in PER_LAYER:
        value = plain(header, name)
        if isinstance(value, list):
            write[f"{arch}.{name}"] = _array(value[first:last])
    if (sliding := sliding_layers(header)) is not None:
        key = f"{arch}.attention.sliding_window_pattern"
        write[key] = ("array:bool", sliding[first:last])
    if (recurrent := recurrent_layers(header)) is not None:
        write[f"{arch}.attention.recurrent_layers"] = ("array:bool", recurrent[first:last])
    if dense := number(header, "leading_dense_block_count"):
        write[f"{arch}.leading_dense_block_count"] = ("uint32", max(0, dense - first))
    write |= _head_sizes(header)
    return write


def _array(values: list[Any]) -> tuple[str, list[Any]]:
    if all(isinstance(value, bool) for value in values):
        return "array:bool", values
    if any(isinstance(value, float) for value in values):
        return "array:float32", values
    return ("array:int32" if min(values) < 0 else "array:uint32"), values


def _head_sizes(header: Header) -> dict[str, tuple[str, Any]]:
    """Sizes that the loader would work out from the heads of its first layer, which is another."""
    heads = per_layer(header, "attention.head_count")
    if not isinstance(plain(header, "attention.head_count"), list) or not heads[0]:
        return {}
    size = number(header, "embedding_length") // heads[0]
    key = number(header, "attention.key_length", size)
    wanted = {
        "attention.key_length": key,
        "attention.value_length": number(header, "attention.value_length", size),
        "rope.dimension_count": number(header, "rope.dimension_count", key),
    }
    return {f"{header.architecture}.{k}": ("uint32", v) for k, v in wanted.items()}


def _told_by_layers(header: Header) -> dict[str, tuple[str, Any]]:
    """What llama.cpp would conclude from the number of layers or words, written out."""
    arch, layers = header.architecture, header.layers
    if arch == "minicpm" and plain(header, "residual_scale") is None:
        scale = np.float32(1.4) / np.float32(math.sqrt(layers))
        return {f"{arch}.residual_scale": ("float32", float(scale))}
    if arch != "deepseek2":
        return {}
    write: dict[str, tuple[str, Any]] = {}
    if is_lite(header):
        write[f"{arch}.attention.q_lora_rank"] = ("uint32", 0)
    if not number(header, "expert_gating_func"):
        words = len(header.metadata.get("tokenizer.ggml.tokens", ()))
        words = number(header, "vocab_size", words)
        glm = layers in (47, 48) and words == 154880
        gating = _SIGMOID if glm else _SOFTMAX
        write[f"{arch}.expert_gating_func"] = ("uint32", gating)
    return write
