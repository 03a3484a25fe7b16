"""Real stage processes over real sockets, with the fake engine: the same tokens from any ring."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zmq

from backends.fake_model import EOS
from peer.errors import AnswerFailed, RequestError
from peer.models.imports import import_gguf
from peer.models.manifest import Manifest
from peer.models.store import Store
from peer.planning.plan import PlanId
from peer.protocol import Sampling, StageAdmit, Tokens
from peer.ring.entry import Entry
from peer.ring.frames import FrameHeader
from peer.ring.generation import Patience
from peer.ring.sockets import as_client
from tests import fake_models
from tests.conftest import Until
from tests.e2e.rings import Ring, plan_of, running
from tests.e2e.stages import Stages
from tests.plans import PEERS

PROMPT = [256, *b"What is a ring?"]


class House:
    """A store with one fake model, and the model's file as the oracle."""

    def __init__(self, home: Path, **model: object) -> None:
        self.file = fake_models.write(home / "fake.gguf", **model)  # type: ignore[arg-type]
        self.store = Store(home)
        self.manifest: Manifest = import_gguf(self.file, self.store)
        self.folder = self.store.folder(self.manifest.digest)

    def truth(self, ids: list[int], count: int) -> list[int]:
        return fake_models.truth(self.file, ids, count)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    return House(tmp_path_factory.mktemp("house"), end_every=0)


@pytest.fixture
async def ring(house: House) -> AsyncIterator[Ring]:
    async with running(plan_of(house.store, house.manifest, [4, 8], "fake"), house.folder) as ring:
        yield ring


@pytest.mark.parametrize("bounds", [[], [5], [4, 8], [1, 2, 3, 11]])
async def test_every_ring_gives_the_tokens_of_the_whole_model(
    house: House, bounds: list[int]
) -> None:
    plan = plan_of(house.store, house.manifest, bounds, "fake", batch_tokens=16)
    async with running(plan, house.folder) as ring:
        assert await ring.tokens(PROMPT, 40) == house.truth(PROMPT, 40)
        long = [256, *range(200)]
        assert await ring.tokens(long, 20) == house.truth(long, 20)


async def test_two_rounds_over_two_peers_give_the_same_tokens(house: House) -> None:
    plan = plan_of(house.store, house.manifest, [2, 5, 9], "fake", peers=2)
    async with running(plan, house.folder) as ring:
        assert await ring.tokens(PROMPT, 40) == house.truth(PROMPT, 40)


async def test_many_answers_at_once_do_not_mix(house: House, ring: Ring) -> None:
    prompts = [[256, *f"question number {i}".encode()] for i in range(20)]
    answers = await asyncio.gather(*(ring.tokens(p, 30 + i) for i, p in enumerate(prompts)))
    assert answers == [house.truth(p, 30 + i) for i, p in enumerate(prompts)]
    await ring.idle()


async def test_an_answer_depends_on_its_seed_and_not_on_its_company(ring: Ring) -> None:
    drawn = Sampling(temperature=5.0, top_k=0, top_p=1.0, min_p=0.0, seed=7)
    alone = await ring.tokens(PROMPT, 25, drawn)
    others = [
        ring.tokens([256, 65 + i], 40, msgspec.structs.replace(drawn, seed=i)) for i in range(6)
    ]
    together, *_ = await asyncio.gather(ring.tokens(PROMPT, 25, drawn), *others)
    assert together == alone
    assert await ring.tokens(PROMPT, 25, msgspec.structs.replace(drawn, seed=8)) != alone


async def test_an_end_token_ends_the_answer_and_is_not_part_of_it(tmp_path: Path) -> None:
    house = House(tmp_path, end_every=11)
    plan = plan_of(house.store, house.manifest, [6], "fake")
    async with running(plan, house.folder) as ring:
        answer = await ring.tokens(PROMPT, 200, ends=(EOS,))
    assert answer == house.truth(PROMPT, 200)
    assert len(answer) < 200


async def test_a_reader_that_leaves_frees_the_slot_and_stops_the_steps(ring: Ring) -> None:
    async with aclosing(ring.answer(PROMPT, 1900)) as answer:
        async for _ in answer:
            break
    await ring.idle()
    assert ring.entry.running == 0
    steps = {peer: news.steps for peer, news in ring.news.items()}
    assert max(steps.values()) < 1000


async def test_a_prompt_beyond_the_context_is_refused_before_anything_runs(ring: Ring) -> None:
    with pytest.raises(RequestError, match="2048"):
        await ring.tokens([1] * 2048, 5)


async def test_a_killed_stage_ends_the_answer_with_an_error_and_leaves_the_others(
    house: House, ring: Ring
) -> None:
    victim = PEERS[1]

    async def read() -> None:
        async for _ in ring.answer(PROMPT, 1900):
            if not ring.exits:
                for pid in ring.supervisors[victim].pids().values():
                    with contextlib.suppress(ProcessLookupError):  # gone, and not yet told
                        os.kill(pid, signal.SIGKILL)

    with pytest.raises(AnswerFailed, match="SIGKILL"):
        await asyncio.wait_for(read(), 10)
    for peer in (PEERS[0], PEERS[2]):
        (pid,) = ring.supervisors[peer].pids().values()
        os.kill(pid, 0)


