"""What membership hears and what it asks for. Values; see `membership`."""

from __future__ import annotations

from dataclasses import dataclass

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
    proven: str = ""  # or that of its addresses which is on the host that its link comes from


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
    """The dial that was asked for came to nothing.

    refused: it answered that it does not want us; ask rarely. closed: the machine answered that
    nobody listens on that port (connection refused).
    """

    peer_id: str
    refused: bool = False
    closed: bool = False


@dataclass(frozen=True, slots=True)
class Left:
    """It said goodbye."""

    peer_id: str
    why: str


@dataclass(frozen=True, slots=True)
class Asked:
    """The peer `by` does not hear `peer_id` any more, and asks whether this one does."""

    by: str
    peer_id: str


@dataclass(frozen=True, slots=True)
class Opined:
    """What the peer `by` answered about `peer_id`."""

    by: str
    peer_id: str
    heard: bool
    ago_s: float


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = Seen | LinkUp | LinkDown | Heard | DialFailed | Left | Asked | Opined | Tick

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
    """The peer is a member no longer. heard_by: a member that hears it still, "": none does."""

    peer_id: str
    why: str
    heard_by: str = ""


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask each of `others` whether it hears the peer; each answer is an Opined."""

    peer_id: str
    others: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """Tell `to`, who asked, whether the peer is heard here; it was, `ago_s` ago."""

    to: str
    peer_id: str
    heard: bool
    ago_s: float


@dataclass(frozen=True, slots=True)
class SendBeats:
    """Send every member a heartbeat."""


Action = Dial | HangUp | GiveUp | Joined | Lost | Ask | Answer | SendBeats
