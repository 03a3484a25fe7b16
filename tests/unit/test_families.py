"""Shapes by name have the sizes of the files that people download, and their layers."""

from __future__ import annotations

import pytest

from peer.planning.families import FAMILIES, QUANTS, is_shape, shape
from peer.planning.profile import ModelShape
from peer.planning.split import unusable

# Bytes of the GGUF files as they are published, in thousands of millions.
FILES = {
    "1B:q4_k_m": 0.808, "3B:q4_k_m": 2.019, "7B:q4_k_m": 4.081, "8B:q4_k_m": 4.921,
    "13B:q4_k_m": 7.866, "14B:q4_k_m": 8.988, "30B:q4_k_m": 19.62, "32B:q4_k_m": 19.85,
    "34B:q4_k_m": 20.22, "65B:q4_k_m": 39.28, "70B:q4_k_m": 42.52, "405B:q4_k_m": 243.0,
    "8B:q4_0": 4.661, "8B:q5_k_m": 5.733, "8B:q6_k": 6.596, "8B:q8_0": 8.541, "8B:f16": 16.07,
}  # fmt: skip


def file_bytes(of: ModelShape) -> int:
    return of.head_bytes + of.window_bytes(0, of.layers)


@pytest.mark.parametrize("text", FILES)
def test_a_shape_weighs_what_the_published_file_does(text: str) -> None:
    assert file_bytes(shape(text)) / 1e9 == pytest.approx(FILES[text], rel=0.01)


@pytest.mark.parametrize("size", FAMILIES)
@pytest.mark.parametrize("quant", QUANTS)
def test_every_shape_can_be_planned_with(size: str, quant: str) -> None:
    of = shape(f"{size}:{quant}")
    assert unusable(of) == ""
    assert len(of.layer_bytes) == len(of.kinds) == of.layers
    by_kind = {(kind, size) for kind, size in zip(of.kinds, of.layer_bytes, strict=True)}
    assert len(by_kind) == len(set(of.kinds)), "layers of one kind weigh the same"


def test_layers_with_more_bits_are_a_kind_of_their_own() -> None:
    of = shape("8B:q4_k_m")
    assert of.kinds[:8] == (0, 0, 0, 0, 1, 1, 0, 1)
    assert of.kinds[-4:] == (0, 0, 0, 0)
    assert of.layer_bytes[0] > of.layer_bytes[4]
    assert set(shape("8B:q8_0").kinds) == {0}


def test_a_tied_model_has_no_output_of_its_own() -> None:
    of = shape("1b")
    assert of.tied
    assert of.output_bytes == 0
    assert of.embed_bytes > 0
    assert of.model == "llama-3.2-1b-q4_k_m", "without a quantisation, the usual one"


def test_two_shapes_are_two_models() -> None:
    every = [shape(f"{size}:{quant}") for size in FAMILIES for quant in QUANTS]
    assert len({of.digest for of in every}) == len({of.model for of in every}) == len(every)


@pytest.mark.parametrize("text", ["9B", "8B:q9", "", ":", "8B:q4_k_m:x"])
def test_an_unknown_shape_names_those_there_are(text: str) -> None:
    with pytest.raises(ValueError, match=r"SIZE:QUANT of 1B, 3B.*405B and q4_0.*f16"):
        shape(text)


def test_what_looks_like_a_shape_is_no_file() -> None:
    assert is_shape("70B:q4_k_m")
    assert is_shape("8b")
    assert not any(map(is_shape, ["8B.gguf", "./8B", "smollm2", "models/8B:q4_0"]))
