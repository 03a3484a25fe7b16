"""`halka pull`: a model into the store of this machine's agent, with progress."""

from __future__ import annotations

import os
import pwd
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from peer.errors import CommandError
from peer.words.agent import Agent
from peer.words.screen import Screen, count, note, say, size

LINE_PERCENT = 10  # between lines of progress where no terminal is


def command(args: Namespace) -> int:
    """Returns 0. Raises: CommandError, ConfigError, ModelError."""
    agent = Agent(args.home, args.http)
    home, running = _home(agent, given=bool(args.home or os.environ.get("HALKA_HOME")))
    check_writable(home, args.model)
    from peer.models.pull import pull
    from peer.models.store import Store

    name = Screen.of(sys.stderr).clean(Path(args.model).name)[:60]
    with shown(f"pulling {name}") as progress:
        manifest = pull(args.model, Store(home), progress)
    say(
        f"{manifest.model} is here: {count(manifest.layers, 'layer')}, "
        f"{size(manifest.total_bytes)}, in {home / 'models'}"
    )
    if running:
        say("the running agent sees it within seconds and the cluster plans with it: halka status")
    else:
        say("no agent is running on this machine yet; start it: halka run")
    return 0


def _home(agent: Agent, given: bool) -> tuple[Path, bool]:
    """Where to put it: into the home of the agent that runs here, unless another was named."""
    with suppress(CommandError):
        status = agent.status()
        if status.me.home and not given:
            return Path(status.me.home), True
        return agent.settings.home, Path(status.me.home) == agent.settings.home
    return agent.settings.home, False


def check_writable(home: Path, model: str) -> None:
    """Raises CommandError with the command that works, where the home is another user's."""
    nearest = home
    while not _exists(nearest) and nearest != nearest.parent:
        nearest = nearest.parent
    folders = [
        nearest,
        *([home / "models"] if nearest == home and _exists(home / "models") else []),
    ]
    for folder in folders:
        if not os.access(folder, os.W_OK | os.X_OK):
            owner = _owner(folder)
            own = Path(sys.argv[0]).name == "halka"  # its path: sudo may look elsewhere
            command = (shutil.which(sys.argv[0]) if own else None) or "halka"
            name = str(Path(model).resolve()) if Path(model).is_file() else model
            raise CommandError(
                f"{folder} belongs to {owner}: the agent's models are not yours to change",
                f"sudo -u {owner} {command} pull --home {home} {name}",
            )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return True  # inside of a folder that may not be looked into


def _owner(folder: Path) -> str:
    try:
        return pwd.getpwuid(folder.stat().st_uid).pw_name
    except (OSError, KeyError):
        return "halka"


@contextmanager
def shown(text: str) -> Iterator[Callable[[int, int], None]]:
    """A function (done_bytes, total_bytes) that shows progress: a bar on a terminal, else lines."""
    if not sys.stderr.isatty():
        yield _lines(text)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(text, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total or None)


def _lines(text: str) -> Callable[[int, int], None]:
    """A line every ten percent, and at least a second apart."""
    note(text)
    last_percent, last_s = 0, time.monotonic()

    def update(done: int, total: int) -> None:
        nonlocal last_percent, last_s
        percent = done * 100 // total if total else 0
        if percent >= last_percent + LINE_PERCENT and time.monotonic() > last_s + 1:
            last_percent, last_s = percent, time.monotonic()
            note(f"{text}: {percent} % of {size(total)}")

    return update
