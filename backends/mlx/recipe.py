"""What a window's files are for MLX: the tensors are read where they lie, so next to nothing."""

from __future__ import annotations

from backends.base import BackendFault, Header, Recipe
from backends.llama_cpp.rules import cuts


def recipe(header: Header, first: int, last: int) -> Recipe:
    """The recipe of the window [first, last). Raises BackendFault (refused), saying why.

    A last window of a tied model has the embedding as its head; a first one gets it anyway.
    """
    if why := cuts(header).refusal(first, last):
        raise BackendFault(why, "refused")
    untied = "output.weight" in header.tensors
    whole = (first, last) == (0, header.layers)
    tail = last == header.layers
    return Recipe(
        write={},
        drop=("tokenizer.",),
        embed=whole or (tail and not untied),
        output=tail and untied,
    )
