"""This peer's spare parts: fetched when nothing else happens, within what it offers; and the
coordinator's look ahead with real outlooks."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import pytest
from msgspec.structs import replace

from peer import sparing
from peer.config import Config
from peer.errors import PartError, PeerLost
from peer.models import parts as model_parts
from peer.models import transfer
from peer.models.manifest import Manifest
from peer.models.store import Store
from peer.models.transfer import Progress, Rest
from peer.planning import foresight, survey
from peer.planning import rollout as r
from peer.planning.plan import Plan, PlanId, PlanState, PlanWindow, Split
from peer.planning.profile import ModelOffer, ModelShape, Profile
from peer.planning.spares import own_parts, part_sizes
from peer.protocol import (
    ChunkHere,
    ChunkWanted,
    ManifestHere,
    ManifestWanted,
    NotHere,
    Outlook,
    Spare,
)
from peer.sparing import Host, Sparing
from tests import gguf_files
from tests.conftest import Until
from tests.coordinator import A, B, C, profile, shape

T = TypeVar("T")
LAYERS = 6
SLOW_S = 2 * transfer.QUICK_S  # of a chunk


class Peer:
    """An agent as sparing sees it: B, beside A who has all of a model that both run."""

    def __init__(self, folder: Path) -> None:
        self.origin, self.store = Store(folder / "a"), Store(folder / "b")
        file = gguf_files.model(layers=LAYERS, hidden=256, vocabulary=4000, tied=False)
        model_parts.import_gguf(file.write(folder / "model.gguf"), self.origin)
        self.manifest = self.origin.models()[0].manifest
        sizes = {part.name: part.data_bytes for part in self.manifest.parts}
        self.shape: ModelShape = replace(
            shape(layers=LAYERS), digest=self.manifest.digest, head_bytes=sizes["head"],
            layer_bytes=tuple(sizes[f"layer-{i:03d}"] for i in range(LAYERS)),
            embed_bytes=sizes["embed"], output_bytes=sizes["output"],
        )  # fmt: skip
        self.mine = profile(B, spare_bytes=1 << 40)
        self.offers: dict[str, Sequence[ModelOffer]] = {}
        self.held({A: list(sizes), B: ["head"]})
        windows = (PlanWindow(A, 0, 3, "fake"), PlanWindow(B, 3, LAYERS, "fake"))
        plan = Plan(PlanId(3, 1), A, self.shape, Split(windows, 512, 512, 8, 512))
        self.state: PlanState | None = PlanState(plan, "serving")
        self.works = False
        self.looks: Counter[str] = Counter()
        self.told: list[Outlook] = []
        self.asked: list[tuple[str, str]] = []  # chunks, with their part
        self.rests: list[tuple[float, float]] = []  # after a quick chunk, and after a slow one
        self.gate = asyncio.Event()
        self.gate.set()
        self.faults: dict[str, Exception] = {}
        self.changed = asyncio.Event()
        self.config = Config.fast_test(home=folder / "b")
        self.sparing = Sparing(self.config, self.store, self.host)

    @property
    def plan(self) -> Plan:
        assert self.state
        return self.state.plan

    @property
    def host(self) -> Host:
        return Host(
            B, lambda: self.seen("busy", self.works), lambda: self.seen("serving", self.state),
            lambda: self.seen("profile", self.mine), self.change, self.offers, self.told.append,
            self.parts,
        )  # fmt: skip

    def seen(self, what: str, value: T) -> T:
        self.looks[what] += 1
        return value

    async def looked(self, until: Until, what: str) -> None:
        """Until it has looked at this ten times more, and could have done something."""
        before = self.looks[what]
        await until(lambda: self.looks[what] >= before + 10, 10, f"it looks at {what}")

    def held(self, names: Mapping[str, Sequence[str]]) -> None:
        for peer_id, held in names.items():
            self.offers[peer_id] = (ModelOffer(self.shape, 1.0, tuple(held)),)

    def change(self, **changes: object) -> None:
        self.mine = replace(self.mine, **changes)
        self.changed.set()

    async def parts(
        self,
        digest: str,
        parts: Sequence[str],
        progress: Progress = lambda done, total: None,
        rest: Rest | None = None,
    ) -> Manifest:
        async def ask(
            peer_id: str, message: ManifestWanted | ChunkWanted
        ) -> ManifestHere | ChunkHere:
            if isinstance(message, ChunkWanted):
                self.asked.append((message.part, peer_id))
                assert rest is not None
                self.rests.append((rest(0.0), rest(SLOW_S)))
                await self.gate.wait()
                if fault := self.faults.get(message.part):
                    raise fault
            found = await asyncio.to_thread(transfer.answer, self.origin, message)
            assert not isinstance(found, NotHere)
            return found

        offers = {A: [part.name for part in self.manifest.parts]}
        return await transfer.fetch(self.store, digest, parts, lambda: offers, ask, progress, rest)

    def asks_for(self, *parts: str, digest: str = "", whose: str = B) -> None:
        spare = Spare(whose, digest or self.manifest.digest, parts)
        self.sparing.heard(Outlook(3, (), (spare,)))

    def here(self) -> set[str]:
        folder = self.store.folder(self.manifest.digest)
        return {path.stem for path in folder.glob("[!.]*.gguf")}


@asynccontextmanager
async def running(folder: Path) -> AsyncIterator[Peer]:
    peer = Peer(folder)
    task = asyncio.create_task(peer.sparing.run())
    try:
        yield peer
    finally:
        peer.sparing.close()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks as often as a test can wait for, and as if the disk were large."""
    for name in ("LOOK_S", "STORE_S", "ROOM_S", "AGAIN_S"):
        monkeypatch.setattr(sparing, name, 0.02)
    monkeypatch.setattr(survey, "SPARE_FREE_LEAST_BYTES", 0)