class Cable:
    """A TCP relay on loopback that can be cut."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._writers: list[asyncio.StreamWriter] = []

    async def lay(self) -> int:
        self._server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner, onward = await asyncio.open_connection("127.0.0.1", self._to)
        self._writers += [writer, onward]
        await asyncio.gather(self._copy(reader, onward), self._copy(inner, writer))

    async def _copy(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(1 << 16):
                target.write(data)
                await target.drain()
        target.close()

    async def cut(self) -> None:
        """Break every connection; new ones may come."""
        writers, self._writers = self._writers, []
        for writer in writers:
            writer.close()
        for writer in writers:
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def close(self) -> None:
        self._server.close()
        await self.cut()


async def test_an_answer_goes_on_at_once_over_a_new_link_to_the_head(
    house: House, ring: Ring
) -> None:
    ring.entry.end(ring.plan.id, "laid anew")
    head = ring.link(PEERS[0])
    cable = Cable(head.submit_port)
    ring.entry.open(ring.plan.id, f"tcp://127.0.0.1:{await cable.lay()}", head.key)
    ring.entry.serve(ring.offer)
    found: list[int] = []
    try:
        async with asyncio.timeout(8), aclosing(ring.answer(PROMPT, 300)) as answer:
            async for given in answer:  # it would notice silence after 20
                found += given.ids
                if len(found) in (1, 150):
                    await cable.cut()
        assert found == house.truth(PROMPT, 300)
        assert ring.entry.continued == 2
        await ring.idle()
    finally:
        await cable.close()


async def test_answers_of_an_agent_that_is_gone_stop_before_their_first_token(
    tmp_path: Path, until: Until
) -> None:
    slow = House(tmp_path, end_every=0, delay_s=0.1)
    ring = Stages(plan_of(slow.store, slow.manifest, [6], "fake", batch_tokens=1))
    try:
        await ring.start(slow.folder, until)
        await ring.submit([256, *range(200)], 5)  # 40 s of prefill
        await until(lambda: ring.news[PEERS[0]].active, 10, "it is being read")
        ring.supervisors[PEERS[0]].send(ring.plan.id, StageAdmit(()))
        await until(lambda: not ring.news[PEERS[0]].active, 5, "it stopped")
        while isinstance(said := await ring.said(), Tokens):
            assert not said.ids
        assert said.code == "stale", "it may go on where its agent is in reach"
    finally:
        await ring.close()


async def test_no_plan_means_no_answer(ring: Ring) -> None:
    ring.entry.serve(None)
    with pytest.raises(AnswerFailed, match="no ring serves"):
        await ring.tokens(PROMPT, 3)


async def test_submits_of_another_plan_are_refused_as_stale_and_wait_for_the_right_one(
    house: House, ring: Ring, until: Until
) -> None:
    head = ring.link(PEERS[0])
    other = msgspec.structs.replace(ring.plan, id=PlanId(1, 2))
    ring.entry.open(other.id, f"tcp://127.0.0.1:{head.submit_port}", head.key)
    ring.entry.serve(dataclasses.replace(ring.offer, plan=other.id))
    async with asyncio.timeout(10):
        asked = asyncio.create_task(ring.tokens(PROMPT, 3))
        await until(lambda: ring.entry.waiting, 5, "it was refused")
        ring.entry.serve(ring.offer)
        assert await asked == house.truth(PROMPT, 3)


async def test_an_agent_that_is_not_admitted_gets_no_answer_until_it_is(ring: Ring) -> None:
    head, digest = ring.link(PEERS[0]), ring.plan.shape.digest
    public, secret = zmq.curve_keypair()
    stranger = Entry(public, secret, Patience(silence_s=1.0, plan_s=1.0))
    try:
        stranger.open(ring.plan.id, f"tcp://127.0.0.1:{head.submit_port}", head.key)
        stranger.serve(ring.offer)
        with pytest.raises(AnswerFailed):
            async for _ in stranger.answer((256, 65), Sampling(temperature=0.0), 3, (), digest):
                pass
    finally:
        await stranger.close()
    ring.supervisors[PEERS[0]].send(ring.plan.id, StageAdmit((public.decode(),)))
    admitted = Entry(public, secret, Patience(silence_s=10.0, plan_s=1.0))
    try:
        admitted.open(ring.plan.id, f"tcp://127.0.0.1:{head.submit_port}", head.key)
        admitted.serve(ring.offer)
        async for given in admitted.answer((256, 65), Sampling(temperature=0.0), 3, (), digest):
            assert given.ids
    finally:
        await admitted.close()


async def test_strangers_frames_on_the_ring_port_change_nothing(house: House, ring: Ring) -> None:
    """A stranger with a good CURVE key but not the stage's is not let in at all."""
    middle = ring.link(PEERS[1])
    public, secret = zmq.curve_keypair()
    with zmq.Context() as context, context.socket(zmq.PUSH) as push:
        as_client(push, middle.key.encode(), public, secret, 1 << 20)
        push.connect(f"tcp://127.0.0.1:{middle.ring_port}")
        header = msgspec.msgpack.encode(FrameHeader(ring.plan.id, 1, 1, 1, 8))
        for _ in range(3):
            push.send_multipart([header, bytes(9), np.zeros(8, np.float32).tobytes()])
        assert await ring.tokens(PROMPT, 40) == house.truth(PROMPT, 40)
    assert ring.news[PEERS[1]].dropped == 0


@pytest.mark.parametrize("token", [-1, 10_000, 2**31 - 1])
async def test_ids_that_the_model_does_not_have_are_refused_and_the_ring_goes_on(
    house: House, ring: Ring, token: int
) -> None:
    with pytest.raises(RequestError, match="not among the model's"):
        await ring.tokens([*PROMPT, token], 3)
    assert await ring.tokens(PROMPT, 5) == house.truth(PROMPT, 5)
