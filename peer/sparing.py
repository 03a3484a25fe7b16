"""Spare parts: the coordinator's look ahead, and this peer's copies of what others hold. A shell.

Who is to hold what is decided in `planning.outlook`, and when, in `planning.foresight`. What this
peer is to hold is fetched a part at a time, when nothing computes here or in the ring; what it has
then shows in its offers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from peer.clockwork import Alarm, Retries
from peer.config import Config
from peer.errors import ModelError, PeerError
from peer.models import disk
from peer.models.manifest import Manifest
from peer.models.store import Store
from peer.models.transfer import QUICK_S, Progress, Rest
from peer.planning import foresight as f
from peer.planning import rollout as r
from peer.planning import survey
from peer.planning.making import Members, Question
from peer.planning.outlook import Standing, outlook
from peer.planning.plan import PlanState
from peer.planning.profile import ModelOffer, ModelShape, Profile
from peer.planning.spares import held_besides_bytes, part_sizes, total_bytes
from peer.protocol import Outlook

log = logging.getLogger("halka.sparing")

LOOK_S = 0.25  # between looks whether something is to be fetched, or an answer has come
STORE_S = 5.0  # between looks whether all of it is still there
ROOM_S = 5.0  # between looks at what is free on the disk
ROOM_NEWS = 0.1  # of change; less is not told
PATIENT_S = 30.0  # a look ahead waits for the end of answers: it may use a core that they need
AGAIN_S, AGAIN_MAX_S = 5.0, 600.0  # after a part could not be had
STARVED_S = 300.0  # where something always computes, parts trickle in after so long
TRICKLE = 9.0  # a tenth of the time, then
TRICKLE_S = 0.05  # at least, after each chunk


class Parts(Protocol):
    """`Fetching.parts`."""

    def __call__(
        self, digest: str, parts: Sequence[str], progress: Progress = ..., rest: Rest | None = ...
    ) -> Awaitable[Manifest]:
        """Have these parts here. Raises ModelError, PeerError."""
        ...


@dataclass(frozen=True, slots=True)
class Host:
    """What sparing needs of its agent.

    busy: whether this peer or the ring computes, or fetches what a plan needs. serving: the plan
    that serves, as known here. profile: this peer's, as last told; change: tells another. offers:
    of all peers. tell: sends a message to every member.
    """

    me: str
    busy: Callable[[], bool]
    serving: Callable[[], PlanState | None]
    profile: Callable[[], Profile]
    change: Callable[..., None]
    offers: Mapping[str, Sequence[ModelOffer]]
    tell: Callable[[Outlook], Any]
    parts: Parts


class Sparing:
    """Both halves. outlook: what was last foreseen, by this peer or its coordinator; why: for what
    reason a spare part could not be had here, until one could."""

    def __init__(self, config: Config, store: Store, host: Host) -> None:
        self._config, self._store, self._host = config, store, host
        self.outlook: Outlook | None = None
        self.why = ""
        self._foresight = f.Foresight(config.timing.publish_s)
        self._alarm = Alarm(lambda: self._step(f.Tick()))
        self._asked: asyncio.Queue[f.Foresee] = asyncio.Queue()
        self._term = 0
        self._members: Members | None = None
        self._question: Question | None = None
        self._retries = Retries(AGAIN_S, AGAIN_MAX_S)
        self._calm_at = time.monotonic()  # when nothing was busy last
        self._begun = 0  # spare parts that were missing when fetching them began

    # The coordinator's look ahead -----------------------------------------------------------------

    def planned(self, question: Question) -> None:
        """The coordinator asks for a plan: whom it does without is in the question."""
        self._question = question

    def watch(self, event: r.Event, states: Sequence[PlanState]) -> None:
        """What the coordinator's plans are after an event. states: () where it is another peer."""
        match event:
            case r.Members():
                self._members = event
            case r.Elected(term):
                self._term, self._question = term, None
        serving = [state.plan for state in states if state.phase == "serving"]
        if not serving or self._members is None:
            self._step(f.Seen(None))
            return
        plan = max(serving, key=lambda plan: plan.id)
        asked = self._question
        self._step(
            f.Seen(
                Standing(
                    self._term,
                    self._host.me,
                    self._members,
                    plan,
                    asked.barred.get(plan.shape.digest, {}) if asked else {},
                    asked.shaky if asked else {},
                )
            )
        )

    def heard(self, told: Outlook) -> None:
        """The coordinator told what it foresees."""
        self.outlook = told
        self._step(f.Heard(told))

    def _step(self, event: f.Event) -> None:
        for action in self._foresight.step(event, time.monotonic()):
            match action:
                case f.Foresee():
                    self._asked.put_nowait(action)
                case f.Publish(told):
                    self.outlook = told
                    self._host.tell(told)
        self._alarm.set(self._foresight.deadline)

    async def _look_ahead(self) -> None:
        while True:
            asked = await self._asked.get()
            await self._calm()
            began = time.monotonic()
            found = await asyncio.to_thread(outlook, asked.standing)
            self._step(f.Foreseen(asked.number, found, time.monotonic() - began))

    async def _calm(self) -> None:
        until = time.monotonic() + PATIENT_S
        while True:
            if not self._host.busy() or time.monotonic() >= until:
                return
            await asyncio.sleep(LOOK_S)

    # This peer's spare parts ----------------------------------------------------------------------

    async def run(self) -> None:
        """Look ahead, offer room and fetch, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._look_ahead(), name="outlook")
            tasks.create_task(self._offer_room(), name="room for spare parts")
            tasks.create_task(self._fetch(), name="spare parts")

    def close(self) -> None:
        """Nothing is foreseen any more."""
        self._alarm.set(None)

    async def _offer_room(self) -> None:
        """Tell what of the disk is for spare parts. While nothing serves it is not known which of
        the parts here are spare ones."""
        while True:
            if state := self._host.serving():
                free = await asyncio.to_thread(survey.disk_free_bytes, self._config.home)
                shape = state.plan.shape
                held = _parts_of(self._host.offers.get(self._host.me, ()), shape.digest)
                besides = held_besides_bytes(state.plan, self._host.me, held)
                offered = survey.spare_bytes(self._config.spare, free, besides)
                before = self._host.profile().spare_bytes
                if abs(offered - before) > ROOM_NEWS * before or bool(offered) != bool(before):
                    self._host.change(spare_bytes=offered, disk_free_bytes=free)
            await asyncio.sleep(ROOM_S)

    async def _fetch(self) -> None:
        """What this peer is to hold, a part at a time, when nothing else happens."""
        while True:
            told, at = self.outlook, time.monotonic()
            missing = await self._missing(told)
            self._note(missing)
            due: tuple[str, str] | None = None
            while due is None and self.outlook is told and time.monotonic() < at + STORE_S:
                due = self._due(missing)
                if due is None:
                    await asyncio.sleep(LOOK_S)
            if due is not None:
                await self._have(*due)

    def _due(self, missing: Sequence[tuple[str, str]]) -> tuple[str, str] | None:
        """The part to fetch now, if any."""
        now = time.monotonic()
        due = (part for part in missing if self._retries.due(":".join(part), now))
        if (part := next(due, None)) is None:
            self._calm_at = now  # nothing waits
            return None
        return part if self._may() else None

    async def _missing(self, told: Outlook | None) -> list[tuple[str, str]]:
        """(digest, part) of what this peer is to hold and does not. A coordinator that asks for
        more than was offered gets nothing: it will hear of what is offered now. Nor does one that
        asks for parts that the model has not."""
        found: list[tuple[str, str]] = []
        left = self._host.profile().spare_bytes
        for spare in told.spares if told else ():
            shape = self._shape(spare.digest)
            if spare.peer_id != self._host.me or shape is None:
                continue
            sizes = part_sizes(shape)
            wanted = [part for part in dict.fromkeys(spare.parts) if part in sizes]
            if (size := total_bytes(shape, wanted)) > left:
                continue
            left -= size
            lacks = await asyncio.to_thread(self._store.missing, spare.digest, wanted)
            found += [(spare.digest, part) for part in lacks]
        return found

    def _shape(self, digest: str) -> ModelShape | None:
        every = (offer.shape for offers in self._host.offers.values() for offer in offers)
        return next((shape for shape in every if shape.digest == digest), None)

    def _note(self, missing: Sequence[tuple[str, str]]) -> None:
        """One line when fetching begins, one when all is here."""
        if missing and not self._begun:
            shape = self._shape(missing[0][0])
            size = total_bytes(shape, [part for _, part in missing]) if shape else 0
            log.info("spares=wanted parts=%d bytes=%d", len(missing), size)
        elif self._begun and not missing:
            self.why = ""
            log.info("spares=held parts=%d", self._begun)
        self._begun = max(self._begun, len(missing)) if missing else 0

    def _may(self) -> bool:
        """Whether nothing else happens; or something always does, so that it is time to trickle."""
        now = time.monotonic()
        if not self._host.busy():
            self._calm_at = now
            return True
        return now - self._calm_at > STARVED_S

    def _rest(self, took_s: float) -> float:
        """After a chunk: a source or a way that is slow has something else to do."""
        if time.monotonic() - self._calm_at > STARVED_S:
            return max(TRICKLE * took_s, TRICKLE_S)
        return 0.0 if took_s < QUICK_S else took_s

    async def _have(self, digest: str, part: str) -> None:
        """Fetch one part, unless something that cannot wait comes: what arrived by then is kept."""
        name = f"{digest}:{part}"
        task = asyncio.create_task(self._fetched(digest, part))
        try:
            while not task.done():
                await asyncio.wait([task], timeout=LOOK_S)
                if not task.done() and not self._may():
                    return
            why = task.result()
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        if not why:
            self._retries.worked(name)
            return
        self._retries.failed(name, time.monotonic())
        if why != self.why:
            log.warning("spares=missing part=%s because=%s", part, why)
        self.why = why

    async def _fetched(self, digest: str, part: str) -> str:
        """Have a part here. Returns why it cannot be had, or ""."""
        shape = self._shape(digest)
        keep = survey.SPARE_FREE_LEAST_BYTES
        try:
            size = total_bytes(shape, [part]) if shape else 0
            await asyncio.to_thread(disk.require, self._store.root, size + keep)
            await self._host.parts(digest, (part,), rest=self._rest)
        except (ModelError, PeerError) as error:
            return str(error)
        return ""


def _parts_of(offers: Sequence[ModelOffer], digest: str) -> list[str]:
    return [part for offer in offers if offer.shape.digest == digest for part in offer.parts]
