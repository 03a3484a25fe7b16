"""The checkout as the tidy tests see it: files, syntax trees, complaints with file and line."""

from __future__ import annotations

import ast
import functools
import subprocess
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("peer", "backends")
FOLDERS = (*PACKAGES, "tests", "install")


@functools.cache
def files() -> tuple[Path, ...]:
    """Every file of the project: tracked, and new ones that git does not ignore."""
    if (ROOT / ".git").exists():
        git = ["git", "-c", "safe.directory=*"]  # a checkout of another account's is fine
        kinds = ["--cached", "--others", "--exclude-standard", "-z"]
        listed = subprocess.run(
            [*git, "ls-files", *kinds], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        names = (name for name in listed.split("\0") if name)
        return tuple(sorted(path for name in names if (path := ROOT / name).is_file()))
    skipped = {"__pycache__", "build", "dist"}  # an unpacked archive
    return tuple(
        sorted(
            path
            for path in ROOT.rglob("*")
            if path.is_file()
            and not any(p in skipped or p.startswith(".") for p in path.relative_to(ROOT).parts)
        )
    )


def python_files(*folders: str) -> list[Path]:
    """The Python files below these folders of the checkout (all of the project's by default)."""
    tops = [ROOT / folder for folder in folders or FOLDERS]
    return [
        path
        for path in files()
        if path.suffix == ".py" and any(path.is_relative_to(top) for top in tops)
    ]


@functools.cache
def text(path: Path) -> str:
    """A file's text."""
    return path.read_text(encoding="utf-8")


@functools.cache
def tree(path: Path) -> ast.Module:
    """A file's syntax tree."""
    return ast.parse(text(path), str(path))


def name(path: Path) -> str:
    """A file as a person would type it, from the top of the checkout."""
    return path.relative_to(ROOT).as_posix()


def module(path: Path) -> str:
    """A file as Python imports it: peer/ring/stage.py → peer.ring.stage."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def imports(path: Path) -> tuple[tuple[int, str], ...]:
    """(line, module) of every import; `from a import b` counts as a.b, for b may be a module.

    Imports inside functions and `import_module("a")` count, too. (Relative ones: ruff TID.)
    """
    found: list[tuple[int, str]] = []
    for item in ast.walk(tree(path)):
        match item:
            case ast.Import():
                found += [(item.lineno, alias.name) for alias in item.names]
            case ast.ImportFrom(module=str(source)):
                found += [(item.lineno, f"{source}.{alias.name}") for alias in item.names]
            case ast.Call(func=called, args=[ast.Constant(value=str(source)), *_]):
                if ast.unparse(called).rpartition(".")[2] == "import_module":
                    found.append((item.lineno, source))
    return tuple(found)


def none(complaints: Iterable[str]) -> None:
    """Fail with all of them, one a line."""
    lines = list(complaints)
    assert not lines, "\n" + "\n".join(lines)
