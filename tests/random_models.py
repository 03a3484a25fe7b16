"""Tiny random models of every architecture in the rule table, as GGUF files.

libllama itself tells which tensors an architecture has, and of which shapes: it is given metadata
and asked to make a model out of nothing (llama_model_init_from_user), and every tensor that it
asks data for is written down. The metadata are those of llama.cpp's own test of all architectures
(tests/test-llama-archs.cpp), the file is written with the `gguf` package.
"""

from __future__ import annotations

import ctypes
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from backends.llama_cpp.library import GgufInitParams, library

LAYERS = 6
CONTEXT = 256
SLIDING = 32  # tokens that a sliding layer sees


@dataclass(frozen=True)
class Model:
    """One random model. extra: metadata beside or instead of the usual, by key without arch.

    None takes a key away.
    """

    arch: str
    moe: bool = False
    tied: bool = False
    quantised: str = ""  # of the matrices: "" (F32), F16, Q8_0 …
    layers: int = LAYERS
    extra: dict[str, Any] = field(default_factory=dict)
    label: str = ""

    @property
    def name(self) -> str:
        """Of the test."""
        parts = [self.arch, "moe" * self.moe, "tied" * self.tied, self.quantised, self.label]
        return "-".join(part for part in parts if part)


_HEADS_ONE = {"deepseek2", "deepseek32", "glm-dsa", "dots3note", "mistral4"}
_PATTERN_LISTED = {"cohere2moe", "mimo2", "spark2_5", "granite_swa", "dots3note", "maple"}
_HYBRID_256 = {"qwen3next", "qwen35", "qwen35moe"}


