"""Who is here, as a pure machine: sightings become dials, links become members, silence a loss.

A sighting is a hint and costs at most a dial. A member is a peer whose link said hello; it stays
one until it says goodbye, its link breaks and does not come back within `regret_s`, or nothing was
heard of it for `silence_s`. Time in which this process itself did not run (stopped, asleep,
starved) is never held against others: `step` sees its own lateness and moves its clocks by it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from peer.config import Timing
from peer.planning.profile import PEERS_MAX

DIALS_MAX = 8  # at once: a flood of sightings must not become a flood of connections
ADDRESSES_MAX = 8  # tried for one peer, the newest
DIAL_AGAIN_MIN_S = 0.25
LIVED_S = 1.0  # a link that was shorter is no success: whoever hangs up at once is dialled less
CROWDED_S = 60.0  # for people to read that somebody was turned away
LATE_S = 0.25  # later than this, this process was not running; earlier is a busy machine

# Events -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Seen:
    """A sighting; the caller has checked that the key belongs to the peer id."""

    peer_id: str
    key: str
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LinkUp:
    """A link said hello, whoever dialled. Addresses are where the peer says that it listens."""

    peer_id: str
    key: str
    incarnation: int
    addresses: tuple[str, ...] = ()
    dialled: str = ""  # the address that worked, where we dialled


@dataclass(frozen=True, slots=True)
class LinkDown:
    """The last connection with the peer is gone."""

    peer_id: str
    why: str


@dataclass(frozen=True, slots=True)
class Heard:
    """Anything at all came from the peer."""

    peer_id: str


@dataclass(frozen=True, slots=True)
class DialFailed:
    """The dial that was asked for came to nothing."""

    peer_id: str
    refused: bool = False  # it answered that it does not want us; ask rarely


@dataclass(frozen=True, slots=True)
class Left:
    """It said goodbye."""

    peer_id: str
    why: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = Seen | LinkUp | LinkDown | Heard | DialFailed | Left | Tick

# Actions ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Dial:
    """Connect and say hello; ends in LinkUp, or in DialFailed, or is taken back by HangUp."""

    peer_id: str
    key: str
    address: str


@dataclass(frozen=True, slots=True)
class HangUp:
    """Close every connection with the peer, also half-made ones."""

    peer_id: str


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Close the half-made connection of the dial; a link that stands stays."""

    peer_id: str


@dataclass(frozen=True, slots=True)
class Joined:
    """The peer is a member now."""

    peer_id: str


@dataclass(frozen=True, slots=True)
class Lost:
    """The peer is a member no longer. heard_by: a member that still hears it, "" where none does."""

    peer_id: str
    why: str
    heard_by: str = ""


@dataclass(frozen=True, slots=True)
class SendBeats:
    """Send every member a heartbeat."""


Action = Dial | HangUp | GiveUp | Joined | Lost | SendBeats


@dataclass(slots=True)
class _Peer:
    key: str
    addresses: list[str]  # best first
    since: float  # first sighting
    member: bool = False
    linked: bool = False
    linked_since: float = -math.inf
    incarnation: int = -1
    heard: float = 0.0
    broken: float = math.inf  # link lost at; infinity while it stands
    why: str = ""
    dialling_until: float = math.inf  # infinity: no dial is under way
    tries: int = 0  # since the last success
    dial_at: float = 0.0

    @property
    def dialling(self) -> bool:
        return self.dialling_until < math.inf


