"""`halka doctor`: each thing that may be amiss, and what mends it; it changes nothing."""

from __future__ import annotations

import json
import os
import socket
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace as changed

from peer import cli
from peer.planning import survey, thunderbolt
from peer.planning.profile import Port, Profile
from peer.words import checkup, checkup_rdma, doctor
from peer.words.checkup import Check, Facts
from peer.words.checkup_rdma import BRIDGE_OFF, RECOVERY, RdmaFacts
from peer.words.screen import Screen
from tests.agent_double import AgentDouble, a_status

DATA = Path(__file__).parents[1] / "data" / "thunderbolt"
GOOD = Facts(
    "linux", "/home/x/halka", engines=["llama_cpp"], free_bytes=50 << 30, agent="127.0.0.1:42552",
    networks=["10.0.0.5"],
)  # fmt: skip
OAK, ELM, FIR = (letter * 16 for letter in "oef")


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*os.environ]:
        if name.startswith("HALKA_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HALKA_HOME", str(tmp_path / "home"))


def text(name: str) -> str:
    return (DATA / name).read_text(encoding="utf-8")


def ports(of: str, devices: str = "devices.txt") -> tuple[Port, ...]:
    return thunderbolt.ports(text(f"{of}.json"), text("hardware.txt"), text(devices))


def a_mac(peer_id: str, *found: Port) -> Profile:
    rest = {"os": "macos", "cores": 8, "memory_total_bytes": 1, "memory_available_bytes": 1}
    name = {OAK: "oak", ELM: "elm", FIR: "fir"}[peer_id]
    return msgspec.convert({"peer_id": peer_id, "name": name, "ports": found, **rest}, Profile)


MACS = (a_mac(OAK, *ports("oak")), a_mac(ELM, *ports("elm")))
READY = RdmaFacts(ports("oak"), "26.2", "enabled\n", frozenset(), OAK, MACS, wanted=True)


def not_ok(found: list[Check]) -> list[Check]:
    return [check for check in found if check.level != "ok"]


# The machine ----------------------------------------------------------------------------------


def test_a_good_machine_has_nothing_but_good_lines() -> None:
    assert not_ok(checkup.checks(GOOD)) == []


@pytest.mark.parametrize(
    ("facts", "level", "words", "mend"),
    [
        (replace(GOOD, settings_error="config.toml: bad"), "wrong", "config.toml: bad", ""),
        (replace(GOOD, warnings=["no setting `ful`"]), "note", "`ful`", ""),
        (replace(GOOD, engines=[], install="pip install x"), "wrong", "no engine", "pip install x"),
        (replace(GOOD, engines=[], wanted="mlx", install="i"), "wrong", "for, mlx, is", "i, or"),
        (replace(GOOD, system="darwin", install="i"), "note", "not on MLX", "i"),
        (replace(GOOD, writable=False), "wrong", "cannot write", "sudo chown -R"),
        (replace(GOOD, free_bytes=1 << 20), "wrong", "0.0 GiB left", "HALKA_HOME"),
        (replace(GOOD, free_bytes=2 << 30), "note", "2.0 GiB left", ""),
        (replace(GOOD, network_error="no home network"), "wrong", "no home", "interfaces ="),
        (replace(GOOD, deaf=["10.0.0.5"]), "wrong", "multicast", "peers ="),
        (replace(GOOD, agent="", agent_error="not up", agent_mend="go"), "note", "not up", "go"),
        (replace(GOOD, problems=[("a model is broken", "halka pull x")]), "wrong", "broken", ""),
    ],
)  # fmt: skip
def test_what_is_amiss_is_one_line_with_what_mends_it(
    facts: Facts, level: str, words: str, mend: str
) -> None:
    (check,) = not_ok(checkup.checks(facts))
    assert check.level == level
    assert words in check.what
    assert mend in check.mend


@pytest.mark.parametrize(
    ("system", "backend", "extras"),
    [
        ("darwin", "auto", "llama,mlx"),
        ("linux", "auto", "llama"),
        ("linux", "mlx", "llama,mlx"),  # llama.cpp makes tokens of text in any case
        ("darwin", "llama_cpp", "llama"),
    ],
)
def test_what_mends_a_missing_engine_is_the_one_that_is_wanted(
    system: str, backend: str, extras: str
) -> None:
    assert survey.with_engines(system, backend) == f"pip install 'halka[{extras}]'"


def test_a_port_that_another_program_has_is_named_before_the_agent_that_cannot_start() -> None:
    facts = replace(GOOD, agent="", agent_error="no agent", http="h:1", port_error="in use")
    wrong, note = not_ok(checkup.checks(facts))
    assert (wrong.level, note.level) == ("wrong", "note")
    assert "h:1 cannot be had: in use" in wrong.what


def test_one_deaf_network_beside_one_that_hears_is_fine() -> None:
    facts = replace(GOOD, networks=["10.0.0.5", "10.1.0.5"], deaf=["10.1.0.5"])
    assert not_ok(checkup.checks(facts)) == []


# RDMA -----------------------------------------------------------------------------------------


def test_a_mac_that_is_ready_for_rdma_is_told_so() -> None:
    found = checkup_rdma.checks(READY)
    assert not_ok(found) == []
    assert any("a cable to elm, at 80 Gb/s" in check.what for check in found)


def test_islands_that_are_off_are_the_last_thing_that_is_lacking() -> None:
    (note,) = not_ok(checkup_rdma.checks(replace(READY, wanted=False)))
    assert note.level == "note"
    assert "not encrypted" in note.what
    assert 'islands = "auto"' in note.mend


