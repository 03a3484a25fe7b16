"""Style as a test: linters and types, sizes, words, and what must not be written at all."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tidy.source import (
    PACKAGES,
    ROOT,
    files,
    imports,
    module,
    name,
    none,
    python_files,
    text,
    tree,
)

FILE_LINES_MAX = 400
FUNCTION_LINES_MAX = 70
# Files that are longer today, each with a limit of its own that only goes down.
LONGER = {
    "peer/models/gguf.py": 411,  # reader and writer of one format
    "tests/unit/test_parts.py": 620,
    "tests/unit/test_rollout.py": 540,  # one machine
    "tests/unit/test_transfer.py": 570,
}
LONGER_SLACK = 40  # lines that such a file may shrink before its limit must follow

TOP_LEVEL = {
    "pyproject.toml", "README.md", "LICENSE",
    "peer", "backends", "tests", "install", "launchd", "systemd",
}  # fmt: skip


def tool(*words: str) -> subprocess.CompletedProcess[str]:
    """Run a tool of the environment that runs this test."""
    return subprocess.run(
        [sys.executable, "-m", *words],
        cwd=ROOT, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


# Tools -------------------------------------------------------------------------------------------


def test_ruff_finds_nothing() -> None:
    done = tool("ruff", "check", "--quiet", "--output-format=concise", ".")
    assert done.returncode == 0, f"\n{done.stdout}\nmend: ruff check --fix ."


def test_everything_is_formatted() -> None:
    done = tool("ruff", "format", "--check", "--quiet", ".")
    assert done.returncode == 0, f"\n{done.stdout}\nmend: ruff format ."


def test_types_hold_strictly() -> None:
    done = tool("mypy", "--strict", *PACKAGES, "install")
    assert done.returncode == 0, f"\n{done.stdout}"


# Sizes -------------------------------------------------------------------------------------------


def test_files_are_short() -> None:
    me = name(Path(__file__))

    def complaints() -> Iterator[str]:
        for path in python_files():
            lines, allowed = text(path).count("\n"), LONGER.get(name(path), FILE_LINES_MAX)
            if lines > allowed:
                yield f"{name(path)}:{lines}: longer than {allowed} lines; a file that needs headings is two"  # noqa: E501
            if name(path) in LONGER and lines < LONGER[name(path)] - LONGER_SLACK:
                yield f"{name(path)}: now {lines} lines; lower its limit in LONGER, {me}"
        for gone in LONGER.keys() - {name(path) for path in python_files()}:
            yield f"{gone}: is gone; remove it from LONGER, {me}"

    none(complaints())


def test_functions_fit_a_screen() -> None:
    def complaints() -> Iterator[str]:
        for path in python_files():
            for item in ast.walk(tree(path)):
                if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef):
                    lines = (item.end_lineno or item.lineno) - item.lineno + 1
                    if lines > FUNCTION_LINES_MAX:
                        yield f"{name(path)}:{item.lineno}: {item.name} has {lines} lines, not ≤ {FUNCTION_LINES_MAX}; split it"  # noqa: E501

    none(complaints())


# Words -------------------------------------------------------------------------------------------


def test_every_file_opens_with_what_it_is() -> None:
    none(
        f"{name(path)}:1: begins without a docstring; one paragraph: what the file is for"
        for path in python_files()
        if text(path).strip() and not ast.get_docstring(tree(path))
    )


WORDS_TO_USE = {
    "node": "peer", "worker": "peer or stage", "master": "coordinator", "leader": "coordinator",
    "session": "term", "epoch": "term",
}  # fmt: skip


def defined_names(item: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, identifier) that this piece of syntax gives a name to."""
    match item:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            yield item.lineno, item.name
        case ast.Name(ctx=ast.Store()):
            yield item.lineno, item.id
        case ast.Attribute(ctx=ast.Store()):
            yield item.lineno, item.attr
        case ast.arg():
            yield item.lineno, item.arg
        case ast.alias(asname=str(given)):
            yield item.lineno, given
        case _:
            pass


def words_in(identifier: str) -> set[str]:
    """lostPeers_seen → lost, peer, seen (plurals as their singular)."""
    parts = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", identifier)
    return {part.lower().removesuffix("s") for part in parts}


