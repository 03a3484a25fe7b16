"""When what failed is tried again."""

from __future__ import annotations

from peer.clockwork import Lull, Retries


def test_what_never_failed_is_due() -> None:
    assert Retries(30, 3600).due("a", 5.0)


def test_the_wait_doubles_up_to_the_most() -> None:
    retries, now, waits = Retries(30, 100), 1000.0, []
    for _ in range(4):
        retries.failed("a", now)
        wait_s = next(s for s in range(200) if retries.due("a", now + s))
        waits.append(wait_s)
        now += wait_s
    assert waits == [30, 60, 100, 100]


def test_names_wait_each_for_itself_and_success_is_the_end_of_it() -> None:
    retries = Retries(30, 100)
    retries.failed("a", 0.0)
    assert not retries.due("a", 29.9)
    assert retries.due("b", 0.0)
    retries.worked("a")
    assert retries.due("a", 1.0)
    retries.failed("a", 1.0)
    assert retries.due("a", 31.0)


def test_what_comes_seldom_is_expected_for_longer() -> None:
    lull = Lull(1.5, 30.0)
    assert lull.is_over(0.0), "it never came"
    lull.goes_on(100.0)
    assert not lull.is_over(129.0), "nothing is known of how often it comes"
    lull.goes_on(104.0)
    assert not lull.is_over(111.9)
    assert lull.is_over(112.0)
    lull.goes_on(104.1)
    assert not lull.is_over(105.5)
    assert lull.is_over(105.6)
