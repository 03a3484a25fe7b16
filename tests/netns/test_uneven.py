"""Peers made uneven on one machine are what the benchmark takes them for, and answer rightly."""

from __future__ import annotations

import os
from pathlib import Path

from peer.models.imports import import_gguf
from peer.models.store import Store
from peer.planning.groups import processors, share
from tests.bench.surveyed import peer_ids
from tests.bench.uneven import GROUPS, House, Peer, Throttled, house
from tests.bench.uneven_ring import Answer, rings
from tests.e2e.rings import plan_of
from tests.plain_llama import PlainLlama
from tests.smollm2 import smollm2

TOKENS = 32
TEXT = "".join(f"In the year {year} a new ring was forged in the mountains. " for year in range(4))
SLOW = 0.3  # of a core: less than its part of a ring of two needs
PEERS = (Peer("desk"), Peer("attic", core=max(os.sched_getaffinity(0)), quota=SLOW, link_mbit=100))


def groups() -> list[str]:
    """Control groups of this process's houses."""
    return [path.name for path in GROUPS.glob(f"**/halka-{os.getpid()}-*") if path.is_dir()]


async def ask(made: House, home: Path, prompt: list[int]) -> tuple[Answer, dict[str, Throttled]]:
    """The answer of a ring of two, and how both peers were throttled while it was given."""
    store = Store(home)
    plan = plan_of(store, import_gguf(smollm2(), store), [10], "llama_cpp")
    names = {peer_id: name for name, peer_id in peer_ids(made).items()}
    async with rings(made, store.folder(plan.shape.digest)) as running:
        ring = await running.start(plan, names)
        for stage, peer in zip(ring.stages.values(), made.peers, strict=True):
            assert os.sched_getaffinity(stage.pid) == {peer.core}
            assert namespace(stage.pid) != namespace(os.getpid())  # which asks from a third one
        before = {peer.name: made.throttled(peer.name) for peer in made.peers}
        answer = await running.once(ring, prompt, TOKENS)
        after = {peer.name: made.throttled(peer.name) for peer in made.peers}
    waited = {
        name: Throttled(t.periods - before[name].periods, t.seconds - before[name].seconds)
        for name, t in after.items()
    }
    return answer, waited


def namespace(pid: int) -> str:
    """The network namespace of a process."""
    return str(Path(f"/proc/{pid}/ns/net").readlink())


async def test_a_ring_across_uneven_peers_gives_the_tokens_of_one_process(tmp_path: Path) -> None:
    with PlainLlama(smollm2(), cells=512, batch=512) as whole:
        prompt = whole.tokenise(TEXT)
        expected = whole.greedy(prompt, TOKENS, 512)
    home = namespace(os.getpid())
    with house(tmp_path / "world", PEERS) as made:
        assert len(groups()) == len(PEERS) + 1  # and who asks
        with made.asking():
            answer, waited = await ask(made, tmp_path / "home", prompt)
        assert namespace(os.getpid()) == home
    assert list(answer.ids) == expected
    assert waited["desk"] == Throttled(0, 0.0)
    assert waited["attic"].periods > 2
    assert waited["attic"].seconds > 0.1
    assert groups() == []


def test_a_peer_sees_its_own_quota_and_the_house_takes_it_away(tmp_path: Path) -> None:
    with house(tmp_path, PEERS) as made:
        folders = {peer.name: made.group(peer.name) for peer in PEERS}
        for peer in PEERS:
            words = ["import sys; from pathlib import Path",
                     "from peer.planning.groups import processors, share",
                     "sys.stdout.write(str(share(1, processors())))"]  # fmt: skip
            said = made.output(peer.name, "; ".join(words))
            assert float(said) == (peer.quota or share(1, processors()))
    assert not any(folder.exists() for folder in folders.values())
