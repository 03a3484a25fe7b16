"""Guesses: what lookup finds, when and for how long a guess pays, and what is never wasted."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest

from peer.ring.speculation import Lookup, Speculation, best

Cost = Callable[[int], float]

# Measured: a small model on two cores, seconds by rows.
CPU = {1: 0.0071, 2: 0.0175, 3: 0.024, 4: 0.030, 5: 0.039, 8: 0.049, 16: 0.083, 116: 0.553}


def cpu(hops_s: float = 0.0) -> Cost:
    rows = list(CPU)

    def cost_s(guessed: int) -> float:
        last = max(1, bisect_left(rows, 1 + guessed))
        low, high = rows[last - 1], rows[last]
        share = (1 + guessed - low) / (high - low)
        return CPU[low] + share * (CPU[high] - CPU[low]) + hops_s

    return cost_s


def gpu(guessed: int) -> float:
    """Rows cost next to nothing."""
    return 0.008 + 0.00002 * guessed


def hostile(guessed: int) -> float:
    """Every row costs a step."""
    return 0.01 * (1 + guessed)


@dataclass
class Answered:
    """How an answer came about."""

    steps: int = 0
    seconds: float = 0.0
    drafted: int = 0
    right: int = 0
    drafts: list[tuple[int, int, int]] = field(default_factory=list)  # at, of so many, right


def answer(
    prompt: Sequence[int], truth: Sequence[int], cost: Cost, most: int = 64,
    speculation: Speculation | None = None,
) -> Answered:  # fmt: skip
    """Give the answer `truth` as the head and the tail would."""
    speculation = speculation or Speculation(prompt)
    done, at = Answered(), 0
    while at < len(truth):
        guess = speculation.draft(min(most, len(truth) - at), cost)
        right = 0
        most_right = min(len(guess), len(truth) - at - 1)
        while right < most_right and guess[right] == truth[at + right]:
            right += 1
        done.steps += 1
        done.seconds += cost(len(guess))
        done.drafted += len(guess)
        done.right += right
        done.drafts.append((at, len(guess), right))
        speculation.took(truth[at : at + right + 1])
        at += right + 1
    return done


def noise(count: int, of: int, seed: int = 1) -> list[int]:
    dice = random.Random(seed)
    return [dice.randrange(of) for _ in range(count)]


# Lookup ------------------------------------------------------------------------------------------


def test_what_followed_the_last_ids_is_guessed() -> None:
    assert Lookup([1, 2, 3, 4, 5, 6, 7, 2, 3]).draft(3) == (4, 5, 6)


@pytest.mark.parametrize("ids", [[], [1], [1, 2], [1, 2, 3, 4], [1, 2, 3, 2], [5, 6, 7, 8, 7, 6]])
def test_nothing_is_guessed_where_the_last_two_did_not_occur_before(ids: list[int]) -> None:
    lookup = Lookup(ids)
    assert lookup.draft(5) == ()
    assert lookup.matched == 0


def test_the_longest_match_is_followed() -> None:
    lookup = Lookup([9, 1, 2, 3, 50, 8, 2, 3, 60, 9, 1, 2, 3])
    assert lookup.draft(1) == (50,)
    assert lookup.matched == 4


def test_of_equal_matches_the_latest_is_followed() -> None:
    assert Lookup([1, 2, 50, 4, 1, 2, 60, 5, 1, 2]).draft(1) == (60,)


def test_a_match_goes_on_while_it_holds_and_is_looked_for_anew_when_it_breaks() -> None:
    lookup = Lookup([*range(100, 120), 7, 7, 40, 41, 42])
    lookup.extend([105, 106])
    assert lookup.draft(2) == (107, 108)
    lookup.extend([107])
    assert (lookup.matched, lookup.draft(2)) == (3, (108, 109))
    lookup.extend([40, 41])
    assert (lookup.matched, lookup.draft(1)) == (2, (42,))
    lookup.extend([99])
    assert lookup.draft(1) == ()


def test_what_repeats_is_guessed_to_repeat_on() -> None:
    assert Lookup([4, 4, 4]).draft(5) == (4,) * 5
    assert Lookup([0, 1, 2, 3, 1, 2, 3]).draft(7) == (1, 2, 3, 1, 2, 3, 1)


@pytest.mark.parametrize("most", [-1, 0, 1, 5])
def test_a_guess_is_no_longer_than_asked(most: int) -> None:
    assert len(Lookup([4] * 10).draft(most)) == max(0, most)


def test_pairs_of_the_same_hash_are_told_apart() -> None:
    """Nothing but pairs that never occurred before, over a table that is full."""
    lookup = Lookup([])
    for first in range(130):
        for second in range(first + 1, 130):
            lookup.extend([first, second, 10_000 + first * 130 + second])
            assert lookup.draft(1) == ()


def oracle(ids: Sequence[int]) -> int:
    """The longest match of the last ids, up to 16, by looking everywhere."""
    for length in range(min(16, len(ids) - 1), 1, -1):
        last = list(ids[-length:])
        if any(list(ids[at : at + length]) == last for at in range(len(ids) - length)):
            return length
    return 0


@pytest.mark.parametrize("of", [3, 12, 60])
def test_indexed_at_once_or_one_by_one_the_same_is_found(of: int) -> None:
    ids = noise(300, of)
    for cut in range(0, 300, 37):
        whole, grown = Lookup(ids[:cut]), Lookup([])
        grown.extend(ids[:cut])
        if of > 3:  # of three ids all pairs occur more often than are looked at
            assert whole.matched == oracle(ids[:cut])
        assert (grown.matched > 0) == (whole.matched > 0)
        assert whole._before == grown._before


def test_a_long_text_is_found_in_again_after_the_index_grew() -> None:
    ids = noise(30_000, 40_000)
    lookup = Lookup(ids[:10])
    for at in range(10, len(ids), 100):
        lookup.extend(ids[at : at + 100])
    assert len(lookup._heads) >= len(ids)  # else most pairs would share their places
    lookup.extend(ids[50:55])
    assert lookup.draft(4) == tuple(ids[55:59])
    lookup.extend(ids[20_000:22_000])  # at once
    assert lookup.draft(4) == tuple(ids[22_000:22_004])


def test_memory_is_some_bytes_an_id() -> None:
    lookup = Lookup(noise(128_000, 50_000))
    held = (lookup.ids, lookup._heads, lookup._before)
    assert sum(len(numbers) * numbers.itemsize for numbers in held) < 20 * 128_000


# When it pays ------------------------------------------------------------------------------------


def test_the_length_with_the_most_tokens_a_second_is_chosen() -> None:
    assert best([1.0] * 64, 64, cpu()) == 64
    assert best([1.0] * 64, 4, cpu()) == 0  # short ones do not pay on a CPU
    assert best([1.0] * 64, 64, gpu) == 64
    assert best([1.0] * 64, 64, hostile) == 0
    assert best([0.5**n for n in range(1, 65)], 64, lambda n: 0.01 + 0.0015 * n) == 2


def test_no_guess_where_costs_are_unknown() -> None:
    assert best([1.0] * 64, 64, lambda guessed: 0.0) == 0
    assert Speculation([3] * 100).draft(64, lambda guessed: 0.0) == ()


def test_a_guess_that_gains_next_to_nothing_is_not_made() -> None:
    assert best([0.04], 1, lambda guessed: 0.01) == 0
    assert best([0.06], 1, lambda guessed: 0.01) == 1


@pytest.mark.parametrize("most", [0, 1, 5, 17, 64, 1000])
def test_a_guess_stays_within_what_is_allowed(most: int) -> None:
    speculation = Speculation([3] * 200)
    assert len(speculation.draft(most, gpu)) == min(most, 62)


@pytest.mark.parametrize(("cost", "tokens_a_step"), [(cpu(0.004), 11), (cpu(), 7), (gpu, 25)])
def test_an_answer_that_copies_the_prompt_takes_few_steps(cost: Cost, tokens_a_step: int) -> None:
    prompt = noise(600, 50_000)
    done = answer(prompt, prompt[200:400], cost)
    assert 200 / done.steps >= tokens_a_step
    assert done.drafted - done.right <= 20


@pytest.mark.parametrize(("cost", "within"), [(cpu(0.004), 12), (cpu(), 20), (gpu, 3)])
def test_copying_is_recognised_within_some_tokens(cost: Cost, within: int) -> None:
    prompt = noise(600, 50_000)
    done = answer(prompt, prompt[200:400], cost)
    assert next(at for at, guessed, _ in done.drafts if guessed) <= within


def test_copying_again_is_recognised_at_once() -> None:
    prompt = noise(1000, 50_000)
    truth = [*prompt[200:400], *noise(50, 50_000, seed=2), *prompt[500:700]]
    done = answer(prompt, truth, cpu(0.004))
    assert next(at for at, guessed, _ in done.drafts if guessed and at >= 250) <= 250 + 5


def edited(text: Sequence[int], every: int) -> list[int]:
    """One id of so many is another one."""
    return [10**6 + n if n % every == every - 1 else token for n, token in enumerate(text)]


def test_an_edit_now_and_then_leaves_most_of_the_gain() -> None:
    truth = edited(prompt := noise(600, 50_000), 30)
    for cost, gain in ((cpu(0.004), 1.3), (gpu, 8.0)):
        done = answer(prompt, truth, cost)
        assert len(truth) * cost(0) / done.seconds >= gain


def test_words_of_a_real_text_that_is_edited_come_faster() -> None:
    words = (Path(__file__).parents[2] / "peer" / "README.md").read_text().split()
    distinct = list(dict.fromkeys(words))
    truth = edited(prompt := [distinct.index(word) for word in words], 40)
    done = answer(prompt, truth, cpu(0.004))
    assert len(truth) * cpu(0.004)(0) / done.seconds >= 1.4


@pytest.mark.parametrize("of", [4, 20, 300, 50_000])
@pytest.mark.parametrize("hops_s", [0.0, 0.004])
def test_where_guesses_fail_next_to_none_are_made(of: int, hops_s: float) -> None:
    done = answer(noise(1500, of), noise(1000, of, seed=2), cpu(hops_s))
    assert done.drafted <= 5


@pytest.mark.parametrize("of", [4, 20, 50_000])
def test_none_are_made_where_none_can_pay(of: int) -> None:
    assert answer(noise(1500, of), noise(1000, of, seed=2), hostile).drafted == 0
    prompt = noise(600, 50_000)
    assert answer(prompt, prompt[200:400], hostile).drafted == 0


def test_where_rows_cost_little_and_guesses_fail_they_end_soon() -> None:
    """Every pair of 1,000 ids' text occurred before, and never with the same one behind it."""
    first = [n for pair in pairwise(range(0, 800, 2)) for n in (*pair, 5000 + pair[0])]
    truth = [n for pair in pairwise(range(0, 800, 2)) for n in (*pair, 9000 + pair[0])]
    done = answer(first, truth, gpu)
    assert done.right == 0
    assert all(not guessed for at, guessed, _ in done.drafts if at >= 600)


