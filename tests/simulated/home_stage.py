"""A stage's process in the simulated home: what `ring/stage.py` and `ring/head.py` do, no more.

Frames come over a wire, are counted, run one after another, and go on to the next stage: several
steps are on their way at once. The head has the real scheduler; its replies go to the connection
that asked. The process ends when its agent is gone, when frames are missing, or when the link to
the next stage broke and some seconds have passed.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np

from peer.planning.plan import Plan, PlanId, StageLink
from peer.protocol import Cancel, StageNews, Submit, Tokens, Unanswered
from peer.ring import scheduler as schedule
from peer.ring.frames import Draft, Fault
from peer.ring.sockets import BROKEN_S, LINK_S
from tests.coordinator import KEY
from tests.simulated.home_engine import VOCABULARY, Row, Windows
from tests.simulated.home_wires import Dialled, Process, Wire

NEWS_S = 0.5
STEP_S = 120.0
STRETCH_TOKENS = 6  # few, as the answers are short
PIPE_S = 0.002  # between an agent and its stages


@dataclass(frozen=True, slots=True)
class Frame:
    """Rows on their way: what a FrameHeader, the index and the activations tell."""

    plan: PlanId
    step: int
    window: int
    reached: int  # layers
    rows: tuple[Row, ...]
    outputs: tuple[bool, ...]
    x: tuple[int, ...]
    ops: tuple[Any, ...]
    drafts: tuple[Draft, ...] = ()
    faults: tuple[Fault, ...] = ()
    spent_s: float = 0.0
    slowest_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Sampled:
    """The tail's tokens, to the head."""

    plan: PlanId
    step: int
    tokens: tuple[int, ...]
    faults: tuple[Fault, ...] = ()
    taken: tuple[int, ...] = ()
    spent_s: float = 0.0
    slowest_s: float = 0.0

    @property
    def returned(self) -> schedule.Returned:
        """As the scheduler is told."""
        return schedule.Returned(
            self.step, self.tokens, self.faults, self.taken, self.spent_s, self.slowest_s
        )


class Scheduler(schedule.Scheduler):
    """The real one, with answers that grow out of what was reserved for them."""

    def _stretch(self, job: Any) -> int:
        return min(len(job.ids) + min(job.tokens_left, STRETCH_TOKENS), self.context)


