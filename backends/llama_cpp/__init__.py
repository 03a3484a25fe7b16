"""llama.cpp: windows of a GGUF model's layers on stock libllama. See `rules` for which models."""

from __future__ import annotations

from pathlib import Path

from backends.base import (
    Ability,
    Backend,
    Cuts,
    Device,
    Engine,
    Header,
    Recipe,
    Settings,
    Vocabulary,
    Weights,
)
from backends.llama_cpp import cache, recipe, rules
from backends.llama_cpp.cache import recurrent


class LlamaCpp:
    """See backends.base.Engine. libllama itself is loaded by devices, open and vocabulary only."""

    name = "llama_cpp"

    def devices(self) -> list[Device]:
        """The processors that it can use here."""
        from backends.llama_cpp import engine

        return engine.devices()

    def cuts(self, header: Header) -> Cuts:
        """Where it may cut the model."""
        return rules.cuts(header)

    def can_run(self, header: Header, weights: Weights = "auto") -> Ability:
        """Whatever it is given: what libllama does not know it refuses when it loads it."""
        return Ability("exact")

    def recipe(self, header: Header, first: int, last: int) -> Recipe:
        """How to write the main file of the window. Raises BackendFault if refused."""
        return recipe.recipe(header, first, last)

    def kv_bytes_per_cell(self, header: Header, kv_type: str = "f16") -> tuple[int, ...]:
        """Bytes of KV cache that one token takes, for each layer."""
        return cache.kv_bytes_per_cell(header, kv_type)

    def kv_types(self, header: Header) -> tuple[str, ...]:
        """The types that the model's KV cache can have."""
        return cache.kv_types(header)

    def rewinds(self, header: Header) -> bool:
        """Whether a slot can be trimmed to, and copied up to, any position."""
        return not recurrent(header)

    def open(self, settings: Settings) -> Backend:
        """An empty backend. Raises ImportError where llama-cpp-python is not installed."""
        from backends.llama_cpp import engine

        return engine.LlamaBackend(settings)

    def vocabulary(self, head: Path) -> Vocabulary:
        """The words of the model whose head.gguf this is. Raises BackendFault."""
        from backends.llama_cpp import vocabulary

        return vocabulary.LlamaVocabulary(head)


ENGINE: Engine = LlamaCpp()
