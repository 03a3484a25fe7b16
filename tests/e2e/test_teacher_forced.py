"""Batched or not, the model says the same: top-1 agreement under a teacher's text.

This guards what exact equality under equal shapes cannot see: rows, positions or slots that are
mixed up as the shape changes. What llama.cpp itself does to a row as the shape changes is known: on
a processor with flash attention, steps of fewer than 64 rows give each row the same bits whatever
is beside it; from 64 rows on attention is computed in tiles, and 3.8 % of 630 likeliest tokens are
others (logits differ by up to 1). So prompts are read here in chunks below that on both sides, as a
difference in their reading would stay in the cache for good.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from backends.base import Settings
from peer.ring.scheduler import Scheduler
from tests.e2e.scheduled import Lockstep, Scheduled
from tests.plain_llama import PlainLlama
from tests.smollm2 import smollm2
from tests.windows import Ring, Stored

AGREEMENT = 0.99
TOKENS = 500  # at least so many are compared
CELLS, BATCH, SLOTS = 4096, 256, 8
EDGES = (15,)
CHUNK = 48
SETTINGS = Settings(SLOTS, CELLS, BATCH, threads=1, gpu_layers=0)
TEXTS = (
    "The baker opens his shop at six in the morning. By then the bread has been in the oven for an "
    "hour, and the whole street smells of it. The first people to come are the bus drivers, who "
    "take coffee and rolls. After them come the children on their way to school, and at nine the "
    "old people, who have time to talk. At noon he closes the door and goes to bed.",
    "Water boils at one hundred degrees at the level of the sea. High in the mountains the air is "
    "thinner, so it boils earlier, and an egg takes longer to cook. In a closed pot it is the "
    "other way around: the steam cannot leave, the pressure rises, and with it the temperature. "
    "This is why beans are soft after twenty minutes in such a pot and not after an hour.",
    "To change a wheel, first put the car on level ground and pull the brake. Loosen the nuts by "
    "half a turn while the wheel still stands on the road. Then lift the car with the jack, take "
    "the nuts off, and pull the wheel towards you. Put the new one on, turn the nuts by hand until "
    "they hold, let the car down, and tighten them in the shape of a star.",
    "My grandmother was born in a small village near the sea. Her father built boats, and her "
    "mother kept a garden with apple trees and a dozen hens. When she was ten years old the family "
    "moved to the city, because the boats were made in factories by then. She never learned to "
    "like the noise, and every summer she went back to look at the old house.",
    "A list in this language is an ordered collection of values. You make one by writing the "
    "values between square brackets, with commas between them. The first value has the index zero. "
    "You can add a value to the end with the method append, remove one with the method pop, and "
    "count them with the function len. Lists may contain other lists.",
    "The moon turns around the earth once in about twenty seven days. Because it turns around "
    "itself in the same time, we always see the same side of it. The other side was unknown until "
    "a probe flew around it and sent pictures home. There are fewer dark plains on that side and "
    "many more craters, and nobody is quite sure why the two sides are so different.",
    "Dear Anna, thank you for your letter and for the photographs. The children have grown so "
    "much. We are well here, although the winter was long and the roof leaked in two places. Paul "
    "has found work at the harbour, and I teach three days a week. We hope that you will come in "
    "August, when the plums are ripe. The room under the roof is yours for as long as you like.",
    "Chess is played by two people on a board of sixty four squares. Each of them has sixteen "
    "pieces: a king, a queen, two rooks, two bishops, two knights and eight pawns. White moves "
    "first. A player wins when the king of the other one is attacked and cannot escape. If a "
    "player cannot move and the king is not attacked, the game is a draw.",
)


@pytest.fixture(scope="module")
def whole() -> Iterator[PlainLlama]:
    with PlainLlama(smollm2(), cells=CELLS, batch=BATCH, slots=SLOTS) as plain:
        yield plain


@pytest.fixture(scope="module")
def texts(whole: PlainLlama) -> list[list[int]]:
    return [whole.tokenise(text) for text in TEXTS]


@pytest.fixture(scope="module")
def alone(whole: PlainLlama, texts: list[list[int]]) -> list[NDArray[np.int64]]:
    """The likeliest token after each of a text's, one row a step and nothing else in the cache."""
    return [said_alone(whole, ids, 1) for ids in texts]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    return Stored(smollm2(), tmp_path_factory.mktemp("home"))


