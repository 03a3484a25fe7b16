"""What a plan depends on, so that a coordinator knows when to think again. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from peer.planning import drafts
from peer.planning.choice import Choice
from peer.planning.failures import RETRY_S, Failures
from peer.planning.making import Members, pace
from peer.planning.plan import Split
from peer.planning.profile import ModelShape
from peer.planning.running import Running


def ranked(
    choice: Choice, failures: Failures, current: Collection[Running], serves: bool
) -> list[ModelShape]:
    """The models to try, in order. While nothing serves, one that failed again and again, or that
    would interrupt another's loading to fail once more, waits until another one does.

    current: plans that are not on their way out. serves: whether any plan does.
    """

    def waits(shape: ModelShape) -> bool:
        failed = failures.count(shape.digest)
        others = any(r.plan.shape.digest != shape.digest for r in current)
        return failed >= len(RETRY_S) or (failed > 0 and others)

    return list(choice.shapes) if serves else sorted(choice.shapes, key=waits)


def situation(
    members: Members,
    choice: Choice,
    shapes: list[ModelShape],
    failures: Failures,
    shaky: Mapping[str, str],
    memory: bool,
    lost: bool = False,
) -> object:
    """All that a plan for these models depends on, to be compared.

    memory: whether free memory counts. It changes all the time, and most of all through a plan
    itself, so it is only looked at while there is none. lost: answers wait for a ring that broke.
    """
    digest = choice.shapes[0].digest if choice.shapes else ""
    profiles = [
        (
            members.nature(profile.peer_id)[0],
            profile.memory_available_bytes if memory else 0,
            pace(profile, digest),
        )
        for profile in members.here
    ]
    broken = sorted((p.peer_id, p.unreachable) for p in members.here if p.unreachable)
    bars = failures.bars({shape.digest for shape in shapes})
    told = choice.why, choice.newest, choice.passed_over
    drafting = drafts.situation(members.here, members.offers_here, lost)
    leaving = sorted(members.leaving)
    return shapes, told, profiles, bars, broken, leaving, sorted(shaky), drafting


def news(current: Sequence[Running], split: Split, gain: str, name: Callable[[str], str]) -> str:
    """Why there is a new plan, in words, where nothing was lost. current: the newest first."""
    if not current:
        return "all that it needs is here now"
    taking = {peer_id for w in split.windows for peer_id in (w.peer_id, *w.island)}
    joined = taking.difference(current[0].plan.peers)
    names = ", ".join(map(name, sorted(joined)))
    return "; ".join([f"{names} joined"] * bool(names) + [gain] * bool(gain)) or "a new split"
