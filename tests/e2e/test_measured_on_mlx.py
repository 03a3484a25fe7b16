"""Speeds on MLX, with real random layers: of a model whose layers are of two kinds."""

from __future__ import annotations

from pathlib import Path

import pytest

from peer.config import Config
from peer.planning import survey
from tests import mlx_models, random_models
from tests.windows import Stored

pytest.importorskip("mlx.core", reason="needs the mlx extra")
pytest.importorskip("llama_cpp", reason="needs the llama extra")


def odd_layers_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only every second layer's matrices are quantised, as in most files only some are."""
    is_matrix = random_models._is_matrix

    def some(name: str, shape: tuple[int, ...]) -> bool:
        layer = name.removeprefix("blk.").partition(".")[0]
        return is_matrix(name, shape) and not (layer.isdecimal() and int(layer) % 2)

    monkeypatch.setattr(random_models, "_is_matrix", some)


async def test_layers_that_stand_in_for_others_are_read_as_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")
    odd_layers_plain(monkeypatch)
    monkeypatch.setitem(mlx_models.MODELS, "mixed", mlx_models.tiny("llama", quantised="Q8_0"))
    path = mlx_models.written("mixed", tmp_path / "m.gguf")
    stored = Stored(path, tmp_path)
    shape = await survey.shape("mlx", stored.folder)
    assert shape.kinds == (0, 1, 0, 1, 0, 1)
    (fit,) = shape.fits
    assert (fit.backend, fit.how) == ("mlx", "exact")
    assert fit.layer_bytes[0] > shape.layer_bytes[0], "Q8_0 is repacked"
    assert fit.layer_bytes[1] == shape.layer_bytes[1]
    config = Config.fast_test(home=tmp_path, backend="mlx", threads=1)
    (speed,) = await survey.speeds(config, stored.folder, shape)
    assert (speed.backend, speed.kind) == ("mlx", "cpu")
    assert len(speed.decode_s) == len(speed.prefill_s) == 2
    assert min(speed.decode_s) > 0
