"""A model's words, from head.gguf alone: libllama reads the tokenizer and no weights."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

from backends.base import BackendFault
from backends.llama_cpp.library import library

_PIECE_BYTES = 256  # longer pieces are asked for again


class LlamaVocabulary:
    """See backends.base.Vocabulary. Lives as long as the process: a few MiB a model."""

    def __init__(self, head: Path) -> None:
        self._library = library()
        llama = self._llama = self._library.llama
        params = llama.llama_model_default_params()
        params.vocab_only = True
        self._library.journal.begin()
        self._model: Any = llama.llama_model_load_from_file(os.fsencode(head), params)
        if not self._model:
            raise BackendFault(f"{head} has no usable tokenizer: {self._library.journal.cause()}")
        self._vocab = llama.llama_model_get_vocab(self._model)
        self._words: int = llama.llama_vocab_n_tokens(self._vocab)
        if self._words < 1:
            self.close()
            raise BackendFault(f"{head} has no tokenizer")
        self._ends = frozenset(
            token for token in range(self._words) if llama.llama_vocab_is_eog(self._vocab, token)
        )
        bos = llama.llama_vocab_bos(self._vocab)
        adds = llama.llama_vocab_get_add_bos(self._vocab) and bos >= 0
        self._starts_with: tuple[int, ...] = (bos,) if adds else ()

    @property
    def ends(self) -> frozenset[int]:
        """Ids that end an answer."""
        return self._ends

    @property
    def starts_with(self) -> tuple[int, ...]:
        """Ids that the model wants before any text, () where none."""
        return self._starts_with

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Token ids of text, without `starts_with`. special: read "<|…|>" spellings as such."""
        data = text.encode("utf-8", "replace")
        room = len(data) + 8  # a token is at least a byte; 8 for a space or so put before it
        for _ in range(2):
            ids = (ctypes.c_int32 * room)()
            count = self._llama.llama_tokenize(
                self._vocab, data, len(data), ids, room, False, special
            )
            if count >= 0:
                return list(ids[:count])
            room = -count
        raise BackendFault(f"libllama cannot tokenise {len(data)} bytes")

    def pieces(self) -> list[bytes]:
        """The bytes of every token id, in order; b"" for control tokens."""
        return [self._piece(token, special=False) for token in range(self._words)]

    def text_of(self, token: int) -> str:
        """A token's spelling, control tokens included, for chat templates. "" for no such id."""
        if not 0 <= token < self._words:
            return ""
        return self._piece(token, special=True).decode("utf-8", "replace")

    def _piece(self, token: int, *, special: bool, room: int = _PIECE_BYTES) -> bytes:
        buffer = ctypes.create_string_buffer(room)
        length = self._llama.llama_token_to_piece(self._vocab, token, buffer, room, 0, special)
        if length < 0:
            return self._piece(token, special=special, room=-length)
        return bytes(buffer.raw[:length])

    def close(self) -> None:
        """Free the model. Nothing else may be called afterwards."""
        if self._model:
            self._llama.llama_model_free(self._model)
            self._model = None
