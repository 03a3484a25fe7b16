"""How the ranks of an island find each other, before MLX does.

MLX's own way hangs: its first rank waits for a connection for ever, the others give up after 15
seconds, and while they wait no other Python thread runs. So the ranks first meet here, over plain
sockets at the first rank's address, each saying which island it belongs to; MLX is asked only when
all are there. Whoever is missing is named. What is said decides nothing but the moment: it is a few
bytes, checked, and answered with one.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import json
import re
import select
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from backends.base import BackendFault, Island, Settings

_HELLO = b"halka-island-1"
_HELLO_BYTES = len(_HELLO) + 1 + 32
_GO, _OTHER = b"G", b"O"
_AGAIN_S = 0.1  # between two attempts to reach the first rank
_PORT = re.compile(r"[0-9]{1,5}")
_WORD_S = 5.0  # for one that connected to say who it is
_LOOK_S = 1.0  # between looks at the clock
_CALLERS_MAX = 32  # at once, that have not said it

VARIABLES = tuple(
    f"{maker}_{name}"
    for maker in ("MLX", "JACCL")
    for name in (
        "HOSTFILE", "RANK", "SIZE", "WORLD_SIZE", "IBV_DEVICES", "COORDINATOR", "RING",
        "JACCL_COORDINATOR", "JACCL_RING", "RING_VERBOSE", "METAL_FAST_SYNCH",
    )
)  # fmt: skip
"""Of MLX and JACCL, what decides who meets whom; and a mode that wedges GPUs (mlx issue 3142)."""


def address_of(text: str) -> tuple[str, int]:
    """The parts of "host:port". Raises BackendFault; MLX knows IPv4 only.

    A name is none: addresses come from other machines, and asking for a name asks the internet.
    """
    host, _, port = text.rpartition(":")
    try:
        ipaddress.IPv4Address(host)
    except ValueError:
        port = ""
    if not _PORT.fullmatch(port) or not 0 < int(port) < 65536:
        raise BackendFault(f"{text[:64]!r} is no address of an island: MLX meets at IPv4 host:port")
    return host, int(port)


def check(island: Island) -> None:
    """Raises BackendFault where no island can be made of it."""
    ranks = len(island.addresses)
    if ranks < 2 or not 0 <= island.rank < ranks:
        raise BackendFault(f"rank {island.rank} of an island of {ranks}")
    for address in island.addresses:
        address_of(address)
    if not island.devices:
        return
    if len(island.devices) != ranks or any(len(row) != ranks for row in island.devices):
        raise BackendFault("an island's RDMA devices are not a table of its ranks")
    for i, row in enumerate(island.devices):
        for j, device in enumerate(row):
            if (device == "") != (i == j):
                raise BackendFault(
                    f"no RDMA from rank {i} to rank {j} of the island: MLX wants a Thunderbolt "
                    "cable between every two of its Macs"
                )


@contextmanager
def variables(island: Island) -> Iterator[Mapping[str, str]]:
    """What MLX reads from the environment while it meets.

    The table of hosts or devices is a file without a name, so nothing is left of it whatever dies.
    """
    rank = {"MLX_RANK": str(island.rank)}
    with tempfile.TemporaryFile() as file:
        path = f"/dev/fd/{file.fileno()}"
        if island.devices:
            table: object = [[device or None for device in row] for row in island.devices]
            given = {
                **rank, "MLX_IBV_DEVICES": path, "MLX_JACCL_COORDINATOR": island.addresses[0]
            }  # fmt: skip
        else:
            table = [[address] for address in island.addresses]
            given = {**rank, "MLX_HOSTFILE": path}
        file.write(json.dumps(table).encode())
        file.seek(0)
        yield given


def digest(settings: Settings) -> bytes:
    """What all ranks of one island have in common."""
    island = settings.island
    assert island
    said = json.dumps(
        [
            island.addresses, island.devices, settings.slots, settings.kv_cells,
            settings.batch_tokens, settings.kv_type, settings.flash, settings.weights,
        ]
    )  # fmt: skip
    return hashlib.sha256(said.encode()).digest()


def meet(settings: Settings, limit_s: float) -> None:
    """Return when all ranks are here. Raises BackendFault, naming who is not."""
    island = settings.island
    assert island
    until_s = time.monotonic() + limit_s
    if island.rank:
        _go_to(island, digest(settings), until_s)
    else:
        _await_all(island, digest(settings), until_s)


@dataclass(slots=True)
class _Caller:
    """Somebody who reached the first rank and has not said yet who it is."""

    line: socket.socket
    until_s: float
    said: bytes = b""


def _await_all(island: Island, ours: bytes, until_s: float) -> None:
    """All lines are heard at once: whoever says nothing, or little, holds nobody up."""
    here: dict[int, socket.socket] = {}
    callers: list[_Caller] = []
    with contextlib.ExitStack() as stack:
        door = stack.enter_context(_listening(island.addresses[0]))
        stack.callback(lambda: _hang_up([*here.values(), *(each.line for each in callers)]))
        while missing := set(range(1, len(island.addresses))) - here.keys():
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                names = ", ".join(f"{rank} ({island.addresses[rank]})" for rank in sorted(missing))
                raise BackendFault(f"rank {names} of the island did not come")
            lines = [door, *here.values(), *(each.line for each in callers)]
            ready = select.select(lines, [], [], min(left_s, _LOOK_S))[0]
            for rank, line in list(here.items()):
                if line in ready:  # it has nothing more to say: it hung up
                    here.pop(rank).close()
            if door in ready:
                _let_in(door, callers)
            for caller in list(callers):
                try:
                    rank = _who(caller, len(island.addresses), ours)
                except OSError:
                    caller.line.close()
                    callers.remove(caller)
                    continue
                if rank:
                    callers.remove(caller)
                    _hang_up([here[rank]] if rank in here else [])
                    here[rank] = caller.line
        for line in here.values():
            with contextlib.suppress(OSError):  # it is lost then: MLX's meeting has a deadline
                line.sendall(_GO)


def _let_in(door: socket.socket, callers: list[_Caller]) -> None:
    """One more; where there are too many, the one that has said nothing for longest goes."""
    with contextlib.suppress(BlockingIOError, ConnectionAbortedError):
        line = door.accept()[0]
        line.setblocking(False)
        callers.append(_Caller(line, time.monotonic() + _WORD_S))
        if len(callers) > _CALLERS_MAX:
            callers.pop(0).line.close()


def _hang_up(lines: Iterable[socket.socket]) -> None:
    for line in lines:
        line.close()


def _listening(address: str) -> socket.socket:
    host, port = address_of(address)
    door = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        door.bind((host, port))
        door.listen()
        door.setblocking(False)
    except OSError as error:
        door.close()
        raise BackendFault(f"the island cannot meet at {address}: {error}") from error
    return door


def _who(caller: _Caller, ranks: int, ours: bytes) -> int:
    """Which rank it is, 0 while it has not said so. Raises OSError where it says something else,
    says it too slowly, or is of another island."""
    with contextlib.suppress(BlockingIOError):
        more = caller.line.recv(_HELLO_BYTES - len(caller.said))
        if not more:
            raise ConnectionResetError("it hung up")
        caller.said += more
    said, rank = caller.said, caller.said[len(_HELLO) : len(_HELLO) + 1]
    if not _HELLO.startswith(said[: len(_HELLO)]) or (rank and not 0 < rank[0] < ranks):
        raise ConnectionAbortedError("it is no rank of an island")
    if len(said) < _HELLO_BYTES:
        if time.monotonic() >= caller.until_s:
            raise TimeoutError
        return 0
    if said[len(_HELLO) + 1 :] != ours:
        caller.line.sendall(_OTHER)
        raise ConnectionAbortedError("it is of another island")
    return rank[0]


def _go_to(island: Island, ours: bytes, until_s: float) -> None:
    first = address_of(island.addresses[0])
    hello = _HELLO + bytes([island.rank]) + ours
    why = "nobody listens there"
    while (left_s := until_s - time.monotonic()) > 0:
        try:
            with socket.create_connection(first, min(left_s, _WORD_S)) as line:
                line.sendall(hello)
                line.settimeout(max(0.01, until_s - time.monotonic()))
                word = _exactly(line, 1)
                if word == _GO:
                    return
                if word == _OTHER:
                    raise BackendFault(
                        f"rank 0 of the island at {island.addresses[0]} was given other settings "
                        "than this one: both must be of the same plan"
                    )
        except TimeoutError:
            why = "it waits for others, or does not answer"
        except OSError as error:
            why = str(error)
        time.sleep(_AGAIN_S)
    raise BackendFault(f"rank 0 of the island at {island.addresses[0]} did not come: {why}")


def _exactly(line: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = line.recv(count - len(data))
        if not more:
            raise ConnectionResetError("it hung up")
        data += more
    return data