FIRST = ("embed", "layer-000", "layer-001", "layer-002")


@pytest.mark.blocks("a test's model is written before anything runs")
async def test_what_the_coordinator_asks_for_is_fetched_and_nothing_else(
    tmp_path: Path, until: Until, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="halka.sparing")
    async with running(tmp_path) as peer:
        peer.asks_for(*FIRST)
        await until(lambda: peer.here() == {*FIRST}, 20, "its spare parts are there")
        await until(lambda: "spares=held parts=4" in caplog.text, 20, "it says so")
        assert caplog.text.count("spares=wanted parts=4 bytes=") == 1
        for part in FIRST:
            await asyncio.to_thread(peer.store.verify, peer.manifest.digest, part)
        order = list(dict.fromkeys(part for part, _ in peer.asked))
        assert order == [*FIRST]  # one at a time
        assert set(peer.rests) == {(0.0, SLOW_S)}
        asked = len(peer.asked)
        peer.asks_for("layer-004", whose=C)  # of another peer
        peer.asks_for(*FIRST)
        await until(lambda: peer.sparing.outlook is not None, 5, "it heard")
        assert len(peer.asked) == asked


@pytest.mark.blocks("a test's model is written before anything runs")
async def test_it_waits_while_something_computes_and_goes_on_where_it_was(
    tmp_path: Path, until: Until
) -> None:
    async with running(tmp_path) as peer:
        peer.gate.clear()
        peer.asks_for("embed", "layer-000")
        await until(lambda: peer.asked, 10, "the first chunk is asked for")
        peer.works = True  # an answer comes
        await until(lambda: len(asyncio.all_tasks()) <= 6, 10, "the fetch is over")
        peer.gate.set()
        asked = len(peer.asked)
        await peer.looked(until, "busy")
        assert len(peer.asked) == asked
        assert peer.here() == set()
        peer.works = False
        await until(lambda: peer.here() == {"embed", "layer-000"}, 20, "it goes on")


@pytest.mark.blocks("a test's model is written before anything runs")
async def test_where_something_always_computes_parts_trickle_in(
    tmp_path: Path, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparing, "STARVED_S", 0.5)
    async with running(tmp_path) as peer:
        peer.works = True
        peer.asks_for("layer-000")
        await until(lambda: peer.here() == {"layer-000"}, 20, "it comes all the same")
        assert set(peer.rests) == {(sparing.TRICKLE_S, sparing.TRICKLE * SLOW_S)}
        peer.works = False
        peer.rests.clear()
        peer.asks_for("layer-001")
        await until(lambda: peer.here() == {"layer-000", "layer-001"}, 20, "at full speed again")
        assert set(peer.rests) == {(0.0, SLOW_S)}


