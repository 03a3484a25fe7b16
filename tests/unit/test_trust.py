"""Profiles that say nonsense are refused by name; honest ones, however poor, are not."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from peer.errors import NoPlan
from peer.planning.profile import EngineProfile, Link, Profile, Speed
from peer.planning.split import Wishes, solve
from peer.planning.trust import fault
from tests.coordinator import A, B, profile, shape

NAN, INFINITE = float("nan"), float("inf")
GOOD = Speed("0" * 64, "fake", "cpu", 4, (1e-3,), (0.1,), 512)


def with_speed(**changes: object) -> Profile:
    return profile(A, speeds=(replace(GOOD, **changes),))


BAD = {
    "no memory": profile(A, memory_available_bytes=0),
    "negative memory": profile(A, memory_available_bytes=-1),
    "more than there is": profile(A, memory_available_bytes=1 << 34, memory_total_bytes=1 << 33),
    "absurd memory": profile(A, memory_available_bytes=1 << 59, memory_total_bytes=1 << 59),
    "absurd GPU": profile(A, engines=(EngineProfile("fake", "G", "cuda", 1 << 59),)),
    "negative GPU": profile(A, engines=(EngineProfile("fake", "G", "cuda", -5),)),
    "no processor time": profile(A, cpu_share=0.0),
    "next to no processor time": profile(A, cpu_share=1e-9),
    "not a share": profile(A, cpu_share=NAN),
    "negative threads": profile(A, threads=-1),
    "not a disk": profile(A, disk_read_bytes_per_s=NAN),
    "absurd disk": profile(A, disk_read_bytes_per_s=1e18),
    "a disk that divides to infinity": profile(A, disk_read_bytes_per_s=1e-300),
    "a link that divides to infinity": profile(A, links=(Link(B, 0.1, 5e-324),)),
    "not a link": profile(A, links=(Link(B, NAN),)),
    "negative link": profile(A, links=(Link(B, -1.0),)),
    "infinite link": profile(A, links=(Link(B, 0.1, INFINITE),)),
    "no layers": with_speed(decode_s=()),
    "no chunk": with_speed(prefill_tokens=0),
    "short chunks in no time": with_speed(short_chunks=((16, 0.0),)),
    "zero seconds": with_speed(decode_s=(0.0,)),
    "negative seconds": with_speed(decode_s=(-1.0,)),
    "not seconds": with_speed(prefill_s=(NAN,)),
    "absurd seconds": with_speed(decode_s=(1e9,)),
    "not around": with_speed(window_s=NAN),
    "negative output": with_speed(output_s=-1.0),
    "not a correction": with_speed(correction=NAN),
    "zero correction": with_speed(correction=0.0),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_nonsense_is_refused_by_the_peers_name_and_the_others_are_planned_with(
    bad: Profile,
) -> None:
    assert fault(bad).startswith("the profile of machine-a is refused: ")
    split = solve([bad, profile(B)], shape(), Wishes(spread_all=True))
    assert [window.peer_id for window in split.windows] == [B]
    assert split.left_out[0].peer_id == A
    assert "machine-a is refused" in split.left_out[0].why
    with pytest.raises(NoPlan, match="machine-a is refused"):
        solve([bad], shape())


@pytest.mark.parametrize(
    "good",
    [
        profile(A),
        profile(A, memory_mib=20),
        profile(A, memory_total_bytes=0),  # not told
        profile(A, engines=()),
        with_speed(),
        with_speed(decode_s=(100.0,), correction=50.0),
        profile(A, links=(Link(B, 0.0, 0.0),), cpu_share=0.01, threads=256),
    ],
)
def test_what_can_be_is_believed(good: Profile) -> None:
    assert fault(good) == ""
