"""NVIDIA cards, asked through their driver's management library: no engine and no context needed.

Loading an engine to ask for free memory takes a second and hundreds of MiB of a card; NVML answers
in milliseconds. Without an NVIDIA driver there are simply no cards.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

from peer.planning.profile import EngineProfile


@dataclass(frozen=True, slots=True)
class Card:
    """One NVIDIA card, named as CUDA names it."""

    name: str
    memory_free_bytes: int
    memory_total_bytes: int


def cards() -> tuple[tuple[Card, ...], str]:
    """The cards in the driver's order, and its version; ((), "") where there is none."""
    import pynvml  # nvidia-ml-py; here, because most peers never need it

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return (), ""
    try:
        found = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            name = pynvml.nvmlDeviceGetName(handle)
            found.append(Card(str(name), int(memory.free), int(memory.total)))
        return tuple(found), str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:  # a card that fell off the bus, a machine with unified memory
        return (), ""
    finally:
        pynvml.nvmlShutdown()


def refreshed(engines: Sequence[EngineProfile], found: Iterable[Card]) -> tuple[EngineProfile, ...]:
    """The engines with what NVIDIA cards have free now; others, and unknown cards, as they were.

    Cards of one name take their turns. Where the engine sees fewer of them than the driver, it is
    not known which: then each counts as the fullest.
    """
    by_name: dict[str, list[Card]] = {}
    for card in found:
        by_name.setdefault(card.name, []).append(card)
    wanted = [engine.device for engine in engines if engine.kind == "cuda"]
    result: list[EngineProfile] = []
    for engine in engines:
        same = by_name.get(engine.device, []) if engine.kind == "cuda" else []
        if same:
            if len(same) == wanted.count(engine.device) - sum(
                e.kind == "cuda" and e.device == engine.device for e in result
            ):
                free = same.pop(0).memory_free_bytes
            else:
                free = min(card.memory_free_bytes for card in same)
            engine = msgspec.structs.replace(engine, memory_free_bytes=max(0, free))
        result.append(engine)
    return tuple(result)