@pytest.fixture
def ring(stored: Stored) -> Iterator[Ring]:
    with stored.cut(EDGES, SETTINGS) as windows:
        yield windows


def said_alone(whole: PlainLlama, ids: Sequence[int], first: int) -> NDArray[np.int64]:
    """The likeliest token after ids[:first], ids[: first + 1], …; the first ones in chunks."""
    whole.clear()
    edges = [*range(0, first, CHUNK), *range(first, len(ids) + 1)]
    said = [whole.step(ids[a:b], range(a, b))[-1].argmax() for a, b in pairwise(edges)]
    return np.array(said[-(len(ids) - first + 1) :])


def turn(who: str, text: str) -> str:
    return f"<|im_start|>{who}\n{text}<|im_end|>\n"


def agreement(
    expected: Sequence[NDArray[np.int64]], given: Sequence[NDArray[np.int64]]
) -> tuple[float, int]:
    """The part of the tokens that is the same, of how many."""
    ours, theirs = np.concatenate(given), np.concatenate(expected)
    assert ours.shape == theirs.shape
    return float((ours == theirs).mean()), len(ours)


def test_eight_sequences_in_one_batch_say_what_each_says_alone(
    ring: Ring, texts: list[list[int]], alone: list[NDArray[np.int64]]
) -> None:
    """One row of each a step, as decoding in batches has it."""
    given: list[list[int]] = [[] for _ in texts]
    for at in range(max(map(len, texts))):
        slots = [slot for slot, ids in enumerate(texts) if at < len(ids)]
        logits = ring.step([texts[slot][at] for slot in slots], [at] * len(slots), slots=slots)
        for slot, token in zip(slots, logits.argmax(1), strict=True):
            given[slot].append(int(token))
    part, tokens = agreement(alone, [np.array(ids) for ids in given])
    assert tokens >= TOKENS
    assert part >= AGREEMENT


@pytest.mark.parametrize("guesses", [4, 62])
def test_rows_that_verify_guesses_say_what_single_steps_say(
    ring: Ring, texts: list[list[int]], alone: list[NDArray[np.int64]], guesses: int
) -> None:
    given = []
    for slot, ids in enumerate(texts):
        edges = [*range(0, len(ids), 1 + guesses), len(ids)]
        given.append(
            np.concatenate(
                [
                    ring.step(ids[a:b], range(a, b), slots=[slot] * (b - a)).argmax(1)
                    for a, b in pairwise(edges)
                ]
            )
        )
    part, tokens = agreement(alone, given)
    assert tokens >= TOKENS
    assert part >= AGREEMENT


def test_answers_out_of_shared_steps_are_what_the_model_says_after_the_same_ids(
    ring: Ring, whole: PlainLlama
) -> None:
    """Through the real scheduler: prompts in chunks, beginnings that are copied, guesses that are
    right and wrong; then each answer is read alone, from its own ids."""
    home = Scheduled(
        Lockstep(ring, None),
        Scheduler(SLOTS, 512, CELLS, BATCH, 60.0, depth=2, chunk_tokens=CHUNK, speculate=True),
    )
    system = whole.tokenise(turn("system", "You are a writer, and like what you are given."))
    prompts = [
        [*system, *whole.tokenise(turn("user", text) + "<|im_start|>assistant\n")]
        for text in (*TEXTS[:6], *(f"Repeat this word for word: {text}" for text in TEXTS[6:]))
    ]
    for some, tokens_max in (range(6), 56), (range(6, 8), 96):
        for name in some:
            home.ask(str(name), prompts[name], tokens_max)
        home.run()
    assert max(sum(rows for _, rows in shape) for shape in home.shapes) < 64
    assert home.scheduler.reused > 0
    assert 0 < home.scheduler.accepted < home.scheduler.drafted
    given = [np.array(ids) for ids in home.answers.values()]
    expected = [
        said_alone(whole, [*prompt, *answer[:-1]], len(prompt))
        for prompt, answer in zip(prompts, home.answers.values(), strict=True)
    ]
    part, tokens = agreement(expected, given)
    assert tokens >= TOKENS
    assert part >= AGREEMENT
