"""Who may import whom: the rooms of the house, read from the syntax trees (design, section 4)."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tidy.source import ROOT, imports, module, name, none, python_files, tree

ROOMS = ("cluster", "planning", "models", "ring", "api")

# Values, messages, settings, errors: free to all.
FREE = {
    "peer", "peer.errors", "peer.protocol", "peer.config",
    "peer.planning.profile", "peer.planning.plan",
}  # fmt: skip

# Decisions without I/O: time and randomness are arguments.
PURE = {
    "peer.cluster.membership", "peer.cluster.membership_events", "peer.cluster.doubts",
    "peer.cluster.election",
    "peer.cluster.probing", "peer.cluster.probing_once", "peer.cluster.ways",
    "peer.planning.plan", "peer.planning.split", "peer.planning.cuts", "peer.planning.rollout",
    "peer.planning.choice", "peer.planning.making", "peer.planning.failures",
    "peer.planning.running", "peer.planning.duty", "peer.planning.costs",
    "peer.planning.tables", "peer.planning.halda", "peer.planning.rings", "peer.planning.subsets",
    "peer.planning.ring_order", "peer.planning.baselines", "peer.planning.counts",
    "peer.planning.trust", "peer.planning.wishes", "peer.planning.reasons",
    "peer.planning.rollout_events", "peer.planning.correction", "peer.planning.abilities",
    "peer.planning.after_loss", "peer.planning.pipeline", "peer.planning.kv",
    "peer.planning.problems",
    "peer.planning.patience", "peer.planning.steadiness", "peer.planning.situation",
    "peer.planning.leaving",
    "peer.planning.outlook", "peer.planning.spares", "peer.planning.foresight",
    "peer.planning.duty_events",
    "peer.ring.paces",
    "peer.ring.tempo", "peer.ring.speculation",
    "peer.ring.scheduler", "peer.ring.scheduler_events", "peer.ring.batching", "peer.ring.slots",
    "peer.ring.generation", "peer.ring.lease", "peer.ring.endings",
    "peer.planning.islands", "peer.planning.together",
    "peer.planning.trials", "peer.planning.drafts", "peer.models.tokenizers",
    "peer.planning.proof",
    "peer.planning.thunderbolt",
}  # fmt: skip
PURE_LATER: set[str] = set()
IMPURE_LIBRARIES = {
    "asyncio", "time", "socket", "os", "logging", "zmq", "zeroconf", "aiohttp", "backends",
    "threading", "subprocess", "psutil",
}  # fmt: skip

# A room's shell that needs another room's, and why nobody can introduce them.
INTRODUCED = {
    # The stage is a process of its own: it opens the files of its windows itself.
    "peer.ring.windows": {"peer.models.manifest", "peer.models.parts"},
    "peer.ring.drafting": {"peer.models.manifest", "peer.models.parts"},
    # So is the measuring: it reads the shape of the model that it measures with.
    "peer.planning.measure": {
        "peer.models.disk",
        "peer.models.manifest",
        "peer.models.parts",
        "peer.models.kinds",
    },
    "peer.planning.random_layers": {
        "peer.models.disk",
        "peer.models.gguf",
        "peer.models.manifest",
        "peer.models.parts",
    },
    "peer.planning.disk": {"peer.models.disk"},
    # A proof runs windows in a process of its own, as a stage does, of models that it makes.
    "peer.planning.verify": {"peer.models.manifest", "peer.models.parts"},
    "peer.planning.proving": {"peer.models.disk"},
    "peer.planning.canary": {"peer.models.manifest"},
    "peer.planning.copies": {
        "peer.models.blocks",
        "peer.models.disk",
        "peer.models.gguf",
        "peer.models.kinds",
        "peer.models.manifest",
    },
    "peer.planning.builtin": {
        "peer.models.blocks",
        "peer.models.gguf",
        "peer.models.imports",
        "peer.models.manifest",
        "peer.models.store",
    },
    # What was measured holds for all models of the same tensors, which only the manifest tells.
    "peer.planning.speeds": {"peer.models.manifest"},
}

# backends: these four open its door, the others name its values.
ENGINE_DOORS = {
    "peer.ring.stage", "peer.planning.measure", "peer.models.vocabulary", "peer.bench.whole",
    "peer.planning.verify",
}  # fmt: skip
ENGINE_VALUES = {
    "peer.models.parts", "peer.models.gguf",  # Header, TensorFact, Recipe
    "peer.ring.windows", "peer.ring.frames", "peer.ring.drafting",  # Window, Batch
    "peer.ring.steps", "peer.ring.tail", "peer.ring.rehearsal",
    "peer.models.kinds", "peer.planning.random_layers", "peer.planning.stopwatch",
    "peer.planning.fits",
}  # fmt: skip

# Libraries, each named in as few files as possible.
LIBRARIES = {
    "zeroconf": {"peer/cluster/mdns.py"},
    "jinja2": {"peer/models/template.py"},
    "zmq": {
        "peer/cluster/transport.py", "peer/cluster/sockets.py", "peer/cluster/identity.py",
        "peer/ring/sockets.py", "peer/ring/pipe.py", "peer/ring/stage.py", "peer/ring/head.py",
        "peer/ring/entry.py", "peer/ring/links.py",
    },
    "aiohttp": {"peer/api/"},
    "rich": {"peer/words/"},
    "llama_cpp": {"backends/llama_cpp/"},
    "mlx": {"backends/mlx/"},
    "mlx_lm": {"backends/mlx/"},
    "pynvml": {"peer/planning/gpus.py"},
    "highspy": {"peer/planning/counts.py"},
    "dbus_fast": {"peer/sleep.py"},
}  # fmt: skip

MODULES = {module(path): path for path in python_files("peer", "backends")}


def ours(imported: str) -> str:
    """The module of the project that `from a import b` means: a.b where that is one, else a."""
    return imported if imported in MODULES else imported.rpartition(".")[0] or imported


def project_imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module of the project) of every import of one."""
    for line, imported in imports(path):
        if imported.partition(".")[0] in ("peer", "backends"):
            yield line, ours(imported)


