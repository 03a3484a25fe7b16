"""Clusters that are not here: TOML that people write, JSON that was saved, and what is wrong in
either, named by peer and field."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from peer import cli
from peer.errors import CommandError
from peer.planning import abilities, families
from peer.planning.abilities import Size
from peer.planning.profile import Profile
from peer.words import cables, paces, profiles
from peer.words.cables import Cable
from peer.words.profiles import Source, read
from tests import fake_models
from tests.homes import IDS, MODEL, home, link, peer, running, told

Written = Callable[[str], Path]

HOME = """
[[peer]]
name = "desk"
memory = "12GiB"
cores = 8
cpu_bandwidth = "40GB/s"
cpu_flops = "500G"
gpu = "cuda"
gpu_memory = "8GiB"
gpu_bandwidth = "200GB/s"
gpu_flops = "8T"
disk = "2GB/s"
link = "1gbit"
rtt = "0.4ms"

[[peer]]
name = "attic"
memory = 17179869184
link = "100mbit"
rtt = "4ms"

[[peer]]
name = "mini"
os = "macos"
memory = "10GiB"
gpu = "metal"
gpu_bandwidth = "50GB/s"

[[link]]
from = "desk"
to = "mini"
bandwidth = "2.5gbit"
"""


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*os.environ]:
        if name.startswith(("HALKA_", "LC_")) or name in ("NO_COLOR", "LANG"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HALKA_HOME", str(tmp_path / "home"))


@pytest.fixture
def written(tmp_path: Path) -> Written:
    def write(text: str, name: str = "home.toml") -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def named(source: Source, name: str) -> Profile:
    return next(p for p in source.basis.profiles if p.name == name)


def test_what_people_write_becomes_profiles(written: Written) -> None:
    source = read(written(HOME))
    desk, attic, mini = (named(source, name) for name in ("desk", "attic", "mini"))
    assert (desk.memory_available_bytes, attic.memory_available_bytes) == (12 << 30, 16 << 30)
    assert [(e.kind, e.memory_free_bytes) for e in desk.engines] == [("cuda", 8 << 30), ("cpu", 0)]
    assert (desk.cores, desk.threads, desk.disk_read_bytes_per_s) == (8, 8, 2e9)
    assert (desk.unified_memory, mini.unified_memory, mini.os) == (False, True, "macos")
    assert mini.engines[0].memory_free_bytes == 10 << 30
    assert len({p.peer_id for p in source.basis.profiles}) == 3
    assert desk.peer_id == named(read(written(HOME)), "desk").peer_id, "the same every time"


def test_a_way_is_as_fast_as_the_slower_end_unless_a_link_says_otherwise(written: Written) -> None:
    source = read(written(HOME))
    desk, attic, mini = (named(source, name) for name in ("desk", "attic", "mini"))
    ways = {(a.name, b.name): cables.link(a, b) for a in (desk, attic) for b in (attic, desk, mini)}
    for pair in (("desk", "attic"), ("attic", "desk")):
        found = ways[pair]
        assert found is not None
        assert (found.bytes_per_s, found.rtt_s) == (1.25e7, 4e-3)
    to_mini, from_attic = ways["desk", "mini"], ways["attic", "mini"]
    assert to_mini is not None
    assert (to_mini.bytes_per_s, to_mini.rtt_s) == (3.125e8, 4e-4)
    assert from_attic is not None
    assert from_attic.bytes_per_s == 1.25e7, "of mini's own cable nothing is known"


def test_bandwidths_become_speeds_of_the_models_layers(written: Written) -> None:
    source = read(written(HOME))
    shape = families.shape("8B:q4_k_m")
    desk = named(source, "desk")
    paced = paces.paced(desk, shape, source.paces[desk.peer_id])
    able = abilities.able(paced, shape, Size(1, 1, 512))
    assert able.gpu is not None
    for pace, rate, operations, slower in (
        (able.cpu, 40e9, 500e9, abilities.KV_FACTOR), (able.gpu, 200e9, 8e12, 1.0)
    ):  # fmt: skip
        assert pace.measured
        kv = abilities.FILL_TOKENS * slower * sum(shape.layer_kv_bytes)
        assert pace.decode_s.sum() == pytest.approx((sum(shape.layer_bytes) + kv) / rate)
        # 218 million weights a layer, each multiplied and added once for each of 512 tokens
        assert pace.prefill_s.sum() == pytest.approx(2 * 512 * 6.98e9 / operations, rel=0.03)
        assert pace.output_s == shape.output_bytes / rate
    attic = named(source, "attic")
    assert paces.paced(attic, shape, source.paces[attic.peer_id]) == attic, "nothing is made up"


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ('[[peer]]\nmemory = "8GiB"', "peer 1: name: is missing"),
        ('[[peer]]\nname = "desk"', "peer desk: memory: is missing: it is a size such as 8GiB"),
        ('[[peer]]\nname = "desk"\nmemory = 0', "peer desk: memory: is a size such as 8GiB, not"),
        ('[[peer]]\nname = "desk"\nmemory = nan', "peer desk: memory: is a size such as 8GiB; no"),
        ('[[peer]]\nname = "desk"\nmemory = "-2GiB"', "peer desk: memory: "),
        ('[[peer]]\nname = "desk"\nmemory = "8"\nmemory_ = 1', "memory_: there is no such field; "
         "is it `memory`"),
        ('[[peer]]\nname = "desk"\nmemory = "8GiB"\ndisk = 1e18', "peer desk: disk: is a rate"),
        ('[[peer]]\nname = "desk"\nmemory = "8GiB"\ndisk = 0', "peer desk: disk: "),
        ('[[peer]]\nname = "desk"\nmemory = "8GiB"\ncpu_bandwidth = inf', "peer desk: cpu_bandwid"),
        ('[[peer]]\nname = "desk"\nmemory = "8GiB"\ncpu_flops = "8GiB"', "peer desk: cpu_flops: "),
        ('[[peer]]\nname = "desk"\nmemory = "8GiB"\ncores = 0', "peer desk: cores: is a whole"),
        ('[[peer]]\nname = "desk"\nmemory = "8GiB"\nunified = 1', "peer desk: unified: is true"),
        ('[[peer]]\nname = "desk"\nmemory = "8GiB"\ngpu = "voodoo"', "peer desk: gpu: is one of"),
        ('[[peer]]\nname = "desk"\nmemory = "8GiB"\ngpu = "cuda"', "peer desk: gpu_memory: is mis"),
        ('[[peer]]\nname = "desk"\nmemory = "8GiB"\ngpu_memory = 1', "peer desk: gpu: is missing"),
        ('[[peer]]\nname = "desk"\nmemory = "8GiB"\nlink = "5ms"', "peer desk: link: is a rate"),
        ('[[peer]]\nname = "desk"\nmemory = "8GiB"\nrtt = "2min"', "peer desk: rtt: is a time"),
        ('[[peer]]\nname = ""\nmemory = "8GiB"', "peer 1: name: is a short text"),
        ('[[peer]]\nname = "a\\nb"\nmemory = "8GiB"', "name: is a short text"),
        ('[[peer]]\nname = "desk"\nmemory = "8GiB"\n' * 2, "peer desk: name: two peers have it"),
        ('[peer]\nname = "desk"', "write [[peer]] above each"),
        ("[[node]]", "`node` is not understood"),
        ("", "it has 0 peers"), ("peer = 3", "is a list of tables"), ("[[peer", "not TOML"),
        (HOME + '[[link]]\nfrom = "desk"\nto = "nas"\nrtt = 1', "link 2: to: there is no peer nas"),
        (HOME + '[[link]]\nfrom = "desk"\nto = "desk"\nrtt = 1', "link 2: to: is the same peer"),
        (HOME + '[[link]]\nfrom = "desk"\nto = "attic"', "link 2: bandwidth: is missing"),
        (HOME + '[[link]]\nto = "attic"', "link 2: from: is missing"),
        (HOME + '[[link]]\nfrom = "desk"\nto = "attic"\nbandwidth = -1', "link 2: bandwidth: is a"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_by_peer_and_field(
    written: Written, capsys: pytest.CaptureFixture[str], wrong: str, why: str
) -> None:
    path = written(wrong)
    assert cli.main(["plan", "--profiles", str(path), "--model", "8B"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert f"halka: {path}: " in said.err
    assert why in said.err


def altered(field: str, value: Any) -> str:
    """A saved home whose attic says something else."""
    saved = told(home(), running())
    saved["profiles"][1][field] = value
    return json.dumps(saved)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "not JSON"), ("[]", "no list of `profiles`"), ("{}", "no list of `profiles`"),
        ('{"profiles": []}', "it has no profiles"),
        ('{"profiles": [3]}', "profile 1: Expected `object`"),
        ('{"profiles": [{"name": "nas"}]}', "peer nas: Object missing required field `peer_id`"),
        (altered("memory_available_bytes", 0), "profile of attic is refused: 0 bytes of memory"),
        (altered("memory_available_bytes", -1), "peer attic: Expected `int` >= 0"),
        (altered("memory_total_bytes", None), "peer attic: Expected `int`"),
        (altered("disk_read_bytes_per_s", float("nan")), "peer attic: Expected `float` >= 0"),
        (altered("disk_read_bytes_per_s", 1e18), "peer attic: Expected `float` <= 1"),
        (altered("disk_read_bytes_per_s", 9e14), "profile of attic is refused: a disk of 9e+14"),
        (altered("speeds", [{}]), "peer attic: Object missing required field"),
        (altered("peer_id", IDS["desk"]), "a peer is there twice"),
    ],
)  # fmt: skip
def test_a_saved_profile_that_says_nonsense_is_refused_by_name(
    written: Written, text: str, why: str
) -> None:
    with pytest.raises(CommandError, match=r"home\.json: ") as raised:
        read(written(text, "home.json"))
    assert why in str(raised.value)
    assert raised.value.exit_code == 2


@pytest.mark.parametrize("field", ["shape", "plan", "models"])
def test_a_saved_model_that_contradicts_itself_is_refused(written: Written, field: str) -> None:
    saved = told(home(), running())
    each = saved[field][0] if field == "models" else saved[field]
    (each if field == "shape" else each["shape"])["layer_kinds"] = [0, 1]
    with pytest.raises(CommandError, match="contradicts itself"):
        read(written(json.dumps(saved), "home.json"))


def test_a_zero_speed_in_a_saved_profile_is_refused(written: Written) -> None:
    speeds = [msgspec.to_builtins(home()[1].speeds[0]) | {"decode_s": [0.0]}]
    with pytest.raises(CommandError, match="attic is refused: 0 s for a layer on cpu"):
        read(written(altered("speeds", speeds), "home.json"))


def test_a_cluster_that_is_not_here_is_planned_off_line(
    written: Written, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["plan", "--profiles", str(written(HOME)), "--model"]
    assert cli.main([*argv, "8B:q4_k_m"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("A plan for llama-3.1-8b-q4_k_m\n  32 layers · 1 peer · 1 round")
    assert "desk: 32 layers on cuda GPU" in shown
    assert cli.main([*argv, "405B:f16", "--only", "attic"]) == 4
    assert "There is no plan for llama-3.1-405b-f16" in capsys.readouterr().out


def test_a_model_larger_than_the_cluster_streams_and_says_so(
    written: Written, capsys: pytest.CaptureFixture[str]
) -> None:
    small = '[[peer]]\nname = "desk"\nmemory = "4GiB"\ndisk = "2GB/s"\n'
    argv = ["plan", "--profiles", str(written(small)), "--model", "14B:q4_k_m"]
    assert cli.main(argv) == 0
    shown = capsys.readouterr().out
    assert "read from disk again for each token" in shown
    assert "reads" in shown
    assert "(usual for its kind, not measured)" in " ".join(shown.split())


def test_a_peer_of_a_file_can_join_the_cluster_of_another(
    written: Written, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from tests.agent_double import AgentDouble

    fast = '[[peer]]\nname = "nas"\nmemory = "64GiB"\ncpu_bandwidth = "500GB/s"\nlink = "10gbit"\n'
    with AgentDouble(**{"/halka/profiles": told(home(), running())}) as double:
        argv = ["plan", "--http", double.http, "--profiles", str(written(fast))]
        assert cli.main([*argv, "--with", "nas", "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)
        ring = {w["peer_id"] for w in answer["then"]["split"]["windows"]}
        assert ring == {profiles.peer_id("nas")}
        assert len(answer["now"]["split"]["windows"]) == 2
        assert cli.main([*argv, "--with", "desk"]) == 2
        assert "--with desk: there is no such peer" in capsys.readouterr().err


def test_a_files_shape_is_read_from_its_header_alone(
    written: Written, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("HALKA_BACKEND", "fake")
    gguf = fake_models.write(tmp_path / "small.gguf", layers=6, name="small")
    argv = ["plan", "--profiles", str(written(HOME)), "--json", "--model"]
    assert cli.main([*argv, str(gguf)]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["model"] == "small-f32"
    assert answer["now"]["split"]["windows"][-1]["last"] == 6
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(gguf.read_bytes()[:100])
    assert cli.main([*argv, str(damaged)]) == 2
    assert "damaged.gguf" in capsys.readouterr().err
    assert not (tmp_path / "home").exists(), "nothing is stored"


def test_a_cable_is_as_fast_as_itself_and_the_other_end() -> None:
    profiles = (
        peer("desk", 1, 1.0, links=(link("attic", 1e7), link("mini", 1e8))),
        peer("attic", 1, 1.0, links=(link("desk", 1e7), link("mini", 1e7))),
        peer("mini", 1, 1.0),
    )
    fast = {p.name: p for p in cables.recabled(profiles, IDS["attic"], Cable(1.25e8))}
    way = cables.link(fast["attic"], fast["desk"])
    assert way is not None
    assert (way.bytes_per_s, way.rtt_s) == (1e8, 1e-3), "desk sends 1e8 to mini, and no more"
    slow = {p.name: p for p in cables.recabled(profiles, IDS["attic"], Cable(1e6, 0.02))}
    for a, b in (("attic", "desk"), ("desk", "attic"), ("attic", "mini"), ("mini", "attic")):
        way = cables.link(slow[a], slow[b])
        assert way is not None
        assert (way.bytes_per_s, way.rtt_s) == (1e6, 0.02)
    assert cables.link(slow["desk"], slow["mini"]) == cables.link(profiles[0], profiles[2])


def test_twice_the_speed_is_half_the_time_measured_or_not() -> None:
    desk = peer("desk", 1 << 30, 2e-3)
    faster = paces.faster(desk, MODEL, 2.0)
    assert faster.speeds[0].decode_s == (1e-3,)
    assert faster.speeds[0].prefill_s == (0.1,)
    other = families.shape("1B:q8_0")
    before, after = (
        abilities.able(p, other, Size(1, 1, 512)).cpu.decode_s.sum()
        for p in (desk, paces.faster(desk, other, 4.0))
    )
    assert after == pytest.approx(before / 4)
