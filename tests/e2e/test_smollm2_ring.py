"""The real model through rings of real stage processes: the answer of one llama.cpp context."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from peer.models.imports import import_gguf
from peer.models.store import Store
from tests.e2e.rings import plan_of, running
from tests.plain_llama import PlainLlama
from tests.smollm2 import smollm2

TOKENS = 200
SHORT = "<|im_start|>user\nWhat is a ring?<|im_end|>\n<|im_start|>assistant\n"
LONG = "".join(f"In the year {year} a new ring was forged in the mountains. " for year in range(96))
Answers = dict[str, tuple[list[int], list[int]]]


@pytest.fixture(scope="module")
def answers() -> Answers:
    """Prompts and what one context answers to them, in chunks of 512."""
    found: Answers = {}
    with PlainLlama(smollm2(), cells=4096, batch=512) as whole:
        for text in (SHORT, LONG + SHORT):
            prompt = whole.tokenise(text)
            whole.clear()
            found["long" if text != SHORT else "short"] = prompt, whole.greedy(prompt, TOKENS, 512)
    assert 1400 < len(found["long"][0]) < 1700
    return found


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    import_gguf(smollm2(), Store(home))
    return home


@pytest.mark.parametrize("cuts", [[], [13], [10, 20], [2, 9, 16, 23]])
@pytest.mark.parametrize("length", ["short", "long"])
async def test_a_ring_of_processes_gives_the_tokens_of_one_context(
    home: Path, answers: Answers, cuts: list[int], length: str
) -> None:
    """Each in a ring of its own: what an answer leaves in its slot moves the next one's cells, and
    where they lie decides about the last bits."""
    prompt, expected = answers[length]
    store = Store(home)
    (stored,) = store.models()
    plan = plan_of(store, stored.manifest, cuts, "llama_cpp")
    # A step that verifies guesses has several rows, which other kernels compute: the last bits of
    # an answer with guesses are those of one context that is given the same batches.
    plan = replace(plan, split=replace(plan.split, speculation="off"))
    async with running(plan, store.folder(stored.digest)) as ring:
        assert await ring.tokens(prompt, TOKENS) == expected
        news = ring.news.values()
        weights = sum(stage.weights_bytes for stage in news)
        assert weights >= sum(part.data_bytes for part in stored.manifest.parts[1:])