def test_guesses_end_when_the_copying_does_and_begin_again_with_it() -> None:
    prompt = noise(1000, 500)
    truth = [*prompt[100:300], *noise(400, 500, seed=2), *prompt[500:700]]
    done = answer(prompt, truth, cpu(0.004))
    between = [drafted for drafted in done.drafts if 204 <= drafted[0] < 596]
    assert sum(guessed for _, guessed, _ in between) <= 32
    again = [drafted for drafted in done.drafts if drafted[0] >= 600]
    assert 200 / len(again) >= 10


def test_one_id_over_and_over_is_guessed_and_costs_little_once_it_ends() -> None:
    truth = [7] * 300 + noise(300, 50_000)
    done = answer([1, 2, 3], truth, cpu(0.004))
    assert len([1 for at, _, _ in done.drafts if at < 300]) <= 30
    assert done.drafted - done.right <= 64
    assert all(not guessed for at, guessed, _ in done.drafts if at > 301)


def test_runs_that_always_break_after_five_are_learned() -> None:
    """Guesses of sixteen would all be wrong from the sixth on: few are made in the end."""
    prompt = noise(3000, 50_000)
    truth = [
        token
        for at in range(0, 2900, 10)
        for token in (*prompt[at : at + 5], 10**6 + at, 2 * 10**6 + at)
    ]
    done = answer(prompt, truth, cpu(0.004))
    late = [drafted for drafted in done.drafts if drafted[0] >= 600]
    assert sum(guessed - right for _, guessed, right in late) <= 0.02 * len(truth)
    assert done.seconds <= 1.02 * len(truth) * cpu(0.004)(0)


