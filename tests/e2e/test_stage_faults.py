"""Stages that hang, crash, run out of memory or compute nonsense: noticed, named, cleaned up.

Real stage processes with the fake engine, whose faults are switched on by a file while it runs.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from unittest import mock

import psutil
import pytest

from peer import children
from peer.planning.plan import PlanState
from peer.protocol import StageNews, Tokens, Unanswered
from peer.ring import supervisor as supervising
from peer.ring.lease import Bounds
from peer.ring.supervisor import Supervisor
from tests import fake_models
from tests.conftest import Until
from tests.e2e import limited
from tests.e2e.stages import Model, Stages, Switch, stages
from tests.plans import PEERS

PROMPT = [256, *b"What is a ring?"]
LONG = [256, *range(200)]  # long enough for a stage to tell what a row takes
POISON = 222
NOTICED_S = 8.0  # a stage that hangs
MIDDLE = PEERS[1]


@pytest.fixture
def switch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Switch:
    return Switch(tmp_path / "fault", monkeypatch)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("model"))


@pytest.fixture
async def ring(model: Model, switch: Switch, until: Until) -> AsyncIterator[Stages]:
    """Three linked stages."""
    async with stages(model, until, 4, 8) as found:
        yield found


# Hung -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["sleep", "SIGSTOP", "SIGSTOP while idle"])
async def test_a_stage_that_stands_still_is_said_to_be_hung_and_ended(
    ring: Stages, switch: Switch, model: Model, until: Until, how: str
) -> None:
    assert await ring.tokens(PROMPT, 5) == fake_models.truth(model.file, PROMPT, 5)
    pid, others = ring.pid(MIDDLE), [ring.pid(PEERS[0]), ring.pid(PEERS[2])]
    if how == "sleep":
        switch.on("sleep")
    else:
        os.kill(pid, signal.SIGSTOP)
    if how != "SIGSTOP while idle":
        await ring.submit(PROMPT, 1000)
    why = await ring.ended(MIDDLE, NOTICED_S, until)
    assert why.startswith("hung: it neither computed nor answered for 5 s")
    assert ("stopped" in why) == (how != "sleep")
    assert not psutil.pid_exists(pid)
    assert all(psutil.pid_exists(other) for other in others), "it took others with it"


async def test_a_stage_that_computes_for_ever_is_hung_once_its_pace_is_known(
    model: Model, switch: Switch, until: Until
) -> None:
    async with stages(model, until, 4, 8, bounds=Bounds(computing_s=3.0)) as ring:
        await ring.tokens(LONG, 3)
        await until(lambda: ring.news[MIDDLE].timed is not None, 10, "it tells its pace")
        switch.on("spin")
        began = time.monotonic()
        await ring.submit(PROMPT, 5)
        why = await ring.ended(MIDDLE, NOTICED_S, until)
        assert why.startswith("hung: it did not answer for 3 s while it seemed to compute")
        assert ring.exits[MIDDLE][1] - began > 2.9


async def test_a_long_honest_step_is_waited_for(model: Model, switch: Switch, until: Until) -> None:
    """Four seconds in one step, where nothing more than one second of silence is suffered."""
    async with stages(model, until, 4, 8, bounds=Bounds(quiet_s=1.0, computing_s=2.0)) as ring:
        switch.on("busy", token=POISON)
        prompt, began = [*PROMPT, POISON], time.monotonic()
        answer = await ring.tokens(prompt, 5)
        assert time.monotonic() - began > 4.0
        assert answer == fake_models.truth(model.file, prompt, 5)
        assert not ring.exits


async def test_one_that_cannot_be_ended_is_reported_all_the_same(
    model: Model, switch: Switch, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the middle of an operation on a dead disk, which the kernel does not interrupt."""
    monkeypatch.setattr(supervising, "_STOP_S", 0.5)
    async with stages(model, until, bounds=Bounds(quiet_s=1.0)) as alone:
        pid = alone.pid(PEERS[0])
        with mock.patch.object(os, "killpg"):
            os.kill(pid, signal.SIGSTOP)
            try:
                assert "hung" in await alone.ended(PEERS[0], 8, until)
                assert psutil.pid_exists(pid)
            finally:
                os.kill(pid, signal.SIGKILL)
        await until(lambda: not psutil.pid_exists(pid), 5, "it is gone in the end")


# Crashed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("crash", ["SIGSEGV", "Fatal Python error: Segmentation fault | in string_at", "at_step"]),
        ("assert", ["SIGABRT", "last words: fake_faults.py:1: GGML_ASSERT(rows > 0) failed"]),
    ],
)
async def test_a_crash_is_told_with_its_last_words(
    ring: Stages, switch: Switch, until: Until, kind: str, words: list[str]
) -> None:
    switch.on(kind)
    await ring.submit(PROMPT, 5)
    why = await ring.ended(MIDDLE, 5, until)
    assert [word for word in words if word not in why] == [], why
    assert str(Path(__file__).parents[2]) not in why


async def test_a_crash_while_loading_is_told_as_such(
    model: Model, switch: Switch, until: Until
) -> None:
    switch.on("load-crash", first=0)
    alone = Stages(model.plan())
    try:
        await alone.begin(PEERS[0], model.folder)
        why = await alone.ended(PEERS[0], 20, until)
        assert why.startswith("its process was ended by SIGSEGV while it loaded; last words: Fatal")
        assert "at_load" in why
        assert not alone.supervisors[PEERS[0]].holds
    finally:
        await alone.close()