@pytest.mark.parametrize(
    ("facts", "words", "mend"),
    [
        (replace(READY, version="26.1.3"), "26.1.3 knows no RDMA", "softwareupdate"),
        (replace(READY, version="15.7", rdma=None), "15.7 knows no RDMA", "softwareupdate"),
        (replace(READY, rdma="disabled"), "not enabled", RECOVERY),
        (replace(READY, ports=ports("oak", "no-devices.txt")), "lists no device", "restart"),
        (replace(READY, bridged=frozenset({"en6"})), "Bridge is up, with en6", BRIDGE_OFF),
        (replace(READY, profiles=(MACS[0], changed(MACS[1], ports=MACS[1].ports[:1]))),
         "no cable goes from this Mac to elm", "a Thunderbolt 5 cable between each two"),
    ],
)  # fmt: skip
def test_what_a_mac_lacks_for_rdma_is_wrong_only_where_islands_are_wanted(
    facts: RdmaFacts, words: str, mend: str
) -> None:
    (check,) = not_ok(checkup_rdma.checks(facts))
    assert check.level == "wrong"
    assert words in check.what
    assert mend in check.mend
    levels = {check.level for check in checkup_rdma.checks(replace(facts, wanted=False))}
    assert "wrong" not in levels


def test_thunderbolt_4_is_told_that_enabling_never_brings_devices() -> None:
    facts = RdmaFacts(ports("fir", "no-devices.txt"), "26.4", "enabled", frozenset({"en1"}))
    first, cables = checkup_rdma.checks(facts)
    assert first.level == cables.level == "note"
    assert "there never will be" in first.what
    assert "1 of its ports" in cables.what
    off, _ = checkup_rdma.checks(replace(facts, rdma="disabled"))
    assert "RDMA needs Thunderbolt 5" in off.what
    (nothing,) = checkup_rdma.checks(RdmaFacts(()))
    assert "no Thunderbolt port" in nothing.what


def test_macs_that_are_not_all_cabled_to_each_other_are_told_of() -> None:
    def port(a: str, b: str) -> Port:
        return Port(f"{a}{b}", f"{b}{a}", bits_per_s=80e9, rdma="rdma_en1")

    oak = a_mac(OAK, port("o", "e"), port("o", "f"))
    elm, fir = a_mac(ELM, port("e", "o")), a_mac(FIR, port("f", "o"))
    star = replace(READY, ports=oak.ports, profiles=(oak, elm, fir))
    (note,) = not_ok(checkup_rdma.checks(star))
    assert "not all cabled to each other" in note.what
    elm, fir = (changed(m, ports=(*m.ports, p)) for m, p in ((elm, port("e", "f")),
                                                            (fir, port("f", "e"))))  # fmt: skip
    assert not_ok(checkup_rdma.checks(replace(star, profiles=(oak, elm, fir)))) == []
    (alone,) = not_ok(checkup_rdma.checks(replace(star, profiles=(oak,))))
    assert "no other Mac" in alone.what


# The word -------------------------------------------------------------------------------------


def test_the_word_looks_and_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = cli.main(["doctor", "--json", "--http", "127.0.0.1:0"])
    told = json.loads(capsys.readouterr().out)["checks"]
    assert code == (4 if any(check["level"] == "wrong" for check in told) else 0)
    assert any("halka is not running" in check["what"] for check in told)
    assert any(check["mend"] == "halka run" for check in told)
    assert list(tmp_path.iterdir()) == []  # not even its own folder


def test_settings_that_cannot_be_used_are_told_and_the_rest_is_looked_at(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "config.toml").write_text("backend = 'gpu'\n")
    found = doctor.examine(Namespace(home=None, http=None))
    assert found[0].level == "wrong"
    assert "`backend` is one of" in found[0].what
    assert len(found) > 3


def test_a_taken_port_and_a_folder_of_somebody_else_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        http = f"127.0.0.1:{other.getsockname()[1]}"
        # It accepts and says nothing: no agent, within the client's patience.
        monkeypatch.setattr("peer.words.agent.ANSWER_S", 0.2)
        monkeypatch.setattr("os.access", lambda path, mode: False)
        found = doctor.examine(Namespace(home=str(tmp_path / "home"), http=http))
    assert any("cannot be had: Address already in use" in check.what for check in found)
    assert any("cannot write" in check.what for check in found)


def test_an_agent_that_runs_tells_its_problems_and_a_mac_its_cables() -> None:
    def printing(name: str) -> tuple[str, ...]:
        script = "import sys; sys.stdout.write(open(sys.argv[1]).read())"
        return (sys.executable, "-c", script, str(DATA / name))

    commands = {
        "profiler": printing("oak.json"),
        "hardware": printing("hardware.txt"),
        "devices": printing("devices.txt"),
        "bridge": printing("bridge.txt"),
        "rdma": (sys.executable, "-c", "print('enabled')"),
        "version": (sys.executable, "-c", "print('26.3')"),
    }
    status = a_status(problems=[{"what": "a part is broken", "mend": "halka pull x"}])
    status["me"]["peer_id"] = OAK
    profiles = {"profiles": [msgspec.to_builtins(mac) for mac in MACS]}
    with AgentDouble(**{"/halka/status": status, "/halka/profiles": profiles}) as double:
        found = doctor.examine(Namespace(home=None, http=double.http), "darwin", commands)
    assert Check("wrong", "a part is broken", "halka pull x") in found
    assert any("a cable to elm" in check.what for check in found)
    assert any("Bridge is up, with en1, en6, en2" in check.what for check in found)
    shown = "\n".join(doctor.lines(found, Screen(colour=False)))
    assert f"mend it: {BRIDGE_OFF}" in shown  # on one line, to be copied
    assert max(len(line) for line in shown.splitlines()) <= 80
