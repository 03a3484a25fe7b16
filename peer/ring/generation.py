"""One answer, as its entry peer owns it: prompt ids, settings, every token so far. Pure.

Tokens are taken in once and in order, or the answer ends with a reason; it never ends looking
complete when it is not. What is kept here is all that a new plan needs to go on with the answer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from peer.planning.plan import PlanId
from peer.protocol import Cancel, Sampling, Submit, Tokens, Unanswered


@dataclass(frozen=True, slots=True)
class Begin:
    """A plan serves: send the answer to its head."""

    plan: PlanId


@dataclass(frozen=True, slots=True)
class Arrived:
    """A message from the head."""

    message: Tokens | Unanswered


@dataclass(frozen=True, slots=True)
class PlanLost:
    """The plan that the answer runs on is over."""

    plan: PlanId
    why: str


@dataclass(frozen=True, slots=True)
class ClientGone:
    """Nobody reads the answer any more."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed."""


Event = Begin | Arrived | PlanLost | ClientGone | Tick


@dataclass(frozen=True, slots=True)
class Send:
    """To the head of the plan."""

    message: Submit | Cancel


@dataclass(frozen=True, slots=True)
class Give:
    """Tokens for the client; finish "" | "stop" | "length" as in protocol.Tokens."""

    ids: tuple[int, ...]
    finish: Literal["", "stop", "length"]


@dataclass(frozen=True, slots=True)
class Fail:
    """The answer ends here, and says why. code: busy | stale | invalid | failed."""

    code: str
    why: str


Action = Send | Give | Fail


@dataclass(slots=True)
class Generation:
    """The state of one answer. prompt: token ids; tokens_max: new tokens at most."""

    request: str
    prompt: tuple[int, ...]
    sampling: Sampling
    tokens_max: int
    ends: tuple[int, ...]
    silence_s: float  # without a token for so long, the answer has failed
    delivered: list[int] = field(default_factory=list)
    plan: PlanId | None = None
    done: bool = False
    deadline: float | None = None

    def step(self, event: Event, now: float) -> list[Action]:
        """Take one event in; what is to be done comes out. Nothing after the end."""
        if self.done:
            return []
        match event:
            case Begin(plan):
                return self._begin(plan, now)
            case Arrived(message):
                return self._arrived(message, now)
            case PlanLost(plan, why) if plan == self.plan:
                return self._fail("failed", why)
            case ClientGone():
                return self._cancel()
            case Tick() if self.deadline is not None and now >= self.deadline:
                why = f"no token came for {self.silence_s:.0f} s"
                return [*self._cancel(), Fail("failed", why)]
        return []

    def _begin(self, plan: PlanId, now: float) -> list[Action]:
        self.plan = plan
        self.deadline = now + self.silence_s
        ids = np.array([*self.prompt, *self.delivered], np.int32)
        return [
            Send(
                Submit(
                    self.request,
                    plan,
                    ids.tobytes(),
                    self.sampling,
                    self.tokens_max - len(self.delivered),
                    self.ends,
                    len(self.delivered),
                )
            )
        ]

    def _arrived(self, message: Tokens | Unanswered, now: float) -> list[Action]:
        if message.plan != self.plan or message.request != self.request:
            return []  # of a plan that is over: dropped here and nowhere else
        if isinstance(message, Unanswered):
            return self._fail(message.code, message.why)
        expected = len(self.prompt) + len(self.delivered)
        if message.position < expected:
            return []  # repeated
        if message.position > expected:
            why = f"tokens {expected} to {message.position} were lost between head and entry"
            return [*self._cancel(), Fail("failed", why)]
        self.delivered += message.ids
        self.deadline = now + self.silence_s
        self.done = message.finish != ""
        return [Give(message.ids, message.finish)]

    def _cancel(self) -> list[Action]:
        self.done = True
        return [] if self.plan is None else [Send(Cancel(self.request, self.plan))]

    def _fail(self, code: str, why: str) -> list[Action]:
        self.done = True
        return [Fail(code, why)]
