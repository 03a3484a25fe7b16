"""Parts for plans, and the model that drafts beside them: all of it, at the head only."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from msgspec.structs import replace

from peer.cluster.driver import Cluster
from peer.config import Config
from peer.errors import PeerLost
from peer.fetching import Fetching
from peer.models import transfer
from peer.models.imports import import_gguf
from peer.models.manifest import Manifest
from peer.models.store import Store
from peer.planning import duty as d
from peer.planning.plan import Plan
from peer.planning.profile import ModelOffer
from peer.protocol import ChunkHere, ChunkWanted, ManifestHere, ManifestWanted, NotHere
from tests import fake_models
from tests.coordinator import offer
from tests.e2e.rings import plan_of
from tests.plans import PEERS

HEAD, ORIGIN = PEERS[0], PEERS[1]


class Home:
    """The head's store, empty, and another peer's, with a model and one that is to draft for it."""

    def __init__(self, folder: Path) -> None:
        self.origin, self.store = Store(folder / "origin"), Store(folder / "here")
        self.model, self.draft = self._model(folder, "big", 0), self._model(folder, "small", 1)
        plan = plan_of(self.origin, self.model, [1], "fake")
        self.plan: Plan = replace(plan, split=replace(plan.split, draft=self.draft.digest))
        self.events: list[d.Event] = []
        self.lost: set[str] = set()  # digests that the origin is gone with
        self.offers: dict[str, tuple[ModelOffer, ...]] = {
            ORIGIN: tuple(self._offer(manifest) for manifest in (self.model, self.draft))
        }

    def _model(self, folder: Path, name: str, seed: int) -> Manifest:
        path = fake_models.write(folder / f"{name}.gguf", layers=3, seed=seed, name=name)
        return import_gguf(path, self.origin)

    def _offer(self, manifest: Manifest) -> ModelOffer:
        return offer(plan_of(self.origin, manifest, [1], "fake").shape)

    async def _ask(
        self, peer_id: str, message: ManifestWanted | ChunkWanted, _timeout_s: float
    ) -> ManifestHere | ChunkHere:
        if message.digest in self.lost:
            raise PeerLost(f"peer {peer_id} was lost")
        said = transfer.answer(self.origin, message)
        assert not isinstance(said, NotHere)
        return said

    async def fetched(self, me: str, parts: tuple[str, ...]) -> Fetching:
        """What the peer `me` has done once the plan's parts are said to be here."""
        members: Mapping[str, object] = {ORIGIN: object()}
        cluster = cast(Cluster, SimpleNamespace(me=me, members=members, ask=self._ask))
        done = asyncio.Event()

        def told(event: d.Event) -> None:
            self.events.append(event)
            if isinstance(event, d.Fetched):
                done.set()

        def spawn(work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
            return asyncio.create_task(work, name=name)

        found = Fetching(Config.fast_test(), self.store, cluster, self.offers, told, spawn)
        found.begin(self.plan, parts)
        async with asyncio.timeout(20):
            await done.wait()
        return found

    def has(self, manifest: Manifest) -> set[str]:
        """Names of its parts that are here."""
        parts = [stored.parts for stored in self.store.models() if stored.digest == manifest.digest]
        return set(parts[0]) if parts else set()


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


async def test_a_head_has_all_of_the_draft_model_before_its_stage_starts(home: Home) -> None:
    fetching = await home.fetched(HEAD, home.plan.shape.window_parts(0, 1))
    assert home.events[-1] == d.Fetched(home.plan.id)
    assert home.has(home.draft) == {part.name for part in home.draft.parts}
    assert home.has(home.model) == {"head", "embed", "layer-000"}
    assert fetching.draft_of(home.plan.id) == home.store.folder(home.draft.digest)
    fetching.end(home.plan.id)
    assert fetching.draft_of(home.plan.id) is None


async def test_other_peers_of_the_plan_have_nothing_of_it(home: Home) -> None:
    fetching = await home.fetched(PEERS[2], ("head", "layer-001"))
    assert home.events[-1] == d.Fetched(home.plan.id)
    assert home.has(home.draft) == set()
    assert fetching.draft_of(home.plan.id) is None


async def test_a_draft_model_that_cannot_be_had_does_not_fail_the_plan(
    home: Home, caplog: pytest.LogCaptureFixture
) -> None:
    home.lost = {home.draft.digest}
    with caplog.at_level(logging.WARNING, "halka.agent"):
        fetching = await home.fetched(HEAD, ("head", "layer-000"))
    assert home.events[-1] == d.Fetched(home.plan.id)
    assert "draft=none plan=1.1" in caplog.text
    assert fetching.draft_of(home.plan.id) is None


async def test_a_plan_whose_own_parts_are_missing_fetches_no_draft_model(home: Home) -> None:
    home.lost = {home.model.digest}
    await home.fetched(HEAD, ("head", "layer-000"))
    told = home.events[-1]
    assert isinstance(told, d.Fetched)
    assert "was lost" in told.why
    assert home.has(home.draft) == set()
