"""The service files: systemd's own checks, exit codes, the GPU's devices, every launchd key."""

from __future__ import annotations

import os
import plistlib
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from peer.config import Timing

ROOT = Path(__file__).parents[2]
SYSTEM_UNIT = ROOT / "systemd/halka.service"
USER_UNIT = ROOT / "systemd/user/halka.service"
UNITS = pytest.mark.parametrize("unit", [SYSTEM_UNIT, USER_UNIT], ids=["machine", "account"])
JOB = ROOT / "launchd/dev.halka.agent.plist"
ENDING_S = 10  # for stages and sockets, after others have taken over
needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not here"
)


def settings(unit: Path) -> dict[str, list[str]]:
    """The unit's keys, each with its values in order."""
    found: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        key, is_setting, value = line.partition("=")
        if is_setting and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


def analyze(tmp_path: Path, unit: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Ask systemd-analyze about the unit, as if its program were installed."""
    program = tmp_path / "halka"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    installed = tmp_path / unit.name
    text = unit.read_text()
    installed.write_text(re.sub(r"(?m)^ExecStart=\S+", f"ExecStart={program}", text))
    return subprocess.run(
        ["systemd-analyze", *arguments, str(installed)],
        env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path), "SYSTEMD_COLORS": "0"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@needs_systemd
def test_systemd_understands_every_line_of_the_machine_unit(tmp_path: Path) -> None:
    done = analyze(tmp_path, SYSTEM_UNIT, "verify", "--man=no")
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@needs_systemd
def test_systemd_understands_every_line_of_the_account_unit(tmp_path: Path) -> None:
    done = analyze(tmp_path, USER_UNIT, "--user", "verify", "--man=no")
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@needs_systemd
def test_the_machine_unit_is_exposed_by_at_most_3_0(tmp_path: Path) -> None:
    done = analyze(tmp_path, SYSTEM_UNIT, "security", "--offline=true", "--threshold=30")
    assert done.returncode == 0, done.stdout
    score = re.search(r"exposure level for \S+: ([0-9.]+)", done.stdout)
    assert score
    assert float(score[1]) <= 3.0


@needs_systemd
def test_the_check_notices_a_line_that_systemd_does_not_know(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    unit = broken / "halka.service"
    unit.write_text(SYSTEM_UNIT.read_text().replace("WatchdogSec=", "WatchDogSecs="))
    done = analyze(tmp_path, unit, "verify", "--man=no")
    assert "WatchDogSecs" in done.stderr


@UNITS
def test_every_line_of_a_unit_is_explained(unit: Path) -> None:
    """A comment stands above each setting or above the lines that it begins."""
    explained = False
    for number, line in enumerate(unit.read_text().splitlines(), 1):
        if line.startswith("#"):
            explained = True
        elif not line or line.startswith("["):
            explained = False
        else:
            plain = line.startswith(("Description=", "WantedBy="))
            assert explained or plain, f"{unit}:{number}: say in a comment above why: {line}"


@UNITS
def test_exit_codes_that_a_restart_cannot_mend_stop_the_service(unit: Path) -> None:
    keys = settings(unit)
    assert keys["Restart"] == ["on-failure"]
    assert keys["RestartPreventExitStatus"] == ["2 3 4"]
    assert keys["Type"] == ["notify"]
    assert int(keys["WatchdogSec"][0]) >= 30, "a slow machine must not be taken for a hung one"
    assert keys["KillMode"] == ["mixed"]
    assert int(keys["TimeoutStopSec"][0]) >= Timing().leave_s + ENDING_S


def test_the_machine_unit_keeps_its_data_where_the_agent_looks() -> None:
    keys = settings(SYSTEM_UNIT)
    assert "HALKA_HOME=/var/lib/halka" in keys["Environment"]
    assert keys["StateDirectory"] == ["halka"]
    assert keys["StateDirectoryMode"] == ["0700"]
    assert keys["User"] == keys["Group"] == ["halka"]


def test_the_hardening_leaves_gpus_visible() -> None:
    keys = settings(SYSTEM_UNIT)
    allowed = {value.split()[0] for value in keys["DeviceAllow"]}
    assert allowed == {"char-nvidia*", "char-drm", "char-kfd"}
    assert keys["DevicePolicy"] == ["closed"]
    hiding = {"PrivateDevices", "PrivateUsers", "ProtectClock", "MemoryDenyWriteExecute"}
    hiding |= {"ProcSubset", "PrivateNetwork", "IPAddressDeny", "SupplementaryGroups"}
    assert not hiding & keys.keys(), "these take away GPUs, memory figures or the network"
    families = keys["RestrictAddressFamilies"][0].split()
    assert set(families) == {"AF_INET", "AF_INET6", "AF_UNIX", "AF_NETLINK"}


def test_settings_that_cannot_be_used_end_the_agent_with_code_2(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "peer", "run"],
        env={**os.environ, "HALKA_HOME": str(tmp_path), "HALKA_PORT": "99999"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "99999" in done.stderr


@UNITS
def test_both_units_start_the_same_word(unit: Path) -> None:
    assert re.fullmatch(r"\S+/halka/venv/bin/halka run", settings(unit)["ExecStart"][0])


JOB_KEYS: dict[str, Any] = {
    "Label": "dev.halka.agent",
    "ProgramArguments": ["/opt/halka/venv/bin/halka", "run"],
    "UserName": "_halka",
    "GroupName": "_halka",
    "EnvironmentVariables": {
        "HALKA_HOME": "/Library/Application Support/halka",
        "PYTHONUNBUFFERED": "1",
    },
    "WorkingDirectory": "/Library/Application Support/halka",
    "RunAtLoad": True,
    "KeepAlive": {"SuccessfulExit": False},
    "ThrottleInterval": 10,
    "ExitTimeOut": 30,
    "ProcessType": "Interactive",
    "SoftResourceLimits": {"NumberOfFiles": 65536},
    "HardResourceLimits": {"NumberOfFiles": 65536},
    "Umask": 0o077,
    "StandardOutPath": "/Library/Logs/halka/agent.log",
    "StandardErrorPath": "/Library/Logs/halka/agent.log",
}


def same(found: Any, wanted: Any) -> bool:
    """Equal in value and type: launchd ignores a string "true" where it expects a boolean."""
    if type(found) is not type(wanted):
        return False
    if isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(same(found[k], wanted[k]) for k in wanted)
    return bool(found == wanted)


@pytest.mark.parametrize("key", sorted(JOB_KEYS))
def test_the_launchd_job_says(key: str) -> None:
    job = plistlib.loads(JOB.read_bytes())
    assert same(job[key], JOB_KEYS[key]), f"{JOB}: {key} is {job[key]!r}, not {JOB_KEYS[key]!r}"


def test_the_launchd_job_has_no_key_that_nobody_thought_about() -> None:
    assert plistlib.loads(JOB.read_bytes()).keys() == JOB_KEYS.keys()


def test_the_file_is_named_as_the_job() -> None:
    assert f"{plistlib.loads(JOB.read_bytes())['Label']}.plist" == JOB.name
