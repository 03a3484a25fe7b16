"""What `GET /halka/profiles` says, as values: all that a plan is made of, as this agent knows it.

`halka plan --save` writes it to a file, and `halka plan --profiles` plans with it without an agent.
Every field but the profiles has a default and unknown ones are skipped, as in `words.state`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import msgspec

from peer.errors import CommandError
from peer.planning.plan import Plan
from peer.planning.profile import PEERS_MAX, ModelShape, PeerId, Profile, Seconds


class TimedPeer(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a stage really took lately: for a token, and for each row of a prefill; 0: not seen.

    wait_s, send_s: for a token, waiting for its frame and sending it on.
    """

    decode_s: Seconds = 0.0
    prefill_s: Seconds = 0.0
    wait_s: Seconds = 0.0
    send_s: Seconds = 0.0


class TimedRing(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the plan shown really took. tpot_s: from token to token of one answer; 0: not seen.

    drafted, accepted: ids that were guessed, and of them right. read, reused: ids of prompts that
    were computed, and that were in a slot already. All since the plan began, as its head counts.
    active: answers that run or wait in the ring, as its head told last.
    """

    tpot_s: Seconds = 0.0
    peers: dict[PeerId, TimedPeer] = {}
    drafted: int = 0
    accepted: int = 0
    read: int = 0
    reused: int = 0
    active: int = 0


class KnownModel(msgspec.Struct, frozen=True):
    """A model of which peers hold parts. held: their names, by peer id."""

    shape: ModelShape
    held: dict[PeerId, tuple[str, ...]] = {}


class Basis(msgspec.Struct, frozen=True):
    """The whole answer. shape, held: of the plan shown. models: all that are here, it among them.

    coordinator: whose wishes count, a peer id or "".
    """

    profiles: Annotated[tuple[Profile, ...], msgspec.Meta(max_length=PEERS_MAX)]
    shape: ModelShape | None = None
    held: dict[PeerId, tuple[str, ...]] = {}
    timed: TimedRing = TimedRing()
    plan: Plan | None = None
    coordinator: str = ""
    models: tuple[KnownModel, ...] = ()

    def labels(self) -> dict[str, str]:
        """Names by peer id, as `halka status` shows them."""
        return labels(self.profiles)


def labels(profiles: Sequence[Profile]) -> dict[str, str]:
    """Each peer's name; where two share one, with the beginning of the peer id after it."""
    names = [profile.name for profile in profiles]
    return {
        p.peer_id: p.name if names.count(p.name) == 1 else f"{p.name[:9]} {p.peer_id[:4]}"
        for p in profiles
    }


def find(name: str, known: Mapping[str, str], flag: str) -> str:
    """The peer id that a name, or the beginning of one or of an id, stands for.

    known: labels by peer id. Raises: CommandError (2), listing the names that there are.
    """
    exact = [p for p, label in known.items() if name in (label, p)]
    begun = [p for p, label in known.items() if label.startswith(name) or p.startswith(name)]
    found = exact or (begun if name else [])
    if len(found) == 1:
        return found[0]
    listed = ", ".join(sorted(known.values())) or "none"
    if found:
        among = ", ".join(sorted(known[p] for p in found))
        raise CommandError(
            f"{flag} {name}: that could be {among}", "type more of the name, or the peer id", 2
        )
    raise CommandError(
        f"{flag} {name}: there is no such peer", f"it is one of: {listed}", exit_code=2
    )
