"""One answer, as its entry peer owns it: prompt ids, settings, every token so far. Pure.

An answer outlives the plan that it runs on: what is kept here is all that another plan needs to go
on with it. It is submitted anew from the ids, never from text; penalties look back on the same ids
and a draw depends on the seed and the position alone, so the tokens are those that would have come.
Each submission has a name of its own, and what comes under an earlier one is dropped: a token is
given once and in order, or the answer ends with a reason. It never ends looking complete when it
is not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from peer.planning.plan import PlanId
from peer.protocol import Cancel, Sampling, Submit, Tokens, Unanswered

AGAIN_S = 0.5  # before the same head is asked again: who is gone is known better by then
BUSY_AGAIN_S = 1.0  # an answer that goes on waits for its turn like any other
STRIKES = 4  # submissions in a row that bring no token: the fault is the answer's own


@dataclass(frozen=True, slots=True)
class Patience:
    """How long an answer waits. silence_s: for any sign from a head that has it. plan_s: for a plan
    that serves, while nobody makes one; plan_max_s: at all."""

    silence_s: float = 130.0
    plan_s: float = 30.0
    plan_max_s: float = 600.0


@dataclass(frozen=True, slots=True)
class Offer:
    """A plan that serves, and how many tokens of one request there is room for on it."""

    plan: PlanId
    digest: str
    context: int


@dataclass(frozen=True, slots=True)
class Serves:
    """New answers go to this plan's head from now on; None: to nobody."""

    offer: Offer | None


@dataclass(frozen=True, slots=True)
class Underway:
    """A plan that will serve this model is being made ready."""

    digest: str


@dataclass(frozen=True, slots=True)
class Arrived:
    """A message from a head."""

    message: Tokens | Unanswered


@dataclass(frozen=True, slots=True)
class PlanLost:
    """The plan that the answer runs on is over."""

    plan: PlanId
    why: str


@dataclass(frozen=True, slots=True)
class LinkBroke:
    """The link to the head of this plan broke: what was on its way may be lost."""

    plan: PlanId


@dataclass(frozen=True, slots=True)
class GoOver:
    """The plan still runs, and is to be left for the one that serves."""

    plan: PlanId


@dataclass(frozen=True, slots=True)
class ClientGone:
    """Nobody reads the answer any more."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed."""


Event = Serves | Underway | Arrived | PlanLost | LinkBroke | GoOver | ClientGone | Tick


@dataclass(frozen=True, slots=True)
class Send:
    """To the head of the message's plan."""

    message: Submit | Cancel


@dataclass(frozen=True, slots=True)
class Give:
    """Tokens for the client; finish "" | "stop" | "length" as in protocol.Tokens."""

    ids: tuple[int, ...]
    finish: Literal["", "stop", "length"]


@dataclass(frozen=True, slots=True)
class Fail:
    """The answer ends here, and says why. code: busy | invalid | failed."""

    code: str
    why: str


@dataclass(frozen=True, slots=True)
class Continued:
    """For the log: the answer goes on, on this plan, after so many of its tokens."""

    plan: PlanId
    delivered: int
    why: str


Action = Send | Give | Fail | Continued


