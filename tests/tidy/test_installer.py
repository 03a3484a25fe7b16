"""The installer on Linux and macOS, for a machine and for an account.

It runs for real on pretended machines (machine.py); one test takes the true Python and pip.
"""

from __future__ import annotations

import os
import platform
import plistlib
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tidy.machine import ROOT, Machine, make_machine, tree


@pytest.fixture(
    params=["system-Linux", "user-Linux", "system-Darwin", "user-Darwin"],
    ids=["a Linux machine", "a Linux account", "a Mac", "a Mac account"],
)
def machine(request: pytest.FixtureRequest, tmp_path: Path) -> Machine:
    """One of the four kinds of installation."""
    return make_machine(tmp_path, *request.param.split("-"))


@pytest.fixture
def linux(tmp_path: Path) -> Machine:
    """A Linux machine, installed to as root."""
    return make_machine(tmp_path, "system", "Linux")


def succeeded(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout


def test_after_it_the_command_exists_and_the_service_runs(machine: Machine) -> None:
    said = succeeded(machine.install())
    assert machine.link.readlink() == machine.venv / "bin/halka"
    assert os.access(machine.link, os.X_OK)
    assert machine.unit.exists()
    running = {
        "system-Linux": "halka.service", "user-Linux": "halka.service",
        "system-Darwin": "system/dev.halka.agent", "user-Darwin": "gui/1000/dev.halka.agent",
    }[f"{machine.mode}-{machine.system}"]  # fmt: skip
    assert machine.remembers("running") == {running}
    assert "runs as a service" in said
    assert "http://127.0.0.1:42552/v1" in said
    assert "halka status" in said
    assert f"--{machine.mode} --uninstall" in said


def test_the_service_starts_the_program_that_was_installed(machine: Machine) -> None:
    succeeded(machine.install())
    program = str(machine.venv / "bin/halka")
    if machine.system == "Darwin":
        job = plistlib.loads(machine.unit.read_bytes())
        assert job["ProgramArguments"] == [program, "run"]
        assert job["EnvironmentVariables"]["HALKA_HOME"] == str(machine.state)
        assert job.get("UserName") == ("_halka" if machine.mode == "system" else None)
        assert (machine.state.stat().st_mode & 0o777) == 0o700
        for key in ("StandardOutPath", "StandardErrorPath"):
            assert Path(job[key]).parent.is_dir()
        return
    text = machine.unit.read_text().replace("%h", str(machine.home))
    assert f"\nExecStart={program} run\n" in text
    assert f"\nEnvironment=HALKA_HOME={machine.state}\n" in text


def test_only_a_service_of_the_machine_gets_an_account(machine: Machine) -> None:
    succeeded(machine.install())
    wanted = {"system-Linux": {"halka"}, "system-Darwin": {"_halka"}}
    assert machine.remembers("accounts") == wanted.get(f"{machine.mode}-{machine.system}", set())
    if (machine.mode, machine.system) == ("system", "Linux"):
        joined = [line for line in machine.log() if line.startswith("usermod")]
        assert joined == ["usermod --append --groups video halka"], "groups that exist, no others"
    if (machine.mode, machine.system) == ("system", "Darwin"):
        assert "dscl . -create /Users/_halka UniqueID 302" in machine.log(), "300, 301 are taken"


def test_two_runs_equal_one(machine: Machine) -> None:
    succeeded(machine.install())
    once, running = tree(machine.disk), machine.remembers("running")
    succeeded(machine.install())
    assert tree(machine.disk) == once
    assert machine.remembers("running") == running


def test_a_second_run_installs_the_new_program_and_restarts_it(machine: Machine) -> None:
    succeeded(machine.install())
    succeeded(machine.install())
    log = machine.log()
    installs = [i for i, line in enumerate(log) if line.startswith("python -m pip install ")]
    starts = [i for i, line in enumerate(log) if " restart " in line or " bootstrap " in line]
    assert len(installs) == len(starts) == 1
    assert installs < starts


def test_uninstall_with_purge_leaves_the_machine_as_it_was(machine: Machine) -> None:
    before = tree(machine.disk)
    succeeded(machine.install())
    machine.state.mkdir(parents=True, exist_ok=True)
    (machine.state / "config.toml").touch()
    assert "halka is gone" in succeeded(machine.install("--uninstall", "--purge"))
    after = tree(machine.disk)
    for parent in machine.state.relative_to(machine.disk).parents:  # made by this test or systemd
        after.pop(str(parent), None)
        before.pop(str(parent), None)
    assert after == before
    for what in ("accounts", "linger", "running"):
        assert machine.remembers(what) == set(), what


def test_uninstall_keeps_models_and_keys(machine: Machine) -> None:
    succeeded(machine.install())
    machine.state.mkdir(parents=True, exist_ok=True)
    (machine.state / "key").write_text("secret")
    said = succeeded(machine.install("--uninstall"))
    assert str(machine.state) in said
    assert (machine.state / "key").read_text() == "secret"
    assert not machine.venv.parent.exists()
    assert not machine.unit.exists()
    assert not machine.link.is_symlink()
    if machine.mode == "system":
        assert f"chown -R 0:0 {machine.state}" in machine.log(), "no other account inherits them"


def test_folders_and_lingering_that_were_there_before_stay(tmp_path: Path) -> None:
    machine = make_machine(tmp_path, "user", "Linux")
    (machine.home / ".local/bin").mkdir(parents=True)
    (tmp_path / "fakes/linger").write_text("tester\n")
    before = tree(machine.disk)
    succeeded(machine.install())
    succeeded(machine.install("--uninstall"))
    assert tree(machine.disk) == before
    assert machine.remembers("linger") == {"tester"}


def test_an_account_that_was_there_before_stays(linux: Machine) -> None:
    (linux.top / "fakes/accounts").write_text("halka\n")
    succeeded(linux.install())
    assert not any(line.startswith("useradd") for line in linux.log())
    succeeded(linux.install("--uninstall"))
    assert linux.remembers("accounts") == {"halka"}


def test_uninstall_of_nothing_says_so(machine: Machine) -> None:
    before = tree(machine.disk)
    assert "There is no halka here" in succeeded(machine.install("--uninstall"))
    assert tree(machine.disk) == before


def test_a_dry_run_changes_nothing_and_says_what_it_would_do(machine: Machine) -> None:
    before = tree(machine.disk)
    said = succeeded(machine.install("--dry-run"))
    assert tree(machine.disk) == before
    for what in ("accounts", "linger", "running"):
        assert machine.remembers(what) == set(), what
    assert f"would write: {machine.unit}" in said
    for part in ("pip install", "ln -sfn", "-m venv"):
        assert part in said
    succeeded(machine.install())
    there = tree(machine.disk)
    assert f"rm -f {machine.link}" in succeeded(machine.install("--uninstall", "--dry-run"))
    assert tree(machine.disk) == there


def test_an_installation_that_died_anywhere_is_finished_by_the_next_run(tmp_path: Path) -> None:
    whole = make_machine(tmp_path / "whole", "system", "Linux")
    succeeded(whole.install())
    steps = len(whole.log())
    assert steps > 8
    want = {k: (m, t.replace(str(whole.top), "")) for k, (m, t) in tree(whole.disk).items()}
    for step in range(1, steps + 1):
        machine = make_machine(tmp_path / str(step), "system", "Linux")
        before = tree(machine.disk)
        machine.install(FAKE_KILL_AFTER=str(step))
        succeeded(machine.install())
        got = tree(machine.disk).items()
        assert {k: (m, t.replace(str(machine.top), "")) for k, (m, t) in got} == want, step
        assert machine.remembers("running") == {"halka.service"}, step
        succeeded(machine.install("--uninstall"))
        assert tree(machine.disk) == before, step
        assert machine.remembers("accounts") == set(), step


def test_an_environment_of_another_python_is_made_anew(linux: Machine) -> None:
    succeeded(linux.install())
    whole = tree(linux.disk)
    (linux.venv / "bin/python").unlink()  # what an upgrade of the system's Python amounts to
    succeeded(linux.install())
    assert tree(linux.disk) == whole


@pytest.mark.parametrize("mode", ["system", "user"])
def test_without_systemd_it_installs_and_says_how_to_start(mode: str, tmp_path: Path) -> None:
    machine = make_machine(tmp_path, mode, "Linux")
    shutil.rmtree(machine.root / "run")
    said = succeeded(machine.install(FAKE_NO_SYSTEMD="yes"))
    assert "systemd is not running here" in said
    start = "sudo systemctl" if mode == "system" else "systemctl --user"
    assert f"{start} enable --now halka" in said
    assert f"{machine.link} run" in said
    assert machine.unit.exists()
    succeeded(machine.install("--uninstall", FAKE_NO_SYSTEMD="yes"))
    assert not machine.unit.exists()


def test_a_service_that_does_not_start_is_a_failure_that_names_its_log(linux: Machine) -> None:
    done = linux.install(FAKE_BROKEN_SERVICE="yes")
    assert done.returncode == 1
    assert "journalctl --unit halka" in " ".join(done.stderr.split())


def test_over_ssh_a_mac_account_gets_its_service_in_the_other_domain(tmp_path: Path) -> None:
    machine = make_machine(tmp_path, "user", "Darwin")
    assert "sudo" in succeeded(machine.install(FAKE_SSH="yes")), "the local network's warning"
    assert machine.remembers("running") == {"user/1000/dev.halka.agent"}
    succeeded(machine.install("--uninstall", FAKE_SSH="yes"))
    assert machine.remembers("running") == set()


def test_without_a_service_there_is_only_the_command(machine: Machine) -> None:
    said = succeeded(machine.install("--no-service"))
    assert machine.link.is_symlink()
    assert not machine.unit.exists()
    assert machine.remembers("running") == machine.remembers("accounts") == set()
    assert f"{machine.link} run" in said


@pytest.mark.parametrize(
    ("distribution", "command"),
    [
        ("ID=arch", "sudo pacman -S --needed python base-devel"),
        ("ID=cachyos\nID_LIKE=arch", "sudo pacman -S --needed python base-devel"),
        ("ID=debian", "sudo apt install python3 python3-venv build-essential"),
        ('ID=linuxmint\nID_LIKE="ubuntu debian"', "sudo apt install python3 python3-venv"),
        ("ID=fedora", "sudo dnf install python3 gcc-c++"),
        ("", "this system's package manager"),
    ],
)
def test_what_is_missing_is_named_with_the_command_that_brings_it(
    distribution: str, command: str, linux: Machine
) -> None:
    (linux.root / "etc/os-release").write_text(distribution + "\n")
    (linux.top / "fakes/bin/c++").unlink()
    before = tree(linux.disk)
    compiler = linux.install()
    (linux.top / "fakes/bin/python3.13").unlink()
    python = linux.install()
    assert compiler.returncode == python.returncode == 1
    assert "no C++ compiler" in compiler.stderr
    assert "Python 3.11 or newer" in python.stderr
    assert command in compiler.stderr
    assert command in python.stderr
    assert tree(linux.disk) == before


@pytest.mark.parametrize(
    ("mode", "prefix", "version", "why"),
    [
        ("system", "/usr", (3, 11, 2), ""),
        ("user", "/usr", (3, 14, 0), ""),
        ("user", "/home/ada/.pyenv/versions/3.12", (3, 12, 1), ""),
        ("system", "/home/ada/.pyenv/versions/3.12", (3, 12, 1), "lies in a home folder"),
        ("system", "/Users/ada/miniconda3", (3, 12, 1), "lies in a home folder"),
        ("user", "/usr", (3, 10, 12), "is 3.10"),
    ],
)
def test_a_python_that_the_service_could_not_use_is_passed_over(
    mode: str,
    prefix: str,
    version: tuple[int, int, int],
    why: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    why_not = runpy.run_path(str(ROOT / "install/check_python.py"))["why_not"]
    monkeypatch.setattr(sys, "base_prefix", prefix)
    monkeypatch.setattr(sys, "version_info", version)
    said = why_not(mode)
    assert why in said
    assert bool(said) == bool(why)


def test_without_llama_no_compiler_is_asked_for(linux: Machine) -> None:
    (linux.top / "fakes/bin/c++").unlink()
    succeeded(linux.install(HALKA_INSTALL_EXTRAS=""))
    asked = next(line for line in linux.log() if " pip install " in line)
    assert asked.endswith(str(ROOT))


@pytest.mark.parametrize(
    ("mac", "extras"),
    [
        ({}, "llama,mlx"),
        ({"FAKE_MACHINE": "x86_64"}, "llama"),
        ({"FAKE_MACOS": "13.7.8"}, "llama"),
        ({"HALKA_INSTALL_EXTRAS": "llama"}, "llama"),
    ],
)
def test_a_mac_that_mlx_runs_on_gets_both_engines(
    tmp_path: Path, mac: dict[str, str], extras: str
) -> None:
    machine = make_machine(tmp_path, "user", "Darwin")
    succeeded(machine.install(**mac))
    asked = next(line for line in machine.log() if " pip install " in line)
    assert asked.endswith(f"{ROOT}[{extras}]")


def test_another_program_of_the_name_is_left_alone(machine: Machine) -> None:
    machine.link.parent.mkdir(parents=True)
    machine.link.write_text("a game")
    before = tree(machine.disk)
    done = machine.install()
    assert done.returncode == 1
    assert str(machine.link) in done.stderr
    assert tree(machine.disk) == before


@pytest.mark.parametrize("options", [("--sideways",), ("--purge",)])
def test_wrong_usage_changes_nothing_and_is_exit_code_2(
    options: tuple[str, ...], linux: Machine
) -> None:
    before = tree(linux.disk)
    done = linux.install(*options)
    assert done.returncode == 2
    assert options[0] in done.stderr
    assert tree(linux.disk) == before


def test_a_plain_account_is_told_how_to_install_for_the_machine(linux: Machine) -> None:
    done = linux.install(FAKE_UID="1000", HALKA_INSTALL_ROOT="")
    assert done.returncode == 2
    assert "sudo" in done.stderr


def test_with_the_true_python_and_pip_the_command_works(tmp_path: Path) -> None:
    machine = make_machine(tmp_path, "user", platform.system())
    (tmp_path / "fakes/bin/uname").unlink()  # Python's own libraries ask it, too
    network = {k: v for k, v in os.environ.items() if k.startswith("PIP_") or "proxy" in k.lower()}
    network["PIP_NO_CACHE_DIR"] = "1"  # pip's cache is not ours to clear
    path = {"PATH": f"{tmp_path}/fakes/bin:{os.environ['PATH']}"}
    python = Path(sys.base_prefix) / "bin" / f"python{sys.version_info[0]}.{sys.version_info[1]}"
    said = succeeded(
        machine.install(
            HALKA_INSTALL_PYTHON=str(python),
            HALKA_INSTALL_EXTRAS="",
            HALKA_INSTALL_PIP="--no-deps",
            **path,
            **network,
        )
    )
    assert str(machine.venv) in said
    help_text = subprocess.run(
        [machine.link, "--help"],
        env={"PATH": "/usr/bin:/bin", "HOME": str(machine.home)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=tmp_path,
    )
    assert help_text.returncode == 0, help_text.stderr
    assert "status" in help_text.stdout
    succeeded(machine.install("--uninstall", "--purge", **path))
    left = [str(path) for path in machine.home.rglob("*halka*")]
    assert left == []
    assert not machine.link.parent.exists()
