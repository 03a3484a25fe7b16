"""What stages really take corrects what was measured for them. Pure."""

from __future__ import annotations

import math

from msgspec.structs import replace

from peer.planning import costs
from peer.planning.plan import Plan
from peer.planning.profile import Profile
from peer.planning.trust import CORRECTION
from peer.protocol import Timed

TELL = 1.07  # a factor that is told: two peers apart by it each way are not a plan apart
CONFIRM_S = 20.0  # for which steps must take another time than told before that is believed
FADE_S, FADE_MAX_S = 600.0, 86400.0  # without a stage, until a correction is doubted a little


class Corrections:
    """When a peer believes what its steps took, and when it doubts that again. `now`: seconds."""

    def __init__(self, now: float) -> None:
        self._odd_since: float | None = None  # steps have not taken what they should
        self._fade_s, self._fade_at = FADE_S, now + FADE_S
        self._faded = False  # since the last correction

    def told(self, profile: Profile, plan: Plan, timed: Timed, now: float) -> Profile | None:
        """This peer's stage of the plan told what its steps took: the profile that follows, None:
        the same. A moment's other work is no reason to move a model."""
        found = corrected(profile, plan, timed)
        if found is None:
            self._odd_since = None
            return None
        self._odd_since = now if self._odd_since is None else self._odd_since
        if now < self._odd_since + CONFIRM_S:
            return None
        self._odd_since = None
        if self._faded:  # and should not have: wait longer before the next doubt
            self._fade_s, self._faded = min(2 * self._fade_s, FADE_MAX_S), False
        return found

    def passed(self, profile: Profile, holds: bool, now: float) -> Profile | None:
        """Time passed; holds: whether this peer has a stage. Corrections that none can confirm any
        more are doubted, else a peer that was busy once would be left out for ever."""
        if holds or now >= self._fade_at:
            self._fade_at, due = now + self._fade_s, not holds
            found = faded(profile) if due else None
            self._faded = self._faded or found is not None
            return found
        return None


def corrected(profile: Profile, plan: Plan, timed: Timed) -> Profile | None:
    """This peer's profile, corrected by what its stage's steps took; None: it is right already.

    timed: of the peer's own stage of the plan. Only measured speeds are corrected: what is usual
    for a processor was never meant to be exact. Where a stage streams, its steps say how long it
    waited for the disk, too; where a control group throttles it, a step longer than the quota lasts
    takes up to 1 / share of its time. Both are forecast besides, and no reason to correct.
    """
    split = plan.split
    of = costs.of_split([profile], plan.shape, split)
    mine = [w for w in split.windows if w.peer_id == profile.peer_id]
    if not timed.decode_s or not mine or not of.peers:
        return None
    if any(window.streamed_bytes for window in mine):
        return None
    layers = mine[0].gpu_layers if mine[0].gpu_layers >= 0 else plan.shape.layers
    windows = [(w.first, w.last) for w in mine]
    expected_s = costs.busy_s(of, of.peers[0], windows, layers)
    if expected_s <= 0:
        return None
    throttled_s = expected_s / max(1e-6, profile.cpu_share)
    factor = timed.decode_s / min(max(timed.decode_s, expected_s), throttled_s)
    if 1 / TELL < factor < TELL:
        return None
    backend, (low, high) = of.peers[0].backend, CORRECTION
    speeds = tuple(
        replace(s, correction=min(high, max(low, (s.correction or 1.0) * factor)))
        if (s.digest, s.backend) == (plan.shape.digest, backend)
        else s
        for s in profile.speeds
    )
    return replace(profile, speeds=speeds) if speeds != profile.speeds else None


def faded(profile: Profile) -> Profile | None:
    """The profile of a peer that has had no stage for a while: what held its stages up then, a game
    perhaps, may be over. None: there is nothing to fade."""
    speeds = tuple(
        replace(s, correction=1.0 if 1 / TELL < s.correction < TELL else math.sqrt(s.correction))
        for s in profile.speeds
    )
    return replace(profile, speeds=speeds) if speeds != profile.speeds else None
