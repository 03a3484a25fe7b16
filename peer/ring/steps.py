"""The ring half of a stage: a frame in, its windows, a frame out; the head's steps begin here.

Several steps are on their way in a ring at once, one for each stage. Each window sees each of them
once and in order; what a step does to the slots is done before its rows meet the stage's first
window. A frame's time here is the answer's time: what is not needed for sending is done after it.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from backends.base import Batch
from peer.errors import HalkaError, ProtocolError, StalePlan
from peer.planning.plan import Plan
from peer.ring import scheduler as schedule
from peer.ring.frames import (
    Fault,
    Frame,
    FrameHeader,
    Meet,
    Sampled,
    decode,
    encode_frame,
    encode_sampled,
    pack_index,
    unfinite,
)
from peer.ring.head import Head
from peer.ring.links import Broken, Links
from peer.ring.paces import Paces
from peer.ring.windows import Windows

log = logging.getLogger("halka.stage")

SHORT_ROWS = 16  # answers that go on, not prompts: the next frame comes after about as long


class Steps:
    """One stage's part in every step. `begun`, `returned`: the head's latest ones. `count`,
    `rows`: of steps that left this stage. `dropped`: frames that were refused."""

    def __init__(
        self, plan: Plan, peer_id: str, windows: Windows, links: Links, head: Head | None
    ) -> None:
        self.plan, self.peer_id, self.windows = plan, peer_id, windows
        self.links, self.head, self.paces = links, head, Paces()
        self.begun = self.returned = 0
        self.count = self.rows = self.dropped = 0
        self._last = len(plan.split.windows) - 1
        self._seen = dict.fromkeys(windows.mine, 0)  # the latest step, by window
        self._rounds = len(plan.split.windows) > len(plan.ring) > 1
        self._computed_s = 0.0  # for the step that is under way, in all of this stage's windows
        self._wait_s = 0.0
        self._short = False  # the latest that the head began
        # A stage that computes its window with another one gets that one's frames, and sends none.
        self.follows = peer_id not in plan.ring
        self._ids = self.follows and windows.mine[0] == 0
        self.island: tuple[str, ...] = ()  # where its ranks meet, once the first has told that

    # In -------------------------------------------------------------------------------------

    def hear(self) -> None:
        """Everything that the stage before has sent, up to one frame that is computed: tokens
        first, for they are what the next step needs. Raises Broken."""
        self.links.arrived_s = time.monotonic()
        while (parts := self.links.receive()) is not None:
            try:
                came = decode(parts, self.plan, self.windows.vocabulary, ids=self._ids)
                if isinstance(came, Frame):
                    return self._frame(came)
                if isinstance(came, Meet):
                    self._meet(came)
                    continue
                self._sampled(came)
                if self.returned == self.begun:
                    return  # nothing else can have come
            except (StalePlan, ProtocolError) as error:
                self._drop(error)

    def _meet(self, came: Meet) -> None:
        """Where this stage's island meets: once, and from the stage that it follows."""
        if not self.follows or self.island or self.plan.id != came.plan:
            raise ProtocolError("addresses of an island that this stage is not in, or has met")
        if len(came.addresses) != len(self.plan.island_of(self.peer_id)):
            raise ProtocolError("addresses of an island of another size")
        self.island = came.addresses

    def _drop(self, error: HalkaError) -> None:
        """Refuse a frame: counted, named, without effect."""
        self.dropped += 1
        if self.dropped <= 10 or self.dropped % 1000 == 0:
            log.warning("dropped=frame count=%d because=%s", self.dropped, error)

    def _in_turn(self, step: int, seen: int) -> None:
        """Each step once, and none left out: its rows would be missing from this stage's KV cache,
        and going on would answer wrongly."""
        if step <= seen:
            raise ProtocolError(f"step {step} came again")
        if step > seen + 1:
            raise Broken(f"frames before step {step} were lost on the way to this peer")

    def _known(self, step: int) -> None:
        """At the head: nothing comes back that was not begun here."""
        if step > self.begun:
            raise ProtocolError(f"step {step} came back before it was begun")

    def _frame(self, frame: Frame) -> None:
        """Rows for one of this stage's windows."""
        header = frame.header
        seen = self._seen.get(header.window)
        if seen is None:
            raise ProtocolError(f"window {header.window} is not this peer's")
        if self.head:
            self._known(header.step)
        self._in_turn(header.step, seen)
        self._seen[header.window] = header.step
        self._waited(header.rows <= SHORT_ROWS)
        x = frame.x
        faults = list(header.faults)
        bad = [] if self._ids else unfinite(frame.batch.slots, x)
        if bad or faults:  # the other rows go on; these must not spread
            known = {fault.slot for fault in faults}
            before = self.plan.split.windows[header.window - 1].peer_id
            faults += [Fault(slot, before) for slot in bad if slot not in known]
            x = np.where(np.isin(frame.batch.slots, [f.slot for f in faults])[:, None], 0, x)
        if header.window == self.windows.mine[0] and header.ops:
            self.windows.apply(header.ops)
        self._run(header, frame.batch, frame.index, x, faults)

    def _sampled(self, sampled: Sampled) -> None:
        """The tail's tokens, at the head."""
        if not self.head:
            raise ProtocolError("sampled tokens came to a peer that is not the head")
        self._known(sampled.step)
        self._in_turn(sampled.step, self.returned)
        self._waited(self._short)
        self.returned = sampled.step
        self.head.take(
            schedule.Returned(
                sampled.step,
                sampled.tokens,
                sampled.faults,
                sampled.taken,
                sampled.spent_s,
                sampled.slowest_s,
            )
        )

    def _waited(self, short: bool) -> None:
        """Note the wait that ended with this frame. short: it is one of few rows."""
        self._wait_s = max(0.0, self.links.arrived_s - self.links.rested_s)
        if short:
            self.links.waited(self._wait_s)

    # The head -------------------------------------------------------------------------------

    @property
    def may_begin(self) -> bool:
        """Whether another step may begin. In a ring of more rounds than one a step at its first
        window would trim slots under another that has still to come to its later windows."""
        return not self._rounds or self.returned == self.begun

    def begin(self, run: schedule.Run, alone: bool) -> None:
        """The head's own first window, then on along the ring. alone: of the only answer."""
        rows = len(run.ids)
        self.paces.begun(rows, alone and self.returned == self.begun, time.monotonic())
        self.begun = self._seen[0] = run.step
        self._short = rows <= SHORT_ROWS
        if run.ops:
            self.windows.apply(run.ops)
        batch = Batch(run.slots, run.positions, run.outputs)
        header = FrameHeader(
            self.plan.id, run.step, 0, rows, self.plan.shape.hidden, run.ops, drafts=run.drafts
        )
        self._run(header, batch, None, run.ids, [])

    # Through and out ------------------------------------------------------------------------

    def _run(
        self,
        header: FrameHeader,
        batch: Batch,
        index: memoryview | None,
        x: NDArray[Any],
        faults: list[Fault],
    ) -> None:
        """Run this stage's window, and the following ones while they are its own; then send."""
        window = header.window
        if self.links.followers:  # they compute it, too: no layer is ready without them
            shared = msgspec.structs.replace(header, faults=())
            self.links.share(encode_frame(shared, pack_index(batch) if index is None else index, x))
        began_s = time.monotonic()
        while True:
            if header.rows:
                x = self.windows.run(window, batch, x)
            if window == self._last or window + 1 not in self._seen:
                break
            window += 1
        if self.follows:
            self._computed_s += time.monotonic() - began_s
            return self._rest(header, batch, time.monotonic(), True)
        if window == self._last:
            return self._finish(header, batch, x, faults, began_s)
        if header.rows == 0:
            x = np.empty((0, header.hidden), np.float32)
        done_s = time.monotonic()
        spent_s = done_s - began_s
        self._computed_s += spent_s
        onward = msgspec.structs.replace(
            header,
            window=window + 1,
            faults=tuple(faults),
            spent_s=header.spent_s + spent_s,
            slowest_s=max(header.slowest_s, self._computed_s),
        )
        self.links.send(encode_frame(onward, pack_index(batch) if index is None else index, x))
        self._rest(header, batch, done_s, window >= self.windows.mine[-1])

    def _finish(
        self,
        header: FrameHeader,
        batch: Batch,
        logits: NDArray[np.float32],
        faults: list[Fault],
        began_s: float,
    ) -> None:
        """The tail: sample, and close the ring."""
        tokens: tuple[int, ...] = ()
        taken: tuple[int, ...] = ()
        if header.rows:
            tokens, taken = self.windows.sample(batch, logits, faults, header.drafts)
        done_s = time.monotonic()
        self._computed_s += done_s - began_s
        spent_s = header.spent_s + done_s - began_s
        slowest_s = max(header.slowest_s, self._computed_s)
        came = tuple(faults)
        if not self.head:
            sampled = Sampled(self.plan.id, header.step, tokens, came, taken, spent_s, slowest_s)
            self.links.send(encode_sampled(sampled))
        self._rest(header, batch, done_s, True)
        if self.head:
            self.returned = header.step
            self.head.take(schedule.Returned(header.step, tokens, came, taken, spent_s, slowest_s))

    def _rest(self, header: FrameHeader, batch: Batch, done_s: float, left: bool) -> None:
        """What is done once a frame is on its way. left: the step will not come here again."""
        self.links.rested_s = time.monotonic()
        if left:
            position = int(batch.positions[0]) if header.rows == 1 else 0
            rows = header.rows if not header.drafts else 0  # those say little of other steps
            send_s = self.links.rested_s - done_s
            self.paces.computed(rows, self._computed_s, position, self._wait_s, send_s)
            self._computed_s = 0.0
            self.count += 1
            self.rows += header.rows
        self.windows.rest()
