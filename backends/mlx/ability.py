"""Whether MLX runs a model and what it weighs there, from the header alone: see `Ability`.

Bytes are those of the parts that a planner counts: each layer's tensors, the token embedding, the
output matrix. Small tensors outside of them lie in head.gguf and are counted by nobody's engine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from backends.base import Ability, BackendFault, Header, TensorFact, Weights
from backends.mlx import archs, blocks, repack, shares

LAYERS_MAX = 4096  # of which a planner can know

_TYPES_TOLD = 4  # of those that are missing, most frequent first


def can_run(header: Header, weights: Weights = "auto") -> Ability:
    """Whether MLX runs the model exactly, with some weights rounded, or not, and why."""
    if isinstance(header.layers, bool) or not 1 <= header.layers <= LAYERS_MAX:
        return Ability("no", f"a model of {header.layers} layers is none that MLX can run")
    if why := archs.refusal(header) or _missing(header, weights):
        return Ability("no", why)
    try:
        layers, embed, output, changed = _sizes(header, weights)
    except BackendFault as fault:
        return Ability("no", f"its header is not to be trusted: {fault}")
    rounded = _of(header, weights, "approximate")
    told = (layers, embed, output) if changed else ((), 0, 0)
    ranks = shares.ranks_of(header)
    if not rounded:
        return Ability("exact", "", *told, ranks)
    return Ability("approximate", _roundings(rounded, weights), *told, ranks)


def _of(header: Header, weights: Weights, how: str) -> list[tuple[str, int]]:
    """Types of tensors that are kept like this, with how many there are, most frequent first."""
    counted = Counter(fact.type for fact in header.tensors.values())
    return [(t, n) for t, n in counted.most_common() if repack.how(t, weights) == how]


def _missing(header: Header, weights: Weights) -> str:
    """Which types of tensors MLX has not, "" where it has all."""
    missing = _of(header, weights, "no")
    if not missing:
        return ""
    named = [type_name[:16] for type_name, _ in missing[:_TYPES_TOLD]]
    more = len(missing) - len(named)
    named += [f"{more} other {'type' if more == 1 else 'types'}"] if more else []
    count = sum(number for _, number in missing)
    are = "is" if count == 1 else "are"
    why = f"MLX has no {_listed(named, 'or')}, which {count} of its tensors {are}"
    if all(repack.how(type_name, "auto") == "approximate" for type_name, _ in missing):
        why += '; the setting weights = "auto" lets it keep these as float16'
    return why


def _roundings(rounded: list[tuple[str, int]], weights: Weights) -> str:
    """What is not kept as it is in the file, in words."""
    said = []
    for kept in ("requantised to 8 bits", "kept as float16"):
        types = [
            f"{count} {'tensor' if count == 1 else 'tensors'} of {type_name}"
            for type_name, count in rounded
            if (kept == "kept as float16") != repack.requantises(type_name, weights)
        ]
        if types:
            alone = len(types) == 1 and types[0].startswith("1 tensor ")
            said.append(f"{_listed(types)} {'is' if alone else 'are'} {kept}")
    return _listed(said)


def _listed(items: Iterable[str], word: str = "and") -> str:
    """a, b and c."""
    *first, last = items
    return f"{', '.join(first)} {word} {last}" if first else last


def _sizes(header: Header, weights: Weights) -> tuple[tuple[int, ...], int, int, bool]:
    """Bytes in memory of each layer, of embedding and output, and whether any differ from the file.

    Raises BackendFault for tensors that cannot be.
    """
    layers = [0] * header.layers
    ends = {"embed": 0, "output": 0}
    known: dict[
        tuple[str, tuple[int, ...]], tuple[int, int]
    ] = {}  # few kinds of tensors, many of each
    changed = False
    for name, fact in header.tensors.items():
        kind = fact.type, fact.shape
        if kind not in known:
            known[kind] = _in_file_and_memory(name, fact, weights)
        in_file, size = known[kind]
        if fact.size != in_file:
            raise BackendFault(f"{name[:64]} has {fact.size} bytes instead of {in_file}", "refused")
        changed = changed or size != in_file
        place = _layer_of(name)
        if 0 <= place < header.layers:
            layers[place] += size
        elif name.startswith(("token_embd.", "per_layer_token_embd.")):
            ends["embed"] += size
        elif name.startswith("output."):
            ends["output"] += size
    return tuple(layers), ends["embed"], ends["output"], changed


def _in_file_and_memory(name: str, fact: TensorFact, weights: Weights) -> tuple[int, int]:
    """Bytes of such a tensor. Raises BackendFault, naming the tensor."""
    try:
        in_file = blocks.size_bytes(fact.type, fact.shape)
        return in_file, repack.memory_bytes(fact.type, fact.shape, weights)
    except BackendFault as fault:
        raise BackendFault(f"{name[:64]}: {fault}", "refused") from None


def _layer_of(name: str) -> int:
    """The layer that a tensor belongs to, -1 for none: "blk.7.attn_q.weight" → 7."""
    first, _, rest = name.partition(".")
    number = rest.partition(".")[0]
    if first != "blk" or not number.isdecimal() or not number.isascii() or len(number) > 6:
        return -1
    return int(number)