# A small model -----------------------------------------------------------------------------------


class Small:
    """A small model, right about the first ids of a guess. asked: at which token, for how many."""

    seconds_each = 0.0005

    def __init__(self, truth: Sequence[int], right: int, prompt: Sequence[int] = (1, 2, 3)) -> None:
        self.truth, self.right, self.prompt = truth, right, prompt
        self.asked: list[tuple[int, int]] = []
        self.speculation = Speculation(prompt, self, "answer")

    def draft(self, key: Hashable, ids: Sequence[int], most: int) -> tuple[int, ...]:
        at = len(ids) - len(self.prompt)
        assert list(ids) == [*self.prompt, *self.truth[:at]]
        self.asked.append((at, most))
        said = self.truth[at : at + most]
        return tuple(token if n < self.right else -1 for n, token in enumerate(said))

    def forget(self, key: Hashable) -> None:
        raise AssertionError("the scheduler does that")

    def answered(self, cost: Cost, first: int = 0, last: int | None = None) -> Answered:
        return answer((), self.truth[first:last], cost, speculation=self.speculation)


def cheap(guessed: int) -> float:
    """A row costs a twentieth of a step."""
    return 0.02 + 0.001 * guessed


def test_a_small_model_that_is_right_is_asked_at_every_step() -> None:
    small = Small(noise(400, 50_000), right=64)
    done = small.answered(cheap)
    assert len(small.asked) >= 0.9 * done.steps
    assert 400 / done.steps > 8


