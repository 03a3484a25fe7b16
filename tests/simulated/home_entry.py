"""The entry peer in the simulated home: what `ring/entry.py` does, and what its client sees.

Every token that is given is compared with the truth here, whatever plan it came from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from peer.planning.plan import Plan, PlanId, StageLink
from peer.protocol import Cancel, Sampling, Submit, Tokens, Unanswered
from peer.ring import generation as g
from tests.simulated.home_engine import END, Truth
from tests.simulated.home_wires import Dialled


@dataclass(eq=False)
class Answer:
    """One client's answer, and what is known of it beside its machine."""

    name: str
    agent: Any  # its entry's
    prompt: tuple[int, ...]
    sampling: Sampling
    tokens_max: int
    truth: Truth
    begun: float
    machine: g.Generation = field(init=False)
    given: int = 0
    submissions: int = 0
    asked: Submit | None = None  # the last one
    context: int = 0  # of the plan that was asked
    timer_at: float = math.inf
    ended: str = ""  # done | the reason | gone


class Entry:
    """Links to heads, and answers."""

    make_generation: type[g.Generation] = g.Generation
    tells_breaks = True

    def __init__(self, agent: Any) -> None:
        self.agent, self.home = agent, agent.home
        self.heads: dict[PlanId, Dialled] = {}
        self.contexts: dict[PlanId, int] = {}
        self.answers: dict[str, Answer] = {}
        self.offer: g.Offer | None = None

    def open(self, plan: Plan, link: StageLink) -> None:
        """Make a link to a plan's head."""
        if plan.id not in self.heads:
            self.contexts[plan.id] = plan.split.context
            self.heads[plan.id] = Dialled(
                self.agent, link.submit_port, lambda link: None, lambda link: self.broke(plan.id)
            )

    def serve(self, offer: g.Offer | None) -> None:
        """New answers, and those that wait, go to this plan's head; None: they wait."""
        self.offer = offer if offer and offer.plan in self.heads else None
        self.take_all(g.Serves(self.offer))

    def underway(self, digest: str) -> None:
        """A plan for this model is being made ready."""
        self.take_all(g.Underway(digest))

    def go_over(self, plan: PlanId) -> None:
        """Answers leave this plan for the one that serves."""
        self.take_all(g.GoOver(plan))

    def end(self, plan: PlanId, why: str) -> None:
        """The plan is over: its answers wait for the next one."""
        if self.offer and self.offer.plan == plan:
            self.offer = None
            self.take_all(g.Serves(None))
        self.take_all(g.PlanLost(plan, why))
        if head := self.heads.pop(plan, None):
            head.close()

    def broke(self, plan: PlanId) -> None:
        """The link to the plan's head."""
        if self.tells_breaks:
            self.take_all(g.LinkBroke(plan))

    def hear(self, message: Any) -> None:
        """From a head."""
        if isinstance(message, Tokens | Unanswered):
            answer = self.answers.get(message.request.rpartition(".")[0])
            if answer:
                self.take(answer, g.Arrived(message))

    def might_take(self, message: Any) -> bool:
        """Whether only its name and plan tell that these tokens are of an earlier submission."""
        answer = self.answers.get(message.request.rpartition(".")[0])
        return (
            answer is not None
            and answer.asked is not None
            and answer.asked.request != message.request
            and isinstance(message, Tokens)
            and message.position == len(answer.prompt) + answer.given
        )

    # Answers --------------------------------------------------------------------------------------

    def begin(self, answer: Answer) -> None:
        """A client asks."""
        answer.machine = self.make_generation(
            answer.name,
            answer.prompt,
            answer.sampling,
            answer.tokens_max,
            (END,),
            self.home.shape.digest,
            g.Patience(),
        )
        self.answers[answer.name] = answer
        self.take(answer, g.Serves(self.offer))

    def take_all(self, event: g.Event) -> None:
        for answer in list(self.answers.values()):
            self.take(answer, event)

    def take(self, answer: Answer, event: g.Event) -> None:
        """One event for one machine; what it asks for."""
        if answer.ended:
            return
        for action in answer.machine.step(event, self.home.now):
            self.perform(answer, event, action)
        if not answer.ended:
            self.arm(answer)

    def arm(self, answer: Answer) -> None:
        at = answer.machine.deadline
        if at is not None and at < answer.timer_at:
            answer.timer_at = at
            wait_s = max(0.0, at - self.home.now)
            self.home.at(wait_s + 1e-6, self.agent.do, self.tick, answer)

    def tick(self, answer: Answer) -> None:
        answer.timer_at = math.inf
        self.take(answer, g.Tick())

    def perform(self, answer: Answer, event: g.Event, action: g.Action) -> None:
        match action:
            case g.Send(Submit() as message):
                self.submit(answer, message)
            case g.Send(Cancel() as message):
                if head := self.heads.get(message.plan):
                    head.send(message)
            case g.Give(ids, finish):
                self.give(answer, event, ids, finish)
            case g.Fail(code, why):
                self.over(answer, f"{code}: {why}")
            case g.Continued(plan, delivered, why):
                self.home.counts["continued"] += 1
                self.home.tell(
                    answer.name, "goes on, plan", plan, "from", delivered, "because", why
                )

    def submit(self, answer: Answer, message: Submit) -> None:
        answer.submissions += 1
        answer.asked, answer.context = message, self.contexts.get(message.plan, 0)
        head = self.heads.get(message.plan)
        if head is None:
            return self.take(answer, g.LinkBroke(message.plan))
        self.home.tell(answer.name, "asks plan", message.plan, "from", message.delivered)
        head.send(message)

    def give(self, answer: Answer, event: g.Event, ids: tuple[int, ...], finish: str) -> None:
        """Tokens for the client: each once, in order, of the last submission, and the right one."""
        home, truth, asked = self.home, answer.truth, answer.asked
        if isinstance(event, g.Arrived):
            message = event.message
            if asked is None or (message.request, message.plan) != (asked.request, asked.plan):
                home.fail(f"{answer.name} took a token of {message.plan} as {message.request}")
            position = len(answer.prompt) + answer.given
            if isinstance(message, Tokens) and ids and message.position != position:
                home.fail(f"{answer.name} took token {message.position} for token {position}")
        for token in ids:
            if (right := truth.next()) != token:
                what = f"token {answer.given} of {answer.name} is {token}, not {right}"
                home.fail(f"{what} (submission {answer.submissions})")
            truth.accept(token)
            answer.given += 1
        if answer.given > answer.tokens_max:
            home.fail(f"{answer.name} was to be {answer.tokens_max} tokens long at most")
        if finish:
            self.check_finish(answer, finish)
            self.over(answer, "done")

    def check_finish(self, answer: Answer, finish: str) -> None:
        """Whether it really ends here, and so."""
        home, end = self.home, answer.truth.next() == END
        full = len(answer.truth.ids) >= answer.context
        if finish == "stop" and not end:
            home.fail(f"{answer.name} stops after {answer.given} tokens, and should not")
        if finish == "length" and answer.given != answer.tokens_max and not full:
            home.fail(f"{answer.name} is {answer.given} of {answer.tokens_max} tokens long")

    def over(self, answer: Answer, how: str) -> None:
        """The client has its last token, or a reason."""
        answer.ended = how
        self.answers.pop(answer.name, None)
        self.home.answered(answer)

    def cancel(self, answer: Answer) -> None:
        """The client has gone."""
        if not answer.ended:
            self.take(answer, g.ClientGone())
            self.over(answer, "gone")