async def test_a_crashed_stage_leaves_no_core_file(ring: Stages) -> None:
    """Gigabytes of weights, and everybody's prompts."""
    soft, _ = psutil.Process(ring.pid(MIDDLE)).rlimit(psutil.RLIMIT_CORE)
    assert soft == 0


@pytest.mark.skipif(bool(limited.why_not()), reason=limited.why_not())
async def test_a_stage_that_the_kernel_killed_for_memory_is_told_from_one_that_a_person_killed(
    model: Model, switch: Switch, until: Until
) -> None:
    with limited.group("fill", 300 << 20) as group, limited.stages_in({0: str(group)}):
        async with stages(model, until) as alone:
            switch.on("fill", first=0)
            await alone.submit(PROMPT, 5)
            why = await alone.ended(PEERS[0], 20, until)
        assert why.startswith("its process was killed because memory ran out")
        assert "`memory`" in why
        switch.off()
        async with stages(model, until) as alone:
            os.kill(alone.pid(PEERS[0]), signal.SIGKILL)
            why = await alone.ended(PEERS[0], 5, until)
        assert why == "its process was ended by SIGKILL (by hand, or because memory ran out)"


# Nonsense ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 1, 2], ids=["head", "middle", "tail"])
async def test_a_peer_whose_numbers_are_never_finite_is_blamed_by_the_head(
    ring: Stages, switch: Switch, until: Until, place: int
) -> None:
    broken = PEERS[place]
    switch.on("infinite", first=4 * place)
    for _ in range(3):
        assert not ring.news[PEERS[0]].blamed
        await ring.submit(PROMPT, 5)
        refused = await ring.said()
        assert isinstance(refused, Unanswered)
        assert f"peer {broken} computed numbers that are not finite" in refused.why
    await until(lambda: ring.news[PEERS[0]].blamed == broken, 5, "the peer is blamed")
    assert not ring.exits


async def test_one_poisoned_prompt_beside_a_good_answer_blames_nobody(
    ring: Stages, switch: Switch, model: Model
) -> None:
    switch.on("infinite", token=POISON)
    good, text = await ring.submit(PROMPT, 400), list[int]()
    poisoned = [*PROMPT, POISON]
    asked, refused = await ring.submit(poisoned, 5), 0
    while len(text) < 400:
        match await ring.said():
            case Tokens(request=request, ids=ids) if request == good:
                text += ids
            case Unanswered(request=request) if request == asked:
                refused += 1
                if refused < 6:
                    asked = await ring.submit(poisoned, 5)
            case other:
                raise AssertionError(other)
    assert refused == 6
    assert text == fake_models.truth(model.file, PROMPT, 400)
    assert not ring.news[PEERS[0]].blamed


# Left behind ------------------------------------------------------------------------------------


async def test_thirty_stages_that_die_leave_no_descriptor_task_or_process(
    model: Model, until: Until
) -> None:
    """Killed at once, while they load, when they are ready; and stopped instead."""
    plan, ends, ready = model.plan(), list[str](), list[StageNews]()
    supervisor = Supervisor(lambda _, news: ready.append(news), lambda _, why: ends.append(why))
    me = psutil.Process()

    async def one(i: int) -> None:
        ready.clear()
        before = len(ends)
        await supervisor.start(
            PlanState(plan, "loading"), PEERS[0], model.folder,
            threads=1, step_s=60.0, bind="127.0.0.1", admitted=(),
        )  # fmt: skip
        pid = supervisor.pids()[plan.id]
        if i % 3:
            phases = ["", "loading", "ready"][i % 3 :][:1]
            await until(lambda: phases[0] in [n.phase for n in ready], 20, "it is so far")
        if i % 5 == 4:
            supervisor.stop(plan.id)
        else:
            os.kill(pid, signal.SIGKILL)
            await until(lambda: len(ends) > before, 5, "its end is told")
        await until(lambda: not supervisor.holds, 5, "it is gone")
        assert not psutil.pid_exists(pid)

    await one(0)  # what is made once: threads, watchers
    tasks, descriptors = len(asyncio.all_tasks()), me.num_fds()
    for i in range(1, 31):
        await one(i)
    await until(lambda: len(asyncio.all_tasks()) <= tasks, 2, "all tasks ended")
    await until(lambda: me.num_fds() <= descriptors, 2, "all descriptors are closed")
    assert me.children() == []
    await supervisor.close()


async def test_the_end_of_a_stage_is_seen_though_its_child_holds_its_pipes(
    model: Model, until: Until
) -> None:
    """Some engines start a debugger when they crash; it must not outlive the stage."""
    code = (
        "import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', "
        "'import time; time.sleep(1000)']); print(child.pid, file=sys.stderr, flush=True)"
    )
    alone = Stages(model.plan())
    with mock.patch.object(children, "command", return_value=(sys.executable, "-c", code)):
        await alone.begin(PEERS[0], model.folder)
    why = await alone.ended(PEERS[0], 5, until)
    assert "code 0 while it loaded" in why
    left = int(why.rpartition(" ")[2])
    await until(lambda: not _runs(left), 2, "its child is gone")
    await alone.close()


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
