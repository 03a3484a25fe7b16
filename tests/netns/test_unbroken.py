"""An answer on the screen goes on, whatever is unplugged: four machines, the real model, and the
`openai` client, which sees nothing but a pause.

Some of the matrix of faults, places and moments; `python -m tests.bench.pause` runs all of it. What
came is compared with one plain llama.cpp context that is started anew where the answer went on.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from peer.protocol import Sampling
from tests.netns.stream import Reader, Stream
from tests.netns.truth import GREEDY, Truth, truth
from tests.netns.unbroken import NAMES, QUESTION, SILENT, Case, Home, Seen, home, starts
from tests.netns.world import members

pytestmark = [pytest.mark.llama, pytest.mark.timeout(300)]

TOKENS = 80
PAUSE_MAX_S = 20.0  # on a machine that others use, too; the benchmark measures
DRAWN = Sampling(temperature=0.8, seed=20)
QUESTIONS = [f"What would a river tell of its way to the sea, in {n} sentences?" for n in range(8)]
EACH = 24  # tokens, of many answers at once
CASES = [
    (Case("kill -9 of the agent", "head", 5), GREEDY),
    (Case("kill -9 of its stage", "tail", 40), DRAWN),
    (Case("SIGSTOP", "coordinator", 40), GREEDY),
    (Case("all it sends is lost", "middle", 20), GREEDY),
]


@pytest.fixture(autouse=True)
def nothing_left_behind() -> None:
    """The agents outlive a test and start stages in it; that they leave none is seen at the end
    of their world."""


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """Four machines that serve, each with the whole model."""
    with home(tmp_path_factory.mktemp("four")) as made:
        yield made


@pytest.fixture(scope="module")
def one(four: Home) -> Iterator[Truth]:
    """What they should say."""
    (head,) = (four.machine(NAMES[0]).home / "models").glob("*/head.gguf")
    with truth(head, [QUESTION, *QUESTIONS]) as made:
        yield made


@pytest.fixture(autouse=True)
def whole(request: pytest.FixtureRequest) -> None:
    """Every test of the four begins with all of them."""
    if "four" in request.fixturenames:
        request.getfixturevalue("four").mend()


def chunk(of: Home, name: str = NAMES[0]) -> int:
    """How many tokens of a prompt the ring reads at once."""
    split = of.machine(name).get("/halka/plan")["split"]
    return int(split["chunk_tokens"] or split["batch_tokens"])


def ended_well(reader: Reader, story: str) -> None:
    """As any answer does; story: told where it did not."""
    assert not reader.error, f"{reader.error}\n{story}"
    assert reader.finish == "length", story
    assert reader.tokens == TOKENS, story


def told(seen: Seen) -> str:
    """Of a case, for a failure's reader."""
    lines = (f"{line.at_s - seen.fault_s:6.2f} {line.machine} {line.text}" for line in seen.lines)
    return "\n".join([f"{seen.case}: {seen.victim}, asked at {seen.entry}", *lines])


@pytest.mark.parametrize(
    ("case", "drawn"), CASES, ids=[f"{case}{', drawn' * (s == DRAWN)}" for case, s in CASES]
)
def test_the_answer_goes_on_as_if_it_had_begun_there(
    four: Home, one: Truth, case: Case, drawn: Sampling
) -> None:
    seen = four.run(case, tokens=TOKENS, temperature=drawn.temperature, seed=drawn.seed)
    ended_well(seen.reader, told(seen))
    assert seen.starts, told(seen)
    assert seen.starts[-1] >= case.after
    assert seen.pause[0] < PAUSE_MAX_S
    expected = one.story(QUESTION, TOKENS, chunk(four, seen.entry), seen.starts, drawn)
    assert seen.reader.text == expected, told(seen)
    if case.fault in SILENT:
        assert seen.victim not in members(four.machine(seen.entry).status())


def test_eight_answers_at_two_peers_go_on_at_once(four: Home, one: Truth) -> None:
    victim = four.at("middle")
    entries = [four.machine(name) for name in NAMES if name != victim.name][:2]
    marks = {name: len(m.log()) for name, m in four.world.machines.items()}
    with ExitStack() as asked:
        streams = {
            question: asked.enter_context(Stream(entries[i % 2], question, max_tokens=EACH))
            for i, question in enumerate(QUESTIONS)
        }
        four.world.until(lambda: all(s.text for s in streams.values()), 60, "all eight flow")
        victim.unplug()
        four.world.until(lambda: all(s.ended for s in streams.values()), 60, "all eight are over")
    lines = four.lines(marks)
    assert sum(len(starts(lines, entry)) for entry in entries) >= len(QUESTIONS)
    for question, stream in streams.items():
        assert not stream.error, four.world.story()
        assert stream.clean
        wrong = one.differs(question, stream.text, EACH, chunk(four, entries[0].name))
        assert not wrong, f"{question} {stream.text}: {wrong}"


def test_the_only_holder_of_the_model_is_waited_for_and_once_there_are_spare_parts_done_without(
    tmp_path: Path,
) -> None:
    with home(tmp_path, ["oak"], spare="off") as few:
        oak, elm = few.machine("oak"), few.machine("elm")
        (head,) = (oak.home / "models").glob("*/head.gguf")
        kept = Path(shutil.copy(head, tmp_path / "head.gguf"))
        with truth(kept, [QUESTION]) as one:
            before = {name: len(m.log()) for name, m in few.world.machines.items()}
            with few.ask(elm, tokens=TOKENS) as reader:
                reader.wait(10, 40)
                oak.kill()
                few.world.until(
                    lambda: members(elm.status() or {"peers": ()}) == ["ash", "elm", "fir"],
                    20, "the only holder is gone",
                )  # fmt: skip
                few.mend()
                few.world.until(lambda: reader.ended, 60, "the answer is over")
            found = starts(few.lines(before), elm)
            ended_well(reader, few.world.story())
            assert found
            assert reader.text == one.story(QUESTION, TOKENS, chunk(few), found)

            few.restart(spare="auto")
            few.world.until(lambda: survives(few), 60, "spare parts make the loss of each survived")
            case = Case("kill -9 of both", "", 10)
            seen = few.run(case, victim=oak, tokens=TOKENS)
            ended_well(seen.reader, told(seen))
            assert seen.starts
            assert seen.reader.text == one.story(QUESTION, TOKENS, chunk(few, "elm"), seen.starts)
            assert "oak" not in members(elm.status())


def survives(few: Home) -> bool:
    """Whether every peer says that the loss of any one would be survived without a transfer."""
    for name in NAMES:
        losses = few.machine(name).status().get("losses", ())
        if {loss["outcome"] for loss in losses} != {"fine"}:
            return False
    return True
