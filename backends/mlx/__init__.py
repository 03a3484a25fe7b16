"""MLX: windows of a GGUF model's layers on Apple's chips, from the same parts as llama.cpp's.

See `archs` for which models, `repack` for which types of tensors. What is asked of headers imports
no mlx; only `devices` and `open` do.
"""

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
from backends.llama_cpp import cache, rules


class Mlx:
    """See backends.base.Engine."""

    name = "mlx"

    def devices(self) -> list[Device]:
        """The processors that it can use here. Raises ImportError where mlx is not installed."""
        from backends.mlx import library

        return library.devices()

    def cuts(self, header: Header) -> Cuts:
        """Where it may cut the model: where llama.cpp may, because one plan is for both."""
        return rules.cuts(header)

    def can_run(self, header: Header, weights: Weights = "auto") -> Ability:
        """Whether it can run the model, and what it weighs in memory then."""
        from backends.mlx import ability

        return ability.can_run(header, weights)

    def recipe(self, header: Header, first: int, last: int) -> Recipe:
        """How to write the main file of the window. Raises BackendFault if refused."""
        from backends.mlx import recipe

        return recipe.recipe(header, first, last)

    def kv_bytes_per_cell(self, header: Header, kv_type: str = "f16") -> tuple[int, ...]:
        """Bytes of KV cache that one token takes, for each layer: float16 whatever is asked."""
        return cache.kv_bytes_per_cell(header)

    def kv_types(self, header: Header) -> tuple[str, ...]:
        """The type that the model's KV cache can have."""
        return ("f16",)

    def rewinds(self, header: Header) -> bool:
        """Whether a slot can be trimmed to, and copied up to, any position: no row of its table
        has a layer with a state."""
        return True

    def open(self, settings: Settings) -> Backend:
        """An empty backend. Raises ImportError where mlx or mlx-lm are not installed."""
        if settings.island is not None:
            from backends.mlx import island

            return island.IslandBackend(settings)
        from backends.mlx import engine

        return engine.MlxBackend(settings)

    def vocabulary(self, head: Path) -> Vocabulary:
        """llama.cpp's: which engine holds a model's tail changes no token's spelling."""
        from backends.llama_cpp import vocabulary

        return vocabulary.LlamaVocabulary(head)


ENGINE: Engine = Mlx()
