"""The ranks of an island meet before MLX does: all of them, these and no others, within a time."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from backends.base import BackendFault, Island, Settings
from backends.mlx import meeting
from backends.mlx.process import ChildBackend
from peer.ring.sockets import free_port

SETTINGS = Settings(slots=2, kv_cells=64, batch_tokens=8, threads=1)
MAC = ("", "rdma_en2"), ("rdma_en3", "")


def addresses(ranks: int) -> tuple[str, ...]:
    return tuple(f"127.0.0.1:{free_port('127.0.0.1')}" for _ in range(ranks))


def settings(rank: int, at: Sequence[str], **changed: int) -> Settings:
    return replace(SETTINGS, island=Island(rank, tuple(at)), **changed)  # type: ignore[arg-type]


@contextmanager
def ranks(count: int) -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(count) as threads:
        yield threads


def test_ranks_that_come_in_any_order_meet() -> None:
    at = addresses(3)
    with ranks(3) as threads:
        last_first = [threads.submit(meeting.meet, settings(r, at), 20.0) for r in (2, 1, 0)]
        assert [future.result() for future in last_first] == [None] * 3


def test_who_does_not_come_is_named() -> None:
    at = addresses(3)
    with ranks(2) as threads:
        first = threads.submit(meeting.meet, settings(0, at), 1.0)
        other = threads.submit(meeting.meet, settings(2, at), 2.0)  # it waits until then
        with pytest.raises(BackendFault, match=rf"rank 1 \({at[1]}\) of the island did not come"):
            first.result()
        with pytest.raises(BackendFault, match=r"rank 0 of the island at .* did not come"):
            other.result()


def test_strangers_and_other_islands_are_turned_away_and_change_nothing() -> None:
    at = addresses(2)
    with ranks(3) as threads:
        first = threads.submit(meeting.meet, settings(0, at), 20.0)
        host, port = meeting.address_of(at[0])
        stranger = _reach(host, port)
        stranger.sendall(b"GET / HTTP/1.1\r\nHost: nobody.example\r\nAccept: */*\r\n\r\n" * 2)
        with pytest.raises(BackendFault, match="other settings"):
            meeting.meet(settings(1, at, kv_cells=128), 20.0)
        assert not first.done()
        meeting.meet(settings(1, at), 20.0)
        first.result()
        stranger.close()


def test_one_that_says_nothing_holds_nobody_up_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "_WORD_S", 0.2)
    at = addresses(2)
    with ranks(2) as threads:
        first = threads.submit(meeting.meet, settings(0, at), 20.0)
        silent = _reach(*meeting.address_of(at[0]))
        meeting.meet(settings(1, at), 20.0)
        first.result()
        silent.close()


def test_many_that_say_nothing_or_little_hold_nobody_up() -> None:
    """Each of them may take five seconds to say who it is; all of them together, too."""
    at = addresses(2)
    with ranks(2) as threads:
        first = threads.submit(meeting.meet, settings(0, at), 4.0)
        strangers = [_reach(*meeting.address_of(at[0])) for _ in range(3 * meeting._CALLERS_MAX)]
        for number, stranger in enumerate(strangers[-meeting._CALLERS_MAX :]):
            stranger.sendall(meeting._HELLO[: number % len(meeting._HELLO)])
        meeting.meet(settings(1, at), 4.0)
        first.result()
        for stranger in strangers:
            stranger.close()


def test_a_hello_that_comes_in_pieces_is_one() -> None:
    at = addresses(2)
    with ranks(1) as threads:
        first = threads.submit(meeting.meet, settings(0, at), 20.0)
        slow = _reach(*meeting.address_of(at[0]))
        slow.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in meeting._HELLO + bytes([1]) + meeting.digest(settings(1, at)):
            slow.sendall(bytes([byte]))
        assert slow.recv(1) == b"G"
        first.result()
        slow.close()


def test_a_rank_that_left_before_all_were_here_may_come_again() -> None:
    at = addresses(3)
    with ranks(3) as threads:
        first = threads.submit(meeting.meet, settings(0, at), 20.0)
        left = _reach(*meeting.address_of(at[0]))
        left.sendall(meeting._HELLO + bytes([1]) + meeting.digest(settings(1, at)))
        left.close()
        second = threads.submit(meeting.meet, settings(2, at), 20.0)
        third = threads.submit(meeting.meet, settings(1, at), 20.0)
        assert [future.result() for future in (first, second, third)] == [None] * 3


def _reach(host: str, port: int) -> socket.socket:
    deadline = time.monotonic() + 10
    while True:
        try:
            return socket.create_connection((host, port), 5)
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            threading.Event().wait(0.01)


def test_a_port_that_another_program_took_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        at = (f"127.0.0.1:{taken.getsockname()[1]}", *addresses(1))
        with pytest.raises(BackendFault, match=f"cannot meet at {at[0]}.*in use"):
            meeting.meet(settings(0, at), 1.0)


def test_a_free_port_is_free_and_of_this_machine() -> None:
    port = free_port("127.0.0.1")
    with socket.socket() as door:
        door.bind(("127.0.0.1", port))
    with pytest.raises(OSError, match="Cannot assign requested address"):
        free_port("192.0.2.7")


def test_over_tcp_mlx_is_told_of_the_hosts() -> None:
    island = Island(1, ("10.0.0.1:5000", "10.0.0.2:5001"))
    with meeting.variables(island) as given:
        assert given.keys() == {"MLX_RANK", "MLX_HOSTFILE"}
        assert given["MLX_RANK"] == "1"
        path = Path(given["MLX_HOSTFILE"])
        assert json.loads(path.read_text()) == [["10.0.0.1:5000"], ["10.0.0.2:5001"]]
    assert not path.exists()


def test_over_rdma_mlx_is_told_of_the_devices() -> None:
    """As mlx's launcher does (mlx/_distributed_utils/launch.py, launch_jaccl)."""
    island = Island(0, ("10.0.0.1:5000", "10.0.0.2:5001"), MAC)
    meeting.check(island)
    with meeting.variables(island) as given:
        assert given.keys() == {"MLX_RANK", "MLX_IBV_DEVICES", "MLX_JACCL_COORDINATOR"}
        assert given["MLX_JACCL_COORDINATOR"] == "10.0.0.1:5000"
        table = json.loads(Path(given["MLX_IBV_DEVICES"]).read_text())
        assert table == [[None, "rdma_en2"], ["rdma_en3", None]]