class Stage(Process):
    """One stage of one plan. agent: the process that started it, and reads its news."""

    heeds_breaks = True
    heeds_plans = True
    heeds_repeats = True
    make_scheduler: type[Scheduler] = Scheduler

    def __init__(self, agent: Any, plan: Plan, admitted: Iterable[str], cost_s: float) -> None:
        super().__init__(agent.home, agent.machine)
        self.agent, self.plan, self.cost_s = agent, plan, cost_s
        self.machine.processes[self] = None
        me, split = self.machine.name, plan.split
        self.mine = plan.windows_of(me)
        self.windows = Windows(self.home.seed, split.windows, self.mine)
        self.admitted = set(admitted)
        self.port = self.home.listen(self)
        self.push: Dialled | None = None
        self.give_up_at = math.inf
        self.ill_until = -math.inf  # its numbers are not finite
        self.blamed = ""
        self.worked_s = 0.0
        self.hung = False  # it is stopped, and nothing but its agent ends that soon
        self.leased = False  # its agent asks it whether it is at work
        self.previous = ""  # whose frames are taken
        self.scheduler: Scheduler | None = None
        if plan.head == me:
            self.scheduler = self.make_scheduler(
                split.slots, split.context, split.kv_cells, split.batch_tokens, STEP_S,
                depth=len(plan.ring) if len(split.windows) == len(plan.ring) else 1,
                chunk_tokens=split.chunk_tokens, speculate=split.speculation == "auto",
            )  # fmt: skip
        self.inbox: deque[Frame] = deque()  # it computes one at a time
        self.busy = False
        self.unheard: list[Any] = []  # answers whose owner is gone
        self.timer_at = math.inf
        self.last_step = self.returned = 0
        self.news = StageNews("loading")
        self.told: tuple[StageNews, float] = (self.news, -math.inf)
        self.telling = False

    # Its agent ------------------------------------------------------------------------------------

    def loaded(self) -> None:
        """The windows are in memory, the sockets listen."""
        self.news = StageNews("ready", self.port, self.port if self.scheduler else 0, key=self.key)
        self.tell()

    @property
    def key(self) -> str:
        """By which others know it."""
        return KEY + self.machine.short

    def connect(self, link: StageLink, previous: str) -> None:
        """The ring is complete: link to the next stage."""
        self.previous = previous
        if len(self.plan.ring) == 1:
            self.linked(None)
        elif self.push is None:
            self.push = Dialled(self, link.ring_port, self.linked, self.unlinked)
            self.give_up(LINK_S)

    def admit(self, admitted: Iterable[str]) -> None:
        """Only these peers' agents wait for answers from now on; the others are told so."""
        self.admitted = set(admitted)
        if self.scheduler:
            for key in self.asked():
                if key[0].ends[0].machine.name not in self.admitted:
                    why = "this peer was out of the head's reach"
                    self.perform(schedule.Refuse(key, "stale", why))
                    self.take_in(schedule.Cancelled(key))

    def asked(self) -> list[Any]:
        """Owner and name of every answer that runs or waits."""
        assert self.scheduler
        return [job.key for job in (*self.scheduler.running.values(), *self.scheduler.waiting)]

    def tell(self) -> None:
        """News to the agent, not too often."""
        active = self.scheduler.active if self.scheduler else 0
        news = msgspec.structs.replace(self.news, active=active, blamed=self.blamed)
        before, at = self.told
        if news == before or not self.alive:
            return
        if news.phase == before.phase and self.home.now < at + NEWS_S:
            if not self.telling:
                self.telling = True
                self.home.at(at + NEWS_S - self.home.now, self.do, self.tell_late)
            return
        self.told = (news, self.home.now)
        self.home.at(PIPE_S, self.agent.do, self.agent.stage_told, self, news)

    def tell_late(self) -> None:
        self.telling = False
        self.tell()

    def broken(self, why: str, lost: str = "") -> None:
        """It cannot go on: its last words, then its end."""
        self.home.tell(self.machine.short, "stage", self.plan.id, "ends:", why)
        if self.scheduler:
            for key in self.asked():
                self.perform(schedule.Refuse(key, "stale", why))
        self.exit(why, lost)

    def exit(self, why: str, lost: str = "") -> None:
        """The process is no more; its agent, if there is one, reads of it."""
        if self.alive:
            self.home.over(self)
            self.home.at(PIPE_S, self.agent.do, self.agent.stage_exited, self, why, lost)

    # Links ----------------------------------------------------------------------------------------

    def admits(self, dialler: Process) -> bool:
        """Whether this key may connect: an agent that may submit, or the stage before this one."""
        name = dialler.machine.name
        if isinstance(dialler, Stage):
            return dialler.plan.id == self.plan.id and name == self.previous
        return name in self.admitted

    def linked(self, link: Dialled | None) -> None:
        if self.news.phase == "ready":
            self.give_up_at = math.inf
            self.news = msgspec.structs.replace(self.news, phase="linked")
            self.tell()

    def unlinked(self, link: Dialled) -> None:
        if self.give_up_at == math.inf and self.heeds_breaks:
            self.give_up(BROKEN_S)

    def give_up(self, wait_s: float) -> None:
        self.give_up_at = self.home.now + wait_s
        self.home.at(wait_s + 1e-6, self.do, self.given_up)

    def given_up(self) -> None:
        if self.home.now >= self.give_up_at:
            lost = self.plan.after(self.machine.name)
            self.broken(f"the link to peer {lost} broke", lost)

    def broke(self, wire: Wire) -> None:
        """A client's link; who is behind a listener's is only known when it is spoken to."""
        if link := self.links.pop(wire, None):
            link.broke()

    def hear(self, wire: Wire, body: Any) -> None:
        match body:
            case Frame() | Sampled():
                self.hear_ring(body)
            case Submit():
                self.submitted(wire, body)
            case Cancel():
                if self.scheduler:
                    self.take_in(schedule.Cancelled((wire, body.request)))

    # The ring -------------------------------------------------------------------------------------

    def hear_ring(self, came: Frame | Sampled) -> None:
        """One frame. What is not of this plan, or came before, is dropped."""
        if came.plan != self.plan.id and self.heeds_plans:
            return
        if isinstance(came, Sampled):
            if self.scheduler and (came.step > self.returned or not self.heeds_repeats):
                self.returned = came.step
                self.take_in(came.returned)
            return
        if came.window not in self.mine:
            return
        count = len(self.plan.split.windows)
        order = came.step * count + came.window
        if order <= self.last_step and self.heeds_repeats:
            return
        if came.step > self.last_step // count + 1:
            return self.broken(f"frames before step {came.step} were lost on the way to this peer")
        self.last_step = order
        self.inbox.append(came)
        self.take_up()

    def begin_step(self, run: schedule.Run) -> None:
        """A step begins with the head's own first window."""
        ids = run.ids.tolist()
        rows = tuple(zip(run.slots.tolist(), run.positions.tolist(), ids, strict=True))
        outputs = tuple(run.outputs.tolist())
        self.inbox.append(
            Frame(self.plan.id, run.step, 0, 0, rows, outputs, tuple(ids), run.ops, run.drafts)
        )

    def take_up(self) -> None:
        """The next frame that came, where this stage is not at one already."""
        if self.inbox and not self.busy:
            frame = self.inbox.popleft()
            if frame.window == self.mine[0]:
                self.windows.apply(frame.ops)
            self.run_on(frame)

    def run_on(self, frame: Frame) -> None:
        """This stage's window, and those after it that are its own; what they take, it takes."""
        index, x, windows = frame.window, list(frame.x), self.plan.split.windows
        took_s, reached = 0.0, frame.reached
        while True:
            if frame.rows:
                x = self.windows.run(index, frame.rows, x, reached)
                took_s += self.cost_s + 0.0002 * len(frame.rows)
            reached = windows[index].last
            index += 1
            if index not in self.mine:
                break
        faults = frame.faults
        if self.home.now < self.ill_until:
            known = {fault.slot for fault in faults}
            slots = dict.fromkeys(slot for slot, _, _ in frame.rows)
            faults += tuple(Fault(s, self.machine.name) for s in slots if s not in known)
        self.worked_s += took_s
        self.busy = True
        done = replace(
            frame, window=index, reached=reached, x=tuple(x), faults=faults,
            spent_s=frame.spent_s + took_s, slowest_s=max(frame.slowest_s, took_s),
        )  # fmt: skip
        self.home.at(took_s, self.do, self.computed, done)

    def computed(self, frame: Frame) -> None:
        """Send it on; the tail samples, and closes the ring."""
        self.busy = False
        self.pass_on(frame)
        if self.alive:
            self.take_up()

    def pass_on(self, frame: Frame) -> None:
        if frame.window < len(self.plan.split.windows):
            return self.send(frame)
        try:
            tokens, taken = self.windows.sample(frame.rows, frame.x, frame.outputs, frame.drafts)
        except KeyError as error:  # no sampler: as ring.stage.main does
            return self.broken(f"KeyError: {error}")
        sampled = Sampled(
            frame.plan, frame.step, tokens, frame.faults, taken, frame.spent_s, frame.slowest_s
        )
        if self.scheduler:
            self.returned = frame.step
            self.take_in(sampled.returned)
        else:
            self.send(sampled)

    def send(self, body: Frame | Sampled) -> None:
        """To the next stage."""
        if self.push is None:
            return self.broken("a frame came before the ring was linked")
        self.home.flew(self, body)
        self.push.send(body)

    # The head -------------------------------------------------------------------------------------

    def submitted(self, owner: Wire, message: Submit) -> None:
        if self.scheduler is None:
            return
        key = (owner, message.request)
        ids = np.frombuffer(message.ids, np.int32)
        if message.plan != self.plan.id:
            why = f"plan {message.plan} is over, {self.plan.id} is served here"
            self.reply(key, Unanswered(message.request, message.plan, "stale", why))
        elif not 0 <= int(ids.min()) <= int(ids.max()) < VOCABULARY:
            self.reply(key, Unanswered(message.request, message.plan, "invalid", "no such ids"))
        else:
            ends = frozenset(message.ends)
            asked = schedule.Submitted(key, ids, message.sampling, message.tokens_max, ends)
            self.take_in(asked)

    def take_in(self, event: schedule.Event) -> None:
        """Give the scheduler an event and do what it asks for."""
        assert self.scheduler
        events = deque([event])
        while events and self.alive:
            for action in self.scheduler.step(events.popleft(), self.home.now):
                if self.alive:
                    self.perform(action)
            # Only now: a step that is decided meanwhile comes after those that were decided before.
            events += map(schedule.Cancelled, self.unheard)
            self.unheard.clear()
        if self.alive:
            self.take_up()
            self.tell()
            self.arm()

    def arm(self) -> None:
        assert self.scheduler
        if self.timer_at == math.inf and (at := self.scheduler.deadline) is not None:
            self.timer_at = at
            self.home.at(max(0.0, at - self.home.now) + 1e-6, self.do, self.tick)

    def tick(self) -> None:
        self.timer_at = math.inf
        self.take_in(schedule.Tick())

    def perform(self, action: schedule.Action) -> None:
        plan = self.plan.id
        match action:
            case schedule.Run():
                self.begin_step(action)
            case schedule.Deliver(key, position, ids, finish):
                self.reply(key, Tokens(key[1], plan, position, ids, finish))
            case schedule.Refuse(key, code, why):
                self.reply(key, Unanswered(key[1], plan, code, why))
            case schedule.Blame(peer):
                self.blamed = peer
            case schedule.Lost(why):
                self.broken(why)

    def reply(self, key: Any, message: Tokens | Unanswered) -> None:
        """To the connection that asked; if it is gone, so is the answer."""
        self.home.spoke(key[0].ends[0], message)
        if not self.home.send(key[0], self, message):
            self.unheard.append(key)
