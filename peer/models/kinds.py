"""Which layers of a model are alike, and what one token reads of each: from its manifest. Pure."""

from __future__ import annotations

from backends.base import Header
from peer.models.manifest import Manifest, PartEntry, layer_part
from peer.planning.profile import KINDS_MAX

_EMBEDDING = "token_embd.weight"


def layer_kinds(manifest: Manifest) -> tuple[int, ...]:
    """The kind of each layer: its tensors' names, shapes and types. Numbers in order of appearance.

    From the KINDS_MAX-th on all count as one.
    """
    return _numbered(manifest, types=True, most=KINDS_MAX)


def layer_families(manifest: Manifest) -> tuple[int, ...]:
    """Which layers have the same tensors in the same shapes, of whatever types."""
    return _numbered(manifest, types=False, most=manifest.layers)


def _numbered(manifest: Manifest, *, types: bool, most: int) -> tuple[int, ...]:
    known: dict[tuple[object, ...], int] = {}
    numbers = []
    for layer in range(manifest.layers):
        tensors = manifest.part(layer_part(layer)).tensors
        facts = (
            (t.name.removeprefix(f"blk.{layer}."), t.shape, t.type if types else "")
            for t in tensors
        )
        numbers.append(known.setdefault(tuple(sorted(facts)), len(known)))
    return tuple(min(number, most - 1) for number in numbers)


def active_bytes(manifest: Manifest, header: Header) -> tuple[int, ...]:
    """Bytes of each layer that one token reads: of the experts only those that it uses."""
    experts = _each(header, "expert_count")
    used = _each(header, "expert_used_count")
    return tuple(
        _active(manifest.part(layer_part(layer)), used[layer], experts[layer])
        for layer in range(manifest.layers)
    )


def vocabulary(manifest: Manifest) -> int:
    """How many tokens the model knows; 0 where its embedding does not say."""
    tensors = manifest.part("embed").tensors
    found = (t.shape[-1] for t in tensors if t.name == _EMBEDDING)
    number = next(found, 0)
    return number if number <= 1 << 31 else 0


def _active(part: PartEntry, used: int, experts: int) -> int:
    of_experts = sum(t.size for t in part.tensors if "exps." in t.name)
    if not 0 < used < experts:
        return part.data_bytes
    return part.data_bytes - of_experts + of_experts * used // experts


def _each(header: Header, key: str) -> list[int]:
    """A number of the header for each layer, 0 where it has none."""
    value = header.metadata.get(f"{header.architecture}.{key}", 0)
    values = value if isinstance(value, list) else [value] * header.layers
    values = [*values, *[0] * header.layers][: header.layers]
    return [v if isinstance(v, int) and 0 <= v < 1 << 32 else 0 for v in values]
