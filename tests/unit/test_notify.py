"""What systemd hears from the agent, on a socket that stands in for PID 1's."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from peer import notify


@pytest.fixture(params=["file", "abstract"])
def systemd(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[socket.socket]:
    """The end that systemd reads, at a path or at an abstract name."""
    if request.param == "abstract" and sys.platform != "linux":
        pytest.skip("abstract sockets exist on Linux only")
    name = str(tmp_path / "notify") if request.param == "file" else f"@halka-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear:
        ear.bind(name.replace("@", "\0", 1) if name.startswith("@") else name)
        ear.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        yield ear


def test_readiness_and_its_status_travel_in_one_datagram(systemd: socket.socket) -> None:
    assert notify.ready("3 peers")
    assert systemd.recv(4096) == b"READY=1\nSTATUS=3 peers"


def test_each_word_is_the_one_that_systemd_knows(systemd: socket.socket) -> None:
    assert notify.ready()
    assert notify.alive()
    assert notify.stopping()
    assert [systemd.recv(4096) for _ in range(3)] == [b"READY=1", b"WATCHDOG=1", b"STOPPING=1"]


def test_a_status_cannot_smuggle_in_another_line(systemd: socket.socket) -> None:
    assert notify.status("serving\nREADY=1\r\n  now")
    assert systemd.recv(4096) == b"STATUS=serving READY=1 now"


def test_a_long_status_is_cut_between_characters(systemd: socket.socket) -> None:
    assert notify.status("é" * 5000)
    heard = systemd.recv(65536).decode()
    assert heard == "STATUS=" + "é" * (notify.STATUS_BYTES_MAX // 2)


async def test_the_event_loop_is_never_blocked(systemd: socket.socket) -> None:
    assert notify.alive()
    assert systemd.recv(4096) == b"WATCHDOG=1"


def test_a_full_socket_is_reported_and_not_waited_for(
    systemd: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    told = [notify.status("x" * 900) for _ in range(3000)]
    assert told[0]
    assert not told[-1]
    assert "systemd_not_told=STATUS=" in caplog.text


@pytest.mark.parametrize("address", [None, "", "vsock:2:1234", "relative/path"])
def test_without_a_listener_nothing_is_sent(
    address: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    if address is not None:
        monkeypatch.setenv("NOTIFY_SOCKET", address)
    assert not notify.ready()
    assert not caplog.text


def test_a_listener_that_is_gone_does_not_stop_the_agent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    assert not notify.ready()
    assert "systemd_not_told=READY=1" in caplog.text


@pytest.mark.parametrize(
    ("allowed_us", "owner", "every_s"),
    [
        ("60000000", None, 30.0),
        ("60000000", "me", 30.0),
        ("60000000", "1", None),
        ("", None, None),
        ("0", None, None),
        ("soon", None, None),
    ],
)
def test_signs_of_life_are_owed_twice_in_the_time_that_the_unit_allows(
    allowed_us: str, owner: str | None, every_s: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", allowed_us)
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    if owner is not None:
        monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()) if owner == "me" else owner)
    assert notify.alive_every_s() == every_s