@pytest.mark.blocks("a test's model is written before anything runs")
async def test_a_part_that_cannot_be_had_is_tried_again_and_the_others_come(
    tmp_path: Path, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparing, "AGAIN_S", 0.2)
    async with running(tmp_path) as peer:
        peer.faults["layer-000"] = PartError("it cannot be read here")
        peer.asks_for("layer-000", "layer-001")
        await until(lambda: peer.here() == {"layer-001"}, 20, "the other one came")
        assert "layer-000" in peer.sparing.why
        peer.faults["layer-000"] = PeerLost("it is silent")
        tried = len([1 for part, _ in peer.asked if part == "layer-000"])
        await until(
            lambda: len([1 for part, _ in peer.asked if part == "layer-000"]) > tried, 20, "again"
        )
        del peer.faults["layer-000"]
        await until(lambda: peer.here() == {"layer-000", "layer-001"}, 20, "at last")
        await until(lambda: peer.sparing.why == "", 5, "nothing is wrong any more")


@pytest.mark.blocks("a test's model is written before anything runs")
async def test_a_coordinator_that_asks_for_more_than_was_offered_gets_nothing(
    tmp_path: Path, until: Until
) -> None:
    async with running(tmp_path) as peer:
        await until(peer.changed.is_set, 10, "its disk's room is told")
        sizes = part_sizes(peer.shape)
        peer.state = None  # what is told stays as it is set now
        peer.mine = replace(peer.mine, spare_bytes=sizes["layer-000"])
        peer.asks_for("layer-000", "layer-001")
        await peer.looked(until, "profile")
        peer.asks_for("layer-000", digest="f" * 64)  # nor of what nobody has
        await peer.looked(until, "serving")
        assert peer.asked == []
        peer.asks_for("layer-000")
        await until(lambda: peer.here() == {"layer-000"}, 20, "what was offered")


