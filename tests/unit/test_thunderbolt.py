"""Thunderbolt ports and cables, from what macOS's commands print and what peers tell."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from peer.cluster import thunderbolt_shell as shell
from peer.planning import thunderbolt as t
from peer.planning.profile import Port, Profile

DATA = Path(__file__).parents[1] / "data" / "thunderbolt"
OAK, ELM, FIR, ASH = (letter * 16 for letter in "oefa")
REST = {"os": "macos", "cores": 8, "memory_total_bytes": 1, "memory_available_bytes": 1}


def text(name: str) -> str:
    return (DATA / name).read_text(encoding="utf-8")


def ports(of: str, devices: str = "devices.txt", **addresses: tuple[str, ...]) -> tuple[Port, ...]:
    return t.ports(text(f"{of}.json"), text("hardware.txt"), text(devices), addresses)


def a_peer(peer_id: str, *found: Port) -> Profile:
    return msgspec.convert({"peer_id": peer_id, "name": peer_id, "ports": found, **REST}, Profile)


def mesh(*peer_ids: str, rdma: bool = True) -> list[Profile]:
    """Peers with a cable from each to each other."""
    return [
        a_peer(a, *(Port(f"{a}-{b}", f"{b}-{a}", bits_per_s=80e9, rdma="rdma_en2" if rdma else "")
                    for b in peer_ids if a != b))
        for a in peer_ids
    ]  # fmt: skip


# What the commands print ----------------------------------------------------------------------


def test_ports_are_told_with_their_interface_their_device_and_the_mac_at_the_other_end() -> None:
    one, two, three = ports("oak", en6=("169.254.77.1",), bridge0=("10.0.0.1",))
    assert [p.receptacle for p in (one, two, three)] == ["1", "2", "3"]
    assert (two.interface, two.rdma, two.bits_per_s) == ("en6", "rdma_en6", 80e9)
    assert two.peer_uuid == ports("elm")[1].uuid
    assert two.addresses == ("169.254.77.1",)
    assert one.addresses == ("10.0.0.1",)  # it is a member of the bridge
    assert (one.peer_uuid, one.bits_per_s) == ("", 120e9)  # what an empty port can do


def test_docks_displays_and_the_macs_behind_a_dock_are_at_no_cables_end() -> None:
    assert [bool(port.peer_uuid) for port in ports("oak")] == [False, True, False]
    assert [bool(port.peer_uuid) for port in ports("elm")] == [False, True, False]
    assert "000000F1" in text("oak.json")  # a Mac behind the dock


def test_the_kind_of_thunderbolt_follows_from_the_speeds() -> None:
    assert t.generation(ports("oak", "no-devices.txt")) == 5
    assert t.generation(ports("fir", "no-devices.txt")) == 4
    assert t.generation(ports("fir", "no-devices.txt")[:0]) == 0
    assert t.generation([Port("x" * 8, rdma="rdma_en1", bits_per_s=40e9)]) == 5


def test_odd_answers_are_passed_over_and_what_is_no_answer_is_refused() -> None:
    found = ports("odd")
    assert [(p.uuid[:8], p.peer_uuid[:8], p.receptacle) for p in found] == [
        ("00000004", "00000005", "2"),
        ("00000002", "", ""),
    ]
    for wrong in ("", "{}", "[]", "null", "[" * 100_000, '{"SPThunderboltDataType": {}}', "x" * 99):
        with pytest.raises(t.Unread):
            t.ports(wrong, text("hardware.txt"))
    with pytest.raises(t.Unread):
        t.ports(" " * (t.TEXT_BYTES_MAX + 1), "")
    many = [{"domain_uuid_key": f"{n:08X}", "receptacle_1_tag": {}} for n in range(1000)]
    assert len(t.ports(json.dumps({"SPThunderboltDataType": many}), "")) == t.PORTS_MAX


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.just("0A0B0C0D-1"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.sampled_from(
            ["domain_uuid_key", "receptacle_1_tag", "_items", "receptacle_id_key",
             "current_speed_key", "SPThunderboltDataType"]
        ),
        inner, max_size=4,
    ),
    max_leaves=20,
)  # fmt: skip


@given(buses=st.lists(json_values, max_size=6), noise=st.text(max_size=200))
def test_whatever_the_commands_print_ports_are_such_as_may_travel(buses: Any, noise: str) -> None:
    found = t.ports(json.dumps({"SPThunderboltDataType": buses}), text("hardware.txt"), noise)
    assert msgspec.convert(msgspec.to_builtins(found), tuple[Port, ...]) == found
    t.interfaces(noise)
    t.bridged(noise)
    with contextlib.suppress(t.Unread):
        t.ports(noise, noise, noise)


def test_interfaces_and_devices_are_those_of_thunderbolt_alone() -> None:
    assert t.interfaces(text("hardware.txt")) == {"1": "en1", "2": "en6", "3": "en2"}
    wrong = "Hardware Port: Thunderbolt 1\nDevice: en1; reboot\nHardware Port: Thunderbolt 2\n\nx"
    assert t.interfaces(wrong) == {}
    assert t.rdma_devices(text("devices.txt")) == {"rdma_en1", "rdma_en6", "rdma_en2"}
    assert t.rdma_devices(text("no-devices.txt")) == frozenset()
    assert t.rdma_devices("mlx5_0 0000\nrdma_en1;x 1") == frozenset()


def test_a_bridge_counts_while_it_is_up() -> None:
    up = text("bridge.txt")
    assert t.bridged(up) == {"en1", "en6", "en2"}
    assert t.bridged(up.replace("<UP,", "<")) == frozenset()
    assert t.bridged("ifconfig: interface bridge0 does not exist") == frozenset()
    assert t.bridged("") == frozenset()


# What it means --------------------------------------------------------------------------------


def test_a_cable_is_what_both_ends_tell_and_never_the_word_of_one() -> None:
    oak, elm = a_peer(OAK, *ports("oak")), a_peer(ELM, *ports("elm"))
    (cable,) = t.cables([oak, elm])
    assert cable.peers == (ELM, OAK)
    assert (cable.end(OAK).receptacle, cable.end(ELM).receptacle) == ("2", "2")
    assert (cable.bits_per_s, cable.rdma) == (80e9, True)
    assert t.cables([elm, oak]) == (cable,)
    silent = replace(elm, ports=tuple(replace(port, peer_uuid="") for port in elm.ports))
    assert t.cables([oak, silent]) == ()
    elsewhere = replace(elm, ports=tuple(replace(p, peer_uuid="0" * 8) for p in elm.ports))
    assert t.cables([oak, elsewhere]) == ()
    assert t.cables([oak]) == ()


def test_an_identity_that_two_peers_claim_is_nobodys() -> None:
    oak, elm, thief = (a_peer(p, *ports(n)) for p, n in ((OAK, "oak"), (ELM, "elm"), (ASH, "elm")))
    assert t.cables([oak, elm, thief]) == ()


def test_a_cable_between_two_ports_of_one_mac_is_none() -> None:
    assert t.cables([a_peer(OAK, Port("a", "b"), Port("b", "a"))]) == ()


def test_groups_are_those_in_which_each_is_cabled_to_each_other() -> None:
    assert t.fully_cabled(mesh(OAK, ELM, FIR)) == (tuple(sorted((OAK, ELM, FIR))),)
    oak, elm, fir = mesh(OAK, ELM, FIR)
    cut = replace(fir, ports=fir.ports[:1])  # no cable from fir to elm any more
    assert t.fully_cabled([oak, elm, cut]) == ((ELM, OAK), (FIR, OAK))
    two = mesh(OAK, ELM) + mesh(FIR, ASH, rdma=False)
    assert t.fully_cabled(two) == ((ASH, FIR), (ELM, OAK))
    assert t.fully_cabled(two, rdma=True) == ((ELM, OAK),)
    assert t.fully_cabled([oak]) == t.fully_cabled([]) == ()


def test_the_devices_of_a_group_are_told_by_rank_or_not_at_all() -> None:
    group = (OAK, ELM)
    cabled = [a_peer(OAK, *ports("oak")), a_peer(ELM, *ports("elm"))]
    assert t.device_matrix(group, cabled) == (("", "rdma_en6"), ("rdma_en6", ""))
    without = [a_peer(OAK, *ports("oak", "no-devices.txt")), cabled[1]]
    assert t.device_matrix(group, without) == ()
    assert t.device_matrix((OAK, ELM, FIR), cabled) == ()


# Asking macOS ---------------------------------------------------------------------------------


def printing(name: str) -> tuple[str, ...]:
    script = "import sys; sys.stdout.write(open(sys.argv[1]).read())"
    return (sys.executable, "-c", script, str(DATA / name))


async def test_the_three_commands_are_asked_and_put_together() -> None:
    commands = {
        "profiler": printing("oak.json"),
        "hardware": printing("hardware.txt"),
        "devices": printing("devices.txt"),
    }
    assert await shell.look({"en6": ("169.254.1.1",)}, commands=commands) == ports(
        "oak", en6=("169.254.1.1",)
    )
    commands["devices"] = ("/nowhere/ibv_devices",)  # as on a macOS before 26.2
    assert await shell.look(commands=commands) == ports("oak", "no-devices.txt")
    commands["profiler"] = (sys.executable, "-c", "raise SystemExit(1)")
    with pytest.raises(t.Unread):
        await shell.look(commands=commands)


async def test_a_command_that_hangs_or_never_stops_printing_is_ended() -> None:
    hangs = (sys.executable, "-c", "import signal; print('x', flush=True); signal.pause()")
    assert await shell.output(hangs, 0.5) is None
    prints = (sys.executable, "-c", "while True: print('x' * 4096)")
    assert await shell.output(prints, 30.0) is None


async def test_nothing_is_asked_where_there_is_no_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*words: str, **settings: Any) -> None:
        raise AssertionError(words)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", run)
    await shell.watch(lambda found: pytest.fail(str(found)), system="linux")
