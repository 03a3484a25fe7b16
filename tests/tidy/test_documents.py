"""What the documents promise: commands that exist, options that are understood, links that lead."""

from __future__ import annotations

import functools
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tidy.source import ROOT, files, name, none, text

DOCUMENTS = [path for path in files() if path.suffix == ".md"]
each = pytest.mark.parametrize("document", DOCUMENTS, ids=name)
NOT_COMMANDS = {"is", "and", "or", "the", "as", "with"}  # "halka is …" in a comment of a block


def commands(document: Path) -> Iterator[tuple[int, list[str]]]:
    """(line, words) of every command in a code block or between `backticks`."""
    in_block = False
    for number, line in enumerate(text(document).splitlines(), 1):
        if line.lstrip().startswith("```"):
            in_block = not in_block
            continue
        for piece in [line] if in_block else re.findall(r"`([^`]+)`", line):
            # A placeholder such as [--peers N] or PATH … stands for what it names.
            for command in re.split(r"&&|;|\|", re.sub(r"[\[\]…]", " ", piece.split("  #")[0])):
                try:
                    words = shlex.split(command.strip().removeprefix("$ "), comments=True)
                except ValueError:
                    continue  # prose with an apostrophe
                while words and (words[0] == "sudo" or re.match(r"[A-Z_]+=", words[0])):
                    words = words[1:]
                if words:
                    yield number, words


@functools.cache
def help_of(*words: str) -> str:
    """What a command says about itself; "" where there is no such command."""
    command = [sys.executable, "-m", "peer"] if words[0] == "halka" else [str(ROOT / words[0])]
    done = subprocess.run(
        [*command, *words[1:], "--help"],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    return done.stdout if done.returncode == 0 else ""


def wrong_with(words: list[str]) -> str:
    """Why this command cannot be typed, or ""."""
    program = words[0].removeprefix("./")
    if program == "halka" and len(words) > 1:
        word = words[1]
        if not word.startswith("-") and (word in NOT_COMMANDS or not re.fullmatch(r"[a-z]+", word)):
            return ""
        asked = ("halka",) if word.startswith("-") else ("halka", word)
    elif re.fullmatch(r"(install|\.ci)/[\w./-]+", program):
        if not (ROOT / program).exists():
            return f"there is no {program}"
        if not program.endswith((".sh", "run")) or program.endswith(("test.sh", "run", "venv.sh")):
            return ""  # pytest's own options; and what is not run by hand
        asked = (program,)
    else:
        return ""
    said = help_of(*asked)
    if not said:
        return f"`{' '.join(asked)} --help` fails"
    for word in words[len(asked) :]:
        option = word.partition("=")[0]
        if re.fullmatch(r"--[a-z-]+", option) and option not in said:
            return f"`{' '.join(asked)}` knows no {option}"
    return ""


def test_the_documents_are_here() -> None:
    assert {"README.md", "peer/README.md", "peer/DECISIONS.md"} <= {name(d) for d in DOCUMENTS}


@each
def test_every_command_in_it_can_be_typed(document: Path) -> None:
    none(
        f"{name(document)}:{line}: {' '.join(words)}: {why}"
        for line, words in commands(document)
        if (why := wrong_with(words))
    )


@each
def test_every_link_in_it_leads_somewhere(document: Path) -> None:
    none(
        f"{name(document)}:{number}: there is no {target}"
        for number, line in enumerate(text(document).splitlines(), 1)
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", line)
        if "://" not in target and not (document.parent / target).exists()
    )


def test_the_readme_shows_the_two_commands_that_a_clone_begins_with() -> None:
    typed = [words[0].removeprefix("./") for _, words in commands(ROOT / "README.md")]
    assert "install/try.sh" in typed
    assert "install/test.sh" in typed


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        (["halka", "status", "--json"], False),
        (["halka", "status", "--yaml"], True),
        (["halka", "dance"], True),
        (["install/install.sh", "--uninstall", "--purge"], False),
        (["install/install.sh", "--sideways"], True),
        (["install/nothing.sh"], True),
        (["git", "clone"], False),
    ],
)
def test_a_command_that_cannot_be_typed_is_noticed(words: list[str], wrong: bool) -> None:
    assert bool(wrong_with(words)) == wrong
