"""Batches, reused beginnings and verified guesses give the very numbers of the whole model.

llama.cpp on a processor computes a row a little differently in another batch shape, so equality is
asked for, to the last bit, under the same shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from backends.base import Settings
from peer.ring.scheduler import Scheduler
from tests.e2e.scheduled import Lockstep, Scheduled
from tests.plain_llama import PlainLlama
from tests.smollm2 import smollm2
from tests.windows import Stored

CELLS, BATCH, SLOTS = 2048, 256, 8
EDGES = (15,)
SYSTEM = (
    "<|im_start|>system\nYou keep bees in the mountains and answer visitors politely. You know all "
    "about hives, honey, wax, queens, drones, swarms, flowers and the weather. You never speak of "
    "politics, you like short sentences, and you end each answer with a good wish.<|im_end|>\n"
)
ASKED = ("How do bees make honey?", "When do they swarm?", "What does a drone do all day?")
EDIT = (
    "<|im_start|>user\nRepeat this list word for word:\n"
    + "".join(f"{n}. The {what} stands in the garden.\n" for n, what in enumerate(
        ("apple tree", "old bench", "blue hive", "stone wall", "long ladder", "water pump"), 1))
    + "<|im_end|>\n<|im_start|>assistant\n1. The apple tree stands in the garden.\n2. The"
)  # fmt: skip


def turn(text: str) -> str:
    """A user's turn, and the beginning of the answer."""
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def whole() -> Iterator[PlainLlama]:
    with PlainLlama(smollm2(), cells=CELLS, batch=BATCH, slots=SLOTS) as plain:
        yield plain


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    return Stored(smollm2(), tmp_path_factory.mktemp("home"))


@pytest.fixture
def both(stored: Stored, whole: PlainLlama) -> Iterator[Lockstep]:
    """Two windows in one backend, and the whole model in one context, both empty."""
    whole.clear()
    settings = Settings(SLOTS, CELLS, BATCH, threads=1, gpu_layers=0)
    with stored.cut(EDGES, settings) as ring:
        yield Lockstep(ring, whole)


def make(**changes: object) -> Scheduler:
    values: dict[str, object] = {"depth": 2, "chunk_tokens": 48, "speculate": True}
    return Scheduler(SLOTS, 1024, CELLS, BATCH, 60.0, **(values | changes))  # type: ignore[arg-type]


def test_answers_that_begin_alike_and_go_on_are_those_of_the_same_batches(both: Lockstep) -> None:
    """Three visitors with one long system prompt, at once; then each of them asks again."""
    words = both.whole.tokenise
    scheduler = make()
    home = Scheduled(both, scheduler)
    prompts = {text: words(SYSTEM + turn(text)) for text in ASKED}
    for text, prompt in prompts.items():
        home.ask(text, prompt, 24)
    home.run()
    system = len(words(SYSTEM))
    assert scheduler.reused >= 2 * (system - 1)
    assert both.counts["copies"] >= 2
    assert both.counts["shared steps"] > 10
    assert home.ahead >= 2

    reused, read = scheduler.reused, scheduler.read
    for text, prompt in prompts.items():
        again = [*prompt, *home.answers[text], *words("<|im_end|>\n" + turn("And in winter?"))]
        home.ask(text + " again", again, 24)
    home.run()
    assert scheduler.reused - reused > sum(map(len, prompts.values()))
    assert scheduler.read - read < 3 * 24
    assert all(len(ids) == 24 for ids in home.answers.values())


def test_a_slot_that_was_given_up_and_an_answer_that_was_put_back_change_nothing(
    both: Lockstep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So few cells that answers do not fit beside each other, as they find out while they grow."""
    monkeypatch.setattr("peer.ring.scheduler.STRETCH_TOKENS", 8)
    words = both.whole.tokenise
    scheduler = Scheduler(3, 180, 300, 32, 60.0, depth=2, chunk_tokens=24)
    home = Scheduled(both, scheduler)
    for text in (*ASKED, "What is wax?"):
        home.ask(text, words(SYSTEM + turn(text)), 60)
        home.run(3)
    home.run()
    assert home.opened > 4
    assert all(len(ids) == 60 for ids in home.answers.values())


def test_guesses_right_and_wrong_give_the_tokens_of_the_rows_that_verify_them(
    both: Lockstep,
) -> None:
    words = both.whole.tokenise
    scheduler = make()
    home = Scheduled(both, scheduler)
    home.ask("edit", words(EDIT), 60)
    home.run()
    assert scheduler.accepted > 20
    assert scheduler.drafted > scheduler.accepted
    assert both.counts["steps"] < 50
    assert max(rows for shape in home.shapes for _, rows in shape[-1:]) > 4


def test_what_a_guess_that_was_wrong_left_behind_is_forgotten(both: Lockstep) -> None:
    """Verified by hand: right and wrong guesses, trims, another answer in the same steps."""
    words = both.whole.tokenise
    first, second = words(turn(ASKED[0])), words(turn(ASKED[1]))

    def step(*rows: tuple[int, int, Sequence[int], int]) -> list[int]:
        """rows: slot, position, ids, output rows. The likeliest tokens."""
        slots = [slot for slot, _, ids, _ in rows for _ in ids]
        positions = [at for _, first, ids, _ in rows for at in range(first, first + len(ids))]
        said = [token for *_, ids, _ in rows for token in ids]
        wanted = [i >= len(ids) - n for *_, ids, n in rows for i in range(len(ids))]
        return both.step(said, positions, slots, wanted).argmax(1).tolist()

    a, b = step((0, 0, first, 1), (1, 0, second, 1))
    na, nb = len(first), len(second)
    (guess,) = step((0, na, [a], 1))
    both.trim(0, na)  # as if it had never been
    a1, a2, b1 = step((0, na, [a, guess], 2), (1, nb, [b], 1))
    assert a1 == guess
    wrong = step((0, na + 2, [a2, 11, 12, 13], 4), (1, nb + 1, [b1, 7, 8], 3))
    both.trim(0, na + 3)
    both.trim(1, nb + 2)
    both.copy(0, 2, na + 2)
    then = step((0, na + 3, [wrong[0]], 1), (1, nb + 2, [wrong[4]], 1), (2, na + 2, [a2], 1))
    assert then[2] == wrong[0]  # the copy says what the slot itself said after the same ids