def test_things_are_called_by_the_words_of_the_design() -> None:
    def complaints() -> Iterator[str]:
        for path in python_files():
            named = [(1, module(path).rpartition(".")[2])]
            for item in ast.walk(tree(path)):
                named += defined_names(item)
            for line, identifier in named:
                for word in words_in(identifier) & WORDS_TO_USE.keys():
                    yield f"{name(path)}:{line}: `{identifier}`: say {WORDS_TO_USE[word]}"

    none(complaints())


# What must not be written ------------------------------------------------------------------------


def test_nothing_is_left_for_later() -> None:
    marks = [first + second for first, second in (("TO", "DO"), ("FIX", "ME"), ("XX", "X"))]
    marks.append("raise NotImplemented" + "Error")
    found = re.compile(r"\b(" + "|".join(marks) + r")\b")
    none(
        f"{name(path)}:{number}: {match[0]}: do it, or leave it out"
        for path in text_files()
        for number, line in enumerate(text(path).splitlines(), 1)
        if (match := found.search(line))
    )


def test_no_path_of_the_machine_that_wrote_it() -> None:
    home = str(Path.home())
    needles = {f"{ROOT}/", f"{ROOT.parent}/", "/".join(("", "work", ""))}
    needles |= {f"{home}/"} if len(Path(home).parts) > 2 else set()
    needles |= {"/".join(("", place, "pypi")) for place in ("opt",)}
    needles -= {"/", "//", "/tmp/", "/home/", "/Users/"}  # a checkout right below one of these
    none(
        f"{name(path)}:{number}: {needle} exists on one machine only"
        for path in text_files()
        for number, line in enumerate(text(path).splitlines(), 1)
        for needle in needles
        if needle in line
    )


def text_files() -> list[Path]:
    """All but golden files, whose bytes are what they are."""
    return [
        path
        for path in files()
        if not path.is_relative_to(ROOT / "tests/data") and b"\0" not in path.read_bytes()[:4096]
    ]


UNPICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
RUN_TEXT = {"eval", "exec", "os.system", "os.popen", "asyncio.create_subprocess_shell",
            "subprocess.getoutput", "subprocess.getstatusoutput", "torch.load"}  # fmt: skip


def dangers(path: Path) -> Iterator[str]:
    """What would run bytes or text that somebody else wrote."""
    for item in ast.walk(tree(path)):
        if isinstance(item, ast.Import | ast.ImportFrom):
            where = [item.module or ""] if isinstance(item, ast.ImportFrom) else []
            where += [alias.name for alias in item.names]
            for imported in {part.partition(".")[0] for part in where} & UNPICKLERS:
                yield f"{name(path)}:{item.lineno}: {imported} runs what the bytes say; use msgspec"
        elif isinstance(item, ast.Call):
            called = ast.unparse(item.func)
            if called in RUN_TEXT or called.endswith((".recv_pyobj", ".send_pyobj")):
                yield f"{name(path)}:{item.lineno}: {called} runs what the text says; name the call itself"  # noqa: E501
            for keyword in item.keywords:
                if keyword.arg == "shell" and ast.unparse(keyword.value) != "False":
                    yield f"{name(path)}:{item.lineno}: no shell: give the words as a list"
                if keyword.arg == "allow_pickle" and ast.unparse(keyword.value) != "False":
                    yield f"{name(path)}:{item.lineno}: allow_pickle runs what the bytes say"


def test_nothing_is_unpickled_evaluated_or_given_to_a_shell() -> None:
    none(complaint for path in python_files() for complaint in dangers(path))


