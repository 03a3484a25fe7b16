"""Where peers are looked for: interfaces, records, the key door, static peers."""

from __future__ import annotations

import asyncio
import errno
import socket
import time
from typing import Any

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as some
from zeroconf.asyncio import AsyncServiceInfo

from peer.cluster import addresses, keydoor, mdns
from peer.cluster.discovery import Discovery
from peer.cluster.identity import peer_id_of
from peer.cluster.interfaces import Interface, choose, missing, survey
from peer.cluster.mdns import Announced, Mdns, cluster_mark, read_record, record_of
from peer.cluster.ports import free_port
from peer.config import Config
from peer.protocol import Sighted


def record(*places: str, cluster: str = "home") -> Announced:
    key = zmq.curve_keypair()[0].decode()
    return Announced(1, peer_id_of(key), key, cluster_mark(cluster), places)


# Interfaces ---------------------------------------------------------------------------------------

HOUSE = [
    Interface("lo", True, ("127.0.0.1", "::1")),
    Interface("enp3s0", True, ("192.168.1.20", "fd12::20", "2a02:1::20", "fe80::20")),
    Interface("wlan0", True, ("10.0.0.7",)),
    Interface("enp4s0", False, ("192.168.2.20",)),
    Interface("eth1", True, ("169.254.3.4",)),
    Interface("ppp0", True, ("10.64.0.2",)),
    Interface("eth2", True, ("203.0.114.9", "100.64.3.2")),
    *(
        Interface(name, True, ("172.17.0.1",))
        for name in (
            "docker0", "br-2f3a", "veth12ab", "virbr0", "tun0", "wg0", "tailscale0",
            "utun4", "awdl0", "llw0", "vmnet8", "bridge100", "zt5u4y6e",
        )
    ),
]  # fmt: skip


def test_home_networks_are_used_and_containers_tunnels_and_the_internet_are_not() -> None:
    assert choose(HOUSE) == ("10.0.0.7", "169.254.3.4", "192.168.1.20", "fd12::20")


def test_the_setting_interfaces_names_what_is_used_instead() -> None:
    assert choose(HOUSE, ["127.0.0.1"]) == ("127.0.0.1",)
    assert choose(HOUSE, ["docker0", "wlan0"]) == ("10.0.0.7", "172.17.0.1")
    assert choose(HOUSE, ["enp3s0"]) == ("192.168.1.20", "2a02:1::20", "fd12::20")
    assert choose(HOUSE, ["enp4s0"]) == ()


def test_a_house_without_a_network_is_told_what_to_set() -> None:
    assert missing(["10.0.0.7"], []) == ""
    assert "`interfaces`" in missing([], [])
    assert "wlan9" in missing([], ["wlan9"])


def test_this_machine_has_a_loopback() -> None:
    assert choose(survey(), ["127.0.0.1"]) == ("127.0.0.1",)


# Addresses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [("tcp://10.0.0.5:1", "10.0.0.5", 1), ("tcp://[fd00::5]:65535", "fd00::5", 65535)],
)
def test_an_address_is_read_as_it_is_written(address: str, host: str, port: int) -> None:
    ip, number = addresses.read(address)
    assert (str(ip), number) == (host, port)
    assert addresses.write(host, port) == address


@pytest.mark.parametrize(
    "address",
    [
        "", "tcp://", "10.0.0.5:1", "udp://10.0.0.5:1", "tcp://10.0.0.5", "tcp://10.0.0.5:0",
        "tcp://10.0.0.5:65536", "tcp://10.0.0.5:-1", "tcp://router.local:80", "tcp://*:5",
        "tcp://0.0.0.0:5", "tcp://224.0.0.251:5", "tcp://255.255.255.255:5", "ipc:///tmp/x",
        "tcp://10.0.0.5:1;tcp://10.0.0.6:1", "inproc://zeromq.zap.01", "tcp://[::]:5",
    ],
)  # fmt: skip
def test_what_is_no_place_to_dial_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        addresses.read(address)
    assert addresses.usable([address], loopback=True) == ()


@given(some.text(max_size=60))
def test_no_text_makes_the_reader_fail_otherwise(text: str) -> None:
    for address in addresses.usable([text, f"tcp://{text}:1"], loopback=True):
        addresses.read(address)


def test_loopback_is_dialled_only_by_peers_that_live_there() -> None:
    places = ["tcp://127.0.0.1:5", "tcp://10.0.0.5:5"]
    assert addresses.usable(places, loopback=False) == ("tcp://10.0.0.5:5",)
    assert addresses.usable(places, loopback=True) == tuple(places)


