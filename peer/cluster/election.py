"""Who decides: the election, as a pure machine.

A claim is (followed, term, peer id), and the highest claim that a peer hears wins. `followed` says
that the claim has had followers; it stands first, so that a peer that elected itself before it
heard the cluster yields, and never deposes a coordinator that others follow. There is no majority
rule: two peers are a cluster, and one left alone is still one.

What holds always:
- A peer claims a term at most once, also across restarts: the term is stored before it is claimed.
- The term that a peer follows never goes back, and within one term it follows one coordinator only.
  So a claim that wins by the order, but whose term is not above the loser's, is made again with a
  term above all that were heard (`_defend`), and the loser follows that.
- Nobody uses up the terms by telling of high ones: a term far above all that were heard is not
  believed (`_believable`), and a peer is heard only a few times a second. Whoever is itself so far
  ahead that nobody believes it (it was lied to before) steps down to a claim that it hears, if that
  is below every term of its present run (`_step_down`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from peer.config import Timing
from peer.planning.plan import TERM_MAX

TERM_FREE_MAX = 1 << 32  # up to here any term is believed; elections alone take millennia to it
TERM_JUMP_MAX = 1000  # beyond it, above the highest known: one liar needs years to use them all up
CHANGES_A_SECOND = 4.0  # of one peer's claim; honest ones change theirs a few times an election
CHANGES_MAX = 8.0  # in a burst

# Events -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PeerUp:
    """A member joined."""

    peer_id: str


@dataclass(frozen=True, slots=True)
class PeerDown:
    """A member is lost."""

    peer_id: str


@dataclass(frozen=True, slots=True)
class Beat:
    """A member's heartbeat: the claim that it follows, its own where coordinator is itself."""

    peer_id: str
    term: int
    coordinator: str
    followed: bool


@dataclass(frozen=True, slots=True)
class Stored:
    """The term is on disk."""

    term: int


@dataclass(frozen=True, slots=True)
class StoreFailed:
    """The term could not be written; it must not be claimed."""

    term: int


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = PeerUp | PeerDown | Beat | Stored | StoreFailed | Tick

# Actions ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StoreTerm:
    """Write the term to disk, then answer with Stored or StoreFailed.

    lower: also where a higher one is stored.
    """

    term: int
    lower: bool = False


@dataclass(frozen=True, slots=True)
class Publish:
    """What I follow changed: tell every member now."""

    term: int
    coordinator: str
    followed: bool


@dataclass(frozen=True, slots=True)
class Elected:
    """From now on this peer coordinates, as far as I know; "" while nobody does."""

    coordinator: str
    term: int


@dataclass(frozen=True, slots=True)
class Doubt:
    """What this member says is not believed, for now. `what` is one of a few fixed phrases."""

    peer_id: str
    what: str


Action = StoreTerm | Publish | Elected | Doubt
Claim = tuple[bool, int, str]


@dataclass(slots=True)
class _Patience:
    """How many changes of a peer's claim are still heard, as of `at`."""

    left: float
    at: float


