"""What a fake model is: its words, its files and the function that its layers compute.

All arithmetic is on integers below 2^24 - 3, which float32 carries exactly, so a window hands over
the same numbers wherever the model is cut.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.base import BackendFault, Slot

ARCHITECTURE = "fake"
PRIME = 16_777_213  # the largest below 2^24: sums and products stay exact in int64, values in f32
CONTROL = {256: "<s>", 257: "</s>", 258: "<|system|>", 259: "<|user|>", 260: "<|assistant|>"}
BOS, EOS = 256, 257
VOCABULARY = 256 + len(CONTROL)
_LEADS = (0xC3, 0xC4, 0xC5)  # first bytes of two-byte letters: answers hold split UTF-8 on purpose
_LETTERS = b"etaoinsrhldcumfpgwybvkz etaoin ,."

Integers = NDArray[np.int64]


# Files -----------------------------------------------------------------------------------------

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}


class Reader:
    """Metadata and F32 tensors of one GGUF file that whoever calls the engine has checked."""

    def __init__(self, path: Path) -> None:
        try:
            self.data = np.memmap(path, np.uint8, "r")
        except (OSError, ValueError) as error:
            raise BackendFault(f"{path.name} cannot be mapped: {error}") from None
        self.at = 0
        magic, _, tensors, keys = (self._scalar(code) for code in "IIQQ")
        if magic != 0x46554747:
            raise BackendFault(f"{path.name} is not a GGUF file")
        self.metadata = {self._text(): self._value(self._scalar("I")) for _ in range(keys)}
        facts = [self._tensor() for _ in range(tensors)]
        align = int(self.metadata.get("general.alignment", 32))
        base = (self.at + align - 1) // align * align
        self.tensors: dict[str, NDArray[np.float32]] = {}
        for name, shape, kind, offset in facts:
            count = int(np.prod(shape))
            raw = self.data[base + offset : base + offset + 4 * count]
            if kind != 0 or len(raw) != 4 * count:
                raise BackendFault(f"{path.name}: tensor {name} is not F32, or cut short")
            self.tensors[name] = raw.view(np.float32).reshape(shape[::-1])

    def _scalar(self, code: str) -> Any:
        size = struct.calcsize("<" + code)
        try:
            value = struct.unpack("<" + code, self.data[self.at : self.at + size].tobytes())[0]
        except struct.error:
            raise BackendFault("a model file ends within its header") from None
        self.at += size
        return value

    def _text(self) -> str:
        size = self._scalar("Q")
        self.at += size
        return self.data[self.at - size : self.at].tobytes().decode("utf-8", "replace")

    def _value(self, kind: int) -> Any:
        if kind == 8:
            return self._text()
        if kind == 9:
            inner, count = self._scalar("I"), self._scalar("Q")
            return [self._value(inner) for _ in range(count)]
        return self._scalar(_SCALARS[kind])

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._text()
        shape = tuple(self._scalar("Q") for _ in range(self._scalar("I")))
        return name, shape, self._scalar("I"), self._scalar("Q")


def integers(tensor: NDArray[np.float32]) -> Integers:
    """A private copy of a mapped tensor, as numbers below PRIME."""
    copied: Integers = tensor.astype(np.int64) % PRIME
    return copied


# The function ----------------------------------------------------------------------------------


@dataclass(slots=True)
class Layer:
    """One layer. weight: [4, hidden]. sums: slot → [tokens, hidden], the KV cache."""

    weight: Integers
    sums: dict[Slot, Integers] = field(default_factory=dict)

    def run(self, slot: Slot, positions: Integers, x: Integers) -> Integers:
        """[tokens, hidden] of one slot, whose positions follow what the slot holds."""
        a, b, w1, w2 = self.weight
        mixed = x * x % PRIME * ((a + positions[:, None] * b) % PRIME) % PRIME
        held = self.sums.get(slot)
        start = held[-1] if held is not None and len(held) else np.zeros_like(a)
        sums = (np.cumsum(mixed, axis=0) + start) % PRIME
        self.sums[slot] = sums if held is None else np.concatenate([held, sums])
        out: Integers = (x * w1 + np.roll(sums, 1, axis=1) * w2 + positions[:, None]) % PRIME
        out[:, 0] = x[:, 0]  # the token itself, which the last window wants to know
        return out


def embed(table: Integers, ids: Integers) -> Integers:
    """[tokens, hidden] of token ids, by table [vocabulary, hidden]."""
    out: Integers = table[ids].copy()
    out[:, 0] = ids
    return out


def logits_of(
    output: Integers, x: Integers, positions: Integers, end_every: int
) -> NDArray[np.float32]:
    """[tokens, vocabulary]: pseudo-random in [0, 4) with a clear peak, an end token in time.

    output: [vocabulary, hidden]. end_every: about one token in so many ends the answer, and the
    last position before each multiple of eight times that does for sure; 0: none does.
    """
    state = x.copy()
    state[:, 0] += 1
    raw = (state[:, None, :] * output[None] % PRIME).sum(axis=2) % PRIME
    logits: NDArray[np.float32] = (raw * (4.0 / PRIME)).astype(np.float32)
    for row, (key, token, position) in enumerate(
        zip(raw[:, EOS].tolist(), x[:, 0].tolist(), positions.tolist(), strict=True)
    ):
        logits[row, _peak(key, token, position, end_every)] += 8.0
    return logits


def _peak(key: int, token: int, position: int, end_every: int) -> int:
    """The likeliest next token after `token`: text that is valid UTF-8, then an end."""
    if 0xC2 <= token <= 0xDF:
        return 0x80 + key % 64
    if end_every and (key % end_every == 0 or (position + 2) % (8 * end_every) < 2):
        return EOS
    key //= 101
    if key % 9 == 0:
        return _LEADS[key // 9 % len(_LEADS)]
    return _LETTERS[key // 9 % len(_LETTERS)]