def test_a_free_port_is_free_for_tcp_and_udp() -> None:
    port = free_port(["127.0.0.1"])
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with socket.socket(socket.AF_INET, kind) as probe:
            probe.bind(("127.0.0.1", port))


# Records ------------------------------------------------------------------------------------------


def test_a_record_says_what_was_announced_and_nothing_of_the_machine() -> None:
    me = record("tcp://10.0.0.7:4242", "tcp://[fd00::7]:4242")
    info = record_of(me)
    assert read_record(info) == me
    assert info.name == f"halka-{me.peer_id}._halka._tcp.local."
    assert info.server == f"halka-{me.peer_id}.local."
    assert set(info.properties) == {b"v", b"id", b"key", b"c"}
    assert socket.gethostname() not in str(info.name)


@pytest.mark.parametrize(
    "change",
    [
        {"id": "a" * 16}, {"key": "x"}, {"key": "x" * 65}, {"v": "one"}, {"v": "9" * 6},
        {"v": None}, {"id": None}, {"key": None}, {"c": None}, {"c": b"\xff"},
        {"key": zmq.curve_keypair()[0]}, {"key": "#" * 40}, {"key": "~" * 40},
    ],
)  # fmt: skip
def test_a_record_that_lies_is_no_sighting(change: dict[str, Any]) -> None:
    me = record("tcp://10.0.0.7:4242")
    fields = {"v": "1", "id": me.peer_id, "key": me.key, "c": me.cluster_mark} | change
    info = AsyncServiceInfo(
        mdns.TYPE,
        f"halka-{me.peer_id}.{mdns.TYPE}",
        port=4242,
        properties={name: value for name, value in fields.items() if value is not None},
    )
    with pytest.raises(ValueError, match=r".+"):
        read_record(info)


def test_the_mark_tells_clusters_apart_without_their_names() -> None:
    assert cluster_mark("home") == cluster_mark("home") != cluster_mark("Home")
    assert "home" not in cluster_mark("home")


async def test_port_5353_in_other_hands_is_told_tried_again_and_mended(
    monkeypatch: pytest.MonkeyPatch, until: Any
) -> None:
    real, tries = mdns.AsyncZeroconf, []

    def refused(**arguments: Any) -> Any:
        tries.append(arguments)
        if len(tries) < 3:
            raise OSError(errno.EADDRINUSE, "Address already in use")
        return real(**arguments)

    monkeypatch.setattr(mdns, "AsyncZeroconf", refused)
    monkeypatch.setattr(mdns, "AGAIN_MIN_S", 0.05)
    me = record("tcp://127.0.0.1:4242")
    shouting = Mdns(lambda: me, lambda other: None)
    shouting.follow(["127.0.0.1"])
    running = asyncio.create_task(shouting.run())
    await until(lambda: shouting.problem, 5, "status tells")
    assert "5353" in shouting.problem
    assert "peers" in shouting.problem
    await until(lambda: len(tries) == 3 and not shouting.problem, 10, "it works again")
    running.cancel()
    await asyncio.wait([running])


async def test_an_interface_that_vanished_does_not_end_mdns(until: Any) -> None:
    me = record("tcp://127.0.0.1:4242")
    shouting = Mdns(lambda: me, lambda other: None)
    shouting.follow(["192.0.2.254"])  # not an address of this machine
    running = asyncio.create_task(shouting.run())
    await until(lambda: "192.0.2.254" in shouting.problem, 5, "status tells")
    shouting.follow(["127.0.0.1"])
    heard: list[Announced] = []
    other = record("tcp://127.0.0.1:4243")
    listening = Mdns(lambda: other, heard.append)
    listening.follow(["127.0.0.1"])
    second = asyncio.create_task(listening.run())
    await until(lambda: me in heard, 15, "it is heard on the interface that is there")
    for task in (running, second):
        task.cancel()
    await asyncio.wait([running, second])


async def test_a_flood_of_names_is_bounded() -> None:
    shouting = Mdns(lambda: record(), lambda other: None)
    for number in range(10_000):
        name = f"halka-{'a' * 12}{number:04}.{mdns.TYPE}".replace("0", "b").replace("1", "c")
        for digit, letter in zip("89", "de", strict=True):
            name = name.replace(digit, letter)
        shouting._on_change(None, mdns.TYPE, name, mdns.ServiceStateChange.Added)  # type: ignore[arg-type]
    assert shouting._names.qsize() == mdns.WAITING_MAX


