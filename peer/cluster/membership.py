"""Who is here, as a pure machine: sightings become dials, links become members, silence a loss.

A sighting is a hint and costs at most a dial. A member is a peer whose link said hello; it stays
one until it says goodbye, or its link breaks and its port refuses to be dialled again: its agent
has ended. Where its link breaks and does not come back within `regret_s`, or nothing was heard of
it for `silence_s`, the others are asked whether they hear it (see `doubts`), and it is lost once
nobody does. Time in which this process itself did not run (stopped, asleep, starved) is never held
against others: `step` sees its own lateness and moves its clocks by it, and a peer that just woke
gives no opinion.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from peer.cluster.doubts import FRESH_BEATS, Doubt
from peer.cluster.membership_events import Action as Action
from peer.cluster.membership_events import Answer as Answer
from peer.cluster.membership_events import Ask as Ask
from peer.cluster.membership_events import Asked as Asked
from peer.cluster.membership_events import Dial as Dial
from peer.cluster.membership_events import DialFailed as DialFailed
from peer.cluster.membership_events import Event as Event
from peer.cluster.membership_events import GiveUp as GiveUp
from peer.cluster.membership_events import HangUp as HangUp
from peer.cluster.membership_events import Heard as Heard
from peer.cluster.membership_events import Joined as Joined
from peer.cluster.membership_events import Left as Left
from peer.cluster.membership_events import LinkDown as LinkDown
from peer.cluster.membership_events import LinkUp as LinkUp
from peer.cluster.membership_events import Lost as Lost
from peer.cluster.membership_events import Opined as Opined
from peer.cluster.membership_events import Seen as Seen
from peer.cluster.membership_events import SendBeats as SendBeats
from peer.cluster.membership_events import Tick as Tick
from peer.config import Timing
from peer.planning.profile import PEERS_MAX

DIALS_MAX = 8  # at once: a flood of sightings must not become a flood of connections
ADDRESSES_MAX = 8  # tried for one peer, the newest
DIAL_AGAIN_MIN_S = 0.25
LIVED_S = 1.0  # a link that was shorter is no success: whoever hangs up at once is dialled less
CROWDED_S = 60.0  # for people to read that somebody was turned away
LATE_S = 0.25  # later than this, this process was not running; earlier is a busy machine
ENDED = "its agent ended"


@dataclass(slots=True)
class _Peer:
    key: str
    addresses: list[str]  # best first
    since: float  # first sighting
    member: bool = False
    linked: bool = False
    linked_since: float = -math.inf
    incarnation: int = -1
    heard: float = 0.0  # moved by the time in which this process did not run
    heard_at: float = 0.0  # really
    broken: float = math.inf  # link lost at; infinity while it stands
    why: str = ""
    doubt: Doubt | None = None
    proven: str = ""  # the address that worked, or is on the host that its link comes from
    closed: set[str] = field(default_factory=set)  # addresses that refused since the link broke
    dialled: str = ""  # the address of the last dial
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
                peer.heard = peer.heard_at = now
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
                    self._unlink(peer, why)
            case Heard(peer_id):
                if (peer := self._peers.get(peer_id)) is not None:
                    peer.heard = peer.heard_at = now
            case DialFailed(peer_id, refused, closed):
                actions += self._fail(peer_id, refused=refused, closed=closed)
            case Left(peer_id, why):
                actions += self._lose(peer_id, why or "it said goodbye")
            case Asked(by, peer_id):
                actions += self._answer(by, peer_id)
            case Opined():
                self._hear_out(event)
            case Tick():
                pass
        actions += self._check()
        self._deadline = max(now, self._next())
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
            if peer.doubt is not None:
                peer.doubt.shift(late, now)

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
        peer.proven = up.dialled or up.proven or peer.proven
        peer.key, peer.incarnation = up.key, up.incarnation
        if not peer.linked:
            peer.linked_since = self.now
        peer.linked, peer.broken = True, math.inf
        peer.heard = peer.heard_at = self.now
        if peer.dialling and up.dialled:
            peer.dialling_until = math.inf
        if not peer.member:
            peer.member = True
            actions.append(Joined(up.peer_id))
        return actions

    def _unlink(self, peer: _Peer, why: str) -> None:
        peer.linked, peer.broken, peer.why = False, self.now, why
        peer.closed.clear()
        if peer.proven:
            rest = (address for address in peer.addresses if address != peer.proven)
            peer.addresses = [peer.proven, *rest][:ADDRESSES_MAX]
        self._after_link(peer, 0.0)

    def _after_link(self, peer: _Peer, wait_s: float) -> None:
        if self.now - peer.linked_since >= LIVED_S:
            peer.tries, peer.dial_at = 0, self.now + wait_s
        else:
            self._wait(peer)

    def _fail(self, peer_id: str, *, refused: bool = False, closed: bool = False) -> list[Action]:
        if (peer := self._peers.get(peer_id)) is None:
            return []
        peer.dialling_until = math.inf
        self._wait(peer, refused)
        if not closed or peer.linked or not peer.member:
            return []
        # Its machine lives, and nobody listens where it did: no need to wait for silence.
        peer.closed.add(peer.dialled)
        if peer.dialled == peer.proven or peer.closed.issuperset(peer.addresses):
            return self._lose(peer_id, ENDED)
        peer.dial_at = self.now  # the next address, at once
        return []

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

    def _lose(self, peer_id: str, why: str, heard_by: str = "") -> list[Action]:
        peer = self._peers.get(peer_id)
        if peer is None or not (peer.member or peer.linked):
            return []
        was_member = peer.member
        if peer.linked or self.now - peer.linked_since >= LIVED_S + self.timing.regret_s:
            self._after_link(peer, DIAL_AGAIN_MIN_S)
        peer.member = peer.linked = False
        peer.broken = peer.dialling_until = math.inf
        peer.doubt = None
        for other in self._peers.values():
            if other.doubt is not None:
                other.doubt.forget(peer_id)
        return [HangUp(peer_id), *([Lost(peer_id, why, heard_by)] if was_member else [])]

    # Opinions -------------------------------------------------------------------------------------

    def _answer(self, by: str, peer_id: str) -> list[Action]:
        """What is really known here; nothing at all where this peer itself may be to blame."""
        if by not in self.members or by == peer_id or self.now < self._lenient_until:
            return []
        peer = self._peers.get(peer_id)
        if peer is None or not peer.member or not peer.linked:
            return [Answer(by, peer_id, False, 0.0)]
        ago_s, fresh_s = self.now - peer.heard_at, FRESH_BEATS * self.timing.beat_s
        if ago_s > fresh_s >= self.now - peer.heard:
            return []  # what it said meanwhile may wait unread
        return [Answer(by, peer_id, ago_s <= fresh_s, ago_s)]

    def _hear_out(self, told: Opined) -> None:
        peer = self._peers.get(told.peer_id)
        if peer is not None and peer.doubt is not None:
            fresh = told.ago_s <= FRESH_BEATS * self.timing.beat_s
            peer.doubt.take(told.by, told.heard and fresh, told.ago_s, self.now)

    def _doubt(self, peer_id: str, peer: _Peer) -> list[Action]:
        """A member is not heard, and it was time to hear it: ask, or lose it."""
        actions: list[Action] = []
        doubt = peer.doubt
        if doubt is None:
            doubt = peer.doubt = Doubt(self.now + self.timing.doubt_s)
            actions += self._ask(peer_id, doubt)
        if doubt.decided(self.now):
            silent_s = self.now - peer.heard
            why = peer.why if peer.broken < math.inf else f"silent for {silent_s:.1f} s"
            actions += self._lose(peer_id, doubt.why(why), doubt.heard_by)
        elif self.now >= doubt.due:
            actions += self._ask(peer_id, doubt)
        return actions

    def _ask(self, peer_id: str, doubt: Doubt) -> list[Action]:
        """Of those that can be asked, and are not in doubt themselves."""
        others = [who for who, p in self._peers.items() if p.member and p.linked and not p.doubt]
        doubt.ask(others, self.now)
        return [Ask(peer_id, tuple(others))] if others else []

    # Time -----------------------------------------------------------------------------------------

    def _suspect_at(self, peer: _Peer) -> float:
        at = min(peer.heard + self.timing.silence_s, peer.broken + self.timing.regret_s)
        return max(at, self._lenient_until)

    def _next(self) -> float:
        at = self._beat_at
        may_dial = self._dialling() < DIALS_MAX
        for peer in self._peers.values():
            at = min(at, peer.dialling_until)
            if peer.member:
                at = min(at, peer.doubt.due if peer.doubt else self._suspect_at(peer))
            if may_dial and not peer.linked and not peer.dialling and peer.addresses:
                at = min(at, peer.dial_at)
        return at

    def _dialling(self) -> int:
        return sum([peer.dialling_until < math.inf for peer in self._peers.values()])

    def _check(self) -> list[Action]:
        actions: list[Action] = []
        for peer_id, peer in self._peers.items():
            if peer.member and self.now >= self._suspect_at(peer):
                actions += self._doubt(peer_id, peer)
            else:
                peer.doubt = None
            if peer.dialling and self.now >= peer.dialling_until:
                actions.append(GiveUp(peer_id))
                self._fail(peer_id)
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
            peer.dialled = peer.addresses[0]
            dials.append(Dial(peer_id, peer.key, peer.dialled))
        return dials
