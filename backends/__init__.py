"""Engines that run a window of layers. `load(name)` is the only door."""

from __future__ import annotations

from importlib import import_module

from backends.base import Engine

_ENGINES = {
    "llama_cpp": "backends.llama_cpp",
    "mlx": "backends.mlx",
    "fake": "backends.fake",
}


def load(name: str) -> Engine:
    """Import the engine `name` and return it.

    Raises: ImportError where its library is not installed, KeyError for an unknown name.
    """
    engine: Engine = import_module(_ENGINES[name]).ENGINE
    return engine
