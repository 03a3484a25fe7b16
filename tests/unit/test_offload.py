"""How many layers libllama is told to put on the GPU, as far as that shows without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from backends.base import BackendFault, Settings
from backends.llama_cpp.library import library
from backends.llama_cpp.window import LoadedWindow
from tests import random_models
from tests.windows import Stored


@pytest.mark.parametrize(
    ("offload", "wanted", "told"),
    [(True, 3, 4), (True, 1, 2), (True, 0, 0), (True, -1, -1), (False, 3, 0), (False, -1, 0)],
)
def test_libllama_counts_the_output_as_a_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offload: bool, wanted: int, told: int
) -> None:
    path = random_models.write(random_models.Model("llama"), tmp_path / "model.gguf")
    window = Stored(path, tmp_path).window(2, 6)
    asked: list[int] = []

    def load(_paths: Any, _count: int, params: Any) -> None:
        asked.append(params.n_gpu_layers)

    lib = library()
    monkeypatch.setattr(lib.llama, "llama_supports_gpu_offload", lambda: offload)
    monkeypatch.setattr(lib.llama, "llama_model_load_from_splits", load)
    with pytest.raises(BackendFault, match="cannot be loaded"):
        LoadedWindow(lib, Settings(1, 64, 8, 1, wanted), window)
    assert asked == [told]
