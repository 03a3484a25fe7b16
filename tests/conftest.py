"""What every test gets without asking: a loop that may not block, and nothing left behind.

After each test no thread, task, process or socket that it started may be alive, and an async test
fails where code of `peer` blocks its event loop (blockbuster). `--rewrite` lets golden files be
written anew; read the difference before committing it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from types import FrameType

import hypothesis
import psutil
import pytest
import pytest_asyncio
from blockbuster import BlockBuster

TESTS = f"{Path(__file__).parent}/"
PEER = f"{Path(__file__).parents[1] / 'peer'}/"
COROUTINE = inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
LEFT_BEHIND_S = 3.0  # for what a test stopped to really end; more is a leak


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rewrite", action="store_true", help="write golden files anew")


# The same cases in every run, however slow the machine: a commit is good or it is not. To look for
# new ones: pytest --hypothesis-profile=explore
hypothesis.settings.register_profile(
    "same",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=5000, database=None)
hypothesis.settings.load_profile("same")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "blocks(why): this async test's code may block the loop, for this reason"
    )


@pytest.fixture
def rewrite(request: pytest.FixtureRequest) -> bool:
    """Whether golden files are to be written instead of compared."""
    return bool(request.config.getoption("--rewrite"))


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The top of the checkout."""
    return Path(__file__).parents[1]


Until = Callable[[Callable[[], object], float, str], Awaitable[None]]


@pytest.fixture
def until() -> Until:
    """`await until(lambda: link.up, 5, "the link is up")`: wait for a condition, not for a time."""

    async def wait(condition: Callable[[], object], within_s: float, what: str) -> None:
        deadline = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < deadline, f"not within {within_s:g} s: {what}"
            await asyncio.sleep(0.005)

    return wait


Alive = tuple[set[threading.Thread], set[psutil.Process], set[str]]
before_it: pytest.StashKey[Alive] = pytest.StashKey()


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> None:
    """Remembers what is alive before the test, for the check after its last fixture ended."""
    request.node.stash[before_it] = (set(threading.enumerate()), _children(), _sockets())
    if _is_async(request):
        request.getfixturevalue("no_task_left_behind")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """Fails a test that leaves a thread, a process or a socket, loop and fixtures closed."""
    yield
    if before_it not in item.stash:
        return  # skipped before it began
    threads, processes, sockets = item.stash[before_it]
    deadline = time.monotonic() + LEFT_BEHIND_S
    left = []
    for thread in set(threading.enumerate()) - threads:
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            left.append(f"thread {thread.name}")
    _, alive = psutil.wait_procs(_children() - processes, max(0.0, deadline - time.monotonic()))
    left += [f"process {process.pid} {_words(process)}" for process in alive]
    for process in alive:
        process.kill()
    psutil.wait_procs(alive, LEFT_BEHIND_S)
    if _sockets() - sockets:
        gc.collect()  # one that only a reference cycle still holds says so itself: ResourceWarning
        left += sorted(_sockets() - sockets)
    assert not left, f"left behind by this test: {', '.join(left)}"


@pytest_asyncio.fixture
async def no_task_left_behind() -> AsyncIterator[None]:
    """Fails an async test that leaves a task on its loop."""
    before = asyncio.all_tasks()
    yield
    left = asyncio.all_tasks() - before - {asyncio.current_task()}
    if left:
        await asyncio.wait(left, timeout=0.5)  # cancelled ones may take a turn of the loop to end
    left = {task for task in left if not task.done()}
    assert not left, f"left behind by this test: {', '.join(map(str, left))}"


def _is_async(request: pytest.FixtureRequest) -> bool:
    return inspect.iscoroutinefunction(getattr(request, "function", None))


@pytest.fixture(autouse=True)
def no_blocking(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails an async test in which code of `peer` blocks the event loop."""
    allowed = request.node.get_closest_marker("blocks")
    if allowed or not _is_async(request):
        assert not allowed or allowed.args, "the mark `blocks` says why"
        yield
        return
    watch = BlockBuster("peer")
    for function in watch.functions.values():
        function.can_block_predicate = _or_by_a_test(function.can_block_predicate)
    watch.activate()
    yield
    watch.deactivate()


def _or_by_a_test(allowed: Callable[..., bool]) -> Callable[..., bool]:
    """What blockbuster allows, and what a test itself calls: its preparations may block.

    Going outwards from the blocking call, whoever comes first decides: a coroutine of `peer` (it
    may not), or a function of the tests (it may). A callback on the loop meets neither.
    """

    def predicate(*args: object, **kwargs: object) -> bool:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            if code.co_filename.startswith(PEER) and code.co_flags & COROUTINE:
                break
            if code.co_filename.startswith(TESTS) and code.co_filename != __file__:
                return True
            frame = frame.f_back
        return allowed(*args, **kwargs)

    return predicate


kept: set[int] = set()
"""Ids of processes that a fixture of a wider scope starts and ends, also during a test; whatever
these start is theirs to end."""


def _children() -> set[psutil.Process]:
    theirs: set[psutil.Process] = set()
    for pid in kept:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            theirs |= {process, *process.children(recursive=True)}
    return set(psutil.Process().children(recursive=True)) - theirs


def _words(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _sockets() -> set[str]:
    """This process's open sockets, where the system shows them (Linux); named by inode."""
    found = set()
    for entry in ("/proc/self/fd/" + fd for fd in _listing()):
        try:
            target = os.readlink(entry)  # noqa: PTH115 - thousands of times, so without Path
        except OSError:
            continue
        if target.startswith("socket:"):
            found.add(target)
    return found


def _listing() -> list[str]:
    try:
        return os.listdir("/proc/self/fd")  # noqa: PTH208
    except OSError:
        return []
