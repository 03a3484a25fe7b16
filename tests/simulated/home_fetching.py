"""How parts come to a peer of the simulated home: from whoever holds them and is in reach."""

from __future__ import annotations

from typing import Any

from peer.planning import duty as d
from peer.planning.plan import Plan
from peer.planning.profile import ModelOffer
from tests.simulated.home_wires import Process

PART_S = 0.03  # to fetch one
TRIES = 3


class Fetching(Process):
    """The agent's half that fills its disk."""

    def offer_parts(self: Any) -> None:
        """What is on the disk is offered."""
        held = tuple(sorted(self.machine.parts))
        offer = ModelOffer(self.home.shape, 1.0, held)
        self.offers[self.me] = (offer,) if held else ()

    def fetch(self: Any, plan: Plan, parts: tuple[str, ...]) -> None:
        """Begin; an earlier one for the plan ends."""
        mark = self.fetches[plan.id] = object()
        missing = [part for part in parts if part not in self.machine.parts]
        wait_s = 0.002 + PART_S * len(missing) * self.home.rng.random() * 2
        self.home.at(wait_s, self.do, self.fetched, plan, parts, mark, 1)

    def fetched(self: Any, plan: Plan, parts: tuple[str, ...], mark: object, tries: int) -> None:
        """Take what can be had now; what cannot is tried again a few times."""
        if self.fetches.get(plan.id) is not mark:
            return
        missing = [part for part in parts if part not in self.machine.parts]
        got = {part for part in missing if self.source_of(part)}
        if got:
            self.machine.parts |= got
            self.offer_parts()
            self.home.at(self.home.rng.random() * 0.3, self.do, self.announce)
        left = [part for part in missing if part not in got]
        if left and tries < TRIES:
            self.home.at(1.0, self.do, self.fetched, plan, parts, mark, tries + 1)
            return
        del self.fetches[plan.id]
        why = f"nobody has {', '.join(left[:3])}" if left else ""
        self.do_duty(d.Fetched(plan.id, why))

    def source_of(self: Any, part: str) -> str:
        """A member that offers the part, and can be asked now."""
        for peer in sorted(self.membership.members):
            if any(part in offer.parts for offer in self.offers.get(peer, ())):
                other, home = self.home.machines[peer].agent, self.home
                runs = other.alive and not other.stopped
                if runs and home.hears(self, other) and home.hears(other, self):
                    return peer
        return ""
