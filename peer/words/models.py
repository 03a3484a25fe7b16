"""`halka models`: which models this peer has, how much of each, and which the cluster can serve."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import msgspec

from peer.errors import CommandError, ModelError
from peer.words.agent import Agent
from peer.words.screen import Screen, note, say, size
from peer.words.state import Status


class Listed(msgspec.Struct, frozen=True):
    """One model. `parts_here` of `parts` are on this peer's disk; `offered`: the cluster has all
    of them; `served`: it answers now. `here` is "" where this peer holds nothing of it.
    """

    id: str
    parts: int = 0
    parts_here: int = 0
    total_bytes: int = 0
    layers: int = 0
    offered: bool = False
    served: bool = False

    @property
    def complete(self) -> bool:
        """All of it is on this peer."""
        return 0 < self.parts == self.parts_here


class Offer(msgspec.Struct, frozen=True):
    """One entry of `GET /v1/models`."""

    id: str


class Offers(msgspec.Struct, frozen=True):
    """The answer of `GET /v1/models`."""

    data: tuple[Offer, ...] = ()


def command(args: Namespace) -> int:
    """Returns 0. Raises: CommandError, ConfigError, ModelError."""
    agent = Agent(args.home, args.http)
    try:
        status: Status | None = agent.status()
        offers = agent.question("/v1/models", Offers).data
    except CommandError as error:
        if error.exit_code != 3:
            raise
        status, offers = None, ()
    home = Path(status.me.home) if status and status.me.home else agent.settings.home
    models = merged(stored(home), offers, status)
    if args.json:
        say(
            json.dumps(
                [{**msgspec.to_builtins(m), "complete": m.complete} for m in models], indent=2
            )
        )
        return 0
    screen = Screen.of(sys.stdout)
    if models:
        say("\n".join(lines(models, screen)))
    else:
        say("There are no models here yet. Get one: halka pull smollm2")
    if status is None:
        note("(from this machine's disk; no agent is running)")
    return 0


def stored(home: Path) -> list[Listed]:
    """What is on disk. Raises ModelError; an unreadable store of another user's is empty."""
    if not _is_readable(home / "models"):
        return []
    from peer.models.store import Store

    return [
        Listed(
            id=model.manifest.model,
            parts=len(model.manifest.parts),
            parts_here=len(model.parts),
            total_bytes=model.manifest.total_bytes,
            layers=model.manifest.layers,
        )
        for model in Store(home).models()
    ]


def _is_readable(folder: Path) -> bool:
    """It is there and may be listed. Raises ModelError where it is there and may not."""
    try:
        next(folder.iterdir(), None)
    except FileNotFoundError:
        return False
    except PermissionError:
        return False  # the service's: what the agent itself offers is shown
    except OSError as error:
        raise ModelError(f"{folder}: {error.strerror}") from None
    return True


def merged(here: Sequence[Listed], offers: Sequence[Offer], status: Status | None) -> list[Listed]:
    """Models of the disk and of the cluster, each once."""
    served = status.model.id if status and status.model.phase == "serving" else ""
    offered = {offer.id for offer in offers}
    known = {model.id for model in here}
    models = [*here, *(Listed(id=name) for name in sorted(offered - known))]
    return [
        msgspec.structs.replace(model, offered=model.id in offered, served=model.id == served)
        for model in models
    ]


def lines(models: Sequence[Listed], screen: Screen) -> list[str]:
    """A table, a line a model."""
    width = screen.width - 44
    head = f"{'MODEL':<{width}} {'LAYERS':>6} {'SIZE':>10}  {'ON THIS PEER':<14} CLUSTER"
    return [screen.paint(head, "dim"), *(_line(model, screen, width) for model in models)]


def _line(model: Listed, screen: Screen, width: int) -> str:
    here = (
        "complete" if model.complete
        else f"{model.parts_here} of {model.parts}" if model.parts_here
        else "nothing"
    )  # fmt: skip
    return (
        f"{screen.fit(screen.clean(model.id), width)} "
        f"{model.layers or '':>6} {size(model.total_bytes) if model.total_bytes else '':>10}  "
        f"{here:<14} {'serves' if model.served else 'has it' if model.offered else ''}"
    ).rstrip()
