"""models.kinds: which layers are alike, and what a token reads of them."""

from __future__ import annotations

from collections.abc import Sequence

from backends.base import Header
from peer.models import gguf
from peer.models.kinds import active_bytes, layer_families, layer_kinds, vocabulary
from peer.models.manifest import FORMAT, Manifest, PartEntry, TensorEntry, region_bytes

Facts = Sequence[tuple[str, tuple[int, ...], str]]


def part(name: str, facts: Facts) -> PartEntry:
    tensors, reached = [], 0
    for tensor, shape, kind in facts:
        size = gguf.tensor_bytes(kind, shape)
        tensors.append(TensorEntry(tensor, kind, shape, reached, size))
        reached += gguf.aligned(size)
    return PartEntry(name, reached, "0" * 64, region_bytes("llama", tensors), tuple(tensors))


def manifest(layers: Sequence[Facts]) -> Manifest:
    named = [
        part(f"layer-{i:03d}", [(f"blk.{i}.{name}", *rest) for name, *rest in facts])  # type: ignore[misc]
        for i, facts in enumerate(layers)
    ]
    embed = part("embed", [("token_embd.weight", (32, 1000), "F16")])
    return Manifest(FORMAT, "m", "llama", len(layers), (embed, *named))


DENSE: Facts = [("ffn_up.weight", (32, 64), "Q4_0"), ("attn_norm.weight", (32,), "F32")]
FINER: Facts = [("ffn_up.weight", (32, 64), "Q8_0"), ("attn_norm.weight", (32,), "F32")]
EXPERTS: Facts = [
    ("ffn_up_exps.weight", (32, 64, 8), "Q4_0"),
    ("ffn_up_shexp.weight", (32, 64), "Q4_0"),
    ("ffn_gate_inp.weight", (32, 8), "F32"),
]


def test_layers_of_one_kind_have_the_same_tensors_shapes_and_types() -> None:
    found = manifest([DENSE, FINER, DENSE, list(reversed(FINER)), EXPERTS, DENSE])
    assert layer_kinds(found) == (0, 1, 0, 1, 2, 0)
    assert layer_families(found) == (0, 0, 0, 0, 1, 0)
    assert vocabulary(found) == 1000


def test_from_the_eighth_kind_on_they_count_as_one() -> None:
    found = manifest([[("x.weight", (32, n + 1), "F32")] for n in range(11)])
    assert layer_kinds(found) == (0, 1, 2, 3, 4, 5, 6, 7, 7, 7, 7)
    assert layer_families(found) == tuple(range(11))


def header(**values: object) -> Header:
    plain = {f"llama.{key}": value for key, value in values.items()}
    return Header({"general.architecture": "llama", "llama.block_count": 2, **plain}, {})


def test_of_the_experts_only_those_that_are_used_are_read() -> None:
    found = manifest([DENSE, EXPERTS])
    dense, experts = (part.data_bytes for part in found.parts[1:])
    of_experts = gguf.tensor_bytes("Q4_0", (32, 64, 8))
    some = (dense, experts - of_experts * 3 // 4)
    assert active_bytes(found, header(expert_count=8, expert_used_count=2)) == some
    assert active_bytes(found, header(expert_count=8, expert_used_count=[0, 2])) == some


def test_headers_that_say_nothing_sensible_of_experts_mean_all_of_them() -> None:
    found = manifest([DENSE, EXPERTS])
    whole = tuple(part.data_bytes for part in found.parts[1:])
    for values in (
        {},
        {"expert_count": 8},
        {"expert_count": 8, "expert_used_count": 9},
        {"expert_count": "many", "expert_used_count": -1},
        {"expert_count": [8], "expert_used_count": []},
    ):
        assert active_bytes(found, header(**values)) == whole
