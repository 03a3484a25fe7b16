"""What `halka status` says of losses: in one glance, and why not."""

from __future__ import annotations

from typing import Any

import msgspec

from peer.words.screen import Screen, cells_of
from peer.words.state import Status
from peer.words.status import lines
from tests.agent_double import a_peer, a_status

GIB = 1 << 30


def a_loss(letter: str, outcome: str = "fine", **more: Any) -> dict[str, Any]:
    return {"peer_id": letter * 16, "outcome": outcome, **more}


def shown(screen: Screen | None = None, **changes: Any) -> str:
    status = msgspec.convert(a_status(**changes), Status)
    return "\n".join(lines(status, screen or Screen()))


def test_that_any_peer_may_go_is_one_line() -> None:
    text = shown(losses=[a_loss(letter) for letter in "abc"])
    assert "\nSurvives the loss of any one of its 3 peers\n\nAPI" in text


def test_whose_loss_ends_answers_is_named_with_the_reason_and_how_far_spares_are() -> None:
    why = "12 parts of smollm2 (1,200 MiB) are nowhere else"
    spares = [
        {"peer_id": "b" * 16, "done_bytes": 43, "total_bytes": 60},
        {"peer_id": "c" * 16, "done_bytes": 0, "total_bytes": 40},
    ]
    losses = [
        a_loss("a", "none", why=why),
        a_loss("b", "fetch", fetch_bytes=5 * GIB // 4),
        a_loss("c"),
    ]
    text = shown(losses=losses, spares=spares)
    assert "Survives the loss of 2 of its 3 peers (fetching spare parts: 43 %)\n" in text
    assert f"  desk           answers end: {why}\n" in text
    assert "  attic          answers go on after 1.2 GiB were fetched from other peers\n" in text
    assert "  mini           answers" not in text


def test_what_can_go_on_only_after_fetching_survives_all_the_same() -> None:
    losses = [a_loss("a", "fetch", fetch_bytes=GIB), a_loss("b"), a_loss("c")]
    text = shown(losses=losses)
    assert "Survives the loss of any one of its 3 peers\n  desk           answers go on" in text


def test_a_cluster_that_survives_nothing_says_so_and_has_no_problem_by_that() -> None:
    losses = [a_loss(letter, "none", why="memory is missing") for letter in "abc"]
    text = shown(losses=losses)
    assert "Survives no peer's loss\n" in text
    assert "halka is running" in text
    assert "Problems" not in text


def test_spare_parts_that_are_all_there_are_not_spoken_of() -> None:
    done = {"peer_id": "b" * 16, "done_bytes": 60, "total_bytes": 60}
    assert "fetching" not in shown(losses=[a_loss("a"), a_loss("b")], spares=[done])


def test_why_this_peer_cannot_have_a_spare_part_is_told_here_only() -> None:
    why = "no space left on the disk"
    spares = [
        {"peer_id": "a" * 16, "done_bytes": 1, "total_bytes": 60, "why": why},
        {"peer_id": "b" * 16, "done_bytes": 1, "total_bytes": 60, "why": "another disk"},
    ]
    text = shown(losses=[a_loss("a"), a_loss("b")], spares=spares)
    assert f"\n  spare parts: {why}\n" in text
    assert "another disk" not in text


def test_who_is_alone_or_told_nothing_hears_nothing_of_losses() -> None:
    assert "Survives" not in shown()
    alone = [a_peer("a", "desk", me=True, layers=[[0, 30]], phase="serving")]
    assert "Survives" not in shown(peers=alone, losses=[a_loss("a", "none", why="alone")])
    gone = [*alone, a_peer("b", "attic", state="lost")]  # what was foreseen of it has come true
    assert "Survives" not in shown(peers=gone, losses=[a_loss("a"), a_loss("b")])


def test_many_losses_and_narrow_plain_terminals() -> None:
    peers = [a_peer(letter, f"peer-{letter}", me=letter == "a") for letter in "abcdefghij"]
    why = "the model \x1b[31m needs 9,000 MiB and " + "much " * 30
    losses = [a_loss(letter, "none", why=why) for letter in "abcdefghij"]
    text = shown(Screen(width=60, unicode=False), peers=peers, losses=losses)
    assert "  and 4 more: halka status --json\n" in text
    assert "\x1b" not in text
    assert text.isascii()
    section = text[text.index("Survives") : text.index("API")]
    assert max(map(cells_of, section.splitlines())) <= 60


def test_colour_is_of_the_words_alone() -> None:
    text = shown(Screen(colour=True), losses=[a_loss("a"), a_loss("b")])
    assert "Survives \x1b[32mthe loss of any one of its 2 peers\x1b[0m" in text
    text = shown(Screen(colour=True), losses=[a_loss("a"), a_loss("b", "fetch", fetch_bytes=1)])
    assert "Survives \x1b[33mthe loss of any one of its 2 peers\x1b[0m" in text


def test_answers_that_wait_or_went_on_elsewhere_are_counted() -> None:
    answers = {"running": 2, "served": 5, "failed": 0, "waiting": 1, "continued": 3}
    text = shown(answers=answers)
    assert "Answers  2 running (1 waiting for a ring), 5 served, 0 failed; 3 times one went" in text
    assert "waiting" not in shown(answers={"running": 2, "served": 5, "failed": 0})


def test_a_peer_that_wants_to_go_is_shown_so() -> None:
    peers = a_status()["peers"]
    assert "going away" not in shown()
    assert "going away" in shown(peers=[{**peers[0], "leaving": True}, *peers[1:]])


def test_who_left_on_purpose_is_not_called_lost() -> None:
    why = "its agent was stopped"
    text = shown(peers=[*a_status()["peers"], a_peer("d", "nas", state="lost", why=why)])
    assert "\n  nas            gone" in text
    assert f"\n                 {why}\n" in text
    assert "lost" not in text


def test_what_is_survived_is_not_passed_over_while_it_is_not_known() -> None:
    assert "\nSurvives not known yet" in shown(unforeseen=True)
    assert "not known yet" not in shown(losses=[a_loss("a"), a_loss("b")])
