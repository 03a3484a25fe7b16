"""What each slot of KV cache holds: who may use it, what can be reused, what is given up. Pure.

When an answer is over its slot keeps what was computed, and a later prompt that begins with the
same ids goes on from there: the next turn of a chat, or another chat with the same system prompt
(which is copied, where the slot that has it is in use or worth keeping). What was used longest ago
is given up first, when slots or cells are wanted.

All stages hold the same: what is done to slots here goes around the ring with the next step, as
operations in the order in which they were decided. Cells are counted as if copies shared none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from peer.ring.frames import Copy, Open, Trim

REUSE_LEAST = 8  # ids: fewer in common are not worth an operation in every stage
FOLLOW_LEAST = 64  # ids that another answer's prompt is about to give: worth waiting for
_SPAN = 512  # ids that are compared at once
_OPS_MAX = 512  # in one step; a frame takes twice as many
_HISTORY_BYTES = 1 << 19  # of ids that penalties look back on; a frame takes 1 MiB and one more's


@dataclass(slots=True, eq=False)
class Slot:
    """One slot. It holds ids[:length] once all that was sent has run, and `extra` positions of
    guesses that were wrong. cells: that are reserved for it, or that what it holds takes."""

    number: int
    ids: list[int] = field(default_factory=list)
    length: int = 0
    extra: int = 0
    cells: int = 0
    busy: bool = False
    used: int = 0  # when it was given back, counted


@dataclass(frozen=True, slots=True)
class Promise:
    """Worth waiting for: the slot will hold `length` of another answer's first ids once so many of
    `ids`, which are being read into it now, have been sent."""

    slot: Slot
    ids: list[int]
    length: int

    @property
    def stands(self) -> bool:
        """Whether that is still to come. It is asked in every step: no ids are compared."""
        return self.slot.busy and self.slot.ids is self.ids and self.slot.length < self.length


@dataclass(slots=True)
class Slots:
    """All slots of a ring. rewinds: whether a slot can be trimmed and copied at any position; else
    only whole (see backends.base.Engine.rewinds)."""

    count: int
    cells: int
    rewinds: bool = True
    ops: list[Open | Trim | Copy] = field(default_factory=list)  # for the next step
    all: list[Slot] = field(default_factory=list)
    _given_back: int = 0

    def __post_init__(self) -> None:
        self.all = [Slot(number) for number in range(self.count)]

    @property
    def free(self) -> list[Slot]:
        """Slots that no answer uses."""
        return [slot for slot in self.all if not slot.busy]

    @property
    def laden(self) -> bool:
        """Whether the next step carries as much as it can before one more answer is let in."""
        histories = sum(len(op.history) for op in self.ops if isinstance(op, Open))
        return len(self.ops) >= _OPS_MAX or histories > _HISTORY_BYTES

    def flush(self) -> tuple[Open | Trim | Copy, ...]:
        """The operations that the next step carries."""
        ops, self.ops = tuple(self.ops), []
        return ops

    # Taking ---------------------------------------------------------------------------------

    def take(self, ids: list[int], cells: int, fresh: bool = False) -> Slot | None:
        """A slot for an answer that goes on from these ids, with so many cells reserved. None:
        there is no room now. fresh: it must not begin with what any slot holds."""
        for target, source, match in self._ways(ids, fresh):
            if not self._make_room(target, source, cells):
                continue
            if source is not target:
                if source is not None:
                    self.ops.append(Copy(source.number, target.number, match))
                elif target.length + target.extra:
                    self.ops.append(Trim(target.number, 0))
            elif target.length + target.extra > match:
                self.ops.append(Trim(target.number, match))
            target.ids, target.length, target.extra = ids, match, 0
            target.cells, target.busy = cells, True
            return target
        return None

    def _ways(self, ids: list[int], fresh: bool) -> list[tuple[Slot, Slot | None, int]]:
        """(slot to take, slot that has the beginning, how much of it), the best first."""
        free = sorted(self.free, key=lambda slot: (bool(slot.length + slot.extra), slot.used))
        if not free:
            return []
        ways: list[tuple[Slot, Slot | None, int]] = []
        found = [(self.match(slot, ids), not slot.busy, -slot.length) for slot in self.all]
        best = self.all[found.index(max(found))]
        match = max(found)[0]
        if match >= REUSE_LEAST and not fresh:
            others = [slot for slot in free if slot is not best]
            # What would be lost by going on in it: another conversation's rest.
            keep = best.busy or best.length - match > match
            if keep and others:
                ways.append((others[0], best, match))
            if not best.busy:
                ways.append((best, best, match))
        return [*ways, (free[0], None, 0)]

    def match(self, slot: Slot, ids: Sequence[int]) -> int:
        """How many of the ids the slot holds already: all but the last at most, which has to be
        run for the next one to be known."""
        if not self.rewinds:
            whole = slot.extra == 0 and slot.length < len(ids)
            same = whole and common(slot.ids, ids, slot.length) == slot.length
            return slot.length if same else 0
        return common(slot.ids, ids, min(slot.length, len(ids) - 1))

    def promised(self, ids: Sequence[int]) -> Promise | None:
        """What an answer that is being read now will soon have held of these ids, where it is so
        much more than any slot holds that it is worth waiting for."""
        reading = [slot for slot in self.all if slot.busy and slot.length < len(slot.ids) - 1]
        if not self.rewinds or not reading:
            return None
        soon = [common(s.ids, ids, min(len(s.ids), len(ids) - 1)) for s in reading]
        most = max(soon)
        if most - max(self.match(slot, ids) for slot in self.all) < FOLLOW_LEAST:
            return None
        slot = reading[soon.index(most)]
        return Promise(slot, slot.ids, most - FOLLOW_LEAST + 1)

    # Cells ----------------------------------------------------------------------------------

    def room(self, cells: int) -> bool:
        """Whether one more answer can have so many, all that is kept given up."""
        return sum(slot.cells for slot in self.all if slot.busy) + cells <= self.cells

    def grow(self, slot: Slot, cells: int) -> bool:
        """Reserve more cells for a slot in use. False: there are none."""
        if not self._make_room(slot, None, cells):
            return False
        slot.cells = cells
        return True

    def _make_room(self, target: Slot, source: Slot | None, cells: int) -> bool:
        """Give up what is kept, as far as `target` needs it for so many cells; not `source`."""
        others = [slot for slot in self.all if slot is not target]
        fixed = sum(slot.cells for slot in others if slot.busy or slot is source)
        if fixed + cells > self.cells:
            return False
        kept = [slot for slot in others if slot.cells and not slot.busy and slot is not source]
        kept.sort(key=lambda slot: slot.used)
        while fixed + cells + sum(slot.cells for slot in kept) > self.cells:
            self.drop(kept.pop(0))
        return True

    # Giving back ----------------------------------------------------------------------------

    def settle(self, slot: Slot, length: int) -> None:
        """Of the guesses only those up to `length` were right: the others are trimmed."""
        if slot.length + slot.extra > length:
            self.ops.append(Trim(slot.number, length))
        slot.length, slot.extra = length, 0

    def give_back(self, slot: Slot, length: int) -> None:
        """The answer is over; its slot keeps ids[:length]."""
        slot.extra += slot.length - length
        slot.length, slot.busy = length, False
        slot.ids = slot.ids[:length]
        slot.cells = length + slot.extra
        self._given_back += 1
        slot.used = self._given_back
        if not self.rewinds and slot.extra:
            self.drop(slot)

    def forget(self) -> None:
        """Keep nothing of what no answer uses."""
        for slot in self.free:
            self.drop(slot)

    def drop(self, slot: Slot) -> None:
        """Forget what it holds; nobody uses it any more."""
        if slot.length + slot.extra:
            self.ops.append(Trim(slot.number, 0))
        slot.ids, slot.length, slot.extra, slot.cells, slot.busy = [], 0, 0, 0, False


def common(a: Sequence[int], b: Sequence[int], most: int) -> int:
    """How many ids two sequences have in common at their beginning, `most` at most."""
    most = min(most, len(a), len(b))
    at = 0
    while at < most:
        end = min(at + _SPAN, most)
        if a[at:end] != b[at:end]:
            return next(i for i in range(at, end) if a[i] != b[i])
        at = end
    return max(0, most)
