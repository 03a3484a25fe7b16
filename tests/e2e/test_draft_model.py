"""A draft model on the head of real rings: what it guesses, and that nothing ends of it."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

import backends
from backends.base import BackendFault
from peer import children
from peer.models.imports import import_gguf
from peer.models.store import Store
from peer.planning.plan import PlanState
from peer.ring.drafting import DraftModel, load
from peer.ring.supervisor import Supervisor
from tests import fake_models
from tests.conftest import Until
from tests.e2e import agents
from tests.e2e.agents import House
from tests.e2e.answers import chat, told
from tests.e2e.rings import Ring, plan_of
from tests.plain_llama import PlainLlama
from tests.plans import PEERS
from tests.random_models import write
from tests.rule_models import MODELS
from tests.smollm2 import Q4_0, requantised, smollm2

TEXT = "<|im_start|>user\nHow do bees make honey?<|im_end|>\n<|im_start|>assistant\n"
TOKENS = 120


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def target(home: Path) -> Path:
    """The folder of the model that is served."""
    store = Store(home)
    return store.folder(import_gguf(smollm2(), store).digest)


@pytest.fixture(scope="module")
def drafter(home: Path, target: Path) -> Iterator[DraftModel]:
    """The same model with fewer bits."""
    path = requantised(home / "fewer-bits.gguf", Q4_0)
    store = Store(home)
    folder = store.folder(import_gguf(path, store).digest)
    found = load(backends.load("llama_cpp"), folder, target, threads=1, kv_cells=4096)
    yield found
    found.close()


def test_a_smaller_model_guesses_so_that_a_ring_needs_less_than_half_the_steps(
    drafter: DraftModel,
) -> None:
    with PlainLlama(smollm2(), cells=1024, batch=512) as whole:
        prompt = whole.tokenise(TEXT)
        answer = whole.greedy(prompt, TOKENS, 512)
    at = steps = 0
    while at < TOKENS:
        guess = drafter.draft("answer", prompt + answer[: at + 1], 4)
        assert drafter.why == ""
        follows = answer[at + 1 :]
        wrong = (i for i, (a, b) in enumerate(zip(guess, follows, strict=False)) if a != b)
        at, steps = at + 1 + next(wrong, len(guess)), steps + 1
    drafter.forget("answer")
    assert steps < TOKENS / 2
    assert 0 < drafter.seconds_each < 1


def test_what_it_guesses_is_what_its_own_model_says_alone(drafter: DraftModel, home: Path) -> None:
    with PlainLlama(home / "fewer-bits.gguf", cells=1024, batch=512) as alone:
        prompt = alone.tokenise(TEXT)
        expected = alone.greedy(prompt, 24, 512)
    found: tuple[int, ...] = ()
    while not found:  # it reads a little at a time
        found = drafter.draft("answer", prompt, 24)
    drafter.forget("answer")
    assert list(found) == expected


def test_a_recurrent_model_is_refused_with_the_reason(home: Path) -> None:
    store = Store(home)
    path = write(MODELS["mamba"], home / "mamba.gguf")
    folder = store.folder(import_gguf(path, store).digest)
    with pytest.raises(BackendFault, match="cannot draft: its recurrent layers"):
        load(backends.load("llama_cpp"), folder, folder, threads=1, kv_cells=512)


async def test_after_a_crash_a_stage_begins_without_the_model_that_drafted(
    tmp_path: Path, until: Until, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(tmp_path)
    path = fake_models.write(tmp_path / "model.gguf", layers=3)
    manifest = import_gguf(path, store)
    plan = plan_of(store, manifest, [], "fake")
    folder, orders = store.folder(manifest.digest), tmp_path / "orders"
    ends: list[str] = []
    supervisor = Supervisor(lambda _plan, _news: None, lambda _plan, why: ends.append(why))

    async def ended(how: str) -> None:
        """Start a stage that notes its order and ends so."""
        code = f"import os, sys\nopen({str(orders)!r}, 'a').write(sys.stdin.readline())\n{how}\n"
        before = len(ends)
        with mock.patch.object(children, "command", return_value=(sys.executable, "-c", code)):
            await supervisor.start(
                PlanState(plan, "loading"), PEERS[0], folder,
                threads=1, step_s=20.0, bind="127.0.0.1", admitted=(), draft=folder,
            )  # fmt: skip
        await until(lambda: len(ends) > before, 10, "its end is told")

    said = '{"type":"news","phase":"failed","why":"a link broke"}'
    await ended(f"print({said!r}, flush=True); sys.exit(1)")
    await ended(f"os.kill(os.getpid(), {int(signal.SIGSEGV)})")
    await ended("sys.exit(1)")
    told = [json.loads(line).get("draft_folder", "") for line in orders.read_text().splitlines()]
    assert told == [str(folder), str(folder), ""]
    assert "draft=none plan=1.1 because=a stage crashed with it" in caplog.text
    caplog.clear()
    await ended("print('draft=none because=of this\\nother=line', file=sys.stderr)")
    lines = [line for line in caplog.messages if line.startswith("plan=1.1 ")]
    assert lines == ["plan=1.1 draft=none because=of this"]
    await supervisor.close()


@pytest.mark.parametrize("guesses", ["right", "wrong", "none"])
async def test_a_ring_gives_the_same_answer_whatever_the_draft_model_guesses(
    tmp_path: Path, until: Until, guesses: str
) -> None:
    store, seed = Store(tmp_path), 1 if guesses == "wrong" else 0
    big = fake_models.write(tmp_path / "big.gguf", layers=4, name="big", delay_s=0.01, end_every=0)
    small = fake_models.write(
        tmp_path / "small.gguf", layers=4, name="small", seed=seed, end_every=0
    )
    manifest, draft = import_gguf(big, store), store.folder(import_gguf(small, store).digest)
    plan = plan_of(store, manifest, [2], "fake")
    ring = Ring(plan)
    try:
        folder = store.folder(manifest.digest)
        await ring.start(folder, draft=None if guesses == "none" else draft)
        prompt = list(b"the quick brown fox jumps over the lazy dog, and")
        assert await ring.tokens(prompt, 150) == fake_models.truth(big, prompt, 150)
        head = plan.head

        def accepted() -> int:
            timed = ring.news[head].timed
            return timed.accepted if timed else 0

        if guesses == "right":
            await until(lambda: accepted() > 120, 20, "its guesses are told")
            assert ring.news[head].steps < 40
        else:
            await until(lambda: ring.news[head].steps > 100, 20, "as many steps are told")
            assert accepted() < 50
    finally:
        await ring.close()


def test_agents_carry_a_wish_for_a_draft_model_to_the_head_and_into_the_words_of_the_plan(
    tmp_path: Path,
) -> None:
    big = fake_models.write(tmp_path / "big.gguf", layers=6, name="big")
    small = fake_models.write(tmp_path / "small.gguf", layers=3, name="small")
    house = House(tmp_path, 2, HALKA_LOG="debug")
    first, second = house.agents
    second.environment["HALKA_DRAFT"] = "small-f32"
    try:
        for agent, model in ((first, big), (second, small)):  # the one to draft comes last
            done = agent.word("pull", str(model))
            assert done.returncode == 0, done.stderr
        with house.watched():
            house.start()
            house.serving(model="big-f32")
            head, tail = house.ring()
            ready = "draft=loaded model=small-f32"
            agents.until(lambda: ready in head.text(), 20, "the head has loaded it")
            assert "draft=loaded" not in tail.text()
            words = first.word("plan").stdout.replace("\n", " ")
            assert "small-f32 drafts for it" in " ".join(words.split())
            for agent in (first, second):
                code, said = agent.post("/v1/chat/completions", chat("What is a ring?", 40))
                assert code == 200, said
                assert said["choices"][0]["message"]["content"] == told(big, "What is a ring?", 40)
    finally:
        house.close()