def metadata(model: Model) -> dict[str, Any]:
    """Keys without the architecture, values as the GGUF writer takes them."""
    arch, layers = model.arch, model.layers
    one = arch in _HEADS_ONE
    hidden, heads, ffn = (128, 1, 192) if one else (256, 2, 384)
    size = hidden // heads
    alternate = [i % 2 for i in range(layers)]
    keys: dict[str, Any] = {
        "context_length": CONTEXT, "embedding_length": hidden, "features_length": hidden,
        "block_count": layers, "leading_dense_block_count": 1, "feed_forward_length": ffn,
        "use_parallel_residual": False, "logit_scale": 1.0, "full_attention_interval": 2,
        "attention.head_count": heads, "attention.head_count_kv": heads,
        "attention.max_alibi_bias": 8.0, "attention.clamp_kqv": 1.0,
        "attention.layer_norm_epsilon": 1e-5, "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.group_norm_epsilon": 1e-5, "attention.group_norm_groups": 8,
        "attention.q_lora_rank": 512, "attention.kv_lora_rank": 512,
        "attention.relative_buckets_count": 8, "attention.sliding_window": SLIDING,
        "attention.sliding_window_pattern": alternate if arch in _PATTERN_LISTED else 2,
        "attention.indexer.head_count": heads if arch == "minimax-m3" else 64,
        "attention.indexer.key_length": 128, "attention.indexer.top_k": 131072,
        "attention.indexer.block_size": 4, "attention.indexer.kpool": 4,
        "attention.indexer.kpool_select_tail": True, "attention.indexer.local_blocks": 1,
        "rope.dimension_sections": [size // 4] * 4,
        "ssm.inner_size": 256 if arch in _HYBRID_256 else 2 * hidden, "ssm.conv_kernel": 4,
        "ssm.state_size": 128, "ssm.time_step_rank": heads, "ssm.group_count": 2,
        "shortconv.l_cache": 3, "residual_scale": 3.5565588200778455,
    }  # fmt: skip
    if one:
        keys |= {
            "attention.key_length": 576, "attention.value_length": 512,
            "rope.dimension_count": 64, "attention.key_length_mla": 192,
            "attention.value_length_mla": 128,
        }  # fmt: skip
    if arch == "dots3note":
        keys |= {
            "attention.kv_lora_rank_swa": 512, "attention.key_length_swa": 576,
            "attention.value_length_swa": 512, "attention.key_length_mla_swa": 192,
            "attention.value_length_mla_swa": 128, "rope.freq_base_swa": 10000.0,
            "attention.indexer.types": [1 - i for i in alternate],
        }  # fmt: skip
    if arch == "minimax-m3":
        keys["rope.dimension_count"] = 64
    if arch == "maple":
        keys["swiglu_clamp_exp"] = 7.0
    if model.moe:
        keys |= {
            "expert_feed_forward_length": ffn, "expert_shared_feed_forward_length": ffn // 2,
            "expert_latent_length": ffn, "interleave_moe_layer_step": 2, "expert_count": 2,
            "expert_used_count": 2, "expert_shared_count": 1, "expert_gating_func": 2,
            "expert_group_scale": 1.0, "experts_per_group": 1,
        }  # fmt: skip
    keys |= model.extra
    return {key: value for key, value in keys.items() if value is not None}


def tokens() -> tuple[list[bytes], list[float], list[int]]:
    """A tiny SentencePiece vocabulary: pieces, scores, types."""
    pieces = [b"<unk>", b"<s>", b"</s>", *(b"<0x%02X>" % byte for byte in range(256))]
    types = [2, 3, 3, *([6] * 256)]
    words = ["▁", *"abcdefghijklmnopqrstuvwxyz", "▁a", "th", "▁th", "he", "▁the", "in", "er", "an"]
    pieces += [word.encode() for word in words]
    types += [1] * len(words)
    return pieces, [-float(i) for i in range(len(pieces))], types


Shapes = dict[str, tuple[int, ...]]


def write(
    model: Model,
    path: Path,
    *,
    seed: int = 1,
    change: Callable[[Shapes], Shapes] = lambda shapes: shapes,
) -> Path:
    """Write the model's file. Raises RuntimeError where libllama does not take its metadata.

    change: libllama asks for every tensor that the architecture may have; to what a file has.
    """
    empty = path.with_suffix(".empty")
    _writer(model, empty, {}, seed)
    shapes = _shapes(empty)
    empty.unlink()
    shapes = change(shapes)
    if model.tied:
        shapes.pop("output.weight", None)
    _writer(model, path, shapes, seed)
    return path


def write_head(model: Model, path: Path) -> Path:
    """Write all of its metadata and no tensors, as head.gguf is."""
    _writer(model, path, {}, 0)
    return path


def _writer(model: Model, path: Path, shapes: dict[str, tuple[int, ...]], seed: int) -> None:
    writer = gguf.GGUFWriter(path, model.arch)
    for key, value in metadata(model).items():
        _add(writer, f"{model.arch}.{key}", value)
    pieces, scores, types = tokens()
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_uint32(f"{model.arch}.vocab_size", len(pieces))
    for name, shape in shapes.items():
        data = _values(name, shape, seed)
        kind = model.quantised if _is_matrix(name, shape) else ""
        if not kind:
            writer.add_tensor(name, data)
            continue
        qtype = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quants.quantize(data, qtype), raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    plain = name.endswith(".weight") and "norm" not in name and "position" not in name
    return plain and len([d for d in shape if d > 1]) >= 2 and shape[0] % 32 == 0


def _values(name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    """Random values; shape in ggml order. Norms lie around 1 and decays below 0, as in life."""
    random = np.random.default_rng([seed, zlib.crc32(name.encode())])
    data = random.standard_normal(tuple(reversed(shape)), dtype=np.float32) * np.float32(0.1)
    if "ssm_a" in name:
        return -np.abs(data)
    if "norm" in name and name.endswith("weight"):
        return data + np.float32(1.0)
    if name.startswith("rope_f"):
        return np.abs(data) + np.float32(1.0)
    return data


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Every tensor that libllama wants for these metadata, with its shape in ggml order."""
    lib = library()
    llama, ggml = lib.llama, lib.ggml
    shapes: dict[str, tuple[int, ...]] = {}

    def wanted(tensor: int, _user_data: object) -> None:
        # struct ggml_tensor: type (4 bytes, padded to 8), buffer (8), then ne[4] of int64
        extents = (ctypes.c_int64 * 4).from_address(tensor + 16)
        shape = [int(n) for n in extents]
        while len(shape) > 1 and shape[-1] == 1:
            shape.pop()
        shapes[ggml.ggml_get_name(tensor).decode()] = tuple(shape)

    callback = llama.llama_model_set_tensor_data_t(wanted)
    file = ggml.gguf_init_from_file(os.fsencode(path), GgufInitParams(True, None))
    lib.journal.begin()
    loaded = llama.llama_model_init_from_user(
        file, callback, None, llama.llama_model_default_params()
    )
    if not loaded:
        raise RuntimeError(f"libllama does not take {path.stem}: {lib.journal.cause()}")
    llama.llama_model_free(loaded)
    ggml.gguf_free(file)
    return shapes
