"""Which model is served when peers offer several, and when some of them say what is not so."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from peer.planning.choice import Choice, choose
from peer.planning.profile import Fit, ModelOffer, ModelShape
from tests.coordinator import A, B, C, D, offer, shape

TRUE = shape()
LIE = replace(shape("lied", layers=3), context=600)


def chosen(model_wanted: str = "", **offers: ModelOffer | list[ModelOffer]) -> Choice:
    """Of peers by their letters; B chooses."""
    listed = {
        letter * 16: of if isinstance(of, list) else [of] for letter, of in sorted(offers.items())
    }
    return choose(listed, model_wanted, B)


def test_the_model_pulled_last_is_wanted_first_and_the_others_after_it() -> None:
    models = [offer(shape(f"m{i}", str(i)), 10.0 + i % 3) for i in range(5)]
    assert [s.model for s in chosen(a=models).shapes] == ["m2", "m4", "m1", "m3", "m0"]


def test_a_peer_that_describes_a_model_otherwise_than_this_one_does_not_count() -> None:
    for liar in "ac":  # whichever of the ids sorts first
        choice = choose({B: [offer(TRUE)], liar * 16: [offer(LIE, 4e9)]}, "", B)
        assert choice.shapes == (TRUE,)
        assert list(choice.ignored) == [liar * 16]
        assert "otherwise than this peer does" in choice.ignored[liar * 16]
    choice = chosen(b=offer(TRUE), a=offer(LIE, 4e9), c=offer(LIE, 4e9), d=offer(LIE, 4e9))
    assert choice.shapes == (TRUE,)
    assert list(choice.ignored) == [A, C, D]


def test_peers_of_a_release_that_knows_fewer_engines_still_count() -> None:
    newer = replace(TRUE, fits=(Fit("mlx", how="no", why="its types"),))
    for mine, others in ((TRUE, newer), (newer, TRUE)):
        choice = choose({B: [offer(mine)], A: [offer(others)]}, "", B)
        assert choice.shapes == (mine,)
        assert not choice.ignored
    assert chosen(a=offer(TRUE), c=offer(newer), d=offer(TRUE)).shapes == (newer,)


def test_of_a_model_that_only_others_have_the_shape_of_most_counts() -> None:
    choice = chosen(a=offer(LIE, 4e9), c=offer(TRUE), d=offer(TRUE))
    assert choice.shapes == (TRUE,)
    assert list(choice.ignored) == [A]
    assert "otherwise than others do" in choice.ignored[A]


def test_parts_and_times_of_an_offer_that_does_not_count_do_not_either() -> None:
    mine = offer(TRUE, 5.0, without=("layer-001",))
    assert "layer-001" in chosen(b=mine, a=offer(replace(TRUE, context=5), 9.0)).why
    other = offer(shape("other", "1"), 7.0)
    choice = chosen(b=[offer(TRUE, 5.0), other], a=offer(replace(TRUE, context=5), 9.0))
    assert [s.model for s in choice.shapes] == ["other", "small"]


def test_a_peer_has_one_offer_of_a_model() -> None:
    choice = chosen(a=[offer(TRUE), offer(LIE)], c=offer(TRUE))
    assert choice.shapes == (TRUE,)
    assert "makes two" in choice.ignored[A]


@pytest.mark.parametrize("pulled_s", [1e300, 1e11, 4.1e9, float("inf"), float("nan"), -1.0])
def test_a_time_that_cannot_be_is_the_earliest(pulled_s: float) -> None:
    new = offer(shape("new", "1"), 1.7e9)
    odd = ModelOffer(shape("odd", "2"), pulled_s, offer(shape("odd", "2")).parts)
    assert [s.model for s in chosen(a=odd, b=new).shapes] == ["new", "odd"]


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_bytes": (1 << 60,) * 12},
        {"layer_kv_bytes": (1 << 60,) * 12},
        {"layers": 0, "layer_bytes": (), "layer_kv_bytes": ()},
        {"layer_bytes": (1,)},
    ],
)
def test_a_shape_that_no_plan_can_be_made_of_does_not_count_and_its_peer_is_named(
    changes: dict[str, object],
) -> None:
    model: ModelShape = replace(shape("absurd", "1"), **changes)
    choice = chosen(a=ModelOffer(model, 9.0, offer(shape()).parts), b=offer(TRUE))
    assert choice.shapes == (TRUE,)
    assert "its offer of absurd does not count" in choice.ignored[A]


def test_a_newer_model_with_parts_missing_is_passed_over_and_that_is_said() -> None:
    newer = offer(shape("newer", "1"), 9.0, without=("head",))
    choice = chosen(b=[offer(TRUE), newer])
    assert choice.shapes == (TRUE,)
    assert choice.newest == "newer"
    assert "on no peer here" in choice.passed_over
    assert chosen("small", b=[offer(TRUE), newer]).passed_over == ""