async def test_nothing_in_a_name_ends_the_search(until: Any) -> None:
    """zeroconf refuses names that do not end in our type as we write it; they come from anybody."""
    shouting = Mdns(lambda: record(), lambda other: None)
    looking = asyncio.create_task(shouting._look_up())
    names = [f"halka-{'a' * 16}._HALKA._tcp.local.", f"HALKA-{'A' * 16}._halka._TCP.LOCAL."]
    for name in names:
        shouting._on_change(None, mdns.TYPE, name, mdns.ServiceStateChange.Added)  # type: ignore[arg-type]
    await until(lambda: looking.done() or not shouting._names.qsize(), 5, "all are looked up")
    await asyncio.sleep(0)
    assert not looking.done()
    looking.cancel()
    await asyncio.wait([looking])


# The key door -------------------------------------------------------------------------------------


@pytest.fixture
async def door() -> Any:
    me = record()
    answer = keydoor.Answer(1, me.peer_id, me.key)
    transport = await keydoor.open_door("127.0.0.1", 0, answer, time.monotonic)
    yield answer, transport.get_extra_info("sockname")[1]
    transport.close()


async def test_the_door_tells_peer_id_and_key(door: Any) -> None:
    answer, port = door
    assert await keydoor.ask("127.0.0.1", port) == answer


async def test_the_door_is_silent_to_everything_else_and_never_says_more_than_it_heard(
    door: Any,
) -> None:
    answer, port = door
    assert keydoor.ANSWER.size <= keydoor.QUERY_BYTES
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
        asker.setblocking(False)
        asker.connect(("127.0.0.1", port))
        good = (keydoor.ASK + b"n" * keydoor.NONCE_BYTES).ljust(keydoor.QUERY_BYTES, b"\0")
        for noise in (b"", b"x", good[:-1], good + b"\0", b"x" * keydoor.QUERY_BYTES, b"\0" * 9000):
            asker.send(noise)
        assert await keydoor.ask("127.0.0.1", port) == answer  # all of the above were read
        with pytest.raises(BlockingIOError):
            asker.recv(100)


async def test_an_answer_that_is_forged_or_no_key_is_not_believed(until: Any) -> None:
    """An impostor answers first: with another number, then with a key that fits no peer id."""
    me = record()

    class Impostor(asyncio.DatagramProtocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport

        def datagram_received(self, data: bytes, addr: Any) -> None:
            nonce = data[10:26]
            good = (me.peer_id.encode(), me.key.encode())
            for number, fields in (
                (b"?" * 16, good),
                (nonce, (b"a" * 16, good[1])),
                (nonce, (good[0], b"\xff" * 40)),
            ):
                self.transport.sendto(keydoor.ANSWER.pack(keydoor.TELL, number, 1, *fields), addr)

    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(Impostor, local_addr=("127.0.0.1", 0))
    port = transport.get_extra_info("sockname")[1]
    with pytest.raises(TimeoutError):
        await keydoor.ask("127.0.0.1", port, 0.2)
    transport.close()


# Together -----------------------------------------------------------------------------------------


def discovery(config: Config, seen: list[Sighted]) -> Discovery:
    me = record("tcp://127.0.0.1:1")
    return Discovery(
        config, me=lambda: me, seen=seen.append, other_cluster=print, clock=time.monotonic
    )


async def test_a_static_peer_is_found_by_its_name_once_it_is_there(
    caplog: pytest.LogCaptureFixture, until: Any
) -> None:
    port = free_port(["127.0.0.1"])
    seen: list[Sighted] = []
    looking = discovery(Config.fast_test(peers=(f"localhost:{port}",)), seen)
    running = asyncio.create_task(looking.run())
    await until(lambda: "not_found" in caplog.text, 10, "the log says that nobody is there")
    there = record()
    door = await keydoor.open_door(
        "127.0.0.1", port, keydoor.Answer(1, there.peer_id, there.key), time.monotonic
    )
    await until(lambda: seen, 10, "it is seen")
    assert seen[0] == Sighted(there.peer_id, there.key, (f"tcp://127.0.0.1:{port}",))
    door.close()
    running.cancel()
    await asyncio.wait([running])


async def test_a_key_door_that_cannot_open_is_told_and_not_fatal() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        looking = discovery(Config.fast_test(), [])
        await looking.follow(["127.0.0.1"], port)
        assert f"UDP port {port}" in looking.problem
        looking.close()
