"""The entry's links to heads: what one takes is given back when its plan ends."""

from __future__ import annotations

import psutil
import zmq

from peer.planning.plan import PlanId
from peer.ring.entry import Entry
from peer.ring.generation import Patience
from tests.conftest import Until

PLANS = 20


async def test_links_to_the_heads_of_plans_that_are_over_keep_no_descriptor(until: Until) -> None:
    public, secret = zmq.curve_keypair()
    entry, process = Entry(public, secret, Patience()), psutil.Process()

    async def one_more(number: int) -> int:
        plan = PlanId(1, number)
        entry.open(plan, "tcp://127.0.0.1:9", public.decode())
        entry.end(plan, "another one serves")
        return int(process.num_fds())

    try:
        first = await one_more(1)
        for number in range(2, PLANS):
            await one_more(number)
        await until(lambda: process.num_fds() <= first, 5, "as few are open as after the first")
    finally:
        await entry.close()
