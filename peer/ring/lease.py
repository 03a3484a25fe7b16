"""Whether a stage that does not answer is at work or hung. Pure.

A stage computes and answers in one thread, so one that is in the middle of a long step answers
late, and that is no fault: a slow machine may read a long prompt for a minute. Hung is one that is
asked, does not answer, and meanwhile neither used the processor nor read anything; and one that
computes, but for so much longer than its longest step can take that it will never come back.

Time in which this process itself did not run (stopped, asleep, starved) is never held against the
stage: lateness is noticed by the deadline, as in `cluster.membership`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

ASK_S = 1.0  # from an answer to the next question, and from look to look
LATE_S = 0.25  # later than this, this process was not running; earlier is a busy machine
IDLE_S = 0.05  # of processor time within `quiet_s`: what a hung stage's socket thread may use


@dataclass(frozen=True, slots=True)
class Bounds:
    """quiet_s: without an answer, processor time or reading. computing_s: with them, at least;
    and at least `times` what the longest step takes."""

    quiet_s: float = 5.0
    computing_s: float = 10.0
    times: float = 4.0


@dataclass(frozen=True, slots=True)
class Pong:
    """The stage answered. row_s: what it says that a row of a long step takes, 0: not known."""

    number: int
    row_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Look:
    """What the stage's process has used so far. state: what it is doing now, by the system's word;
    `disk`: it waits for a disk, which may have to wake up first."""

    cpu_s: float
    read_bytes: int
    state: Literal["runs", "disk", "stopped"] = "runs"


Event = Pong | Look


@dataclass(frozen=True, slots=True)
class Ping:
    """Ask the stage; it is to answer with this number."""

    number: int


@dataclass(frozen=True, slots=True)
class Hung:
    """It will not come back: end it."""

    why: str


Action = Ping | Hung


@dataclass(slots=True)
class Lease:
    """The machine, from when the stage is ready. rows_max: of its longest step. step_s: within
    which any step comes around the ring. on_gpu: it may wait without using the processor."""

    now: float
    rows_max: int
    step_s: float
    on_gpu: bool = False
    bounds: Bounds = field(default_factory=Bounds)
    deadline: float = field(init=False)  # when the next Look is due
    _number: int = 0
    _asked: float | None = None  # since when an answer is waited for
    _answered: float = field(init=False)  # last
    _longest_s: float = 0.0  # between two answers
    _row_s: float = 0.0
    _mark: Look | None = None  # what it had used when it was last seen at work
    _worked: float = field(init=False)  # when that was

    def __post_init__(self) -> None:
        self.deadline = self._answered = self._worked = self.now

    def step(self, event: Event, now: float) -> list[Action]:
        """Take one event in; what is to be done comes out. After Hung there is nothing more."""
        self._forgive(now)
        match event:
            case Pong(number, row_s):
                self._row_s = max(self._row_s, row_s)
                if number == self._number and self._asked is not None:
                    self._longest_s = max(self._longest_s, now - self._answered)
                    self._answered, self._asked = now, None
                return []
            case Look():
                self.deadline = now + ASK_S
                self._look(event, now)
                if self._asked is not None:
                    why = self._verdict(event, now)
                    return [Hung(why)] if why else []
                self._number, self._asked = self._number + 1, now
                return [Ping(self._number)]

    def _forgive(self, now: float) -> None:
        """Move all clocks by the time in which this process did not run."""
        late = now - self.deadline
        if late <= LATE_S:
            return
        self.deadline = now
        self._answered += late
        self._worked += late
        if self._asked is not None:
            self._asked += late

    def _look(self, look: Look, now: float) -> None:
        mark = self._mark
        if (
            mark is None
            or look.state == "disk"
            or look.cpu_s - mark.cpu_s >= IDLE_S
            or look.read_bytes != mark.read_bytes
        ):
            self._mark, self._worked = look, now

    def _verdict(self, look: Look, now: float) -> str:
        """Why the stage that is asked is hung, or ""."""
        assert self._asked is not None
        waited, quiet_s = now - self._asked, self.bounds.quiet_s
        may_wait = self.on_gpu and look.state != "stopped"
        if min(waited, now - self._worked) >= quiet_s and not may_wait:
            stopped = " (something had stopped its process)" if look.state == "stopped" else ""
            return f"hung: it neither computed nor answered for {quiet_s:.0f} s{stopped}"
        if waited < (patience_s := self._patience_s()):
            return ""
        told = f"; its longest step so far took {self._longest_s:.0f} s" if self._row_s else ""
        return f"hung: it did not answer for {patience_s:.0f} s while it seemed to compute{told}"

    def _patience_s(self) -> float:
        """With a stage that computes. Its longest step may be one that it has not met so far."""
        if not self._row_s:
            return self.step_s
        longest_s = max(self._longest_s, self._row_s * self.rows_max)
        return min(self.step_s, max(self.bounds.computing_s, self.bounds.times * longest_s))
