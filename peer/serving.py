"""What the API asks of this peer: its models, their words, and answers on the plan that serves."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Sequence
from contextlib import aclosing
from typing import Any

from peer.api.service import Piece, ServedModel
from peer.errors import ModelError, NoPlan
from peer.models.store import Store
from peer.models.text import Text
from peer.planning.duty import Duty
from peer.planning.plan import Plan
from peer.planning.profile import ModelOffer
from peer.protocol import Sampling
from peer.ring.entry import Entry

log = logging.getLogger("halka.agent")

HOPE_S = 10.0  # after a ring broke: by then another one is at least on its way

Spawn = Callable[[Coroutine[Any, Any, None], str], asyncio.Task[None]]


class Serving:
    """The models, words and answers of `api.service.Service`.

    offers: every model that a present peer holds parts of. waiting: for what a first plan waits, in
    words, or "". spawn: starts a task in the daemon's
    TaskGroup. errors: why a model's words cannot be read here, by digest.
    """

    def __init__(
        self,
        duty: Duty,
        entry: Entry,
        store: Store,
        offers: Callable[[], Iterable[ModelOffer]],
        waiting: Callable[[], str],
        spawn: Spawn,
    ) -> None:
        self._duty, self._entry, self._store = duty, entry, store
        self._offers, self._waiting, self._spawn = offers, waiting, spawn
        self._texts: dict[str, Text] = {}
        self._opening: dict[str, asyncio.Task[None]] = {}
        self._last: Plan | None = None  # that served, until another does
        self._last_s = -math.inf  # until when it did
        self.errors: dict[str, str] = {}

    def _plan(self) -> Plan | None:
        """The plan that serves; while its ring is made anew, the one that did: who asks now waits
        for it like the answers that were under way."""
        if state := self._duty.serving():
            return state.plan
        last = self._last
        if last is None:
            return None
        coming = any(
            part.state.plan.shape.digest == last.shape.digest
            for part in self._duty.parts.values()
            if not part.dead and part.state.phase != "draining"
        )
        return last if coming or time.monotonic() - self._last_s < HOPE_S else None

    def models(self) -> list[ServedModel]:
        """Models that are whole somewhere in the cluster, the one that is served first."""
        plan = self._plan()
        served = plan.shape.digest if plan else ""
        found: dict[str, ServedModel] = {}
        if plan:
            found[served] = ServedModel(plan.shape.model, 0, plan.split.context, True)
        for offer in self._offers():
            shape, digest = offer.shape, offer.shape.digest
            known = found.get(digest)
            if known is None and len(offer.parts) < len(shape.window_parts(0, shape.layers)):
                continue
            found[digest] = ServedModel(
                known.id if known else shape.model,
                max(int(offer.pulled_s), known.created_s if known else 0),
                known.context if known else shape.context,
                digest == served,
                "" if digest == served else self.why_not(),
            )
        return list(found.values())

    def why_not(self) -> str:
        """Why the cluster serves nothing, or not what was asked for, in words."""
        if self._duty.serving():
            return "another model is served; choose with the setting `model`"
        if self._duty.why_none:
            return self._duty.why_none
        if self._duty.parts:
            return "the ring is being made ready; try again in a moment"
        return self._waiting() or "the cluster is still forming; try again in a moment"

    def _plan_of(self, model_id: str) -> Plan:
        plan = self._plan()
        if plan is None or plan.shape.model != model_id:
            raise NoPlan(self.why_not())
        return plan

    def context(self, model_id: str) -> int:
        """Tokens of one request at most."""
        return self._plan_of(model_id).split.context

    async def text(self, model_id: str) -> Text:
        """The words of the model that is served. Raises NoPlan."""
        plan = self._plan_of(model_id)
        digest = plan.shape.digest
        if digest not in self._texts:
            self.learn(plan)
            await asyncio.shield(self._opening[digest])
        text = self._texts.get(digest)
        if text is None:
            raise NoPlan(self.errors.get(digest, "the model's words are on their way"))
        return text

    def serve(self, plan: Plan | None) -> None:
        """This plan serves now: no words but its model's are wanted any more. None: nothing."""
        if plan is None:
            self._last_s = time.monotonic()
            return
        self._last = plan
        self.learn(plan)
        for digest in [known for known in self._texts if known != plan.shape.digest]:
            self._spawn(self._texts.pop(digest).close(), f"end of the words of {digest[:12]}")

    def learn(self, plan: Plan) -> None:
        """Open the words of a model ahead of the first question: a second of work."""
        digest = plan.shape.digest
        if digest not in self._texts and digest not in self._opening:
            self._opening[digest] = self._spawn(self._open(plan), f"words of {plan.shape.model}")

    async def _open(self, plan: Plan) -> None:
        digest = plan.shape.digest
        # Every engine's vocabulary is llama.cpp's but that of the fake one, which has its own.
        engine = "fake" if plan.split.windows[0].backend == "fake" else "llama_cpp"
        try:
            if not await asyncio.to_thread(self._store.has, digest, "head"):
                raise ModelError("head.gguf of the model is still on its way to this peer")
            text = await Text.open(engine, self._store.folder(digest) / "head.gguf")
        except ModelError as error:
            self.errors[digest] = str(error)
            log.warning("words=no model=%s because=%s", plan.shape.model, error)
        else:
            self.errors.pop(digest, None)
            self._texts[digest] = text
        finally:
            self._opening.pop(digest, None)

    async def answer(
        self,
        request_id: str,
        model_id: str,
        ids: Sequence[int],
        sampling: Sampling,
        tokens_max: int,
        ends: tuple[int, ...],
    ) -> AsyncGenerator[Piece, None]:
        """The answer to a prompt as it is made; see `api.service.Service`."""
        digest = self._plan_of(model_id).shape.digest
        asked = self._entry.answer(tuple(ids), sampling, tokens_max, ends, digest)
        async with aclosing(asked) as given:
            async for piece in given:
                yield Piece(piece.ids, piece.finish)

    async def close(self) -> None:
        """End the text processes."""
        for task in self._opening.values():
            task.cancel()
        for text in self._texts.values():
            await text.close()