def room(of: str) -> str:
    """cluster, planning, models, ring, api; "" for what is in no room."""
    parts = of.split(".")
    return parts[1] if parts[0] == "peer" and len(parts) > 1 and parts[1] in ROOMS else ""


def test_the_pure_modules_exist() -> None:
    assert PURE - MODULES.keys() == set(), "renamed? then rename it here, its rules still hold"


@pytest.mark.parametrize("pure", sorted(PURE | PURE_LATER & MODULES.keys()))
def test_decisions_import_nothing_that_acts(pure: str) -> None:
    def complaints() -> Iterator[str]:
        path = MODULES[pure]
        for line, imported in imports(path):
            if imported.partition(".")[0] in IMPURE_LIBRARIES:
                yield f"{name(path)}:{line}: imports {imported}; take what it gives as an argument"
        for line, imported in project_imports(path):
            if imported not in FREE | PURE | PURE_LATER and not is_harmless(imported):
                yield f"{name(path)}:{line}: imports {imported}, which acts; let a shell call both"

    none(complaints())


def is_harmless(of: str, asked: frozenset[str] = frozenset()) -> bool:
    """Whether a module of the project imports nothing that acts, however far one follows it."""
    if of in FREE | {"backends.base"} or of in asked or of not in MODULES:
        return True
    outside = {imported.partition(".")[0] for _, imported in imports(MODULES[of])} - {"backends"}
    return not outside & (IMPURE_LIBRARIES | {"pathlib", "shutil", "tempfile"}) and all(
        is_harmless(further, asked | {of}) for _, further in project_imports(MODULES[of])
    )


def test_rooms_do_not_import_each_others_shells() -> None:
    def complaints() -> Iterator[str]:
        for importer, path in MODULES.items():
            if not room(importer):
                continue
            for line, imported in project_imports(path):
                if room(imported) in ("", room(importer)) or is_harmless(imported):
                    continue
                if room(importer) == "api" and room(imported) == "models":
                    continue
                if imported not in INTRODUCED.get(importer, ()):
                    yield f"{name(path)}:{line}: imports {imported}; daemon.py introduces them"

    none(complaints())


