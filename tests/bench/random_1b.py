"""A model of random weights in the shapes of Llama-3.2-1B, as llama.cpp quantises it to Q4_0.

python -m tests.bench.random_1b FILE: 1.24 B parameters, 0.8 GB, in seconds: blocks are written as
random bytes behind scales that keep activations of a usual size. The tokenizer is SmolLM2's, padded
to the vocabulary. What it answers is noise, and how long it takes is what the real one takes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from tests.smollm2 import smollm2

LAYERS, HIDDEN, FFN, HEADS, KV_HEADS, VOCABULARY = 16, 2048, 8192, 32, 8, 128256
CONTEXT = 8192
KV = HIDDEN // HEADS * KV_HEADS
QUANTS_PER_BLOCK = 32  # of Q4_0
SPREAD_Q4 = 4.6  # standard deviation of nibbles from -8 to 7
Bytes = NDArray[np.uint8]


def q4_0(random: np.random.Generator, rows: int, columns: int) -> Bytes:
    """[rows, bytes of a row]: half precision scales, and two random nibbles a byte."""
    blocks = random.integers(0, 256, (rows, columns // QUANTS_PER_BLOCK, 18), np.uint8)
    scale = np.float16(1 / (SPREAD_Q4 * columns**0.5))
    blocks[:, :, :2] = np.frombuffer(scale.tobytes(), np.uint8)
    return blocks.reshape(rows, -1)


def q6_k(random: np.random.Generator, rows: int, columns: int) -> Bytes:
    """The same of 256 values a block: low bits, high bits, 16 scales, a scale of these."""
    blocks = random.integers(0, 256, (rows, columns // 256, 210), np.uint8)
    blocks[:, :, 192:208] = random.integers(16, 48, (rows, columns // 256, 16), np.uint8)
    scale = np.float16(1 / (18.5 * 32 * columns**0.5))
    blocks[:, :, 208:] = np.frombuffer(scale.tobytes(), np.uint8)
    return blocks.reshape(rows, -1)


def matrices() -> Iterator[tuple[str, int, int]]:
    """Name, rows, columns of every matrix of a layer."""
    yield "attn_q", HIDDEN, HIDDEN
    yield "attn_k", KV, HIDDEN
    yield "attn_v", KV, HIDDEN
    yield "attn_output", HIDDEN, HIDDEN
    yield "ffn_gate", FFN, HIDDEN
    yield "ffn_up", FFN, HIDDEN
    yield "ffn_down", HIDDEN, FFN


def write(path: Path) -> Path:
    """Write the file; returns its path."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("random 1b")
    writer.add_file_type(2)  # mostly Q4_0
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(VOCABULARY)
    _add_words(writer)
    random = np.random.default_rng(1)
    ones = np.ones(HIDDEN, np.float32)
    writer.add_tensor("token_embd.weight", q6_k(random, VOCABULARY, HIDDEN), raw_dtype=Type.Q6_K)
    writer.add_tensor("output_norm.weight", ones)
    writer.add_tensor("rope_freqs.weight", np.ones(HIDDEN // HEADS // 2, np.float32))
    for layer in range(LAYERS):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", ones)
        for name, rows, columns in matrices():
            data = q4_0(random, rows, columns)
            writer.add_tensor(f"blk.{layer}.{name}.weight", data, raw_dtype=Type.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_words(writer: gguf.GGUFWriter) -> None:
    """SmolLM2's tokenizer, padded."""
    fields = gguf.GGUFReader(smollm2()).fields
    words = [bytes(fields["tokenizer.ggml.tokens"].parts[i])
             for i in fields["tokenizer.ggml.tokens"].data]  # fmt: skip
    types = fields["tokenizer.ggml.token_type"].contents()
    padding = VOCABULARY - len(words)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(str(fields["tokenizer.ggml.pre"].contents()))
    writer.add_token_list([*words, *(b"<unused-%d>" % i for i in range(padding))])
    unused = int(gguf.TokenType.UNUSED)
    writer.add_token_types([*types, *([unused] * padding)])
    writer.add_token_merges(fields["tokenizer.ggml.merges"].contents())
    for name in ("bos", "eos"):
        key = f"tokenizer.ggml.{name}_token_id"
        writer.add_uint32(key, int(fields[key].contents()))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
