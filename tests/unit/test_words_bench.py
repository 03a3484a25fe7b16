"""`halka bench`: what it reckons, what it hears, the table, and the process beside the ring."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

from peer import cli
from peer.api import requests
from peer.bench.orders import Ask, Open, Opened, whole
from peer.bench.reference import Reference
from peer.errors import BackendError, CommandError
from peer.models.imports import import_gguf
from peer.models.store import Store
from peer.planning.plan import Plan
from peer.protocol import Sampling
from peer.words import bench_figures as figures
from peer.words import bench_results as results
from peer.words.agent import Agent
from peer.words.bench_ask import ask
from peer.words.bench_figures import Heard
from peer.words.screen import Screen
from tests import fake_models
from tests.agent_double import DONE, AgentDouble, Write, a_status, event, piece, usage
from tests.e2e.rings import plan_of


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*os.environ]:
        if name.startswith("HALKA_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HALKA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HALKA_HTTP", "127.0.0.1:0")


@pytest.fixture
def double(tmp_path: Path) -> Iterator[AgentDouble]:
    with AgentDouble(**{"/halka/status": a_status()}) as made:
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / "http").write_text(made.http)
        yield made


# Figures ------------------------------------------------------------------------------------------


def test_prompts_do_not_begin_alike() -> None:
    texts = [figures.prose(seed, 40) for seed in range(200)]
    assert len({text[:24] for text in texts}) == 200
    assert all(len(text.split()) == 40 for text in texts)
    assert figures.prose(3, 40) == texts[3], "the same seed is the same text"


def steady(first_s: float, every_s: float, pieces: int, tokens: int = 0) -> Heard:
    """An answer that was asked for at 0 and comes evenly."""
    at = [first_s + i * every_s for i in range(pieces)]
    return Heard(0.0, at[-1], at, tokens or pieces, 10)


def test_a_rate_is_told_of_the_time_in_which_most_answers_ran() -> None:
    # Both run from 2 s to 3 s, 10 tokens a second each; the rest is one of them alone.
    together, rate = figures.peak([steady(0.0, 0.1, 31), steady(2.0, 0.1, 31)])
    assert (together, round(rate, 6)) == (2, 20.0)


def test_reading_a_prompt_before_all_run_does_not_count() -> None:
    # The second one's first token comes after 5 s, during which the first one got nothing.
    first = Heard(0.0, 6.0, [0.5, 5.0, 5.25, 5.5, 5.75, 6.0], 6, 10)
    second = Heard(0.0, 6.0, [5.0, 5.25, 5.5, 5.75, 6.0], 5, 10)
    assert figures.peak([first, second]) == (2, 8.0)


def test_pieces_of_several_tokens_count_as_so_many() -> None:
    answer = steady(1.0, 0.5, 5, tokens=13)  # three tokens in each piece after the first
    assert figures.peak([answer]) == (1, 6.0)
    assert answer.tpot_s == pytest.approx(2.0 / 12)
    assert answer.ttft_s == 1.0


def test_an_answer_that_ended_early_does_not_make_the_others_look_faster() -> None:
    both = [steady(0.0, 0.1, 11), steady(0.0, 0.1, 3)]
    assert figures.peak(both)[1] == pytest.approx(20.0)
    assert figures.peak([both[0]])[1] == pytest.approx(10.0)


def test_nothing_is_reckoned_of_nothing() -> None:
    assert figures.peak([]) == (0, 0.0)
    assert figures.peak([Heard(0.0, 1.0, [0.5], 1, 3)]) == (0, 0.0)
    assert (figures.share([], 0.95), figures.middle([]), figures.over(1.0, 0.0)) == (0.0, 0.0, 0.0)
    assert Heard().tpot_s == Heard().ttft_s == 0.0


def test_a_share_is_a_value_that_was_seen() -> None:
    values = [float(i) for i in range(1, 21)]
    assert figures.share(values, 0.95) == 19.0
    assert figures.share(values, 1.0) == 20.0
    assert figures.share([7.0], 0.95) == 7.0


# Asking -------------------------------------------------------------------------------------------


def text(word: str, finish: str | None = None) -> bytes:
    """A piece of a completion."""
    return event({"choices": [{"index": 0, "text": word, "finish_reason": finish}]})


def test_answers_are_heard_with_the_agents_own_count(double: AgentDouble) -> None:
    def stream(write: Write) -> None:
        write(text("one ") + text("two ") + text("three"))
        write(text("", "length") + usage(7, 5) + DONE)

    double.stream = stream
    heard = ask(Agent(), "/v1/completions", [{"prompt": str(i)} for i in range(3)], 30)
    assert sorted(str(asked["prompt"]) for asked in double.asked) == ["0", "1", "2"]
    for one in heard:
        assert (one.count, one.prompt_tokens, len(one.at_s), one.text) == (5, 7, 3, "one two three")
        assert (one.finish, one.cut, one.why) == ("length", False, "")
        assert one.asked_s < one.at_s[0] <= one.at_s[-1] <= one.ended_s


def test_answers_whose_time_is_over_are_ended_and_counted_by_their_pieces(
    double: AgentDouble,
) -> None:
    def stream(write: Write) -> None:
        write(piece("one "))
        write(piece("two "))
        while not double.gone.is_set():
            write(b": still here\n\n")
            double.gone.wait(0.01)

    double.stream = stream
    (heard,) = ask(Agent(), "/v1/chat/completions", [{}], 0.5)
    assert (heard.cut, heard.why, heard.count, heard.text) == (True, "", 2, "one two ")
    assert double.gone.wait(10), "the agent is told that nobody listens"


def test_one_answer_that_fails_is_said_and_the_others_count(double: AgentDouble) -> None:
    turn = threading.Lock()
    served: list[int] = []

    def stream(write: Write) -> None:
        with turn:
            served.append(1)
            first = len(served) == 1
        if first:
            write(event({"error": {"message": "the ring broke"}}))
        else:
            write(text("fine") + text("", "length") + usage(1, 1) + DONE)

    double.stream = stream
    heard = ask(Agent(), "/v1/completions", [{}, {}], 30)
    assert sorted(one.why for one in heard) == ["", "the ring broke"]


def test_where_all_fail_the_agents_reason_is_told(double: AgentDouble) -> None:
    double.refusal = (503, {"error": {"message": "no plan now"}})
    with pytest.raises(CommandError, match="no plan now"):
        ask(Agent(), "/v1/completions", [{}, {}], 30)


def test_without_an_agent_or_a_model_it_says_so(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["bench"]) == 3
    assert "halka is not running" in capsys.readouterr().err
    with AgentDouble(**{"/halka/status": a_status(model={"why": ""})}) as bare:
        assert cli.main(["bench", "--http", bare.http]) == 4
    assert "halka pull smollm2" in capsys.readouterr().err


def test_end_tokens_need_not_end_an_answer() -> None:
    wish = requests.completion({"prompt": "x", "ignore_eos": True})
    assert wish.common.endless
    assert not requests.completion({"prompt": "x"}).common.endless


# The table ----------------------------------------------------------------------------------------

SETUP = results.Setup(
    "2026-03-04", "0.1.0", "abc1234", "4 x CPU",
    (results.Machine("desk", "linux", 4, 16 << 30, ("CPU",), "0.1.0", ((0, 15),)),
     results.Machine("attic\x1b[31m", "macos", 8, 8 << 30, ("M1",), "0.1.0", ((15, 30),))),
    "smollm2", "0" * 64, 30, 2048, "1.2", 8, "q8_0", "on", "auto",
)  # fmt: skip
FOUND = results.Results(
    SETUP,
    results.Alone(True, 2, 1 << 28, backend="mlx"),
    results.Beside(64, 158.0, 166.0, 0.952, (158.0,), (166.0,)),
    results.Beside(1500, 480.0, 260.0, 1.846, (480.0,), (260.0,)),
    (results.Many(8, 8, 0.5, 0.9, 0.03, 400, 290.0, 250.0, 160.0, 1.81),
     results.Many(32, 8, 2.5, 3.9, 0.03, 1600, 290.0, 270.0, 160.0, 1.81, 2, 1, "the ring broke")),
    results.Reuse(1500, 3.0, 0.21, 0.07, 1490),
    results.Drafts(96, 0.003, 120, 90),
    (results.StageTimes("desk", ((0, 15),), 0.0029, 0.0031, 0.0001, 0.0019),),
    0.12, 0.0063, 40, 4,
)  # fmt: skip


def test_the_table_has_every_figure_and_names_what_was_measured() -> None:
    table = "\n".join(results.lines(FOUND, Screen()))
    words = " ".join(table.split())
    for wanted in (
        "smollm2", "2026-03-04", "0.1.0 (abc1234)", "KV q8_0", "flash attention on", "4 x CPU",
        "0.95", "1.85", "1.81", "TTFT 120 ms", "2 answers of 32 failed: the ring broke",
        "on this machine (MLX, 2 threads)",
        "1 answer cut", "x0.07", "1490 tokens were in the KV cache",
        "90 of 120 drafted tokens were right (75%)", "4 of 40 drafted", "3.1 ms",
    ):  # fmt: skip
        assert wanted in words, wanted
    assert "\x1b" not in table
    assert all(len(line) <= 80 for line in table.splitlines())


def test_a_screen_without_unicode_gets_none() -> None:
    assert "\n".join(results.lines(FOUND, Screen(unicode=False))).isascii()


def test_where_the_model_cannot_run_alone_the_table_says_why() -> None:
    why, mend = "this machine lacks 12 of the model's parts", "halka pull smollm2, on this machine"
    setup = msgspec.structs.replace(SETUP, busy=3, quick=True)
    alone = results.Alone(False, why=why, mend=mend)
    found = msgspec.structs.replace(FOUND, setup=setup, alone=alone)
    table = " ".join("\n".join(results.lines(found, Screen())).split())
    assert why in table
    assert mend in table
    assert "busy with 3 other answers" in table
    assert "rough numbers" in table
    assert "ratio" not in table


# The whole model in one process -------------------------------------------------------------------


class Stored:
    """A fake model in a store."""

    def __init__(self, home: Path) -> None:
        self.file = fake_models.write(home / "fake.gguf", end_every=0)
        store = Store(home)
        manifest = import_gguf(self.file, store)
        self.folder = store.folder(manifest.digest)
        self.plan: Plan = plan_of(store, manifest, (4, 8), "fake")

    def order(self, slots: int = 4) -> Open:
        """To load all of it."""
        of = whole(self.plan, self.plan.ring[1], slots=slots, kv_cells=512, gpu_layers=0)
        return Open(of, str(self.folder), 1)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    return Stored(tmp_path_factory.mktemp("home"))


def test_one_window_holds_all_layers_of_the_same_engine(stored: Stored) -> None:
    (window,) = stored.order().plan.split.windows
    assert (window.first, window.last, window.backend) == (0, stored.plan.shape.layers, "fake")
    assert stored.order().plan.split.context == 512, "no longer than there are KV cells"


def test_one_process_gives_the_models_answers_and_their_times(stored: Stored) -> None:
    prompts = (tuple(b"one ring"), tuple(b"to find them"), tuple(b"x"))
    with Reference() as reference:
        assert isinstance(reference.open(stored.order()), Opened)
        took = reference.ask(Ask(prompts, 12, chunk=5, group=2))
        assert took.prompt_tokens == tuple(map(len, prompts))
        assert (len(took.read_s), len(took.steps_s)) == (3, 11)
        assert min(*took.read_s, *took.steps_s) > 0
        assert [list(answer) for answer in took.answers] == [
            fake_models.truth(stored.file, prompt, 12) for prompt in prompts
        ]
        again = reference.ask(Ask(prompts[:1], 12, chunk=512))
        assert again.answers[0] == took.answers[0], "slots are empty again, chunks change nothing"
        told = reference.ask(Ask(("words",), 2, chunk=512, sampling=Sampling(seed=4)))
        assert told.prompt_tokens == (1 + len("words"),), "what the model wants first, and the text"
    assert not psutil.pid_exists(reference.pid)


def test_what_cannot_be_is_refused_with_a_reason_and_the_process_goes_on(stored: Stored) -> None:
    with Reference() as reference:
        with pytest.raises(BackendError, match="no model is loaded"):
            reference.ask(Ask(("a",), 1, 8))
        reference.open(stored.order(slots=2))
        with pytest.raises(BackendError, match=r"3 answers of \d+ tokens together have no room"):
            reference.ask(Ask(("a", "b", "c"), 4, 8))
        with pytest.raises(BackendError, match="no room"):
            reference.ask(Ask(("a",), 4000, 8))
        assert len(reference.ask(Ask(("a",), 4, 8)).answers[0]) == 4


def test_time_that_is_over_ends_an_answer(stored: Stored) -> None:
    with Reference() as reference:
        reference.open(stored.order())
        assert len(reference.ask(Ask(("a",), 400, 8, limit_s=0.0)).answers[0]) == 1


def test_a_process_that_dies_is_told_with_how(stored: Stored) -> None:
    with Reference() as reference:
        reference.open(stored.order())
        os.kill(reference.pid, signal.SIGKILL)
        with pytest.raises(BackendError, match="was ended by signal 9"):
            reference.ask(Ask(("a",), 4, 8))


def test_an_interrupted_user_leaves_no_process(stored: Stored) -> None:
    reference = Reference()

    def interrupted() -> None:
        with reference:
            reference.open(stored.order())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not psutil.pid_exists(reference.pid)
