"""planning.kv: the type of the KV cache, from a peer's setting to a plan and its arithmetic."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from peer.planning import correction, costs, kv
from peer.planning.making import Members, Question, answer
from peer.planning.plan import Plan, PlanId
from peer.planning.profile import ModelShape, Profile, Speed
from peer.planning.split import Wishes, solve
from peer.protocol import Timed
from tests.coordinator import MIB, A, B, offer, profile
from tests.plans import shape

BOTH = ("f16", "q8_0")
MODEL = shape(
    12, 64, layer_bytes=(4 * MIB,) * 12, layer_kv_bytes=(4096,) * 12, kv_types=BOTH, context=65536
)


def peer(peer_id: str = A, memory_mib: int = 8000, **changes: object) -> Profile:
    speed = Speed(MODEL.digest, "fake", "cpu", 4, (1e-3,), (5e-2,), 512)
    return profile(peer_id, memory_mib, **({"spread_all": False, "speeds": (speed,)} | changes))


def ask(*profiles: Profile, now: Plan | None = None, model: ModelShape = MODEL) -> Question:
    here = {p.peer_id: p for p in profiles}
    members = Members(frozenset(here), here, {A: [offer(model)]})
    current = (now,) if now else ()
    return Question(1, PlanId(1, 2), A, members, (model,), {}, current)


def planned(question: Question) -> Plan:
    plan = answer(question).plan
    assert plan is not None
    return plan


def test_a_cell_of_q8_0_takes_34_bytes_where_f16_takes_64() -> None:
    assert kv.sized(MODEL, "q8_0").layer_kv_bytes == (4096 * 34 // 64,) * 12
    assert kv.sized(MODEL, "f16") is MODEL


def test_a_smaller_cache_makes_room_for_a_longer_context() -> None:
    tight = [peer(memory_mib=1200)]
    wishes = Wishes(context=32768)
    large, small = (solve(tight, MODEL, replace_kv(wishes, t)) for t in BOTH)
    assert (large.kv_type, small.kv_type) == BOTH
    assert large.context < small.context == 32768
    assert "for want of memory" in large.why
    assert "for want of memory" not in small.why


def replace_kv(wishes: Wishes, kv_type: str) -> Wishes:
    return Wishes(context=wishes.context, kv_type=kv_type)  # type: ignore[arg-type]


def test_memory_and_time_of_a_plan_follow_the_type() -> None:
    one = [peer()]
    large, small = (solve(one, MODEL, replace_kv(Wishes(context=8192), t)) for t in BOTH)
    assert large.kv_cells == small.kv_cells
    cells = large.kv_cells * 4096 * 12
    saved = large.windows[0].memory_bytes - small.windows[0].memory_bytes
    assert saved == cells - cells * 34 // 64
    before, after = (costs.forecast(one, MODEL, split) for split in (large, small))
    assert before
    assert after
    assert before.peers[0].memory_bytes - after.peers[0].memory_bytes == saved
    assert after.tpot_s < before.tpot_s, "less of it is read beside the weights"


def test_a_stage_with_a_small_cache_is_corrected_by_what_such_a_one_takes() -> None:
    one = peer()
    split = solve([one], MODEL, Wishes(kv_type="q8_0"))
    told = costs.forecast([one], MODEL, split)
    assert told
    plan = Plan(PlanId(1, 1), A, MODEL, split)
    assert correction.corrected(one, plan, Timed(decode_s=told.peers[0].decode_s)) is None
    heavy = replace(MODEL, layer_kv_bytes=(1 << 20,) * 12)
    split = replace(split, kv_type="f16")
    plan = Plan(PlanId(1, 1), A, heavy, split)
    assert correction.corrected(one, plan, Timed(decode_s=told.peers[0].decode_s)) is not None


@pytest.mark.parametrize(
    ("types", "flash", "why"),
    [
        (("f16",), "auto", "the KV cache is f16, as tiny cannot have one of q8_0"),
        (BOTH, "off", "the KV cache is f16: q8_0 needs flash attention, which the setting `flash`"),
    ],
)
def test_a_type_that_cannot_be_is_not_planned_and_the_reason_is_told(
    types: tuple[str, ...], flash: str, why: str
) -> None:
    model = replace(MODEL, kv_types=types)
    split = solve([peer()], model, Wishes(kv_type="q8_0", flash=flash))  # type: ignore[arg-type]
    assert (split.kv_type, split.flash) == ("f16", flash)
    assert why in split.why


def test_a_recurrent_model_gets_fewer_slots() -> None:
    states = replace(MODEL, layer_kv_bytes=(4096, 0) * 6)
    assert solve([peer()], MODEL).slots == 32
    assert solve([peer()], states).slots == 8


# Settings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "value", "why"),
    [
        ("kv_type", "q8_0", "a KV cache of q8_0, as is set"),
        ("flash", "on", "flash attention on, as is set"),
        ("speculation", "off", "speculation off, as is set"),
    ],
)
def test_a_setting_of_the_coordinator_makes_another_plan(
    setting: str, value: str, why: str
) -> None:
    now = planned(ask(peer()))
    assert answer(ask(peer(), now=now)).kept
    changed = answer(ask(peer(**{setting: value}), now=now))
    assert not changed.kept
    assert changed.gain == why
    assert changed.plan
    assert getattr(changed.plan.split, setting) == value
    assert answer(ask(peer(**{setting: value}), now=changed.plan)).kept


def test_settings_of_other_peers_do_not_count() -> None:
    plan = planned(ask(peer(A), peer(B, kv_type="q8_0", flash="off", speculation="off")))
    split = plan.split
    assert (split.kv_type, split.flash, split.speculation) == ("f16", "auto", "auto")


def test_a_setting_that_a_model_cannot_follow_is_no_reason_to_change_again_and_again() -> None:
    plain = replace(MODEL, kv_types=("f16",))
    now = planned(ask(peer(), model=plain))
    assert answer(ask(peer(kv_type="q8_0"), now=now, model=plain)).kept
