"""A model's id: stable, readable, the same from every copy of the file."""

from __future__ import annotations

import re
from collections.abc import Mapping

from peer.models.gguf import TensorInfo, Value
from peer.models.manifest import MODEL_CHARACTERS_MAX

# general.file_type as llama.cpp's llama_ftype numbers it.
_FILE_TYPES = {
    0: "f32", 1: "f16", 2: "q4_0", 3: "q4_1", 7: "q8_0", 8: "q5_0", 9: "q5_1", 10: "q2_k",
    11: "q3_k_s", 12: "q3_k_m", 13: "q3_k_l", 14: "q4_k_s", 15: "q4_k_m", 16: "q5_k_s",
    17: "q5_k_m", 18: "q6_k", 19: "iq2_xxs", 20: "iq2_xs", 21: "q2_k_s", 22: "iq3_xs",
    23: "iq3_xxs", 24: "iq1_s", 25: "iq4_nl", 26: "iq3_s", 27: "iq3_m", 28: "iq2_s", 29: "iq2_m",
    30: "iq4_xs", 31: "iq1_m", 32: "bf16", 36: "tq1_0", 37: "tq2_0", 38: "mxfp4", 39: "nvfp4",
    40: "q1_0",
}  # fmt: skip
_GUESSED = 1024  # added to a file type that the converter was not told

# Training runs that published models carry in place of what people call them.
_FINETUNES = {"8k-lc100k-mix1-ep2": "instruct"}  # SmolLM2-135M-Instruct and SmolLM2-360M-Instruct


def model_id(metadata: Mapping[str, Value], tensors: tuple[TensorInfo, ...], stem: str) -> str:
    """[a-z0-9._-], at most MODEL_CHARACTERS_MAX: from the metadata, else from the file's name.

    As in smollm2-135m-instruct-q4_1: base name, size, fine-tune, version, type of the weights.
    """
    kind = _weights_type(metadata, tensors)
    if base := _text(metadata, "general.basename"):
        finetune = _text(metadata, "general.finetune")
        words = [
            base,
            _text(metadata, "general.size_label"),
            _FINETUNES.get(finetune, finetune),
            _text(metadata, "general.version"),
        ]
        name = "-".join(word for word in words if word)
    else:
        name = _text(metadata, "general.name") or _slug(stem)
    name = re.sub(f"[._-]{re.escape(kind)}$", "", name) or "model"
    return f"{name[: MODEL_CHARACTERS_MAX - len(kind) - 1].rstrip('._-')}-{kind}"


def _weights_type(metadata: Mapping[str, Value], tensors: tuple[TensorInfo, ...]) -> str:
    value = metadata.get("general.file_type")
    number = value.value if value is not None and isinstance(value.value, int) else -1
    if number >= 0 and (known := _FILE_TYPES.get(number & ~_GUESSED)):
        return known
    sizes: dict[str, int] = {}
    for tensor in tensors:
        sizes[tensor.type] = sizes.get(tensor.type, 0) + tensor.size
    return max(sizes, key=lambda name: sizes[name]).lower() if sizes else "f32"


def _text(metadata: Mapping[str, Value], key: str) -> str:
    value = metadata.get(key)
    return _slug(value.value) if value is not None and isinstance(value.value, str) else ""


def _slug(text: str) -> str:
    return re.sub("[^a-z0-9._]+", "-", text[:1024].lower()).strip("._-")
