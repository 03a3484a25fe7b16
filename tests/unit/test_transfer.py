"""models.transfer and models.sources: parts from peers that are honest, dead, slow, lying, gone."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from peer.errors import ModelError, PartError
from peer.models import disk, parts, transfer
from peer.models.manifest import Manifest
from peer.models.partial import Busy, Partial
from peer.models.sources import Sources, Start, Stop
from peer.models.store import Store
from peer.models.transfer import answer, fetch
from peer.protocol import (
    CHUNK_BYTES_MAX,
    ChunkHere,
    ChunkWanted,
    ManifestHere,
    ManifestWanted,
    NotHere,
    decode_control,
    encode,
)
from tests import gguf_files
from tests.part_sources import Net


@pytest.fixture
def origin(tmp_path: Path) -> Store:
    """The store of the peer that pulled the model; its embedding takes several chunks."""
    store = Store(tmp_path / "origin")
    file = gguf_files.model(layers=6, hidden=256, vocabulary=4000, tied=False)
    parts.import_gguf(file.write(tmp_path / "model.gguf"), store)
    return store


@pytest.fixture
def manifest(origin: Store) -> Manifest:
    return origin.models()[0].manifest


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """The store of the peer that lacks parts."""
    return Store(tmp_path / "mine")


Until = Callable[[Callable[[], object], float, str], Awaitable[None]]


def whole(store: Store, manifest: Manifest) -> None:
    """Every part is present, right, and nothing else lies around."""
    for part in manifest.parts:
        store.verify(manifest.digest, part.name)
    files = {part.file for part in manifest.parts} | {"manifest.json"}
    found = {path.name for path in store.folder(manifest.digest).iterdir()} - {".lock"}
    assert found == files


def names(manifest: Manifest) -> list[str]:
    return [part.name for part in manifest.parts]


async def test_missing_parts_come_from_several_peers_at_once(
    origin: Store, store: Store, manifest: Manifest
) -> None:
    net = Net(origin, "a", "b", "c")
    seen: list[tuple[int, int]] = []
    progress = lambda done, total: seen.append((done, total))  # noqa: E731
    assert await fetch(store, manifest.digest, names(manifest), net.offers, net.ask, progress)
    await asyncio.to_thread(whole, store, manifest)
    assert set(net.bytes) == {"a", "b", "c"}
    assert sum(net.bytes.values()) == sum(part.data_bytes for part in manifest.parts)
    assert seen[0][0] == 0
    assert seen[-1][0] == seen[-1][1] == sum(part.data_bytes for part in manifest.parts)
    assert 1 < net.flying_max <= 3 * 2 * transfer.IN_FLIGHT


async def test_only_the_parts_that_are_asked_for_and_lacking_are_fetched(
    origin: Store, store: Store, manifest: Manifest
) -> None:
    net = Net(origin, "a")
    wanted = ["head", "layer-002", "layer-003"]
    await fetch(store, manifest.digest, wanted[:2], net.offers, net.ask)
    await fetch(store, manifest.digest, wanted, net.offers, net.ask)
    assert net.bytes["a"] == sum(manifest.part(name).data_bytes for name in wanted)
    stored = await asyncio.to_thread(store.stored, manifest.digest)
    assert stored.parts == tuple(wanted)
    assert (await asyncio.to_thread(parts.load_header, store.folder(manifest.digest))).layers == 6
    before = net.asked["a"]
    await fetch(store, manifest.digest, wanted, dict, net.ask)  # nobody is needed any more
    assert net.asked["a"] == before


async def test_a_fetched_model_loads_its_windows_like_the_imported_one(
    origin: Store, store: Store, manifest: Manifest, tmp_path: Path
) -> None:
    net = Net(origin, "a")
    await fetch(store, manifest.digest, names(manifest), net.offers, net.ask)
    for part in manifest.parts:
        mine = store.folder(manifest.digest) / part.file
        theirs = origin.folder(manifest.digest) / part.file
        assert mine.read_bytes() == theirs.read_bytes()


async def test_a_peer_that_lies_is_found_out_and_another_one_is_asked(
    origin: Store, store: Store, manifest: Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    net = Net(origin, "liar", "honest")

    def flip(wanted: object, found: ManifestHere | ChunkHere) -> ManifestHere | ChunkHere:
        if isinstance(found, ChunkHere):
            return ChunkHere(found.request, found.data[:-1] + bytes([found.data[-1] ^ 1]))
        return found

    net.tricks["liar"] = flip
    await fetch(store, manifest.digest, names(manifest), net.offers, net.ask)
    await asyncio.to_thread(whole, store, manifest)
    assert net.bytes["liar"] > 0
    assert "from=liar because=wrong_hash" in caplog.text


async def test_when_only_liars_are_left_they_are_named_and_nothing_is_used(
    origin: Store, store: Store, manifest: Manifest
) -> None:
    net = Net(origin, "liar", "short")
    net.tricks["liar"] = lambda wanted, found: (
        ChunkHere(0, bytes(len(found.data))) if isinstance(found, ChunkHere) else found
    )
    net.tricks["short"] = lambda wanted, found: (
        ChunkHere(0, found.data[:-1]) if isinstance(found, ChunkHere) else found
    )
    with pytest.raises(PartError) as caught:
        await fetch(store, manifest.digest, ["layer-001"], net.offers, net.ask)
    assert "layer-001 cannot be fetched" in str(caught.value)
    assert "liar: what it sent has the wrong hash" in str(caught.value)
    assert "short: it did not send the bytes" in str(caught.value)
    assert not store.has(manifest.digest, "layer-001")


async def test_a_manifest_that_is_not_the_one_asked_for_is_not_adopted(
    origin: Store, store: Store, manifest: Manifest
) -> None:
    net = Net(origin, "liar", "confused")
    net.tricks["liar"] = lambda wanted, found: ManifestHere(0, manifest.digest, b"{}")
    net.tricks["confused"] = lambda wanted, found: ChunkHere(0, b"")
    with pytest.raises(PartError, match=r"manifest .* liar: .* not the one .* confused: "):
        await fetch(store, manifest.digest, ["head"], net.offers, net.ask)
    net.offers_now["honest"] = set(net.names)
    await fetch(store, manifest.digest, ["head"], net.offers, net.ask)
    assert store.has(manifest.digest, "head")


async def test_a_peer_that_dies_costs_nothing_of_what_it_gave(
    origin: Store, store: Store, manifest: Manifest
) -> None:
    net = Net(origin, "dying", "other")
    net.offers_now["other"] = set()

    def die(wanted: object, found: ManifestHere | ChunkHere) -> ManifestHere | ChunkHere:
        if net.asked["dying"] > 2:
            net.lost.add("dying")
            net.offers_now["other"] = set(net.names)
        return found

    net.tricks["dying"] = die
    await fetch(store, manifest.digest, ["embed"], net.offers, net.ask)
    assert net.bytes["other"] > 0
    assert net.bytes["dying"] >= 2 * CHUNK_BYTES_MAX
    size = manifest.part("embed").data_bytes
    assert size <= sum(net.bytes.values()) < size + transfer.IN_FLIGHT * CHUNK_BYTES_MAX
    await asyncio.to_thread(store.verify, manifest.digest, "embed")


async def test_when_all_are_lost_the_error_says_so_after_a_few_tries(
    origin: Store, store: Store, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peer.models.sources.REST_S", 0.01)
    net = Net(origin, "gone")
    await fetch(store, manifest.digest, ["head"], net.offers, net.ask)
    net.lost.add("gone")
    with pytest.raises(PartError, match="output cannot be fetched from anyone: gone: gone is sil"):
        await fetch(store, manifest.digest, ["output"], net.offers, net.ask)
    with pytest.raises(PartError, match="no peer offers it"):
        await fetch(store, manifest.digest, ["output"], dict, net.ask)


async def test_a_peer_that_lacks_a_part_after_all_is_not_asked_again(
    origin: Store, store: Store, manifest: Manifest
) -> None:
    net = Net(origin, "a")
    (origin.folder(manifest.digest) / "layer-004.gguf").unlink()
    with pytest.raises(PartError, match=r"layer-004 cannot be .*: a: layer-004 is not here"):
        await fetch(store, manifest.digest, names(manifest), net.offers, net.ask)
    stored = await asyncio.to_thread(store.stored, manifest.digest)
    assert set(stored.parts) == net.names - {"layer-004"}  # the others were worth having


async def test_an_interrupted_transfer_goes_on_where_it_was(
    origin: Store, store: Store, manifest: Manifest, until: Until
) -> None:
    net = Net(origin, "a")
    net.gates["a"] = asyncio.Event()
    net.gates["a"].set()

    def stall(wanted: object, found: ManifestHere | ChunkHere) -> ManifestHere | ChunkHere:
        if net.asked["a"] >= 2:
            net.gates["a"].clear()
        return found

    net.tricks["a"] = stall
    task = asyncio.create_task(fetch(store, manifest.digest, ["embed"], net.offers, net.ask))
    path = store.folder(manifest.digest) / ".embed.partial"
    header = manifest.part("embed").header_bytes
    await until(lambda: disk.size_of(path) > header, 5, "something arrived")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not store.has(manifest.digest, "embed")
    arrived = disk.size_of(path) - header
    assert arrived >= CHUNK_BYTES_MAX

    again, net = Store(store.root.parent), Net(origin, "b")  # after a restart
    seen: list[int] = []
    await fetch(
        again, manifest.digest, ["embed"], net.offers, net.ask, lambda done, _: seen.append(done)
    )
    assert seen[0] == arrived
    assert net.bytes["b"] == manifest.part("embed").data_bytes - arrived
    await asyncio.to_thread(again.verify, manifest.digest, "embed")


async def test_garbage_left_by_a_power_cut_is_fetched_again_and_blames_nobody(
    origin: Store, store: Store, manifest: Manifest
) -> None:
    net = Net(origin, "a")
    await fetch(store, manifest.digest, ["head"], net.offers, net.ask)
    part = manifest.part("embed")
    path = store.folder(manifest.digest) / ".embed.partial"
    for garbage in (bytes(part.header_bytes + 5000), bytes(part.file_bytes), bytes(9_000_000)):
        path.write_bytes(garbage)
        await fetch(store, manifest.digest, ["embed"], net.offers, net.ask)
        await asyncio.to_thread(store.verify, manifest.digest, "embed")
        (store.folder(manifest.digest) / "embed.gguf").unlink()


async def test_two_fetches_of_one_part_do_not_write_over_each_other(
    origin: Store, store: Store, manifest: Manifest
) -> None:
    net = Net(origin, "a", "b")
    await asyncio.gather(
        *(fetch(store, manifest.digest, names(manifest), net.offers, net.ask) for _ in range(3))
    )
    await asyncio.to_thread(whole, store, manifest)
    assert sum(net.bytes.values()) == sum(part.data_bytes for part in manifest.parts)


async def test_a_much_faster_peer_takes_a_part_over_from_a_slow_one(
    origin: Store,
    store: Store,
    manifest: Manifest,
    monkeypatch: pytest.MonkeyPatch,
    until: Until,
) -> None:
    monkeypatch.setattr("peer.models.sources.SLOW_AFTER_S", 0.2)
    net = Net(origin, "slow", "quick")
    net.offers_now["quick"] = set()
    net.gates["slow"] = asyncio.Event()  # never opens: silent, though not yet lost

    async def appear() -> None:
        await until(lambda: net.asked["slow"], 5, "the slow one was asked")
        net.offers_now["quick"] = set(net.names)

    await asyncio.to_thread(store.adopt_manifest, manifest.digest, manifest.data)
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        group.create_task(appear())
        group.create_task(fetch(store, manifest.digest, ["embed", "output"], net.offers, net.ask))
    assert net.bytes["slow"] == 0
    assert store.missing(manifest.digest, ["embed", "output"]) == ()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root on Linux")
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this container may not mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


async def test_a_full_disk_ends_a_fetch_with_path_and_bytes_and_loses_nothing(
    small_disk: Path, origin: Store, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, net = await asyncio.to_thread(Store, small_disk), Net(origin, "a")
    few = ["head", "layer-000"]
    await fetch(store, manifest.digest, few, net.offers, net.ask)
    free = shutil.disk_usage(small_disk).free
    with pytest.raises(PartError, match=r"no space left .* bytes .*more are needed"):
        await fetch(store, manifest.digest, names(manifest), net.offers, net.ask)
    monkeypatch.setattr(disk, "require", lambda folder, needed: None)  # it fills up meanwhile
    with pytest.raises(PartError, match=r"partial: no space left .* bytes .*more are needed") as e:
        await fetch(store, manifest.digest, ["embed", "output"], net.offers, net.ask)
    assert str(small_disk) in str(e.value)
    assert shutil.disk_usage(small_disk).free == free
    for name in few:
        await asyncio.to_thread(store.verify, manifest.digest, name)
    await fetch(store, manifest.digest, ["layer-001"], net.offers, net.ask)  # it goes on


async def test_a_head_that_is_not_its_manifests_is_thrown_away(
    tmp_path: Path, origin: Store, manifest: Manifest, store: Store
) -> None:
    """Every hash is right, but whoever made the manifest lied about the model."""
    head = manifest.part("head")
    data = bytearray((origin.folder(manifest.digest) / "head.gguf").read_bytes())
    at = data.index(b"llama.block_count") + len(b"llama.block_count") + 4
    data[at] = 7  # layers
    entry = msgspec.structs.replace(head, sha256=hashlib.sha256(data).hexdigest())
    lying = msgspec.structs.replace(manifest, parts=(entry, *manifest.parts[1:]))
    folder = origin.root / lying.digest
    shutil.copytree(origin.folder(manifest.digest), folder)
    (folder / "head.gguf").write_bytes(data)
    (folder / "manifest.json").write_bytes(lying.data)
    net = Net(origin, "a")
    with pytest.raises(ModelError, match="not what the model's manifest says"):
        await fetch(store, lying.digest, ["head"], net.offers, net.ask)
    assert not store.has(lying.digest, "head")


def test_questions_that_cannot_be_met_are_answered_with_a_reason(
    origin: Store, manifest: Manifest
) -> None:
    digest = manifest.digest
    for wanted in (
        ManifestWanted(7, "0" * 64),
        ManifestWanted(7, "../" + "0" * 61),
        ChunkWanted(7, "0" * 64, "head", 0, 1),
        ChunkWanted(7, digest, "layer-999", 0, 1),
        ChunkWanted(7, digest, "../../x", 0, 1),
        ChunkWanted(7, digest, "head", 1 << 60, 1),
        ChunkWanted(7, digest, "head", 0, 1 << 40),
    ):
        found = answer(origin, wanted)
        assert isinstance(found, NotHere)
        assert found.request == 7
        assert str(origin.root) not in found.why
        assert decode_control(encode(found)) == found
    (origin.folder(digest) / "layer-001.gguf").rename(origin.root / "moved")
    (origin.folder(digest) / "layer-001.gguf").mkdir()
    (origin.root / ("1" * 64)).mkdir()
    (origin.root / ("1" * 64) / "manifest.json").write_text("garbage")
    for hidden in (ChunkWanted(7, digest, "layer-001", 0, 1), ManifestWanted(7, "1" * 64)):
        found = answer(origin, hidden)
        assert isinstance(found, NotHere)
        assert str(origin.root) not in found.why
    found = answer(origin, ChunkWanted(8, digest, "layer-000", 3, 9))
    assert isinstance(found, ChunkHere)
    assert (found.request, len(found.data)) == (8, 9)


# The pure half ------------------------------------------------------------------------------------


def starts(actions: list[Start | Stop]) -> dict[str, str]:
    return {action.part: action.peer for action in actions if isinstance(action, Start)}


def test_the_rarest_part_is_asked_for_first() -> None:
    sources = Sources({name: (100, 0) for name in ("x", "y", "z", "rare")})
    offers = {"a": {"x", "y", "z", "rare"}, "b": {"x", "y", "z"}, "c": {"x", "y", "z"}}
    assert starts(sources.step(offers, 0.0))["rare"] == "a"


def test_a_wrong_hash_of_mixed_bytes_is_tried_again_from_one_source_alone() -> None:
    sources = Sources({"x": (100, 0)})
    offers = {"a": {"x"}, "b": {"x"}}
    first = starts(sources.step(offers, 0.0))["x"]
    sources.got("x", 50, 1.0)
    sources.lost("x", "silent", 1.0)
    second = starts(sources.step(offers, 1.1))["x"]
    assert {first, second} == {"a", "b"}
    sources.got("x", 100, 2.0)
    sources.damaged("x")  # one of the two: nobody knows which
    assert sources.stuck(offers, 2.0) == ""
    (third,) = sources.step(offers, 2.1)
    assert isinstance(third, Start)
    assert third.fresh
    sources.got("x", 100, 3.0)
    sources.damaged("x")  # all of it from this one
    (fourth,) = sources.step(offers, 3.1)
    assert isinstance(fourth, Start)
    assert fourth.peer != third.peer
    assert fourth.fresh
    sources.got("x", 100, 4.0)
    sources.damaged("x")
    assert sources.step(offers, 9.0) == []
    assert sources.stuck(offers, 9.0).count("wrong hash") == 2


def test_a_part_is_taken_from_a_slow_source_once_and_only_by_a_much_faster_one() -> None:
    sources = Sources({"x": (100 << 20, 0), "y": (100, 0)})
    offers = {"slow": {"x"}, "quick": {"y"}}
    sources.step(offers, 0.0)
    sources.got("x", 1 << 20, 10.0)
    sources.finished("y")
    assert sources.step(offers, 10.0) == []  # the quick one has no x
    offers["quick"] = {"x"}
    assert sources.step(offers, 1.0) == []  # too early to call it slow
    assert sources.step(offers, 10.0) == [Stop("x")]
    assert sources.step(offers, 10.1) == []
    sources.stopped("x")
    assert starts(sources.step(offers, 10.2)) == {"x": "quick"}
    assert sources.step(offers, 30.0) == []  # silent, but the slow one does not get it back


@pytest.mark.parametrize("seed", range(200))
def test_whatever_sources_do_it_ends_and_every_part_comes_from_someone_honest(seed: int) -> None:
    """Always: nobody has more than its share. At the end: what honest sources had is here."""
    draw = random.Random(seed)
    names = [f"part-{i}" for i in range(draw.randrange(1, 12))]
    peers = [f"peer-{i}" for i in range(draw.randrange(1, 5))]
    liars = {peer for peer in peers if draw.random() < 0.3}
    offers = {peer: {name for name in names if draw.random() < 0.7} for peer in peers}
    honest = {name for peer in set(peers) - liars for name in offers[peer]}
    sources = Sources({name: (10, draw.choice((0, 4))) for name in names})
    running: dict[str, tuple[Start, set[str]]] = {}
    mixed: dict[str, set[str]] = {}
    here: set[str] = set()
    now = 0.0
    deaths = 8
    for _ in range(3000):
        now += draw.random()
        for action in sources.step(offers, now):
            if isinstance(action, Stop):
                running.pop(action.part)
                sources.stopped(action.part)
                continue
            assert action.part not in running
            if action.fresh:
                mixed.pop(action.part, None)
            running[action.part] = (action, mixed.setdefault(action.part, set()))
        shares = Counter(start.peer for start, _ in running.values())
        assert all(share <= 2 for share in shares.values())
        if sources.done or (not running and sources.stuck(offers, now)):
            break
        if not running:
            continue
        name = draw.choice(list(running))
        start, givers = running.pop(name)
        kind = draw.random()
        if kind < 0.2 and deaths:
            deaths -= 1
            givers.add(start.peer)
            sources.got(name, 5, now)
            sources.lost(name, "silent", now)
            continue
        givers.add(start.peer)
        sources.got(name, 10, now)
        if givers & liars:
            mixed.pop(name)
            sources.damaged(name)
        else:
            sources.finished(name)
            here.add(name)
    else:
        raise AssertionError("it never ended")
    if deaths > 0 and not sources.done:
        reachable = {n for p in set(peers) - liars - set(sources._lost) for n in offers[p]}
        assert reachable <= here <= honest


def test_a_partial_part_is_one_fetchs_at_a_time(
    origin: Store, store: Store, manifest: Manifest
) -> None:
    store.adopt_manifest(manifest.digest, manifest.data)
    first, second = (Partial(store, manifest, "head") for _ in range(2))
    with contextlib.closing(first), contextlib.closing(second):
        assert first.open()
        with pytest.raises(Busy):
            second.open()


def test_a_part_that_was_finished_while_another_fetch_opened_it_stays_as_it_is(
    origin: Store, store: Store, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.adopt_manifest(manifest.digest, manifest.data)
    first, second = (Partial(store, manifest, "head") for _ in range(2))
    size = manifest.part("head").data_bytes
    with contextlib.closing(first), contextlib.closing(second):
        assert first.open()
        first.append(origin.read_chunk(manifest.digest, "head", 0, size))
        lock = disk.try_lock

        def finish_first(descriptor: int) -> bool:
            assert first.finish()
            first.close()
            return lock(descriptor)

        monkeypatch.setattr(disk, "try_lock", finish_first)
        with pytest.raises(Busy):
            second.open()
        store.verify(manifest.digest, "head")
        monkeypatch.setattr(disk, "try_lock", lock)
        second.close()
        assert not second.open()
    store.verify(manifest.digest, "head")
    assert not list(store.folder(manifest.digest).glob(".*.partial"))


async def test_what_can_wait_asks_for_one_chunk_at_a_time_and_rests_after_each(
    origin: Store, store: Store, manifest: Manifest
) -> None:
    net = Net(origin, "a")
    took: list[float] = []

    def rest(chunk_s: float) -> float:
        assert net.flying == 0
        took.append(chunk_s)
        return 0.0

    await fetch(store, manifest.digest, ["embed"], net.offers, net.ask, None, rest)
    await asyncio.to_thread(store.verify, manifest.digest, "embed")
    assert net.flying_max == 1
    assert net.asked["a"] > 3
    assert len(took) == net.asked["a"] - 1  # nothing comes after the last one
    assert min(took) > 0
