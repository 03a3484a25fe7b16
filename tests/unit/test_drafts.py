"""Which model drafts: wishes, room beside the head's windows, and what a plan says of it."""

from __future__ import annotations

from msgspec.structs import replace

from peer.models import tokenizers
from peer.planning import drafts
from peer.planning.choice import choose
from peer.planning.making import Answer, Members, Question, answer
from peer.planning.plan import Plan, PlanId
from peer.planning.profile import EngineProfile, ModelOffer, ModelShape, Profile
from tests.coordinator import MIB, TIMING, A, B, C, World, offer, profile, shape

BIG = shape("big", "0")
SMALL = shape("small-one", "1", layers=3)
WORDS = [f"word-{i}" for i in range(300)]


def metadata(tokens: list[str], kind: str = "gpt2", **more: object) -> dict[str, object]:
    named = {f"tokenizer.ggml.{key}": value for key, value in more.items()}
    return {"tokenizer.ggml.model": kind, "tokenizer.ggml.tokens": tokens} | named


def ask(
    *peers: Profile,
    models: dict[str, list[ModelOffer]] | None = None,
    now: Plan | None = None,
    before: Plan | None = None,
    model: ModelShape = BIG,
) -> Answer:
    offers = {A: [offer(model), offer(SMALL)]} if models is None else models
    members = Members(frozenset(p.peer_id for p in peers), {p.peer_id: p for p in peers}, offers)
    current = (now,) if now else ()
    return answer(
        Question(1, PlanId(1, 7), A, members, (model,), {model.digest: {}}, current, {}, before)
    )


def made(*peers: Profile, **given: object) -> Plan:
    plan = ask(*peers, **given).plan  # type: ignore[arg-type]
    assert plan is not None
    return plan


def test_a_model_that_any_peer_wishes_for_drafts_and_the_plan_says_so() -> None:
    plan = made(profile(A), profile(B, draft_wanted="small-one"))
    assert plan.split.draft == SMALL.digest
    assert plan.split.why.endswith("; small-one drafts for it")
    assert made(profile(A), profile(B)).split.draft == ""


def test_a_wish_that_cannot_be_fulfilled_is_a_reason_and_not_the_end_of_the_plan() -> None:
    nobody = made(profile(A, draft_wanted="absent"))
    assert nobody.split.draft == ""
    assert "the setting `draft` names absent, which no peer here has" in nobody.split.why
    some = {A: [offer(BIG), offer(SMALL, without=("layer-001",))]}
    missing = made(profile(A, draft_wanted="small-one"), models=some)
    assert "small-one cannot draft: some of its parts are on no peer here" in missing.split.why
    itself = made(profile(A, draft_wanted="big"))
    assert (itself.split.draft, "cannot draft for itself" in itself.split.why) == ("", True)


def test_a_model_with_another_tokenizer_does_not_draft() -> None:
    ours, theirs = tokenizers.mark(metadata(WORDS)), tokenizers.mark(metadata(WORDS[::-1]))
    target = replace(BIG, tokenizer=ours)
    for mark, drafted in ((theirs, ""), (ours, SMALL.digest), ("", SMALL.digest)):
        offers = {A: [offer(target), offer(replace(SMALL, tokenizer=mark))]}
        plan = made(profile(A, draft_wanted="small-one"), models=offers, model=target)
        assert plan.split.draft == drafted
        assert ("its tokenizer is not that of big" in plan.split.why) == (not drafted)


