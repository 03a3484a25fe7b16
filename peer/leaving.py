"""Going away politely: this peer's reasons to go, carried out. A shell of `planning.leaving`.

While there is a reason it looks at the agent ten times a second and tells everybody through the
peer's own profile. It ends nothing itself: who gave the reason is told when it is over, and then
ends the agent or lets the machine sleep.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterable

from peer.agent import Agent
from peer.planning import leaving as l
from peer.planning.plan import PlanId
from peer.planning.reasons import told_apart
from peer.protocol import Report
from peer.words.state import Going

log = logging.getLogger("halka.leaving")

LOOK_S = 0.1  # between looks at what is left; short beside what others take to take over
SHOWN_S = 0.5  # between two pieces of progress, for people
REFUSED = "this peer is going away; ask another"


class Parting:
    """One peer's going away.

    agent: whose parts, answers and profile it is about. over: called once nothing is waited for any
    more, with the reason to go.
    """

    def __init__(self, agent: Agent, over: Callable[[l.Reason], None]) -> None:
        self._agent, self._over = agent, over
        self._machine = l.Leaving(agent.config.timing)
        # What was left behind, once it is over; None: the reason to go is gone.
        self._ends: dict[l.Reason, asyncio.Future[str | None]] = {}
        self._wanted = asyncio.Event()

    @property
    def reasons(self) -> tuple[l.Reason, ...]:
        """Why this peer wishes to go."""
        return self._machine.wishes

    @property
    def refuses(self) -> str:
        """Why new answers are to be asked for elsewhere, "" while they are not."""
        return REFUSED if self._machine.refuses else ""

    def wish(self, reason: l.Reason) -> None:
        """There is a reason to go."""
        self._look()
        if reason not in self._ends:
            log.info("leaving=True because=%s", reason)
            self._ends[reason] = asyncio.get_running_loop().create_future()
        self._step(l.Wished(reason))
        self._wanted.set()

    def stay(self, reason: l.Reason) -> None:
        """The reason is gone."""
        if end := self._ends.pop(reason, None):
            log.info("leaving=%s because=%s was taken back", bool(self._ends), reason)
            if not end.done():
                end.set_result(None)
        self._step(l.Stayed(reason))

    async def ready(self, reason: l.Reason) -> None:
        """Wish, and wait until nothing is waited for any more, or the reason is gone."""
        self.wish(reason)
        await asyncio.shield(self._ends[reason])

    async def run(self) -> None:
        """Look while there is a reason, until cancelled."""
        while True:
            await self._wanted.wait()
            self._look()
            if not self._machine.wishes:
                self._wanted.clear()
            await asyncio.sleep(LOOK_S)

    async def progress(self) -> AsyncGenerator[Going, None]:
        """How far `halka leave` is, from now until it is over or taken back; repeated now and then
        while nothing changes, so that the one who listens knows that somebody is here."""
        end = self._ends.get("leave")
        while end is not None and not end.done():
            yield self._going()
            await asyncio.wait({end}, timeout=SHOWN_S)
        left = end.result() if end else None
        yield Going("stays") if left is None else Going("gone", why=left)

    def told(self) -> str:
        """What is waited for, in a few words, or ""."""
        reasons = self._machine.wishes
        if not reasons:
            return ""
        words = {
            "asking": "asking others to take over",
            "loading": "others load what this peer runs",
            "draining": "answers go over to others",
            "answers": f"{self._agent.entry.running} answers are being finished",
            "alone": "answers are being finished; nobody can take over",
        }
        return f"leaving: {words[self._machine.phase(reasons[0], time.monotonic())]}"

    def _look(self) -> None:
        agent = self._agent
        self._step(
            l.Saw(
                l.scene(
                    agent.me,
                    [part.state for part in agent.duty.parts.values() if not part.dead],
                    self._report,
                    [p for p in agent.cluster.members if not self._leaves(p)],
                    agent.entry.running,
                    agent.duty.why_none,
                )
            )
        )

    def _leaves(self, peer_id: str) -> bool:
        profile = self._agent.profiles.get(peer_id)
        return profile is not None and profile.leaving

    def _report(self, peer_id: str, plan: PlanId) -> Report | None:
        """What a peer last said of its stage; others' come with the coordinator's plans."""
        if peer_id == self._agent.me:
            part = self._agent.duty.parts.get(plan)
            return part.report if part else None
        return self._agent.reports.get((peer_id, plan))

    def _step(self, event: l.Event) -> None:
        for action in self._machine.step(event, time.monotonic()):
            match action:
                case l.Tell(leaving):
                    self._agent.measuring.change(leaving=leaving)
                case l.Over(reason, why):
                    log.info("leaving=over because=%s left_behind=%s", reason, why or "nothing")
                    end = self._ends.get(reason)
                    if end is not None and not end.done():
                        end.set_result(why)
                    self._over(reason)

    def _going(self) -> Going:
        """What is to be shown now."""
        now, agent = time.monotonic(), self._agent
        phase = self._machine.phase("leave", now)
        taking = self._machine.scene.taking
        ring = taking.plan.peers if taking else ()
        reports = [self._report(p, taking.plan.id) for p in ring] if taking else []
        fetching = [r for r in reports if r and r.phase == "fetching"]
        return Going(
            phase,
            taking.plan.shape.model if taking else "",
            tuple(_names(agent, ring)),
            sum(report.done_bytes for report in fetching),
            sum(report.total_bytes for report in fetching),
            max(agent.entry.running, self._machine.scene.passing if phase == "alone" else 0),
            agent.duty.why_none if phase == "alone" else "",
        )


def _names(agent: Agent, peers: Iterable[str]) -> Iterable[str]:
    named = {p.peer_id: p.name for p in told_apart(list(agent.profiles.values()))}
    return [named.get(peer_id, peer_id) for peer_id in peers]
