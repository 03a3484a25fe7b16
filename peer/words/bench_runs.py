"""The runs of `halka bench`: what is asked, how long, how often, and what the ring says of it.

How long prompts and answers are follows from how fast the ring is, so that each run takes about as
long on any. Answers are drawn with the settings of a client that asks for none, and end tokens do
not end them.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from peer.planning.plan import Plan
from peer.protocol import Sampling
from peer.words import bench_figures as figures
from peer.words.agent import Agent
from peer.words.basis import TimedPeer, TimedRing
from peer.words.bench_alone import Alongside
from peer.words.bench_ask import ask
from peer.words.bench_figures import Heard, middle, over, prose, share
from peer.words.bench_results import Beside, Drafts, Many, Reuse

AT_ONCE = (1, 2, 4, 8, 16, 32)
SHORT_WORDS = 24  # of a prompt whose reading is not what is measured
WARM_TOKENS = 8
WARM_S = 180.0  # a ring that streams weights from disk
LOOK_S = 0.5
SEED = 20240607


@dataclass(frozen=True, slots=True)
class Pace:
    """How thorough. run_s: of one run, about. limit_s: of one at most. runs: of one
    answer, and of many at once; always in turns with the whole model."""

    run_s: float
    limit_s: float
    runs: tuple[int, int]
    tokens: tuple[int, int]  # of an answer, at least and at most
    prompt: tuple[int, int]  # of a long prompt
    news_s: float  # for the head's counts to be told to this agent


USUAL = Pace(4.0, 20.0, (5, 3), (16, 128), (64, 1500), 6.0)
QUICK = Pace(0.8, 4.0, (1, 1), (8, 32), (32, 384), 3.0)


class Shown(msgspec.Struct, frozen=True):
    """What the agent adds to its plan."""

    timed: TimedRing = TimedRing()


class Runs:
    """Asks the ring, and the whole model in turns with it."""

    def __init__(self, agent: Agent, plan: Plan, beside: Alongside, pace: Pace) -> None:
        self._agent, self._plan, self._beside, self._pace = agent, plan, beside, pace
        self._seeds: Iterator[int] = itertools.count(SEED)
        self._context = plan.split.context
        self._model = plan.shape.model
        self.tokens, self._limit_s = pace.tokens[0], WARM_S
        self._words_a_token, self._read_s, self._tpot_s = 0.5, 0.1, 1.0
        self.turns = "" if pace.runs[0] == 1 else f", {pace.runs[0]} times"

    # What is asked -------------------------------------------------------------------------------

    def _text(self, tokens: int) -> str:
        """A prompt of about so many tokens that begins like no other one."""
        return prose(next(self._seeds), int(tokens * self._words_a_token))

    def _body(self, text: str, tokens: int, **more: Any) -> dict[str, Any]:
        seed = next(self._seeds)
        common = {"model": self._model, "max_tokens": tokens, "seed": seed, "ignore_eos": True}
        return {**common, "prompt": text, **more}

    def _ask(self, bodies: Sequence[Mapping[str, Any]], chat: bool = False) -> list[Heard]:
        path = "/v1/chat/completions" if chat else "/v1/completions"
        return ask(self._agent, path, bodies, self._limit_s)

    def _one(self, body: Mapping[str, Any], chat: bool = False) -> Heard:
        return self._ask([body], chat)[0]

    def warm_up(self) -> None:
        """Map the weights, and find how long everything else should be."""
        words = SHORT_WORDS
        for _ in range(2):  # the first one maps the weights
            heard = self._one(self._body(prose(next(self._seeds), words), WARM_TOKENS))
        tokens = heard.prompt_tokens or words
        self._words_a_token = words / tokens
        self._read_s = max(1e-6, heard.ttft_s / tokens)
        self._tpot_s = heard.tpot_s or heard.ttft_s
        least, most = self._pace.tokens
        wanted = int(self._pace.run_s / max(1e-6, self._tpot_s))
        self.tokens = min(most, max(least, wanted), max(2, self._context // 3))
        # Even a ring that is too slow for its time gives a few tokens of each.
        self._limit_s = max(self._pace.limit_s, heard.ttft_s + 8 * self._tpot_s)

    @property
    def _short(self) -> int:
        """Tokens of a prompt whose reading is not what is measured."""
        return max(1, min(int(SHORT_WORDS / self._words_a_token), self._context // 3))

    # Runs ----------------------------------------------------------------------------------------

    def decode(self) -> tuple[Beside, float, float]:
        """One answer at a time; then TTFT and TPOT, medians."""
        answers, ring, whole = list[Heard](), list[float](), list[float]()
        for _ in range(self._pace.runs[0]):
            text = self._text(self._short)
            heard = self._one(self._body(text, self.tokens))
            answers.append(heard)
            ring.append(over(1.0, heard.tpot_s))
            sampling = Sampling(seed=next(self._seeds))
            whole.append(self._beside.decode(text, self.tokens, sampling, self._limit_s))
        tokens = max(heard.count for heard in answers)
        ratio = _ratio(tokens, ring, whole)
        return ratio, middle([h.ttft_s for h in answers]), middle([h.tpot_s for h in answers])

    def prefill(self) -> Beside:
        """A long prompt, of which one token is wanted."""
        least, most = self._pace.prompt
        room = min(most, self._context * 3 // 4)
        tokens = min(room, max(least, int(self._pace.run_s / self._read_s)))
        ring, whole, prompt_tokens = list[float](), list[float](), 0
        for _ in range(self._pace.runs[0]):
            text = self._text(tokens)
            heard = self._one(self._body(text, 1))
            prompt_tokens = heard.prompt_tokens or tokens
            ring.append(over(prompt_tokens, heard.ttft_s))
            whole.append(self._beside.prefill(text))
        return _ratio(prompt_tokens, ring, whole)

    def many(self, answers: int) -> Many:
        """So many answers at once, each to a prompt of its own."""
        heard, ring, overall, whole, most = list[Heard](), list[float](), list[float](), [0.0], 0
        tokens = max(self._pace.tokens[0], int(self.tokens / answers**0.5))
        for _ in range(self._pace.runs[1]):
            texts = [self._text(self._short) for _ in range(answers)]
            now = self._ask([self._body(text, tokens) for text in texts])
            together, rate = figures.peak(good := [h for h in now if h.at_s and not h.why])
            ended_s = max((h.at_s[-1] for h in good), default=0.0)
            took_s = ended_s - min(h.asked_s for h in now)
            overall.append(over(sum(h.count for h in good), took_s))
            ring.append(rate)
            heard, most = heard + now, max(most, together)
            rows = min(answers, self._plan.split.slots)
            sampling = Sampling(seed=next(self._seeds))
            whole.append(self._beside.many(texts[:rows], tokens, sampling, self._pace.run_s))
        good = [h for h in heard if h.at_s and not h.why]
        rate, other = middle([r for r in ring if r]), middle([w for w in whole if w])
        return Many(
            answers, most,
            middle([h.ttft_s for h in good]), share([h.ttft_s for h in good], 0.95),
            middle([h.tpot_s for h in good if h.tpot_s]),
            sum(h.count for h in good), rate, middle(overall), other, over(rate, other),
            failed=sum(bool(h.why) for h in heard), cut=sum(h.cut for h in heard),
            why=next((h.why for h in heard if h.why), ""),
        )  # fmt: skip

    def reuse(self) -> Reuse:
        """A chat's first turn with a long text in it, and its second."""
        least, most = self._pace.prompt
        wanted = min(most, self._context // 2, int(2 * self._pace.run_s / self._read_s))
        text = self._text(max(least, wanted))
        tokens = min(16, max(2, self._context // 8))
        turns = [{"role": "user", "content": text}]
        before = self.timed()
        first = self._one(self._chat(turns, tokens), chat=True)
        # What the stages keep of it is kept by the time that its end is heard, or never.
        turns += [{"role": "assistant", "content": first.text},
                  {"role": "user", "content": "Go on."}]  # fmt: skip
        second = self._one(self._chat(turns, tokens), chat=True)
        after = self._settled(lambda timed: timed.read + timed.reused, before)
        return Reuse(
            first.prompt_tokens, first.ttft_s, second.ttft_s,
            over(second.ttft_s, first.ttft_s), max(0, after.reused - before.reused),
        )  # fmt: skip

    def _chat(self, turns: Sequence[Mapping[str, str]], tokens: int) -> dict[str, Any]:
        body = self._body("", tokens, messages=list(turns), temperature=0)
        del body["prompt"]
        return body

    def edit(self) -> Drafts:
        """A text that is mostly in the prompt already."""
        text = self._text(min(self.tokens, self._context // 4))
        wish = f"Write this text once more, with every `the` as `a`:\n\n{text}"
        before = self.timed()
        turns = [{"role": "user", "content": wish}]
        heard = self._one(self._chat(turns, self.tokens), chat=True)
        after = self._settled(lambda timed: timed.drafted, before)
        drafted, accepted = after.drafted - before.drafted, after.accepted - before.accepted
        return Drafts(heard.count, heard.tpot_s, max(0, drafted), max(0, accepted))

    # What the ring says --------------------------------------------------------------------------

    def timed(self) -> TimedRing:
        """As the agent knows it now."""
        return self._agent.question("/halka/plan", Shown).timed

    def named(self, timed: TimedRing) -> list[tuple[str, TimedPeer]]:
        """In ring order, by the names that status shows."""
        labels = self._agent.status().labels()
        ring = self._plan.ring
        return [(labels.get(p, p[:8]), timed.peers.get(p, TimedPeer())) for p in ring]

    def drafts(self) -> TimedRing:
        """The counts until now."""
        return self.timed()

    def drafted_since(self, before: TimedRing) -> tuple[int, int]:
        """Drafted and accepted since then."""
        after = self._settled(lambda timed: timed.drafted, before)
        return max(0, after.drafted - before.drafted), max(0, after.accepted - before.accepted)

    def _settled(self, count: Callable[[TimedRing], int], before: TimedRing) -> TimedRing:
        """Once the count has grown and grows no more, or when it is clear that it does not."""
        until_s, last = time.monotonic() + self._pace.news_s, self.timed()
        while time.monotonic() < until_s:
            time.sleep(LOOK_S)
            now = self.timed()
            # Stages tell their counts every 2 s: four looks without a change are enough.
            if count(now) != count(last):
                until_s = min(until_s, time.monotonic()) + 5 * LOOK_S
            last = now
        return last


def _ratio(tokens: int, ring: Sequence[float], whole: Sequence[float]) -> Beside:
    one, other = middle([r for r in ring if r]), middle([w for w in whole if w])
    return Beside(tokens, one, other, over(one, other), tuple(ring), tuple(w for w in whole if w))
