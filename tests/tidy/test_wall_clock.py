"""Only what must know the date asks for it: seconds are counted on a clock that nobody sets."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.tidy.source import name, none, python_files, tree

# Dates that are shown to people and clients, and a number that grows from one start to the next.
MAY_KNOW = {
    "peer/api/openai.py",  # `created` of an answer
    "peer/models/store.py",  # when a model was pulled
    "peer/models/template.py",  # what day it is, for chat templates that tell the model
    "peer/planning/verified.py",  # when an engine was proven
    "peer/words/bench.py",  # the day of a measurement
    "peer/cluster/identity.py",  # the incarnation, where its file was lost
}
DATES = {"time": {"time", "time_ns", "ctime", "gmtime", "localtime", "strftime"}}
OF_CLASSES = {"now", "utcnow", "today", "fromtimestamp"}


def asks(path: Path) -> Iterator[tuple[int, str]]:
    """(line, what) of everything in a file that asks for the date."""
    for item in ast.walk(tree(path)):
        match item:
            case ast.Attribute(value=ast.Name(id=("time" | "datetime" | "date") as of), attr=what):
                if what in (DATES["time"] if of == "time" else OF_CLASSES):
                    yield item.lineno, f"{of}.{what}"
            case ast.ImportFrom(module="time", names=names):
                for alias in names:
                    if alias.name in DATES["time"]:
                        yield item.lineno, f"time.{alias.name}"
            case _:
                pass


def test_only_a_few_modules_know_the_date() -> None:
    none(
        f"{name(path)}:{line}: {what} jumps when somebody sets the clock; time.monotonic() does not"
        for path in python_files("peer", "backends")
        if name(path) not in MAY_KNOW
        for line, what in asks(path)
    )


def test_those_that_may_know_it_do() -> None:
    paths = {name(path): path for path in python_files("peer", "backends")}
    none(f"{at} asks for no date (any more)" for at in MAY_KNOW if not [*asks(paths[at])])
