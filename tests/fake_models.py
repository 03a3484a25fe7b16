"""Small valid GGUF files of architecture "fake", which `backends.fake` runs, and their answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np

from backends.fake_model import ARCHITECTURE, BOS, CONTROL, EOS, PRIME, VOCABULARY, logits_of

__all__ = ["TEMPLATE", "truth", "write"]

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write(
    path: Path,
    layers: int = 12,
    hidden: int = 8,
    context: int = 4096,
    seed: int = 0,
    *,
    end_every: int = 97,
    delay_s: float = 0.0,
    layer_bytes: int = 0,
    name: str = "fake",
) -> Path:
    """A whole fake model in one file; returns its path.

    seed: other weights, so other answers. end_every: an answer ends after about so many tokens, 0:
    never. delay_s: of each step in each window. layer_bytes: makes layers at least so large.
    """
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    writer.add_name(name)
    writer.add_uint32("fake.block_count", layers)
    writer.add_uint32("fake.embedding_length", hidden)
    writer.add_uint32("fake.context_length", context)
    writer.add_uint32("fake.vocab_size", VOCABULARY)
    writer.add_uint32("fake.end_every", end_every)
    writer.add_float32("fake.delay_s", delay_s)
    writer.add_string("tokenizer.ggml.model", "fake")
    writer.add_array(
        "tokenizer.ggml.tokens", [f"<0x{i:02X}>" for i in range(256)] + list(CONTROL.values())
    )
    writer.add_uint32("tokenizer.ggml.bos_token_id", BOS)
    writer.add_uint32("tokenizer.ggml.eos_token_id", EOS)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_string("tokenizer.chat_template", TEMPLATE)

    def tensor(name: str, rows: int, columns: int = hidden) -> None:
        values = random.integers(1, PRIME, (rows, columns))
        writer.add_tensor(name, values.astype(np.float32))

    tensor("token_embd.weight", VOCABULARY)
    for i in range(layers):
        tensor(f"blk.{i}.weight", 4)
        if layer_bytes > 16 * hidden:
            tensor(f"blk.{i}.ballast", 1, layer_bytes // 4)
    tensor("output.weight", VOCABULARY)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def truth(model: Path, ids: Sequence[int], count: int) -> list[int]:
    """Greedy continuation of ids by a whole model file: at most `count` tokens, without the EOS.

    An oracle: one token after the other through the whole model with plain integers, so it shares
    neither files, batches, spans nor slots with the engine.
    """
    reader = gguf.GGUFReader(model)
    tensors = {t.name: np.asarray(t.data).astype(np.int64) for t in reader.tensors}
    table, output = tensors["token_embd.weight"], tensors["output.weight"]
    layers = int(reader.fields["fake.block_count"].contents())
    every = int(reader.fields["fake.end_every"].contents())
    weights = [tensors[f"blk.{i}.weight"].tolist() for i in range(layers)]
    hidden = table.shape[1]
    sums = [[0] * hidden for _ in range(layers)]
    answer: list[int] = []
    for p in range(len(ids) + count - 1):
        token = ids[p] if p < len(ids) else answer[-1]
        x = [token, *map(int, table[token][1:])]
        for held, (a, b, w1, w2) in zip(sums, weights, strict=True):
            for j in range(hidden):
                held[j] = (held[j] + x[j] ** 2 * (a[j] + p * b[j])) % PRIME
            rest = ((x[j] * w1[j] + held[j - 1] * w2[j] + p) % PRIME for j in range(1, hidden))
            x = [token, *rest]
        if p + 1 >= len(ids):
            logits = logits_of(output, np.array([x], np.int64), np.array([p], np.int64), every)
            best = int(logits[0].argmax())
            if best == EOS:
                break
            answer.append(best)
    return answer