@pytest.mark.parametrize(
    "line",
    ["import pickle", "from dill import loads", "eval(x)", "subprocess.run(x, shell=True)",
     "socket.recv_pyobj()", "numpy.load(f, allow_pickle=True)", "os.system(x)"],
)  # fmt: skip
def test_a_planted_danger_is_found(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = ROOT / "peer/planted.py"
    monkeypatch.setattr(f"{__name__}.tree", lambda _: ast.parse(line))
    assert list(dangers(planted))


# Tests -------------------------------------------------------------------------------------------

POLLING_MAY_SLEEP = ("tests/netns/", "tests/e2e/", "tests/bench/")  # real time, in a loop that asks


def sleeps(path: Path) -> Iterator[tuple[int, bool]]:
    """(line, whether a loop asks again after it) of every sleep that takes time."""

    def search(item: ast.AST, in_loop: bool) -> Iterator[tuple[int, bool]]:
        if isinstance(item, ast.Call):
            called = ast.unparse(item.func).rpartition(".")[2]
            gives_way = [ast.unparse(argument) for argument in item.args] == ["0"]
            if called == "sleep" and not gives_way:
                yield item.lineno, in_loop
        for child in ast.iter_child_nodes(item):
            yield from search(child, in_loop or isinstance(item, ast.While | ast.For))

    yield from search(tree(path), in_loop=False)


def test_tests_wait_for_conditions_and_not_for_time() -> None:
    def complaints() -> Iterator[str]:
        for path in python_files("tests"):
            if name(path) == "tests/conftest.py":
                continue  # `until` sleeps for all others
            for line, asks_again in sleeps(path):
                if not (asks_again and name(path).startswith(POLLING_MAY_SLEEP)):
                    yield f"{name(path)}:{line}: waits for time to pass; await the condition (fixture `until`)"  # noqa: E501

    none(complaints())


def test_every_skip_says_why() -> None:
    def complaints() -> Iterator[str]:
        for path in python_files("tests"):
            for item in ast.walk(tree(path)):
                if isinstance(item, ast.Attribute) and ast.unparse(item) in (
                    "pytest.mark.skip", "pytest.mark.xfail", "pytest.mark.skipif", "pytest.skip",
                ):  # fmt: skip
                    reasons = [
                        call for call in ast.walk(tree(path))
                        if isinstance(call, ast.Call) and call.func is item
                        and (any(k.arg in ("reason", "msg") for k in call.keywords)
                             or (item.attr == "skip" and call.args))
                    ]  # fmt: skip
                    if not reasons:
                        yield f"{name(path)}:{item.lineno}: {item.attr} without a reason"

    none(complaints())


# The house ---------------------------------------------------------------------------------------


def test_nothing_new_at_the_top() -> None:
    there = {path.relative_to(ROOT).parts[0] for path in files()}
    assert {entry for entry in there if not entry.startswith(".")} == TOP_LEVEL


def test_every_dependency_has_its_reason_beside_it() -> None:
    def complaints() -> Iterator[str]:
        inside, above = False, ""
        for number, line in enumerate(text(ROOT / "pyproject.toml").splitlines(), 1):
            entry = line.strip()
            begins = re.match(r"(dependencies|llama|test|mlx) = \[", entry)
            if begins or inside:
                reason = "#" in entry or above.startswith("#")
                if '"' in entry and not reason:
                    yield f"pyproject.toml:{number}: {entry} needs its reason as a comment"
            inside = bool(begins) or (inside and entry != "]")
            above = entry

    none(complaints())


IMPORTED_AS = {
    "pyzmq": "zmq", "llama-cpp-python": "llama_cpp", "nvidia-ml-py": "pynvml",
    "dbus-fast": "dbus_fast", "mlx-lm": "mlx_lm",
}  # fmt: skip


def test_every_dependency_is_used_and_everything_used_is_one() -> None:
    project = tomllib.loads(text(ROOT / "pyproject.toml"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["llama"], *extras["mlx"]]
    names = [re.split(r"[<>=!~;\[ ]", entry, maxsplit=1)[0] for entry in wanted]
    declared = {IMPORTED_AS.get(entry, entry) for entry in names}
    used = {
        imported.partition(".")[0]
        for path in python_files(*PACKAGES)
        for _, imported in imports(path)
    }
    used -= sys.stdlib_module_names | set(PACKAGES)
    assert used - declared == set(), "imported, but not in pyproject.toml"
    assert declared - used == set(), "in pyproject.toml, but never imported"


@pytest.mark.parametrize("together", [("tidy", "unit", "simulated"), ("e2e",), ("netns",)])
def test_files_of_tests_that_run_together_have_names_of_their_own(
    together: tuple[str, ...],
) -> None:
    """pytest collects no second one, and only says so where it collects both."""
    names = [file.name for kind in together for file in (ROOT / "tests" / kind).glob("test_*.py")]
    none(name for name in set(names) if names.count(name) > 1)
