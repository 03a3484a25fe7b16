"""The built-in model: a tiny random one, made at run time, by which every engine is proven.

It is of llama's architecture and has one layer of each type of tensor, so that an error names its
type by its layer. It exists twice: as it is, and as a copy in F32, dequantised by code that no
engine has a part in. What a trusted engine computes with the copy is the truth about both. The
numbers come from a seed: every machine proves its engines with the same ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from peer.models import blocks, gguf
from peer.models.gguf import Value
from peer.models.imports import import_gguf
from peer.models.manifest import Manifest
from peer.models.store import Store

TYPES = (
    "F32", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "MXFP4", "BF16", "F16",
)  # fmt: skip
"""Of the layers, in order."""

ROUNDED = ("Q6_K",)  # that an engine may keep in a type of its own, unless weights = exact
EMBEDDING, OUTPUT = "Q4_0", "Q8_0"  # often quantised otherwise than the layers
ROWS = 32  # of the batch
CHUNKS = (24, 1, 1, 6)  # in which it is run: a prompt, single tokens, a few at once

_HIDDEN = 256  # a block of the K types
_HEADS, _KV_HEADS = 4, 2
_LAYERS_SEED, _TOKENS_SEED = 20, 21
_SPREAD = 0.06  # of the weights, about 1 / √hidden: rows stay as large as they are
_VOCABULARY = 320


def types(weights: str) -> tuple[str, ...]:
    """Of the layers, for an engine that may do with weights what the setting says."""
    return tuple(t for t in TYPES if weights != "exact" or t not in ROUNDED)


def tokens() -> NDArray[np.int32]:
    """The batch: ROWS token ids."""
    random = np.random.default_rng(_TOKENS_SEED)
    return random.integers(3, _VOCABULARY, ROWS).astype(np.int32)


def make(folder: Path, kinds: Sequence[str]) -> tuple[Path, Path]:
    """Put the model and its copy into a store in `folder`. Raises ModelError.

    kinds: the type of each layer. Returns their folders: the model's, its copy's.
    """
    store = Store(folder)
    random = np.random.default_rng(_LAYERS_SEED)
    data = [
        (name, shape, kind, blocks.random_data(kind, shape[0] * shape[1], _SPREAD, random))
        if len(shape) > 1
        else (name, shape, kind, _norm(shape[0], random))
        for name, shape, kind in _tensors(kinds)
    ]
    copy = [(n, s, "F32", blocks.dequantize(k, d).view(np.uint8)) for n, s, k, d in data]
    metadata = _metadata(len(kinds))
    made = [_imported(store, folder / "itself.gguf", metadata, data)]
    made.append(_imported(store, folder / "copy.gguf", metadata, copy))
    return store.folder(made[0].digest), store.folder(made[1].digest)


Tensor = tuple[str, tuple[int, ...], str, NDArray[np.uint8]]
"""name, shape in ggml order, type, bytes"""


def write(path: Path, metadata: dict[str, Value], tensors: Sequence[Tensor]) -> None:
    """A GGUF of these tensors."""
    header = gguf.header_bytes(metadata, [(name, shape, kind) for name, shape, kind, _ in tensors])
    with path.open("xb") as out:
        out.write(header)
        for _, _, _, data in tensors:
            out.write(data.tobytes())
            out.write(bytes(gguf.aligned(data.nbytes) - data.nbytes))


def _imported(
    store: Store, path: Path, metadata: dict[str, Value], tensors: Sequence[Tensor]
) -> Manifest:
    write(path, metadata, tensors)
    try:
        return import_gguf(path, store)
    finally:
        path.unlink()


def _norm(size: int, random: np.random.Generator) -> NDArray[np.uint8]:
    values = 1 + 0.1 * random.standard_normal(size)
    return values.astype(np.float32).view(np.uint8)


def _tensors(kinds: Sequence[str]) -> Iterable[tuple[str, tuple[int, ...], str]]:
    kv = _HIDDEN // _HEADS * _KV_HEADS
    yield "token_embd.weight", (_HIDDEN, _VOCABULARY), EMBEDDING
    for layer, kind in enumerate(kinds):
        name = f"blk.{layer}."
        yield name + "attn_norm.weight", (_HIDDEN,), "F32"
        yield name + "attn_q.weight", (_HIDDEN, _HIDDEN), kind
        yield name + "attn_k.weight", (_HIDDEN, kv), kind
        yield name + "attn_v.weight", (_HIDDEN, kv), kind
        yield name + "attn_output.weight", (_HIDDEN, _HIDDEN), kind
        yield name + "ffn_norm.weight", (_HIDDEN,), "F32"
        yield name + "ffn_gate.weight", (_HIDDEN, _HIDDEN), kind
        yield name + "ffn_up.weight", (_HIDDEN, _HIDDEN), kind
        yield name + "ffn_down.weight", (_HIDDEN, _HIDDEN), kind
    yield "output_norm.weight", (_HIDDEN,), "F32"
    yield "output.weight", (_HIDDEN, _VOCABULARY), OUTPUT


def _metadata(layers: int) -> dict[str, Value]:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [2, 3, 3, *([6] * 256)]  # unknown, control, byte
    words = [f"▁w{number}" for number in range(_VOCABULARY - len(pieces))]

    def number(value: int) -> Value:
        return Value("uint32", value)

    return {
        "general.architecture": Value("string", "llama"),
        "general.name": Value("string", "halka's built-in model"),
        "llama.vocab_size": number(_VOCABULARY),
        "llama.context_length": number(256),
        "llama.embedding_length": number(_HIDDEN),
        "llama.block_count": number(layers),
        "llama.feed_forward_length": number(_HIDDEN),
        "llama.attention.head_count": number(_HEADS),
        "llama.attention.head_count_kv": number(_KV_HEADS),
        "llama.attention.layer_norm_rms_epsilon": Value("float32", 1e-5),
        "llama.rope.dimension_count": number(_HIDDEN // _HEADS),
        "llama.rope.freq_base": Value("float32", 10000.0),
        "tokenizer.ggml.model": Value("string", "llama"),
        "tokenizer.ggml.tokens": Value("array:string", [*pieces, *words]),
        "tokenizer.ggml.scores": Value(
            "array:float32", [-float(place) for place in range(_VOCABULARY)]
        ),
        "tokenizer.ggml.token_type": Value("array:int32", [*kinds, *([1] * len(words))]),
        "tokenizer.ggml.bos_token_id": number(1),
        "tokenizer.ggml.eos_token_id": number(2),
    }