@dataclass(slots=True)
class Generation:
    """The state of one answer. prompt: token ids; tokens_max: new tokens at most; digest: of the
    model that it is made with, whichever plan serves that."""

    request: str
    prompt: tuple[int, ...]
    sampling: Sampling
    tokens_max: int
    ends: tuple[int, ...]
    digest: str
    patience: Patience
    delivered: list[int] = field(default_factory=list)
    plan: PlanId | None = None  # that has it now; None: it waits
    done: bool = False
    deadline: float | None = None  # when a Tick is wanted
    _offer: Offer | None = None
    _submissions: int = 0
    _strikes: int = 0
    _why: str = "no ring serves at this moment"
    _again_at: float = -math.inf  # no submission before
    _waits_since: float | None = None  # without a sign of any head
    _give_up_at: float = math.inf  # while it waits
    _silent_at: float = math.inf  # while a head has it

    def step(self, event: Event, now: float) -> list[Action]:
        """Take one event in; what is to be done comes out. Nothing after the end."""
        if self.done:
            return []
        actions: list[Action] = []
        match event:
            case Serves(offer):
                self._offer = offer
            case Underway(digest):
                if digest == self.digest:
                    self._may_wait(now)
            case Arrived(message):
                actions += self._arrived(message, now)
            case PlanLost(plan, why):
                if self._offer is not None and self._offer.plan == plan:
                    self._offer = None
                if plan == self.plan:
                    self._wait(why, now)
                    self._waits_since = None  # the wait for another plan begins now
            case LinkBroke(plan) if plan == self.plan:
                self._wait("the link to the head of the ring broke", now, AGAIN_S)
            case GoOver(plan) if plan == self.plan and self._is_elsewhere(plan):
                actions += self._leave("a peer of the ring goes away", now)
            case ClientGone():
                self.done = True
                actions += self._cancel()
            case _:
                pass
        if not self.done:
            actions += self._go_on(now)
        self.deadline = self._next()
        return actions

    # Waiting and going on -------------------------------------------------------------------------

    def _is_elsewhere(self, plan: PlanId) -> bool:
        offer = self._offer
        return offer is not None and offer.plan != plan and offer.digest == self.digest

    def _wait(self, why: str, now: float, again_s: float = 0.0) -> None:
        """No head has it (any more)."""
        self.plan, self._why = None, why
        self._again_at, self._silent_at = now + again_s, math.inf

    def _may_wait(self, now: float) -> None:
        """There is hope: a little longer, but not for ever."""
        if self._waits_since is not None:
            most = self._waits_since + self.patience.plan_max_s
            self._give_up_at = min(now + self.patience.plan_s, most)

    def _leave(self, why: str, now: float, again_s: float = 0.0) -> list[Action]:
        """Take it back from a head that may still be at it."""
        cancel = self._cancel()
        self._wait(why, now, again_s)
        return cancel

    def _strike(self, why: str, now: float, again_s: float = AGAIN_S) -> list[Action]:
        """A submission came to nothing, maybe through the answer's own fault."""
        self._strikes += 1
        if self._strikes < STRIKES:
            return self._leave(why, now, again_s)
        return [*self._cancel(), *self._fail("failed", f"{why}; it was tried {STRIKES} times")]

    def _go_on(self, now: float) -> list[Action]:
        """Whatever is due: submit it, or give up."""
        if self.plan is not None:
            if now >= self._silent_at:
                silent_s = self.patience.silence_s
                struck = self._strike(f"no token came for {silent_s:.0f} s", now, 0.0)
                return struck if self.done else [*struck, *self._go_on(now)]
            return []
        if self._waits_since is None:
            self._waits_since, self._give_up_at = now, now + self.patience.plan_s
        offer = self._offer
        if offer is not None and offer.digest == self.digest and now >= self._again_at:
            return self._submit(offer, now)
        if now >= self._give_up_at:
            waited_s = now - self._waits_since
            why = f"{self._why}, and nothing could go on with it within {waited_s:.0f} s"
            return self._fail("failed", why)
        return []

    def _submit(self, offer: Offer, now: float) -> list[Action]:
        ids = np.array([*self.prompt, *self.delivered], np.int32)
        if len(ids) >= offer.context:
            if self.delivered:
                self.done = True
                return [Give((), "length")]  # as if it had begun on this plan
            why = f"{len(ids)} tokens do not fit into a context of {offer.context}"
            return self._fail("invalid", why)
        goes_on = [Continued(offer.plan, len(self.delivered), self._why)] * bool(self._submissions)
        self.plan = offer.plan
        self._submissions += 1
        self._silent_at = now + self.patience.silence_s
        submit = Submit(
            self.name,
            offer.plan,
            ids.tobytes(),
            self.sampling,
            self.tokens_max - len(self.delivered),
            self.ends,
            len(self.delivered),
        )
        return [*goes_on, Send(submit)]

    @property
    def name(self) -> str:
        """Of the submission of now."""
        return f"{self.request}.{self._submissions}"

    def _next(self) -> float | None:
        if self.done:
            return None
        if self.plan is not None:
            return self._silent_at if self._silent_at < math.inf else None
        at = self._give_up_at
        if self._offer is not None and self._offer.digest == self.digest:
            at = min(at, self._again_at)
        return at

    # What heads say -------------------------------------------------------------------------------

    def _arrived(self, message: Tokens | Unanswered, now: float) -> list[Action]:
        if message.plan != self.plan or message.request != self.name:
            return []  # of a submission that is over: dropped here and nowhere else
        if isinstance(message, Unanswered):
            return self._unanswered(message, now)
        self._silent_at, self._waits_since = now + self.patience.silence_s, None
        expected = len(self.prompt) + len(self.delivered)
        if message.position < expected:
            return []  # repeated
        if message.position > expected:
            why = f"tokens {expected} to {message.position} were lost between head and entry"
            return self._strike(why, now)
        if not message.ids and not message.finish:
            return [Give((), "")]  # a sign of life
        ids = message.ids[: self.tokens_max - len(self.delivered)]
        self.delivered += ids
        self._strikes = 0
        if not message.finish and len(self.delivered) >= self.tokens_max:
            # The head should have said so. Nothing is left to ask another one for.
            self.done = True
            return [*self._cancel(), Give(ids, "length")]
        self.done = message.finish != ""
        return [Give(ids, message.finish)]

    def _unanswered(self, message: Unanswered, now: float) -> list[Action]:
        fresh = self._submissions == 1 and not self.delivered
        match message.code:
            case "busy" if fresh:
                return self._fail("busy", message.why)
            case "busy":
                self._wait(message.why, now, BUSY_AGAIN_S)
                self._may_wait(now)  # its ring is at work, on answers before this one
                return []
            case "stale":
                self._wait(message.why, now, AGAIN_S)
                return []
            case "invalid":
                return self._fail("invalid" if fresh else "failed", message.why)
        return self._strike(message.why, now)

    def _cancel(self) -> list[Action]:
        return [] if self.plan is None else [Send(Cancel(self.name, self.plan))]

    def _fail(self, code: str, why: str) -> list[Action]:
        self.done = True
        return [Fail(code, why)]
