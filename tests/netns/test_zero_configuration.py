"""Three machines, a switch, and nothing set: they find each other and answer together.

The agents are started as a stranger would start them, with a home and no settings, so this is mDNS
over a real interface, the default address of the API, the real model on llama.cpp, and the `openai`
client as everybody has it. A model that fits on one machine is left to it; where all three are to
compute together, that alone is set.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from peer.models.store import Store
from peer.models.text import Text
from tests.netns.world import World, agreement, members, world
from tests.plain_llama import PlainLlama
from tests.smollm2 import smollm2

pytestmark = pytest.mark.llama

NAMES = ("oak", "elm", "ash")
QUESTION = "Why do rivers bend? Answer in a few sentences."
TOKENS = 60
MEASURED_BYTES = 10 << 20  # of links, by both neighbours, a few times
CLIENT = f"""
import openai
client = openai.OpenAI(base_url="http://127.0.0.1:42552/v1", api_key="none", max_retries=0)
model = client.models.list().data[0].id
answer = client.chat.completions.create(
    model=model, messages=[{{"role": "user", "content": {QUESTION!r}}}],
    temperature=0, max_tokens={TOKENS},
)
print(answer.choices[0].message.content, end="")
"""


@dataclass(frozen=True)
class Grown:
    """A world whose cluster serves. came: bytes that each machine received since the pull."""

    world: World
    came: dict[str, int]


@pytest.fixture(autouse=True)
def nothing_left_behind() -> None:
    """The agents outlive a test and measure when they find the time; that they leave nothing is
    seen at the end of their world."""


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Grown]:
    with world(tmp_path_factory.mktemp("world")) as made:
        machines = [made.machine(name) for name in NAMES]
        for machine in machines:  # no spare parts: what is fetched is a plan's
            machine.start(spread="all", spare="off")
        made.until(
            lambda: all(members(m.status() or {"peers": ()}) == sorted(NAMES) for m in machines),
            30, "all three know each other",
        )  # fmt: skip
        before = {m.name: m.received_bytes() for m in machines}
        pulled = machines[0].halka("pull", str(smollm2()))
        assert pulled.returncode == 0, pulled.stderr
        made.until(lambda: made.agree(NAMES), 60, "all three agree and serve")
        yield Grown(made, {m.name: m.received_bytes() - before[m.name] for m in machines})


def parts_wanted(grown: Grown, name: str) -> set[str]:
    """Names of the parts that a peer needs for its windows, and head.gguf."""
    plan = grown.world.machines[name].get("/halka/plan")
    me = grown.world.machines[name].status()["me"]["peer_id"]
    wanted = {"head"}
    for window in plan["split"]["windows"]:
        if window["peer_id"] == me:
            wanted |= {f"layer-{i:03d}" for i in range(window["first"], window["last"])}
            if window["first"] == 0 or window["last"] == plan["shape"]["layers"]:
                wanted.add("embed")  # SmolLM2's output matrix is its embedding
    return wanted


def test_all_agree_on_one_coordinator_one_term_and_one_plan(grown: Grown) -> None:
    told = [agreement(machine.status()) for machine in grown.world.machines.values()]
    assert told[0] == told[1] == told[2]
    coordinators = {m.status()["me"]["peer_id"] for m in grown.world.machines.values()}
    assert told[0]["coordinator"] in coordinators
    assert told[0]["term"] > 0
    assert sorted(name for name, _ in told[0]["layers"]) == sorted(NAMES)
    layers = [i for _, windows in told[0]["layers"] for a, b in windows for i in range(a, b)]
    assert sorted(layers) == list(range(30))
    for machine in grown.world.machines.values():
        assert f"listening=tcp://{machine.address}:" in machine.log()
        assert machine.halka("status").returncode == 0


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_peer_without_the_model_fetches_its_parts_and_nothing_else(
    grown: Grown, name: str
) -> None:
    machine, wanted = grown.world.machines[name], parts_wanted(grown, name)
    (stored,) = Store(machine.home).models()
    files = {path.name for path in (machine.home / "models" / stored.digest).iterdir()}
    parts = {f"{part}.gguf" for part in wanted}
    assert {file for file in files if not file.startswith(".")} == {"manifest.json", *parts}
    needed = sum(stored.manifest.part(part).data_bytes for part in wanted)
    assert len(parts) < len(stored.manifest.parts)
    # Not before the parts were there, and not twice: headers, heartbeats and plans are the rest.
    assert needed < grown.came[name] < 1.15 * needed + MEASURED_BYTES


def test_the_peer_with_the_model_fetches_nothing(grown: Grown) -> None:
    least = min(grown.came[name] for name in NAMES[1:])
    assert grown.came[NAMES[0]] < least / 20 + MEASURED_BYTES  # what it sent was acknowledged


def test_the_same_question_has_one_answer_on_every_peer(grown: Grown) -> None:
    answers = {}
    for name, machine in grown.world.machines.items():
        done = machine.run(sys.executable, "-c", CLIENT)
        assert done.returncode == 0, f"{name}: {done.stderr}\n{grown.world.story()}"
        answers[name] = done.stdout
        assert machine.status()["answers"]["served"] == 1
    assert len(set(answers.values())) == 1, answers
    assert answers[NAMES[0]] == asyncio.run(answer_of_one_context(grown))


def test_without_any_setting_one_machine_runs_what_fits_and_all_answer(tmp_path: Path) -> None:
    with world(tmp_path) as made:
        machines = [made.machine(name) for name in NAMES[:2]]
        for machine in machines:
            machine.start()
        pulled = machines[0].halka("pull", str(smollm2()))
        assert pulled.returncode == 0, pulled.stderr
        made.until(
            lambda: all(
                (m.status() or {"model": {}})["model"].get("phase") == "serving"
                and members(m.status()) == sorted(NAMES[:2])
                for m in machines
            ),
            60, "both serve",
        )  # fmt: skip
        answers = set()
        for machine in machines:
            layers = [p["layers"] for p in machine.status()["peers"]]
            assert sorted(layers) == [[], [[0, 30]]]
            done = machine.run(sys.executable, "-c", CLIENT)
            assert done.returncode == 0, f"{machine.name}: {done.stderr}\n{made.story()}"
            answers.add(done.stdout)
        assert len(answers) == 1


async def answer_of_one_context(grown: Grown) -> str:
    """What one ordinary llama.cpp context answers to the same prompt."""
    (stored,) = Store(home := grown.world.machines[NAMES[0]].home).models()
    head: Path = Store(home).folder(stored.digest) / "head.gguf"
    text = await Text.open("llama_cpp", head)
    try:
        chat = [{"role": "user", "content": QUESTION}]
        ids = await text.ids_of_chat(chat, context_tokens=2048)
        with PlainLlama(smollm2(), cells=2048, batch=512) as whole:
            answer = whole.greedy(ids, TOKENS, 512)
        ends = [i for i, token in enumerate(answer) if token in text.ends]
        kept = answer[: ends[0]] if ends else answer
        return b"".join(text.pieces[token] for token in kept).decode()
    finally:
        await text.close()
