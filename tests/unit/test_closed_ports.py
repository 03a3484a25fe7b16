"""A link that breaks, and a port that refuses to be dialled again: an agent that ended, or not."""

from __future__ import annotations

import pytest

from peer.cluster.membership import ENDED, DialFailed, Joined, LinkDown, LinkUp, Lost, Seen
from tests.clocked import Clocked

DIALLED = "tcp://10.0.0.9:7"


def linked(*addresses: str, dialled: str = "", proven: str = "") -> Clocked:
    home = Clocked("c")
    home.feed(LinkUp("b", "key of b", 1, addresses, dialled, proven))
    home.heard.add("b")
    home.until(20.0)
    home.silence("b")
    home.feed(LinkDown("b", "the connection broke"))
    return home


@pytest.mark.parametrize("how", ["dialled", "proven"])
def test_a_port_that_refuses_where_the_link_was_means_that_its_agent_ended(how: str) -> None:
    home = linked("tcp://172.17.0.1:7", DIALLED, **{how: DIALLED})
    assert [dial.address for dial in home.dials] == [DIALLED]
    home.feed(DialFailed("b", closed=True))
    assert home.lost["b"] == (home.now, Lost("b", ENDED))
    assert not home.asked


def test_a_dial_that_fails_otherwise_changes_nothing() -> None:
    home = linked(DIALLED, dialled=DIALLED)
    home.feed(DialFailed("b"))
    assert "b" in home.machine.members
    home.until(home.now + 0.5)
    assert len(home.dials) == 2
    assert not home.lost


def test_of_several_addresses_of_which_none_is_known_to_work_all_must_refuse() -> None:
    home = linked("tcp://10.0.0.8:7", DIALLED)
    home.feed(DialFailed("b", closed=True))  # maybe another machine's, or this one's own
    assert not home.lost
    assert [dial.address for dial in home.dials] == ["tcp://10.0.0.8:7", DIALLED]  # at once
    home.feed(DialFailed("b", closed=True))
    assert home.lost["b"][1] == Lost("b", ENDED)


def test_the_address_that_worked_is_dialled_first_whatever_was_heard_since() -> None:
    home = Clocked("c")
    home.feed(LinkUp("b", "key of b", 1, (), DIALLED))
    home.heard.add("b")
    home.until(20.0)
    for number in range(100):
        home.feed(Seen("b", "key of b", (f"tcp://10.6.6.6:{number + 1}",)), DialFailed("b"))
    home.feed(LinkDown("b", "the connection broke"))
    assert [dial.address for dial in home.dials] == [DIALLED]


@pytest.mark.parametrize("state", ["linked", "no member"])
def test_a_refusal_says_nothing_of_a_peer_that_is_linked_or_was_no_member(state: str) -> None:
    home = Clocked("c")
    home.feed(Seen("b", "key of b", (DIALLED,)))
    if state == "linked":
        home.feed(LinkUp("b", "key of b", 1, (DIALLED,), "", DIALLED))
    assert [dial.address for dial in home.dials] == [DIALLED]
    home.feed(DialFailed("b", closed=True))
    assert not home.lost
    assert not home.asked


def test_a_refusal_of_an_earlier_break_does_not_count_at_the_next() -> None:
    home = linked("tcp://10.0.0.8:7", DIALLED)
    home.feed(DialFailed("b", closed=True))
    home.feed(LinkUp("b", "key of b", 1, ("tcp://10.0.0.8:7", DIALLED)))
    home.heard.add("b")
    home.until(home.now + 5.0)
    home.feed(LinkDown("b", "the connection broke"))
    home.feed(DialFailed("b", closed=True))
    assert not home.lost


def test_a_peer_whose_agent_is_started_again_joins_again() -> None:
    home = linked(DIALLED, dialled=DIALLED)
    home.feed(DialFailed("b", closed=True))
    home.until(home.now + 0.4)
    assert len(home.dials) == 2  # it is looked for at once
    assert home.machine.step(LinkUp("b", "key of b", 2, (), DIALLED), home.now) == [Joined("b")]
