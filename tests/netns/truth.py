"""What a client should read: one plain llama.cpp context, told after how many tokens an answer
went on.

An answer that goes on is computed anew from its prompt and its tokens so far, in chunks as a fresh
one would be; so the truth is a fresh run from there, again after every time it went on. The tokens
before are those of the run before. To the last bit that holds only where slots kept nothing.

llama.cpp gives a row the same bits alone and among up to 63 rows, other slots kept or not, its
beginning copied or not, wrong guesses before it trimmed or not. From 64 rows on it attends with
another kernel; and once a slot before was given up, tokens lie in other cells and are added up in
another order. A ring that went on with an answer has read it in long chunks, and keeps that: asked
the same again, it may say something else. There a token of a greedy answer is right if it is the
likeliest after those before it, or nearly. Of drawn tokens one in nine is another then, for any
two candidates that change places move all that come behind: they need a ring that keeps nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from peer.models.text import Text
from peer.protocol import Sampling
from peer.ring.sampling import Sampler
from tests.plain_llama import PlainLlama
from tests.smollm2 import smollm2

CONTEXT, BATCH = 2048, 512
GREEDY = Sampling(temperature=0.0)
# Of a logit: so far behind the likeliest a token may be. Measured on this model, in Q4_1: logits
# differ by 0.24 (rms), and by 2.3 at most, from those after what was kept in long chunks, in cells
# of another order, or both. Of 11,730 tokens of answers to 69 questions 356 were others then, 0.394
# behind at most; the lead of the likeliest on the second changed by 0.15 (rms), 0.7 in one of 1,000
# tokens and 1.1 at most. It is rounding, no fault: in float32 throughout, slots that the scheduler
# reused, copied and trimmed differ from fresh ones by 0.00005 at most (5,642 rows). A token lost or
# changed in the ring, or lost or said twice on the way to a reader, was seen in all of 36 answers
# each; one that the ring had twice in 14 of the 21 answers that were others for it, and half of the
# prompt forgotten in 16 of 20.
NEARLY = 0.5


class Truth:
    """One context, and the words of its model."""

    def __init__(self, model: PlainLlama, text: Text, prompts: dict[str, list[int]]) -> None:
        self._model, self._pieces, self._ends = model, text.pieces, text.ends
        self.prompts = prompts  # ids, by question
        self._known: dict[tuple[object, ...], list[int]] = {}

    def story(
        self,
        question: str,
        tokens: int,
        chunk: int,
        starts: Sequence[int] = (),
        sampling: Sampling = GREEDY,
    ) -> str:
        """The answer's text. chunk: the plan's chunk_tokens; starts: after how many tokens it was
        computed anew, in order."""
        ids: list[int] = []
        for begin, end in zip([0, *starts], [*starts, tokens], strict=True):
            prefix = [*self.prompts[question], *ids[:begin]]
            fresh = self._fresh(prefix, end - begin, chunk, sampling)
            ids = ids[:begin] + fresh
        return self.text(ids)

    def wrong(
        self,
        question: str,
        text: str,
        tokens: int,
        chunk: int,
        starts: Sequence[int] = (),
        sampling: Sampling = GREEDY,
    ) -> str:
        """Why this is not the answer; "" where it is what `story` tells, or where every token of a
        greedy one is nearly the likeliest."""
        told = self.story(question, tokens, chunk, starts, sampling)
        if text == told:
            return ""
        if sampling.temperature:
            return f"a fresh run says {told!r}"
        return self.differs(question, text, tokens, chunk)

    def differs(self, question: str, text: str, tokens: int, chunk: int) -> str:
        """Where a token of this greedy answer is less likely than another one, by more than what
        rounding does; "" where none is, and all came."""
        prompt = self.prompts[question]
        self._model.clear()
        logits = self._read(prompt, 0, chunk)
        best = (-1, "nothing came")  # how far any way of cutting the text into tokens leads
        ways = [self._ways(logits, text.encode())]  # not yet tried, after each token
        while ways:
            if not ways[-1]:
                ways.pop()
                continue
            given, (token, left) = len(ways), ways[-1].pop()
            self._model.trim(0, len(prompt) + given - 1)
            logits = self._model.step([token], [len(prompt) + given - 1])[-1]
            likeliest = int(logits.argmax())
            if not left and (given == tokens or likeliest in self._ends):
                return ""
            why = f"after {given} tokens {left[:30]!r} came, {self._pieces[likeliest]!r} is likely"
            best = max(best, (given, why))
            ways.append(self._ways(logits, left) if given < tokens else [])
        return best[1]

    def _ways(self, logits: NDArray[np.float32], left: bytes) -> list[tuple[int, bytes]]:
        """Tokens that may come next, and what is left after them; the likeliest last."""
        near = np.flatnonzero(logits >= logits.max() - NEARLY)
        near = near[np.argsort(logits[near])]
        pieces = ((int(token), self._pieces[token]) for token in near)
        return [(t, left[len(p) :]) for t, p in pieces if p and left.startswith(p)]

    def _fresh(self, prefix: list[int], count: int, chunk: int, sampling: Sampling) -> list[int]:
        key = (tuple(prefix), chunk, sampling)
        known = self._known.get(key, [])
        if len(known) < count:
            known = self._known[key] = self._run(prefix, count, chunk, sampling)
        return known[:count]

    def _run(self, prefix: list[int], count: int, chunk: int, sampling: Sampling) -> list[int]:
        self._model.clear()
        sampler = Sampler(sampling, prefix)
        logits, answer = self._read(prefix, 0, chunk), []
        for position in range(len(prefix), len(prefix) + count):
            answer.append(sampler.sample(logits, position))
            sampler.accept(answer[-1])
            logits = self._model.step(answer[-1:], [position])[-1]
        return answer

    def _read(self, ids: Sequence[int], position: int, chunk: int) -> NDArray[np.float32]:
        """Logits after a prompt."""
        for begin in range(0, len(ids), chunk):
            some = ids[begin : begin + chunk]
            last = begin + len(some) == len(ids)
            outputs = [False] * (len(some) - 1) + [last]
            places = range(position + begin, position + begin + len(some))
            logits = self._model.step(some, places, outputs=outputs)
        return np.array(logits[-1])

    def text(self, ids: Sequence[int]) -> str:
        """What a reader sees of these tokens."""
        kept = []
        for token in ids:
            if token in self._ends:
                break
            kept.append(self._pieces[token])
        return b"".join(kept).decode("utf-8", "replace")


@contextmanager
def truth(head: Path, questions: Sequence[str]) -> Iterator[Truth]:
    """head: head.gguf of the model."""

    async def read() -> tuple[Text, dict[str, list[int]]]:
        text = await Text.open("llama_cpp", head)
        try:
            return text, {
                question: list(
                    await text.ids_of_chat(
                        [{"role": "user", "content": question}], context_tokens=CONTEXT
                    )
                )
                for question in questions
            }
        finally:
            await text.close()

    text, prompts = asyncio.run(read())
    with PlainLlama(smollm2(), cells=CONTEXT, batch=BATCH) as model:
        yield Truth(model, text, prompts)