@pytest.mark.parametrize(
    ("island", "why"),
    [
        (Island(0, ("10.0.0.1:5000",)), "of an island of 1"),
        (Island(2, ("10.0.0.1:5000", "10.0.0.2:5000")), "rank 2 of an island of 2"),
        (Island(0, ("10.0.0.1:5000", "[fe80::1]:5000")), "IPv4"),
        (Island(0, ("10.0.0.1:5000", "10.0.0.2:65536")), "no address"),
        (Island(0, ("10.0.0.1:5000", "10.0.0.2:0")), "no address"),
        (Island(0, ("10.0.0.1:5000", "10.0.0.2:\u00b2")), "no address"),
        (Island(1, ("peer.example:5000", "10.0.0.2:5000")), "no address"),
        (Island(0, ("10.0.0.1:5000", "10.0.0.2:5000"), (("", "rdma_en2"),)), "not a table"),
        (
            Island(0, ("10.0.0.1:5000", "10.0.0.2:5000"), (("", "rdma_en2"), ("", ""))),
            "no RDMA from rank 1 to rank 0",
        ),
    ],
)
def test_what_is_no_island_is_refused(island: Island, why: str) -> None:
    with pytest.raises(BackendFault, match=why):
        meeting.check(island)


def test_a_childs_environment_has_nothing_of_other_islands(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLX_HOSTFILE", "JACCL_RANK", "MLX_JACCL_RING", "MLX_METAL_FAST_SYNCH"):
        assert name in meeting.VARIABLES
        monkeypatch.setenv(name, "/nowhere")
    backend = ChildBackend("fake", SETTINGS, without=meeting.VARIABLES, variables={"A_MARK": "7"})
    try:
        said = Path(f"/proc/{backend.pid}/environ")
        if not said.exists():
            pytest.skip(reason="only Linux shows a process's environment")
        environment = dict(
            entry.partition("=")[::2] for entry in said.read_text().rstrip("\0").split("\0")
        )
        assert environment.keys() & set(meeting.VARIABLES) == set()
        assert environment["A_MARK"] == "7"
        assert os.environ["MLX_HOSTFILE"] == "/nowhere"
    finally:
        backend.close()