def test_rooms_do_not_import_the_house_around_them() -> None:
    around = {"peer.cli", "peer.daemon", "peer.agent", "peer.report", "peer.notify"}
    none(
        f"{name(path)}:{line}: imports {imported}; what it gives is daemon.py's to hand in"
        for importer, path in MODULES.items()
        if room(importer)
        for line, imported in project_imports(path)
        if imported in around or imported.startswith("peer.words")
    )


def test_engines_know_no_peers() -> None:
    none(
        f"{name(path)}:{line}: imports {imported}; an engine is handed plain values"
        for path in python_files("backends")
        for line, imported in project_imports(path)
        if imported.partition(".")[0] == "peer"
    )


def test_engines_have_one_door() -> None:
    def complaints() -> Iterator[str]:
        for importer, path in MODULES.items():
            for line, imported in project_imports(path):
                if importer.startswith("backends") or not imported.startswith("backends"):
                    continue
                door = imported == "backends" and importer in ENGINE_DOORS
                values = imported == "backends.base" and importer in ENGINE_DOORS | ENGINE_VALUES
                if not door and not values:
                    yield f"{name(path)}:{line}: imports {imported}; ring.stage, planning.measure and models.vocabulary do"  # noqa: E501

    none(complaints())


def test_of_the_engines_only_load_is_called() -> None:
    none(
        f"{name(path)}:{item.lineno}: backends.{item.attr}: the door is backends.load(name)"
        for path in python_files("peer")
        for item in ast.walk(tree(path))
        if isinstance(item, ast.Attribute)
        and isinstance(item.value, ast.Name)
        and item.value.id == "backends"
        and item.attr not in ("load", "base")
    )


@pytest.mark.parametrize("library", sorted(LIBRARIES))
def test_a_library_is_named_in_few_files(library: str) -> None:
    allowed = tuple(sorted(LIBRARIES[library]))
    none(
        f"{name(path)}:{line}: imports {library}; go through {', '.join(allowed)}"
        for path in python_files("peer", "backends", "install")
        for line, imported in imports(path)
        if imported.partition(".")[0] == library and not name(path).startswith(allowed)
    )


@pytest.mark.parametrize("library", ["aiohttp", "jinja2", "rich", "zeroconf", "zmq"])
def test_the_list_of_those_files_is_no_longer_than_it_must_be(library: str) -> None:
    naming = {
        name(path)
        for path in python_files("peer", "backends")
        if any(imported.partition(".")[0] == library for _, imported in imports(path))
    }
    none(
        f"{allowed} does not import {library} (any more): remove it from LIBRARIES"
        for allowed in LIBRARIES[library]
        if not any(file.startswith(allowed) for file in naming)
    )


def test_the_agent_never_imports_an_engine_nor_does_asking_what_one_could_run() -> None:
    program = (
        "import sys, peer.daemon, peer.ring.supervisor, backends\n"
        "from backends.base import Header\n"
        "for name in ('llama_cpp', 'mlx'):\n"
        "    backends.load(name).can_run(Header({'general.architecture': 'llama'}, {}))\n"
        "print([name for name in ('mlx', 'mlx_lm', 'transformers', 'llama_cpp')"
        " if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("typed", [["--help"], ["status", "--help"]], ids=" ".join)
def test_the_command_line_starts_without_anything_heavy(typed: list[str]) -> None:
    """Each of these costs 50 to 200 ms; `halka status` has 200 in all."""
    heavy = ["aiohttp", "zmq", "zeroconf", "numpy", "rich", "jinja2", "msgspec", "llama_cpp",
             "psutil", "asyncio"]  # fmt: skip
    program = (
        "import sys, peer.cli\n"
        f"try: peer.cli.main({typed!r})\n"
        "except SystemExit: pass\n"
        f"print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stderr.strip() == "[]", (
        "import it where it is used (python -X importtime tells by whom)"
    )
    assert "usage" in done.stdout.lower()
