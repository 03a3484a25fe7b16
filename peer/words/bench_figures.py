"""What answers that were heard say in numbers: rates, medians, tails. Pure; texts to ask with, too.

Texts are made of a seed: no two begin alike, so that none finds the beginning of another one in the
ring's KV cache.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

_WORDS = """time year people way day man thing woman life child world school state family student
group country problem hand part place case week company system program question work government
number night point home water room mother area money story fact month lot right study book eye
job word business issue side kind head house service friend father power hour game line end
member law car city community name president team minute idea body information back parent face
others level office door health person art war history party result change morning reason
research girl guy moment air teacher force education apple bridge candle dragon engine forest
garden harbour island jungle kitchen ladder mirror needle ocean pencil quarry river summer
tower umbrella valley window yellow zebra walks opens carries follows answers builds crosses
draws enters finds gives holds invites joins keeps leaves moves names offers paints reads sees
takes under over behind beside without before after between against through quiet early heavy
narrow old broken clear distant empty foreign gentle hollow iron"""
WORDS = tuple(_WORDS.split())


def prose(seed: int, words: int) -> str:
    """So many words without meaning, in sentences. The first ones tell seeds apart."""
    draw = random.Random(seed)
    chosen = [draw.choice(WORDS) for _ in range(max(1, words))]
    sentences = [" ".join(chosen[at : at + 11]).capitalize() for at in range(0, len(chosen), 11)]
    return ". ".join(sentences) + "."


@dataclass(slots=True)
class Heard:
    """One answer as a client hears it. Seconds on one clock; 0.0: not (yet).

    at_s: when pieces of it came. tokens: by the agent's count, 0 where it gave none. cut: we ended
    it, as its time was over. why: it failed.
    """

    asked_s: float = 0.0
    ended_s: float = 0.0
    at_s: list[float] = field(default_factory=list)
    tokens: int = 0
    prompt_tokens: int = 0
    text: str = ""
    finish: str = ""
    cut: bool = False
    why: str = ""

    @property
    def count(self) -> int:
        """Tokens that came. A piece is one, where the agent did not say."""
        return self.tokens or len(self.at_s)

    @property
    def ttft_s(self) -> float:
        """Time to first token; 0.0 where none came."""
        return self.at_s[0] - self.asked_s if self.at_s else 0.0

    @property
    def tpot_s(self) -> float:
        """Time per output token after the first; 0.0 where there were too few."""
        after = self.count - 1
        took_s = self.at_s[-1] - self.at_s[0] if self.at_s else 0.0
        return took_s / after if after > 0 and took_s > 0 else 0.0


def peak(answers: Sequence[Heard]) -> tuple[int, float]:
    """How many answers ran at once at most, and the tokens a second of all of them while they did.

    An answer runs from its first piece to its last one: what is read of others' prompts meanwhile
    is counted, what is read before is not. (0, 0.0) where none had two pieces.
    """
    running = [heard for heard in answers if len(heard.at_s) > 1]
    edges = sorted({at for heard in running for at in (heard.at_s[0], heard.at_s[-1])})
    most, stretches = 0, list[tuple[float, float]]()
    for begin, end in pairwise(edges):
        count = sum(heard.at_s[0] <= begin and heard.at_s[-1] >= end for heard in running)
        if count > most:
            most, stretches = count, []
        if count == most:
            stretches.append((begin, end))
    if not stretches:
        return len(running), 0.0
    tokens = 0.0
    for heard in running:
        of_piece = (heard.count - 1) / (len(heard.at_s) - 1)
        later = heard.at_s[1:]
        tokens += of_piece * sum(begin < at <= end for at in later for begin, end in stretches)
    took_s = sum(end - begin for begin, end in stretches)
    return most, tokens / took_s if took_s > 0 else 0.0


def share(values: Sequence[float], of: float) -> float:
    """The value that this share of them does not exceed; 0.0 of none."""
    ordered = sorted(values)
    return (
        ordered[min(len(ordered) - 1, max(0, -int(-of * len(ordered) // 1) - 1))] if values else 0.0
    )


def middle(values: Sequence[float]) -> float:
    """The median; 0.0 of none."""
    return median(values) if values else 0.0


def over(one: float, other: float) -> float:
    """Their ratio; 0.0 where one of them is not known."""
    return one / other if one > 0 and other > 0 else 0.0