def test_the_draft_has_to_fit_beside_the_heads_windows() -> None:
    needed = drafts._bytes(SMALL, made(profile(A)).split, profile(A))
    assert 3 * MIB < needed < 8 * MIB
    windows = made(profile(A, draft_wanted="small-one"))
    assert windows.split.draft == SMALL.digest
    held = windows.split.windows[0].memory_bytes
    for spare, fits in ((needed + 4 * MIB, True), (needed - MIB // 2, False)):
        tight = profile(
            A, 0, memory_available_bytes=held + spare, draft_wanted="small-one", context_wanted=512
        )
        plan = made(tight)
        assert bool(plan.split.draft) == fits, plan.split.why
        assert fits or "small-one does not draft: it needs" in plan.split.why


def test_on_a_gpu_it_is_the_gpus_memory_that_counts() -> None:
    card = EngineProfile("fake", "card", "cuda", 700 * MIB, 700 * MIB)
    room = (EngineProfile("fake", "CPU", "cpu"), card)
    plan = made(profile(A, engines=room, draft_wanted="small-one"))
    assert plan.split.windows[0].gpu_layers != 0
    assert plan.split.draft == SMALL.digest
    full = replace(card, memory_free_bytes=512 * MIB + 16 * MIB)  # the headroom, and the windows
    fat = replace(SMALL, layer_bytes=(9 * MIB,) * 3)
    plan = made(
        profile(A, engines=(room[0], full), draft_wanted="small-one"),
        models={A: [offer(BIG), offer(fat)]},
    )
    assert plan.split.windows[0].gpu_layers != 0
    assert plan.split.draft == ""


def test_answers_that_wait_do_not_wait_for_a_draft_model() -> None:
    peers = profile(A, draft_wanted="small-one"), profile(B)
    before = made(*peers)
    elsewhere = {A: [offer(BIG)], B: [offer(SMALL), offer(BIG)]}
    head = made(*peers, models=elsewhere).head
    other = {A: B, B: A}[head]
    away = {head: [offer(BIG)], other: [offer(BIG), offer(SMALL)]}
    here = {head: [offer(BIG), offer(SMALL)], other: [offer(BIG)]}
    assert made(*peers, models=away, before=before).head == head
    assert made(*peers, models=away, before=before).split.draft == ""
    assert made(*peers, models=here, before=before).split.draft == SMALL.digest
    assert made(*peers, models=away).split.draft == SMALL.digest


def test_a_plan_that_serves_is_replaced_once_a_model_can_draft_and_once_none_is_to() -> None:
    without = made(profile(A))
    wish = profile(A, draft_wanted="small-one")
    better = ask(wish, now=without)
    assert (better.kept, better.gain) == (False, "a model drafts for it")
    assert better.plan is not None
    assert ask(wish, now=better.plan).kept
    over = ask(profile(A), now=better.plan)
    assert (over.kept, over.gain) == (False, "no model is to draft for it any more")


def test_a_plan_keeps_its_draft_while_its_own_memory_is_what_there_is_none_of() -> None:
    now = made(profile(A, draft_wanted="small-one"))
    full = profile(A, 14, draft_wanted="small-one", context_wanted=512)
    assert made(full).split.draft == ""
    assert ask(full, now=now).kept


def test_a_model_pulled_to_draft_is_not_the_one_that_is_served() -> None:
    offers = {A: [offer(BIG, 1.0), offer(SMALL, 2.0)]}

    def first(*peers: Profile) -> str:
        members = Members(frozenset({A}), {p.peer_id: p for p in peers}, offers)
        return choose(*members.wishes(A), A).shapes[0].model

    assert first(profile(A)) == "small-one"
    assert first(profile(A, draft_wanted="small-one")) == "big"
    assert first(profile(A, draft_wanted="small-one", model_wanted="small-one")) == "small-one"


def test_a_plan_is_made_anew_when_the_draft_model_was_pulled() -> None:
    world = World(A, offers={A: [offer(BIG)]})
    world.profiles[A] = profile(A, draft_wanted="small-one")
    world.members()
    assert "which no peer here has" in world.serve().why
    world.offers[A] = [offer(BIG), offer(SMALL, 2.0)]
    world.members()
    world.wait(5.0)
    newest = world.plans.states[-1].plan
    assert (newest.shape.model, newest.split.draft) == ("big", SMALL.digest)


def test_a_plan_is_made_anew_when_somebody_begins_to_wish_for_a_draft_model() -> None:
    world = World(A, B, offers={A: [offer(BIG), offer(SMALL, 0.5)]})
    assert world.serve().plan.split.draft == ""
    world.wait(5.0)
    world.profiles[B] = profile(B, draft_wanted="small-one")
    world.members()
    world.wait(5.0)
    assert world.plans.states[-1].plan.split.draft == SMALL.digest


def test_after_a_loss_answers_go_on_without_a_draft_model_that_comes_once_they_do() -> None:
    world = World(A, B, C, offers={p: [offer(BIG)] for p in (A, B, C)})
    world.offers[A] = [offer(BIG), offer(SMALL)]
    world.profiles = {p: profile(p, draft_wanted="small-one") for p in (A, B, C)}
    world.members()
    first = world.serve().plan
    assert first.split.draft == SMALL.digest
    world.lose(first.head)
    world.wait(TIMING.settle_s)
    (second,) = world.plans.states
    assert second.plan.head == B, "else nothing is shown here: A has the draft model"
    assert second.plan.split.draft == ""
    assert "drafts once machine-b has it" in second.why
    world.wait(5.0)  # while it loads, nothing changes
    assert world.phases == {"3.2": "loading"}
    world.obey()
    world.wait(TIMING.settle_s)
    assert [state.phase for state in world.plans.states] == ["serving", "loading"]
    assert world.plans.states[-1].plan.split.draft == SMALL.digest
    world.obey()
    world.wait(30.0)
    assert world.phases == {"3.2": "draining", "3.3": "serving"}


def test_tokenizers_may_differ_by_padding_only() -> None:
    padded = [*WORDS, *(f"[PAD{i}]" for i in range(100))]
    longer = [*WORDS, *(f"[PAD{i}]" for i in range(129))]
    control = ["<unk>", "<s>", "</s>", *WORDS[3:]]
    changed = [*WORDS[:200], "another", *WORDS[201:]]
    for other, same in ((padded, True), (control, True), (longer, False), (changed, False)):
        assert (tokenizers.difference(metadata(WORDS), metadata(other)) == "") == same
        assert tokenizers.same(*(tokenizers.mark(metadata(t)) for t in (WORDS, other))) == same
        assert tokenizers.same(*(tokenizers.mark(metadata(t)) for t in (other, WORDS))) == same
    said = tokenizers.difference(metadata(WORDS), metadata(changed))
    assert said == "token 200 is 'another' to it, not 'word-200'"
    llama = metadata(WORDS, "llama")
    assert "of the kind llama, not gpt2" in tokenizers.difference(metadata(WORDS), llama)
    assert not tokenizers.same(tokenizers.mark(metadata(WORDS)), tokenizers.mark(llama))
    assert tokenizers.mark({}) == ""


def test_a_text_that_begins_otherwise_is_another_tokenizers_where_both_say_so() -> None:
    one = metadata(WORDS, add_bos_token=True, bos_token_id=1)
    assert tokenizers.difference(one, one) == ""
    other = metadata(WORDS, add_bos_token=True, bos_token_id=2)
    assert tokenizers.difference(one, other) == "it begins texts with another token"
    assert tokenizers.difference(one, metadata(WORDS, bos_token_id=2)) == ""
    never = metadata(WORDS, add_bos_token=False, bos_token_id=2)
    assert tokenizers.difference(never, metadata(WORDS, add_bos_token=False)) == ""
