"""planning.gpus: cards are asked through their driver, and a machine without one misses nothing."""

from __future__ import annotations

import pynvml
import pytest

from peer.planning import gpus
from peer.planning.gpus import Card, refreshed
from peer.planning.profile import EngineProfile

CPU = EngineProfile("llama_cpp", "CPU", "cpu", 7, 9)


def card(name: str, free: int) -> EngineProfile:
    return EngineProfile("llama_cpp", name, "cuda", free, 100)


def test_without_a_driver_there_are_no_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", none)
    assert gpus.cards() == ((), "")


def test_a_card_that_does_not_answer_is_left_out_with_the_library_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    closed: list[bool] = []

    def lost() -> int:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)

    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lost)
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: closed.append(True))
    assert gpus.cards() == ((), "")
    assert closed


def test_what_is_free_is_renewed_and_everything_else_stays() -> None:
    metal = EngineProfile("llama_cpp", "A", "metal", 5, 6)
    engines = (CPU, card("A", 50), metal, card("B", 60))
    found = refreshed(engines, [Card("A", 11, 100), Card("B", 22, 100)])
    assert [engine.memory_free_bytes for engine in found] == [7, 11, 5, 22]
    assert refreshed(engines, []) == engines


def test_twins_keep_their_order_and_unclear_ones_count_as_the_fullest() -> None:
    twins = (card("A", 1), card("A", 1))
    cards = [Card("A", 30, 100), Card("A", 20, 100)]
    assert [engine.memory_free_bytes for engine in refreshed(twins, cards)] == [30, 20]
    assert [engine.memory_free_bytes for engine in refreshed(twins[:1], cards)] == [20]