@dataclass(slots=True)
class Membership:
    """One peer's view of who is here. Times are the caller's, in seconds."""

    me: str
    timing: Timing
    now: float
    _peers: dict[str, _Peer] = field(default_factory=dict, init=False)
    _beat_at: float = field(default=0.0, init=False)
    _lenient_until: float = field(default=-math.inf, init=False)
    _turned_away: float = field(default=-math.inf, init=False)
    _deadline: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._beat_at = self._deadline = self.now + self.timing.beat_s

    @property
    def members(self) -> frozenset[str]:
        """Peer ids of the members, without this peer."""
        return frozenset(peer_id for peer_id, peer in self._peers.items() if peer.member)

    @property
    def deadline(self) -> float:
        """When the next Tick is due. At most a beat away: lateness is noticed by it."""
        return self._deadline

    def addresses_of(self, peer_id: str) -> tuple[str, ...]:
        """Where the peer was seen, best first."""
        return tuple(self._peers[peer_id].addresses) if peer_id in self._peers else ()

    def incarnation_of(self, peer_id: str) -> int:
        """Of the peer's run that was linked last; -1 where none was."""
        return self._peers[peer_id].incarnation if peer_id in self._peers else -1

    def has_room(self, peer_id: str) -> bool:
        """Whether this peer may become a member, or is one."""
        return peer_id in self.members or len(self.members) < PEERS_MAX - 1

    @property
    def crowded(self) -> bool:
        """Whether a peer found no place a moment ago: there are more than may be."""
        return self.now - self._turned_away < CROWDED_S

    def turn_away(self) -> None:
        """Note that a peer found no place."""
        self._turned_away = self.now

    def step(self, event: Event, now: float) -> list[Action]:
        """Take one event, return what to do about it, in order."""
        if type(event) is Heard and now < self._deadline:
            # By far the most frequent event; it only ever moves what is due away.
            if (peer := self._peers.get(event.peer_id)) is not None:
                peer.heard = now
            return []
        actions: list[Action] = []
        self._forgive(now)
        self.now = now
        match event:
            case Seen():
                self._see(event)
            case LinkUp():
                actions += self._link(event)
            case LinkDown(peer_id, why):
                peer = self._peers.get(peer_id)
                if peer is not None and peer.linked:
                    peer.linked, peer.broken, peer.why = False, now, why
                    self._after_link(peer, 0.0)
            case Heard(peer_id):
                if (peer := self._peers.get(peer_id)) is not None:
                    peer.heard = now
            case DialFailed(peer_id, refused):
                self._fail(peer_id, refused)
            case Left(peer_id, why):
                actions += self._lose(peer_id, why or "it said goodbye")
            case Tick():
                pass
        actions += self._check()
        self._deadline = self._next()
        return actions

    def _forgive(self, now: float) -> None:
        """Move all clocks by the time in which this process did not run.

        After a long pause the others may have hung up on us, which is our doing: nobody is lost
        before there was time to link again.
        """
        late = now - self._deadline
        if late <= LATE_S:
            return
        if late > self.timing.silence_s / 2:
            self._lenient_until = now + self.timing.dial_s
        for peer in self._peers.values():
            peer.heard += late
            if peer.broken < math.inf:
                peer.broken += late
            if peer.dialling:
                peer.dialling_until += late

    # Sightings ------------------------------------------------------------------------------------

    def _see(self, seen: Seen) -> None:
        if seen.peer_id == self.me or not seen.addresses:
            return
        peer = self._peers.get(seen.peer_id)
        if peer is None:
            if len(self._peers) >= PEERS_MAX and self._evict() is None:
                return self.turn_away()  # it will be seen again
            peer = self._peers[seen.peer_id] = _Peer(seen.key, [], self.now, dial_at=self.now)
        new = [a for a in seen.addresses if a not in peer.addresses]
        if not new:
            return
        # The address that worked last stays first; the newest come next, the oldest go.
        best = peer.addresses[:1] if peer.incarnation >= 0 else []
        rest = [a for a in (*new, *peer.addresses) if a not in best]
        peer.addresses = (best + rest)[:ADDRESSES_MAX]
        peer.dial_at = min(peer.dial_at, self.now + DIAL_AGAIN_MIN_S)
        peer.tries = min(peer.tries, 1)

    def _evict(self, *, proven: bool = False) -> list[Action] | None:
        """Forget the peer that is least likely to be one, and say what ends with it.

        None where all may be: a sighting displaces those that were dialled in vain or cannot be,
        a proven link anybody who is no member.
        """
        ghosts = [
            (peer.incarnation < 0, not peer.addresses, peer.tries, -peer.since, peer_id)
            for peer_id, peer in self._peers.items()
            if not (peer.member or peer.linked)
            and (proven or (not peer.dialling and (peer.tries or not peer.addresses)))
        ]
        if (ghost := max(ghosts)[-1] if ghosts else "") == "":
            return None
        return [GiveUp(ghost)] if self._peers.pop(ghost).dialling else []

    # Links ----------------------------------------------------------------------------------------

    def _link(self, up: LinkUp) -> list[Action]:
        actions: list[Action] = []
        peer = self._peers.get(up.peer_id)
        if peer is None:
            if len(self._peers) >= PEERS_MAX:
                if (evicted := self._evict(proven=True)) is None:
                    return [HangUp(up.peer_id)]
                actions += evicted
            peer = self._peers[up.peer_id] = _Peer(up.key, [], self.now)
        if peer.member and up.incarnation < peer.incarnation:
            return []  # a hello of an earlier run, overtaken by its successor's
        if peer.member and up.incarnation > peer.incarnation:
            actions.append(Lost(up.peer_id, "it was started anew"))
            peer.member = False
        heard_of = ((up.dialled,) if up.dialled else ()) + up.addresses
        merged = dict.fromkeys((*heard_of, *peer.addresses))
        peer.addresses = list(merged)[:ADDRESSES_MAX]
        peer.key, peer.incarnation = up.key, up.incarnation
        if not peer.linked:
            peer.linked_since = self.now
        peer.linked, peer.broken = True, math.inf
        peer.heard = self.now
        if peer.dialling and up.dialled:
            peer.dialling_until = math.inf
        if not peer.member:
            peer.member = True
            actions.append(Joined(up.peer_id))
        return actions

    def _after_link(self, peer: _Peer, wait_s: float) -> None:
        if self.now - peer.linked_since >= LIVED_S:
            peer.tries, peer.dial_at = 0, self.now + wait_s
        else:
            self._wait(peer)

    def _fail(self, peer_id: str, refused: bool) -> None:
        if (peer := self._peers.get(peer_id)) is not None:
            peer.dialling_until = math.inf
            self._wait(peer, refused)

    def _wait(self, peer: _Peer, refused: bool = False) -> None:
        """Dial ever less often, the next address first."""
        peer.tries += 1
        if len(peer.addresses) > 1:
            peer.addresses.append(peer.addresses.pop(0))
        rounds = peer.tries // max(1, len(peer.addresses))
        wait_s = min(self.timing.dial_again_max_s, DIAL_AGAIN_MIN_S * 2 ** min(rounds, 16))
        if refused:
            wait_s = 4 * self.timing.dial_again_max_s
        peer.dial_at = self.now + wait_s

    def _lose(self, peer_id: str, why: str) -> list[Action]:
        peer = self._peers.get(peer_id)
        if peer is None or not (peer.member or peer.linked):
            return []
        was_member = peer.member
        if peer.linked or self.now - peer.linked_since >= LIVED_S + self.timing.regret_s:
            self._after_link(peer, DIAL_AGAIN_MIN_S)
        peer.member = peer.linked = False
        peer.broken = peer.dialling_until = math.inf
        return [HangUp(peer_id), *([Lost(peer_id, why)] if was_member else [])]

    # Time -----------------------------------------------------------------------------------------

    def _lost_at(self, peer: _Peer) -> float:
        at = min(peer.heard + self.timing.silence_s, peer.broken + self.timing.regret_s)
        return max(at, self._lenient_until)

    def _next(self) -> float:
        at = self._beat_at
        may_dial = self._dialling() < DIALS_MAX
        for peer in self._peers.values():
            at = min(at, peer.dialling_until)
            if peer.member:
                at = min(at, self._lost_at(peer))
            if may_dial and not peer.linked and not peer.dialling and peer.addresses:
                at = min(at, peer.dial_at)
        return at

    def _dialling(self) -> int:
        return sum([peer.dialling_until < math.inf for peer in self._peers.values()])

    def _check(self) -> list[Action]:
        actions: list[Action] = []
        for peer_id, peer in self._peers.items():
            if peer.member and self.now >= self._lost_at(peer):
                silent_s = self.now - peer.heard
                why = peer.why if peer.broken < math.inf else f"silent for {silent_s:.1f} s"
                actions += self._lose(peer_id, why)
            if peer.dialling and self.now >= peer.dialling_until:
                actions.append(GiveUp(peer_id))
                self._fail(peer_id, refused=False)
        if self.now >= self._beat_at:
            self._beat_at = self.now + self.timing.beat_s
            actions.append(SendBeats())
        return actions + self._dial()

    def _dial(self) -> list[Action]:
        dials: list[Action] = []
        free = DIALS_MAX - self._dialling()
        waiting = sorted(
            (not peer.member, peer.tries, peer.dial_at, peer_id)
            for peer_id, peer in self._peers.items()
            if peer.addresses and not peer.linked and not peer.dialling and self.now >= peer.dial_at
        )
        for _, _, _, peer_id in waiting[: max(0, free)]:
            peer = self._peers[peer_id]
            peer.dialling_until = self.now + self.timing.dial_s
            dials.append(Dial(peer_id, peer.key, peer.addresses[0]))
        return dials