@dataclass(slots=True)
class Election:
    """One peer's view of the election. Times are the caller's, in seconds."""

    me: str
    timing: Timing
    now: float
    term: int = 0  # of the claim that I follow or followed last; at start, the stored one
    coordinator: str = ""
    followed: bool = False  # my own claim has had followers
    _highest: int = field(default=0, init=False)  # term heard anywhere, and believed
    _horizon: int = field(default=0, init=False)  # no term above it is believed
    _last: str = field(default="", init=False)  # whom I followed in `term`
    _claimed: int = field(default=0, init=False)  # my highest term, stored or being stored
    _storing: int = field(default=0, init=False)
    _first: float = field(default=math.inf, init=False)  # lowest term followed since the start
    _views: dict[str, Beat | None] = field(default_factory=dict, init=False)
    _patience: dict[str, _Patience] = field(default_factory=dict, init=False)
    _since: float = field(default=0.0, init=False)  # nobody coordinates since; plus the listening
    _store_again: float = field(default=-math.inf, init=False)

    def __post_init__(self) -> None:
        self._highest = self._claimed = self.term
        # Listen before the first claim: a coordinator may be there already.
        self._since = self.now + self.timing.listen_s

    @property
    def deadline(self) -> float:
        """When the next Tick is due; infinity while there is nothing to wait for."""
        if self.coordinator or self._storing:
            return math.inf
        return max(self._may_claim_at(), self._store_again)

    @property
    def followers(self) -> frozenset[str]:
        """Members whose last word is that they follow my claim."""
        if self.coordinator != self.me:
            return frozenset()
        beats = (view for view in self._views.values() if view is not None)
        return frozenset(beat.peer_id for beat in beats if beat.coordinator == self.me)

    @property
    def claim(self) -> Publish:
        """What a heartbeat says now."""
        return Publish(self.term, self.coordinator, self.followed and self.coordinator == self.me)

    def step(self, event: Event, now: float) -> list[Action]:
        """Take one event, return what to do about it, in order."""
        self.now = now
        before, elected = self.claim, (self.coordinator, self.term)
        actions: list[Action] = []
        match event:
            case PeerUp(peer_id):
                self._views[peer_id] = None
                self._patience[peer_id] = _Patience(CHANGES_MAX / 2, now)
            case PeerDown(peer_id):
                self._views.pop(peer_id, None)
                self._patience.pop(peer_id, None)
            case Beat():
                actions += self._hear(event)
            case Stored(term):
                self._take_claim(term)
            case StoreFailed(term):
                if term == self._storing:
                    self._storing = 0
                    self._store_again = now + self.timing.dial_again_max_s
            case Tick():
                pass
        actions += self._decide()
        if (self.coordinator, self.term) != elected:
            actions.append(Elected(self.coordinator, self.term))
        if self.claim != before:
            actions.append(self.claim)
        return actions

    # What was heard -------------------------------------------------------------------------------

    def _hear(self, beat: Beat) -> list[Action]:
        if beat.peer_id not in self._views:
            return []  # not a member (any more)
        view = self._views[beat.peer_id]
        if beat == view:
            return []
        if view is not None and beat.term < view.term <= _believable(beat.term):
            return []  # overtaken on its way: a peer's term goes back only where it steps down
        if not self._has_patience(beat.peer_id):
            return [Doubt(beat.peer_id, "claims that change too often")]  # a later beat may count
        self._horizon = max(self._horizon, _believable(self._highest))
        if beat.term > self._horizon:
            # Nothing is followed, but the next one may be as far again: peers that are really so
            # far apart find together in the end.
            self._views[beat.peer_id] = None
            self._horizon = _believable(self._horizon)
            return [Doubt(beat.peer_id, "term far above all others")]
        self._views[beat.peer_id] = beat
        self._highest = max(self._highest, beat.term)
        if self.coordinator == self.me == beat.coordinator and beat.term == self.term:
            self.followed = True
        return []

    def _has_patience(self, peer_id: str) -> bool:
        patience = self._patience[peer_id]
        more = max(0.0, self.now - patience.at) * CHANGES_A_SECOND
        patience.left, patience.at = min(CHANGES_MAX, patience.left + more), self.now
        if patience.left < 1.0:
            return False
        patience.left -= 1.0
        return True

    def _rivals(self) -> list[Claim]:
        """Claims that I hear from the claimants themselves, best last."""
        return sorted(
            (view.followed, view.term, peer_id)
            for peer_id, view in self._views.items()
            if view is not None and view.coordinator == peer_id
        )

    # What to do -----------------------------------------------------------------------------------

    def _decide(self) -> list[Action]:
        if self.coordinator == self.me:
            return self._decide_as_coordinator()
        actions: list[Action] = []
        if self.coordinator:
            actions = self._decide_as_follower()
        if not self.coordinator:
            actions = self._decide_alone()
        return actions

    def _decide_as_coordinator(self) -> list[Action]:
        rivals = self._rivals()
        mine: Claim = (self.followed, self.term, self.me)
        if rivals and rivals[-1] > mine:
            _, term, rival = rivals[-1]
            if term > self.term:
                return self._follow(rival, term)
        if steps := self._step_down(rivals):
            return steps
        if rivals and rivals[-1] > mine:
            return []  # else it hears me, and claims again above my term
        # A member that follows nobody in a term above mine cannot follow me in this one.
        free = [view.term for view in self._views.values() if view and not view.coordinator]
        if any(term >= self.term for _, term, _ in rivals) or max(free, default=0) > self.term:
            return self._defend()
        return []

    def _decide_as_follower(self) -> list[Action]:
        view = self._views.get(self.coordinator)
        if view is None or view.coordinator != self.coordinator:
            self.coordinator = ""
            self._since = self.now
            return []
        for followed, term, rival in reversed(self._rivals()):
            if followed and term > view.term:
                return self._follow(rival, term)
        if view.term > self.term:  # it claimed again, above a rival
            return self._follow(self.coordinator, view.term)
        # It stepped down, where this peer had not heard to whom, and claims again from there.
        return self._step_down([claim for claim in self._rivals() if claim[2] == view.peer_id])

    def _decide_alone(self) -> list[Action]:
        for _, term, rival in reversed(self._rivals()):
            # After a restart `_last` is "": plans of the old run are forgotten, so any may be.
            if term > self.term or (term == self.term and self._last in ("", rival)):
                return self._follow(rival, term)
        if steps := self._step_down(self._rivals()):
            return steps
        if not self._storing and self.now >= self._may_claim_at():
            return self._defend()
        return []

    def _may_claim_at(self) -> float:
        """By rank: the highest peer id claims at once, the others give it time to be heard.

        Later while a member tells of a coordinator: I may soon hear it, or it me.
        """
        above = sum(peer_id > self.me for peer_id in self._views)
        wait_s = self.timing.claim_spread_s * above / max(1, len(self._views))
        if any(view is not None and view.coordinator for view in self._views.values()):
            wait_s += self.timing.listen_s
        return self._since + wait_s

    def _defend(self) -> list[Action]:
        """Claim, above every term that I heard. The claim holds once the term is stored."""
        if self._storing or self.now < self._store_again:
            return []
        self._storing = self._claimed = max(self._highest, self._claimed, self.term) + 1
        return [StoreTerm(self._storing)]

    def _take_claim(self, term: int) -> None:
        if term != self._storing:
            return
        self._storing = 0
        if term <= self.term or self.coordinator not in ("", self.me):
            return  # I followed somebody meanwhile; the term stays unused
        if self.coordinator != self.me:
            self.followed = False  # a claim made again keeps it
        self.coordinator = self._last = self.me
        self.term = term
        self._highest = max(self._highest, term)
        self._first = min(self._first, term)

    def _step_down(self, rivals: list[Claim]) -> list[Action]:
        """Follow the best claim that is so far below mine that who made it cannot believe mine.

        Also where mine is followed; those who follow it step down with me. But only to one below
        all terms that were followed since the start: in each of those there was somebody already.
        What an earlier start followed is forgotten by everybody.
        """
        for _, term, rival in reversed(rivals):
            if self.term > _believable(term) and term < self._first:
                self._storing = 0
                self._highest = self._claimed = self._horizon = term
                for peer_id, view in self._views.items():
                    if view is not None and view.term > _believable(term):
                        self._views[peer_id] = None  # it steps down too, or is not believed
                self._follow(rival, term)
                return [StoreTerm(term, lower=True)]
        return []

    def _follow(self, coordinator: str, term: int) -> list[Action]:
        self.coordinator = self._last = coordinator
        self.term = term
        self.followed = False
        self._first = min(self._first, term)
        return [StoreTerm(term)]  # so that terms go on after a house without power


def _believable(highest: int) -> int:
    """The highest term that a peer believes which knows of none above `highest`."""
    return max(TERM_FREE_MAX, min(highest + TERM_JUMP_MAX, TERM_MAX // 2))