@pytest.mark.blocks("a test's model is written before anything runs")
async def test_a_coordinator_that_asks_again_and_again_or_for_what_is_none_fills_no_disk(
    tmp_path: Path, until: Until, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(tmp_path) as peer:
        await until(peer.changed.is_set, 10, "its disk's room is told")
        peer.state = None
        peer.mine = replace(peer.mine, spare_bytes=part_sizes(peer.shape)["layer-000"])
        none = tuple(f"layer-{i:04d}" for i in range(1000, 4000))
        spares = [Spare(B, peer.manifest.digest, (f"layer-{i:03d}",)) for i in range(LAYERS)]
        peer.sparing.heard(Outlook(3, (), (Spare(B, peer.manifest.digest, none), *spares)))
        await until(lambda: peer.here() == {"layer-000"}, 20, "what was offered, once")
        await peer.looked(until, "profile")
        assert {part for part, _ in peer.asked} == {"layer-000"}
        assert peer.here() == {"layer-000"}
        assert "spares=missing" not in caplog.text
        peer.asks_for("layer-000", "layer-000", "layer-000")  # told thrice, it is one part
        await peer.looked(until, "profile")
        assert peer.here() == {"layer-000"}


@pytest.mark.blocks("a test's model is written before anything runs")
async def test_a_disk_without_room_is_left_alone_and_the_reason_told(
    tmp_path: Path, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(survey, "SPARE_FREE_LEAST_BYTES", 1 << 60)
    async with running(tmp_path) as peer:
        await until(peer.changed.is_set, 10, "its disk's room is told")
        peer.state, peer.mine = None, replace(peer.mine, spare_bytes=1 << 40)
        peer.asks_for("layer-000")
        await until(lambda: peer.sparing.why, 10, "it says why")
        assert "no space left on the disk" in peer.sparing.why
        assert peer.asked == []


@pytest.mark.blocks("a test's model is written before anything runs")
async def test_room_is_told_when_it_changes_and_spare_parts_that_arrive_do_not_change_it(
    tmp_path: Path, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = {"free": 100 << 30}
    monkeypatch.setattr(survey, "disk_free_bytes", lambda home: disk["free"])
    asked: list[tuple[int, int]] = []

    def counted(setting: int, free: int, held: int = 0) -> int:
        asked.append((free, held))
        return real(setting, free, held)

    real = survey.spare_bytes
    monkeypatch.setattr(survey, "spare_bytes", counted)
    async with running(tmp_path) as peer:
        await until(peer.changed.is_set, 10, "half of the disk is told")
        assert (peer.mine.spare_bytes, peer.mine.disk_free_bytes) == (50 << 30, 100 << 30)
        peer.changed.clear()
        # A large part comes: it is held now, and no longer free.
        peer.shape = replace(peer.shape, layer_bytes=(20 << 30,) * LAYERS)
        peer.state = PlanState(replace(peer.plan, shape=peer.shape), "serving")
        peer.held({B: [*own_parts(peer.plan, B), "layer-000"]})
        disk["free"] = 80 << 30
        await until(lambda: asked[-1] == (80 << 30, 20 << 30), 10, "it was looked at")
        assert not peer.changed.is_set()
        disk["free"] = 75 << 30  # 5 %
        await until(lambda: asked[-1] == (75 << 30, 20 << 30), 10, "it was looked at")
        assert not peer.changed.is_set()
        disk["free"] = 40 << 30  # somebody else fills it
        await until(peer.changed.is_set, 10, "that is news")
        assert peer.mine.spare_bytes == 30 << 30
        peer.changed.clear()
        disk["free"] = 0
        await until(lambda: peer.mine.spare_bytes < 20 << 30, 10, "nothing can be spared")


@pytest.mark.blocks("a test's model is written before anything runs")
async def test_a_coordinator_looks_ahead_even_where_something_always_computes(
    tmp_path: Path, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foresight, "QUIET_S", 0.05)
    monkeypatch.setattr(sparing, "PATIENT_S", 0.1)
    async with running(tmp_path) as peer:
        assert peer.state
        peer.works = True
        profiles: dict[str, Profile] = {B: peer.mine, A: profile(A)}
        members = r.Members(frozenset(profiles), profiles, dict(peer.offers))
        peer.sparing.watch(r.Elected(7), ())
        peer.sparing.watch(members, [peer.state])
        await until(lambda: any(told.losses for told in peer.told), 20, "it is told")


@pytest.mark.blocks("a test's model is written before anything runs")
async def test_a_coordinator_looks_ahead_and_tells_everybody(
    tmp_path: Path, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foresight, "QUIET_S", 0.05)
    monkeypatch.setattr(foresight, "REST_S", 0.05)
    async with running(tmp_path) as peer:
        peer.state = PlanState(replace(peer.plan, coordinator=B), "serving")
        profiles: dict[str, Profile] = {B: peer.mine, A: profile(A, spare_bytes=1 << 40)}
        members = r.Members(frozenset(profiles), profiles, dict(peer.offers))
        peer.sparing.watch(r.Elected(7), ())
        assert peer.told == []
        peer.works = True
        peer.sparing.watch(members, [peer.state, PlanState(peer.plan, "draining")])
        await peer.looked(until, "busy")
        assert [told.losses for told in peer.told] == [()]  # not while something computes
        peer.works = False
        await until(lambda: any(told.losses for told in peer.told), 20, "it is told")
        found = peer.told[-1]
        assert found.term == 7
        assert {loss.peer_id: loss.outcome for loss in found.losses} == {A: "none", B: "fine"}
        assert peer.sparing.outlook == found
        # Its own spare parts it fetches as everybody does.
        (mine,) = [spare.parts for spare in found.spares if spare.peer_id == B]
        assert set(mine) == set(FIRST)
        await until(lambda: peer.here() == {*FIRST}, 20, "it holds them")
        peer.sparing.watch(r.Deposed(), ())
        said = len(peer.told)
        await peer.looked(until, "serving")
        assert len(peer.told) == said
