"""A connection beside the link, with a member that does not answer as members do."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import zmq

from peer.cluster import sockets
from peer.cluster.aside import Aside
from peer.config import Config
from peer.errors import PeerError
from peer.protocol import Probed, encode

TIMING = Config.fast_test().timing


@contextmanager
def answering(request: int, times: int) -> Iterator[tuple[str, str]]:
    """A member that answers the first probe with these. Yields its key and its address."""
    public, secret = zmq.curve_keypair()
    stop = threading.Event()
    with zmq.Context() as context, context.socket(zmq.ROUTER) as door:
        door.linger = 0
        door.curve_server, door.curve_secretkey = True, secret
        port = door.bind_to_random_port("tcp://127.0.0.1")

        def flood() -> None:
            while not stop.is_set() and not door.poll(20):
                pass
            if stop.is_set():
                return
            to, _ = door.recv_multipart()
            for _ in range(times):
                if stop.is_set():
                    return
                door.send_multipart([to, encode(Probed(request))])

        thread = threading.Thread(target=flood)
        thread.start()
        try:
            yield public.decode(), f"tcp://127.0.0.1:{port}"
        finally:
            stop.set()
            thread.join()


async def measured(key: str, address: str) -> None:
    public, secret = zmq.curve_keypair()
    context = sockets.Context()
    aside = Aside(context, (public.decode(), secret.decode()), key, address)
    try:
        await aside.measure(TIMING, lambda: False)
    finally:
        aside.close()
        context.destroy(linger=0)


async def test_answers_that_nobody_asked_for_are_not_read_for_ever() -> None:
    """Reading what is there already lets nothing else of the agent run, no deadline either."""
    flood = answering(request=0, times=1 << 20)
    with flood as (key, address), pytest.raises(PeerError, match="not asked"):
        await asyncio.wait_for(measured(key, address), 10)


async def test_a_few_late_answers_are_passed_over() -> None:
    few = answering(request=0, times=3)
    with few as (key, address), pytest.raises(TimeoutError):  # the probe's own never comes
        await measured(key, address)
