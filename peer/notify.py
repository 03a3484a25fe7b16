"""Tells systemd how the service is doing: ready, stopping, alive, in a few words.

Fifteen lines of protocol (sd_notify(3): one datagram of KEY=value lines to the socket that
NOTIFY_SOCKET names), so no library is used. Where nobody listens (a shell, launchd, a container)
every function does nothing and returns False.
"""

from __future__ import annotations

import logging
import os
import socket

log = logging.getLogger("halka.notify")

STATUS_BYTES_MAX = 1000  # one line of `systemctl status`; far below a datagram's limit


def ready(status: str = "") -> bool:
    """The API answers: start-up is over. Until this is sent, `systemctl start` waits."""
    return _send("READY=1", *_status(status))


def stopping(status: str = "") -> bool:
    """Shutting down on purpose, answers are being finished."""
    return _send("STOPPING=1", *_status(status))


def alive() -> bool:
    """The event loop still turns. Owed every `alive_every_s()`, else systemd restarts us."""
    return _send("WATCHDOG=1")


def status(text: str) -> bool:
    """One line for `systemctl status`, such as "4 peers, serving smollm2"."""
    return _send(*_status(text))


def alive_every_s() -> float | None:
    """Seconds between two `alive()`, half of the unit's WatchdogSec; None where not asked."""
    allowed_us = os.environ.get("WATCHDOG_USEC", "")
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None  # meant for the process that started us
    return int(allowed_us) / 2e6 if allowed_us.isdecimal() and int(allowed_us) > 0 else None


def _status(text: str) -> tuple[str, ...]:
    line = " ".join(text.split())
    return (f"STATUS={line.encode()[:STATUS_BYTES_MAX].decode(errors='ignore')}",) if line else ()


def _send(*lines: str) -> bool:
    """Whether systemd was told. Never blocks: a full socket is an error like any other."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not lines or not address.startswith(("/", "@")):
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]  # abstract: a name, not a file
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notices:
            notices.setblocking(False)
            notices.sendto("\n".join(lines).encode(), address)
    except OSError as error:
        log.warning("systemd_not_told=%s because=%s", lines[0], error)
        return False
    return True
