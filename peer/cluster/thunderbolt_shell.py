"""Asks macOS about Thunderbolt: read-only commands of the system, each with a deadline. A shell.

Nothing is ever set or changed by them, none needs more rights than the agent has, and on other
systems none is run. Each is named by its whole path, so that nothing else on PATH is taken for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
from collections.abc import Callable, Mapping, Sequence

from peer.cluster import interfaces
from peer.planning import thunderbolt
from peer.planning.profile import Port

log = logging.getLogger("halka.cluster")

COMMANDS: Mapping[str, tuple[str, ...]] = {
    "profiler": ("/usr/sbin/system_profiler", "SPThunderboltDataType", "-json"),
    "hardware": ("/usr/sbin/networksetup", "-listallhardwareports"),
    "devices": ("/usr/bin/ibv_devices",),
    "rdma": ("/usr/bin/rdma_ctl", "status"),
    "bridge": ("/sbin/ifconfig", thunderbolt.BRIDGE),
    "version": ("/usr/bin/sw_vers", "-productVersion"),
}
ANSWER_S = 20.0  # system_profiler takes a second, and many on a busy machine
LOOK_S = 15.0  # between looks at the interfaces; more often has hung Macs
AGAIN_S = 180.0  # between questions while no interface changes
ENVIRONMENT = {"LC_ALL": "C", "PATH": "/usr/bin:/bin:/usr/sbin:/sbin"}


async def output(words: Sequence[str], within_s: float = ANSWER_S) -> str | None:
    """What a command prints; None where it is not there, fails, or takes or prints too much."""
    try:
        process = await asyncio.create_subprocess_exec(
            *words,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env=ENVIRONMENT,
            start_new_session=True,
        )
    except OSError:
        return None
    assert process.stdout is not None
    said = b""
    try:
        async with asyncio.timeout(within_s):
            while piece := await process.stdout.read(1 << 16):
                said += piece
                if len(said) > thunderbolt.TEXT_BYTES_MAX:
                    return None
            await process.wait()
    except TimeoutError:
        return None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
            await _drain(process)
    return said.decode("utf-8", "replace") if process.returncode == 0 else None


async def _drain(process: asyncio.subprocess.Process) -> None:
    """To its end: a pipe that nobody reads would keep the process object waiting."""
    assert process.stdout is not None
    while await process.stdout.read(1 << 16):
        pass
    await process.wait()


async def look(
    addresses: Mapping[str, Sequence[str]] | None = None,
    *,
    commands: Mapping[str, Sequence[str]] = COMMANDS,
    within_s: float = ANSWER_S,
) -> tuple[Port, ...]:
    """This Mac's Thunderbolt ports, now. addresses: of its interfaces, by name.

    Raises: Unread, where the system does not tell.
    """
    names = ("profiler", "hardware", "devices")
    told = await asyncio.gather(*(output(commands[name], within_s) for name in names))
    profiler, hardware, devices = told
    if profiler is None:
        raise thunderbolt.Unread("system_profiler does not answer about Thunderbolt")
    return thunderbolt.ports(profiler, hardware or "", devices or "", addresses)


async def watch(told: Callable[[tuple[Port, ...]], None], *, system: str = sys.platform) -> None:
    """Tell of the ports at once and whenever they may have changed, until cancelled.

    Elsewhere than on a Mac it asks nothing and returns.
    """
    if system != "darwin":
        return
    loop, problem = asyncio.get_running_loop(), ""
    before: dict[str, tuple[str, ...]] | None = None
    asked_s = 0.0
    while True:
        try:
            surveyed = await asyncio.to_thread(interfaces.survey)
            now = {each.name: each.addresses for each in surveyed if each.up}
            if now != before or loop.time() - asked_s >= AGAIN_S:
                before, asked_s = now, loop.time()
                told(await look(now))
                problem = ""
        except (OSError, thunderbolt.Unread) as error:
            if str(error) != problem:
                log.warning("thunderbolt=unknown because=%s", error)
            problem = str(error)
        await asyncio.sleep(LOOK_S)
