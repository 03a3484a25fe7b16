"""The real scheduler in thousands of small rings, and the proof that they would show a mistake."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from msgspec.structs import replace as change

from peer.ring import scheduler as schedule
from peer.ring.batching import Step
from peer.ring.frames import Copy, Open, Trim
from peer.ring.slots import Slots
from tests.simulated.head import Ring, make_scheduler
from tests.simulated.head_stages import Answer, Limits, Tail
from tests.simulated.house import Broken

SEEDS = 2000
BATCH = 200
TRIES = 400  # seeds in which a planted mistake must show
IDS = range(2, 40)  # of prompts: few, so that pairs of them come again


class Guesser:
    """A model that is right with some probability, always the same for the same ids."""

    seconds_each = 0.00001

    def __init__(self, right: float) -> None:
        self.right = right
        self.ring: Ring | None = None
        self.asked = self.forgotten = 0

    def draft(self, key: Hashable, ids: Sequence[int], most: int) -> tuple[int, ...]:
        """What will come, but for some."""
        assert self.ring
        self.asked += 1
        truth = self.ring.answers[key].truth.copy()  # type: ignore[index]
        assert truth.ids == [*ids[: len(truth.ids)]], "these ids are not the answer's"
        for token in ids[len(truth.ids) :]:  # that are being delivered
            truth.accept(token)
        found = []
        for _ in range(most):
            token = truth.next()
            wrong = hash((self.ring.seed, truth.chain)) % 100 >= 100 * self.right
            found.append(token + 1 if wrong else token)
            truth.accept(found[-1])
        return tuple(found)

    def forget(self, key: Hashable) -> None:
        """The answer is over."""
        self.forgotten += 1


def limits_of(rng: random.Random) -> Limits:
    """A ring of this seed."""
    slots = rng.randint(1, 8)
    context = rng.choice((40, 64, 120))
    stages = rng.randint(1, 4)
    rewinds = rng.random() < 0.8
    step_s = rng.choice((0.0002, 0.002, 0.02))
    speculate = rewinds and rng.random() < 0.5
    right = rng.choice((0.0, 0.5, 0.9, 1.0))
    return Limits(
        slots=slots,
        context=context,
        kv_cells=int(context * rng.choice((1, 1, 1.3, 2, 3, slots, 2 * slots))),
        batch_tokens=rng.choice((8, 16, 64)),
        stages=stages,
        depth=1 if rng.random() < 0.15 else stages,
        chunk_tokens=rng.choice((0, 0, 3, 8, 16, 64, rng.randint(1, 64))),
        rewinds=rewinds,
        speculate=speculate,
        stretch_tokens=rng.choice((2, 6, 6, 512)),
        drafter=Guesser(right) if speculate and rng.random() < 0.4 else None,
        row_s=rng.choice((0.00001, 0.0005)),
        step_s=step_s,
        hop_s=rng.choice((0.0, 0.0005, 0.01)),
        fault=0.03 if rng.random() < 0.15 else 0.0,
        at_rest=rng.random() < 0.3,
    )


class Story:
    """What clients do in one seed."""

    def __init__(self, seed: int, kind: type[Ring] = Ring, **changes: object) -> None:
        self.rng = rng = random.Random(f"story {seed}")
        self.limits = replace(limits_of(rng), **changes)  # type: ignore[arg-type]
        self.ring = kind(seed, self.limits)
        if self.limits.drafter:
            self.limits.drafter.ring = self.ring
        long = self.limits.context - 8
        self.shared = [[rng.choice(IDS) for _ in range(rng.randint(4, long))] for _ in range(2)]
        self.over: list[Answer] = []
        self.hurry_s = rng.choice((0.0, 0.02, 0.3, 2.0))
        self.calm = rng.random() < 0.5  # nobody goes away

    def run(self) -> Ring:
        """All of it, and what must hold at the end."""
        for _ in range(self.rng.choice((2, 4, 8, 16))):
            self.ring.at(self.rng.random() * self.hurry_s, self.ask)
        if not self.calm and self.rng.random() < 0.5:
            gone = f"owner-{self.rng.randrange(3)}"
            self.ring.at(self.rng.random() * self.hurry_s, self.ring.gone.add, gone)
        self.ring.play()
        self.ring.rest()
        return self.ring

    def prompt(self) -> list[int]:
        """A new one, one with a beginning that others have, an old one again, or the next turn of a
        conversation."""
        rng, kind = self.rng, self.rng.random()
        new = [rng.choice(IDS) for _ in range(rng.choice((1, 3, 10, 20)))]
        if kind < 0.25 and self.over:
            ids = rng.choice(self.over).ids
            return ids[: rng.randint(1, len(ids))] if rng.random() < 0.3 else ids + new
        if kind < 0.4 and self.ring.answers:
            return list(rng.choice(list(self.ring.answers.values())).ids)
        if kind < 0.7:
            return rng.choice(self.shared) + new
        return new

    def ask(self) -> None:
        """Somebody asks; most hear the end of it, and some go on from there."""
        rng = self.rng
        ids = self.prompt()
        if len(ids) >= self.limits.context and rng.random() < 0.9:
            ids = ids[: self.limits.context - 1 - rng.randrange(10)]
        answer = self.ring.ask(
            ids,
            rng.choice((1, 2, 5, 20, 40, 80)),
            f"owner-{rng.randrange(3)}",
            temperature=rng.choice((0.0, 0.8)),
            repeat_penalty=rng.choice((1.0, 1.0, 1.0, 1.1)),
            repeat_last_n=rng.choice((-1, 4, 64)),
        )
        answer.answered = self.answered
        if not self.calm and rng.random() < 0.3:
            self.ring.at(rng.random() * rng.choice((0.001, 0.05, 1.0)), self.cancel, answer)

    def cancel(self, answer: Answer) -> None:
        if not answer.ended:
            self.ring.cancel(answer)

    def answered(self, answer: Answer) -> None:
        """The next turn, now and then."""
        self.over.append(answer)
        if len(self.ring.answers) < 20 and self.rng.random() < 0.3:
            self.ring.at(self.rng.choice((0.0, 0.01, 0.5)), self.ask)


@pytest.mark.parametrize("first", range(0, SEEDS, BATCH))
def test_every_answer_is_the_true_one_whatever_is_asked_and_whoever_goes(first: int) -> None:
    for seed in range(first, first + BATCH):
        Story(seed).run()


def test_the_seeds_have_everything_that_may_go_wrong() -> None:
    seen: Counter[str] = Counter()
    for seed in range(150):
        ring = Story(seed).run()
        scheduler = ring.scheduler
        seen += ring.counts
        seen["reused"] += scheduler.reused
        seen["right guesses"] += scheduler.accepted
        seen["wrong guesses"] += scheduler.drafted - scheduler.accepted
    for what in ("stop", "length", "failed", "cancelled", "Copy", "put back"):
        assert seen[what] > 10, (what, seen)
    for what in ("reused", "right guesses", "wrong guesses"):
        assert seen[what] > 200, (what, seen)


# Stages at work -----------------------------------------------------------------------------------


def busy(ring: Ring) -> float:
    """The part of the time in which the stages computed, the least busy of them."""
    return min(stage.busy_s for stage in ring.stages) / (ring.last_end - 1000)


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_twelve_answers_keep_all_stages_at_work(stages: int) -> None:
    ring = Ring(0, Limits(12, 400, 4800, 64, stages, stages, step_s=0.001, hop_s=0.0001))
    answers = [ring.ask([5, 6, 7], 200) for _ in range(12)]
    while not any(answer.ended for answer in answers):
        ring.go_on()
    assert ring.now > 1000.3
    assert busy(ring) > 0.9


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_a_long_prompt_is_read_by_all_stages_at_once(stages: int) -> None:
    ring = Ring(
        0, Limits(1, 1600, 1600, 512, stages, stages, chunk_tokens=50, step_s=0.001, hop_s=0.0001)
    )
    ring.ask([5] * 1500, 1)
    ring.play()
    assert busy(ring) > 0.85


def test_the_next_turn_reads_only_what_is_new_and_a_shared_beginning_is_read_once() -> None:
    ring = Ring(0, Limits(4, 400, 1600, 64))
    first = ring.ask(range(2, 202), 20)
    ring.play()
    rows = ring.counts["rows"]
    ring.ask([*first.ids, 3, 4, 5], 1)
    ring.play()
    assert ring.counts["rows"] - rows <= 3 + 1  # the last token was never run
    rows = ring.counts["rows"]
    for _ in range(3):  # none of them is run yet when all are asked for
        ring.ask([*range(300, 400), *range(2 + len(ring.answers), 12)], 1)
    ring.play()
    assert ring.counts["rows"] - rows < 100 + 3 * 12
    assert ring.counts["Copy"] >= 2


# Planted mistakes ---------------------------------------------------------------------------------


def ops(mend: Callable[[Any], Any]) -> type[Ring]:
    """Every operation of every step made another one; None: left out."""

    def decided(self: Ring, actions: list[Any]) -> list[Any]:
        return [
            replace(a, ops=tuple(new for op in a.ops if (new := mend(op)) is not None))
            if isinstance(a, schedule.Run)
            else a
            for a in actions
        ]

    return type("Planted", (Ring,), {"decided": decided})


def actions(mend: Callable[[list[Any]], list[Any]]) -> type[Ring]:
    """What is decided made something else."""
    return type("Planted", (Ring,), {"decided": lambda self, decided: mend(decided)})


def events(mend: Callable[[Any], Any]) -> type[Ring]:
    """What comes made something else."""
    return type("Planted", (Ring,), {"heard": lambda self, event: mend(event)})


def believes(**wrong: Callable[[Limits], Any]) -> type[Ring]:
    """The scheduler takes the ring for another one."""

    def make(limits: Limits) -> schedule.Scheduler:
        return make_scheduler(replace(limits, **{k: v(limits) for k, v in wrong.items()}))

    return type("Planted", (Ring,), {"make_scheduler": staticmethod(make)})


def scheduler(slots: dict[str, Any] | None = None, **methods: Any) -> type[Ring]:
    """A scheduler with another method, or whose slots have another one."""

    def make(limits: Limits) -> schedule.Scheduler:
        made = make_scheduler(limits)
        made.__class__ = type("Planted", (type(made),), {"__slots__": (), **methods})
        made._cache.__class__ = type("Planted", (Slots,), {"__slots__": (), **(slots or {})})
        return made

    return type("Planted", (Ring,), {"make_scheduler": staticmethod(make)})


class Credulous(Tail):
    """Takes every guess for right."""

    def draw(self, slot: int, end: int, numbers: list[int], guesses: list[int]) -> list[int]:
        got = super().draw(slot, end, numbers, guesses)
        return [*guesses, *got[-1:]] if guesses else got


class Nested(Ring):
    """What the head decides about an owner who is gone comes between two decisions."""

    def perform(self, action: schedule.Action) -> None:
        super().perform(action)
        while self.unheard:
            self.take(schedule.Cancelled(self.unheard.pop()))


def keeps_rejected(self: Slots, slot: Any, length: int) -> None:
    slot.length, slot.extra = length, 0


def drops_silently(self: Slots, slot: Any) -> None:
    slot.ids, slot.length, slot.extra, slot.cells, slot.busy = [], 0, 0, 0, False


def matches_all(self: Slots, slot: Any, ids: Sequence[int]) -> int:
    return min(slot.length, len(ids) - 1)


def finds_room(self: Slots, *_: Any) -> bool:
    return True


def reads_when_idle(self: Any, step: Step, prompts: Any, rows: int) -> None:
    if not step.rows:
        schedule.Scheduler._read(self, step, prompts, rows)


def admits_the_last(self: Any) -> None:
    self.waiting.reverse()
    schedule.Scheduler._admit(self)
    self.waiting.reverse()


def never_put_back(self: Any) -> None:
    pass


def forgets_nothing(self: Any, job: Any, forget: bool = False) -> None:
    schedule.Scheduler._release(self, job)


def a_trim(change_it: Callable[[Trim], Any]) -> Callable[[Any], Any]:
    return lambda op: change_it(op) if isinstance(op, Trim) else op


PLANTED: dict[str, type[Ring]] = {
    "slots are never trimmed": ops(a_trim(lambda op: None)),
    "slots are trimmed for the next answer only": ops(a_trim(lambda o: None if o.position else o)),
    "a trim takes one position too many": ops(
        a_trim(lambda o: change(o, position=max(0, o.position - 1)))
    ),
    "beginnings are not copied": ops(lambda o: None if isinstance(o, Copy) else o),
    "a copy is too long": ops(
        lambda o: change(o, length=o.length + 1) if isinstance(o, Copy) else o
    ),
    "slots are not opened": ops(lambda o: None if isinstance(o, Open) else o),
    "penalties do not look back": ops(
        lambda o: change(o, history=b"") if isinstance(o, Open) else o
    ),
    "steps come in another order": actions(lambda decided: decided[::-1]),
    "tokens are delivered twice": actions(
        lambda decided: [b for a in decided for b in [a] * (1 + isinstance(a, schedule.Deliver))]
    ),
    "a last word is lost": actions(
        lambda decided: [a for a in decided if getattr(a, "finish", "") == ""]
    ),
    "an owner who is gone interrupts": Nested,
    "a cancel is not heard": events(
        lambda e: schedule.Tick() if isinstance(e, schedule.Cancelled) else e
    ),
    "guesses are all taken for right": type("Planted", (Ring,), {"make_tail": Credulous}),
    "a step too many is on its way": believes(depth=lambda limits: limits.depth + 1),
    "a stage is not counted": believes(depth=lambda limits: max(1, limits.depth - 1)),
    "there are fewer cells": believes(kv_cells=lambda limits: limits.kv_cells + 12),
    "the context is shorter": believes(context=lambda limits: limits.context + 3),
    "batches are shorter": believes(
        batch_tokens=lambda limits: limits.batch_tokens + 1, chunk_tokens=lambda limits: 0
    ),
    "there are fewer slots": believes(slots=lambda limits: limits.slots + 1),
    "recurrent layers are rewound": believes(rewinds=lambda limits: True),
    "wrong guesses stay in their slots": scheduler({"settle": keeps_rejected}),
    "what is given up stays in its slot": scheduler({"drop": drops_silently}),
    "another conversation is gone on with": scheduler({"match": matches_all}),
    "cells are not counted": scheduler({"_make_room": finds_room}),
    "answers take no further cells": scheduler(_grow=never_put_back),
    "prompts are read when nobody decodes": scheduler(_read=reads_when_idle),
    "who came last is first": scheduler(_admit=admits_the_last),
    "what was broken is kept": scheduler({"forget": lambda self: None}, _release=forgets_nothing),
}


@pytest.mark.parametrize("mistake", PLANTED)
def test_a_planted_mistake_is_caught(mistake: str) -> None:
    with pytest.raises(Broken, match=r"^seed \d+, "):
        play(PLANTED[mistake])


def play(kind: type[Ring]) -> None:
    for seed in range(TRIES):
        Story(seed, kind).run()