def test_a_small_model_that_is_wrong_is_tried_ever_more_rarely() -> None:
    small = Small(noise(2000, 50_000), right=0)
    done = small.answered(cheap)
    asked = [at for at, _ in small.asked]
    assert asked[-1] - asked[-2] >= 256
    assert len([at for at in asked if at >= 600]) <= 7
    assert all(many <= 4 for at, many in small.asked if at >= 100)
    assert done.seconds <= 1.03 * 2000 * cheap(0)


@pytest.mark.parametrize("cost", [cheap, lambda guessed: 0.02 + 0.01 * guessed])
def test_a_small_model_that_becomes_right_is_asked_often_again(cost: Cost) -> None:
    small = Small(noise(3000, 50_000), right=0)
    small.answered(cost, 0, 1000)
    small.right, tries = 64, len(small.asked)
    small.answered(cost, 1000, 2000)
    first, *others = [at for at, _ in small.asked[tries:]]
    assert first < 1256
    assert len(others) > 5
    assert others[5] < first + 100


@pytest.mark.parametrize(("cost", "seconds_each"), [(hostile, 0.0005), (cheap, 0.05)])
def test_a_small_model_is_not_asked_where_no_guess_could_pay(
    cost: Cost, seconds_each: float
) -> None:
    small = Small(noise(500, 50_000), right=64)
    small.seconds_each = seconds_each
    small.answered(cost)
    assert small.asked == []


def test_where_lookup_pays_the_small_model_is_not_asked() -> None:
    prompt = noise(600, 50_000)
    small = Small(prompt[200:400], right=0, prompt=prompt)
    assert small.answered(gpu).steps < 15
    assert all(at <= 3 for at, _ in small.asked)


def test_a_guess_that_was_not_run_tells_nothing_about_the_small_model() -> None:
    small = Small(noise(400, 50_000), right=64)
    for at in range(300):
        if at % 3 == 0:
            assert len(small.speculation.draft(16, cheap)) >= (8 if at > 150 else 4)
        small.speculation.took(small.truth[at : at + 1])


def test_a_guess_that_was_not_run_is_not_made_again() -> None:
    small = Small(noise(100, 50_000), right=64)
    assert len(small.speculation.draft(16, cheap)) > 2
    assert small.speculation.draft(16, hostile) == ()
