"""Parts of models on their way to this peer, for its plans and for whoever asks. A shell."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from peer.cluster.driver import Cluster
from peer.config import Config
from peer.errors import ModelError, PeerError
from peer.models import transfer
from peer.models.manifest import Manifest
from peer.models.parts import contradiction
from peer.models.store import Store
from peer.planning import duty as d
from peer.planning.plan import Plan, PlanId
from peer.planning.profile import ModelOffer, ModelShape
from peer.protocol import ChunkHere, ChunkWanted, ManifestHere, ManifestWanted
from peer.serving import Spawn

log = logging.getLogger("halka.agent")


class Fetching:
    """What is fetched. offers: of all peers, by peer id. told: hears how far plans' parts are, as
    events of `duty`. spawn: starts a task in the daemon's TaskGroup."""

    def __init__(
        self,
        config: Config,
        store: Store,
        cluster: Cluster,
        offers: Mapping[str, Sequence[ModelOffer]],
        told: Callable[[d.Event], None],
        spawn: Spawn,
    ) -> None:
        self._config, self._store, self._cluster = config, store, cluster
        self._offers, self._told, self._spawn = offers, told, spawn
        self._tasks: dict[PlanId, asyncio.Task[None]] = {}
        self._drafts: dict[PlanId, Path] = {}  # folders of models that draft, all of them here

    @property
    def running(self) -> bool:
        """Whether parts of a plan are on their way."""
        return bool(self._tasks)

    def begin(self, plan: Plan, parts: tuple[str, ...]) -> None:
        """Fetch these parts of a plan's model, instead of those asked for before."""
        self.end(plan.id)
        work = self._for_plan(plan, parts)
        self._tasks[plan.id] = self._spawn(work, f"parts of plan {plan.id}")

    def end(self, plan: PlanId) -> None:
        """The plan does not want its parts any more."""
        self._drafts.pop(plan, None)
        if task := self._tasks.pop(plan, None):
            task.cancel()

    def close(self) -> None:
        """End everything."""
        for plan in list(self._tasks):
            self.end(plan)

    async def _for_plan(self, plan: Plan, parts: tuple[str, ...]) -> None:
        def progress(done: int, total: int) -> None:
            self._told(d.Fetching(plan.id, done, total))

        why = ""
        try:
            manifest = await self.parts(plan.shape.digest, parts, progress)
            if lie := contradiction(manifest, plan.shape):
                why = f"the plan states another `{lie}` for {manifest.model} than its manifest"
                log.warning("refused=plan plan=%s because=%s", plan.id, why)
        except (ModelError, PeerError) as error:
            why = str(error)
            log.warning("fetched=no plan=%s because=%s", plan.id, why)
        if not why and plan.split.draft and plan.head == self._cluster.me:
            await self._draft(plan, progress)
        self._tasks.pop(plan.id, None)
        self._told(d.Fetched(plan.id, why))

    async def _draft(self, plan: Plan, progress: Callable[[int, int], None]) -> None:
        """Have all of the model that drafts here. The plan is served without it where it cannot."""
        digest = plan.split.draft
        try:
            manifest = await self.parts(digest, ("head",))
            await self.parts(digest, [part.name for part in manifest.parts], progress)
        except (ModelError, PeerError) as error:
            log.warning("draft=none plan=%s because=%s", plan.id, error)
        else:
            self._drafts[plan.id] = self._store.folder(digest)

    def draft_of(self, plan: PlanId) -> Path | None:
        """The folder of the model that drafts for a plan of which this peer is the head."""
        return self._drafts.get(plan)

    async def parts(
        self,
        digest: str,
        parts: Sequence[str],
        progress: Callable[[int, int], None] = lambda done, total: None,
        rest: transfer.Rest | None = None,
    ) -> Manifest:
        """Have these parts of a model here, from whoever has them; rest: for what can wait, see
        `transfer.fetch`. Raises ModelError, PeerError."""

        def offers() -> Mapping[str, Sequence[str]]:
            return {
                peer_id: offer.parts
                for peer_id, held in self._offers.items()
                if peer_id in self._cluster.members
                for offer in held
                if offer.shape.digest == digest
            }

        async def ask(
            peer_id: str, message: ManifestWanted | ChunkWanted
        ) -> ManifestHere | ChunkHere:
            return await self._cluster.ask(peer_id, message, self._config.timing.request_s)

        return await transfer.fetch(self._store, digest, parts, offers, ask, progress, rest)

    async def header(self, shape: ModelShape) -> Path:
        """The folder of a model of the cluster, once head.gguf is in it."""
        await self.parts(shape.digest, ("head",))
        return self._store.folder(shape.digest)
