"""`halka plan`: the plan that runs, what it takes beside what it took, and what if."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from peer import cli
from peer.planning.plan import Forecast, PeerForecast
from peer.words import forecast
from peer.words.basis import TimedPeer, TimedRing
from peer.words.forecast import Seen
from peer.words.screen import Screen
from tests.agent_double import AgentDouble, a_peer, a_status
from tests.homes import GIB, IDS, MODEL, home, link, made_of, peer, running, told

A, B = IDS["desk"], IDS["attic"]
EXPECTED = Forecast(
    0.0667, 6.32, 512, 0.00144, 0.0401,
    (
        PeerForecast(A, 0.0401, 3.8, 0.0, 4000 << 20, 0, 0, True),
        PeerForecast(B, 0.0251, 2.5, 0.0, 1100 << 20, 0, 0, True),
    ),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*os.environ]:
        if name.startswith(("HALKA_", "LC_")) or name in ("NO_COLOR", "LANG", "PYTHONUNBUFFERED"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HALKA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HALKA_HTTP", "127.0.0.1:0")


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[AgentDouble]:
    """A double in the home of `tests.homes`, with its plan running."""
    status = a_status(peers=[a_peer("a", "desk", me=True), a_peer("b", "attic"),
                             a_peer("c", "mini")])  # fmt: skip
    plan = running()
    shown = msgspec.to_builtins(plan) | {
        "phase": "serving",
        "forecast": msgspec.to_builtins(EXPECTED),
        "timed": {"tpot_s": 0.0694, "peers": {A: {"decode_s": 0.0421, "prefill_s": 0.0081}}},
    }
    profiles = told(home(), plan)
    answers = {"/halka/status": status, "/halka/plan": shown, "/halka/profiles": profiles}
    with AgentDouble(**answers) as double:
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / "http").write_text(double.http + "\n")
        yield double


def words(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> str:
    assert cli.main(["plan", *argv]) == code
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert cli.main(["plan", *argv]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    return shown.err


# The plan that runs ----------------------------------------------------------------------------


def test_what_the_plan_takes_stands_beside_what_it_took(
    agent: AgentDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = words(capsys)
    assert "TPOT  predicted 66.7 ms, measured 69.4 ms a token; 1.4 ms of it on the" in shown
    assert "TTFT  predicted 6.3 s for a prompt of 512 tokens" in shown
    assert "many answers at once share up to 25 tokens a second" in shown
    assert re.search(r"desk: 19 layers on the CPU, 40.1 ms a token predicted, 42.1 ms\s", shown)
    assert (
        "attic: 5 layers on the CPU, 25.1 ms a token\n    llama.cpp, planned 1.1 GiB, usable"
        in shown
    )
    assert "Without layers\n  mini: with mini a token would take 73 ms" in shown
    assert max(map(len, shown.splitlines())) <= 80
    changed = {"kv_type": "q8_0", "flash": "on", "speculation": "off", "context": 131072}
    agent.answers["/halka/plan"]["split"] |= changed
    assert "speculation off\n" in (shown := words(capsys))
    assert max(map(len, shown.splitlines())) <= 80


def test_a_measured_ttft_is_told_once_every_stage_has_said_what_a_row_takes(
    agent: AgentDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    agent.answers["/halka/plan"]["timed"]["peers"][B] = {"prefill_s": 0.005}
    shown = words(capsys)
    # 512 rows of 8.1 and 5 ms, and the links as predicted: 6.7 + 0.02 s.
    assert "predicted 6.3 s, by what the stages took 6.7 s for a prompt" in shown


def test_a_plan_that_was_lost_is_not_called_a_model_that_was_never_pulled(
    agent: AgentDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = "attic was lost; planning again"
    agent.answers["/halka/plan"] = None
    agent.answers["/halka/status"] = a_status(model={"why": lost})
    assert cli.main(["plan"]) == 4
    shown = capsys.readouterr().out
    assert f"There is no plan now: {lost}" in shown
    assert "pull" not in shown
    assert cli.main(["chat", "hello"]) == 4
    shown = capsys.readouterr().err
    assert lost in shown
    assert "pull" not in shown
    agent.answers["/halka/status"] = a_status(model={"why": "no model yet: halka pull smollm2"})
    assert cli.main(["plan"]) == 4
    assert "Get one: halka pull smollm2" in capsys.readouterr().out


def test_a_plan_of_an_older_agent_is_shown_without_a_forecast(
    agent: AgentDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    del agent.answers["/halka/plan"]["forecast"], agent.answers["/halka/plan"]["timed"]
    shown = words(capsys)
    assert "TPOT" not in shown
    assert "desk: llama.cpp, planned 3.8 GiB, usable 9.0 GiB" in shown


def seen_of(plan_changes: dict[str, Any], expected: Forecast | None = None) -> Seen:
    split = msgspec.structs.replace(running().split, **plan_changes)
    labels = {A: "desk", B: "attic"}
    return Seen(MODEL, split, expected, labels=labels, gpus={A: ("RTX 3070", "cuda")})


def with_gpu_and_disk() -> Seen:
    """desk runs layers 0 to 11 with 8 on its GPU; attic the others, 3 of them from disk."""
    first, last = running().split.windows
    windows = (
        msgspec.structs.replace(first, peer_id=A, last=12, gpu_layers=8),
        msgspec.structs.replace(last, peer_id=B, first=12, streamed_bytes=600 << 20),
    )
    peers = (
        PeerForecast(A, 0.004, 0.2, 0.0, 1 << 30, 2 << 30, 0, True),
        PeerForecast(B, 0.06, 2.0, 0.3, 2 << 30, 0, 600 << 20, False),
    )
    return seen_of({"windows": windows}, Forecast(0.37, 2.3, 512, 0.001, 0.36, peers))


def test_layers_on_a_gpu_and_layers_from_disk_are_drawn_and_told() -> None:
    seen = with_gpu_and_disk()
    screen = Screen(width=78)
    assert forecast.picture(seen, screen) == [
        "  ╭▸ desk           ████▓▓▓▓▓▓▓▓············ 0–11      head            3.0 GiB",
        "  ╰─ attic          ············░░░█████████ 12–23     tail            2.0 GiB",
        "     █ on the CPU   ▓ on a GPU   ░ read from disk again for each token",
    ]
    assert forecast.peers(seen, Screen(width=100))[:4] == [
        "  desk: 12 layers, 8 of them on RTX 3070, 4.0 ms a token",
        "    llama.cpp, planned 1.0 GiB, 2.0 GiB on the GPU besides",
        "  attic: 12 layers on the CPU, 60.0 ms a token (usual for its kind, not measured); reads "
        "600.0 MiB",
        "    from disk for each token, and waits 300 ms for it",
    ]
    assert "  of attic, only what is usual for such a machine is known" in forecast.times(
        seen, screen
    )


def test_a_screen_without_unicode_gets_the_same_picture_in_ascii() -> None:
    drawn = forecast.picture(with_gpu_and_disk(), Screen(width=78, unicode=False))
    assert drawn[0].startswith("  ,> desk           ####@@@@@@@@............ 0-11")
    assert drawn[1].startswith("  '- attic          ............%%%######### 12-23")
    assert drawn[2] == "     # on the CPU   @ on a GPU   % read from disk again for each token"


def test_a_ring_on_processors_alone_needs_no_legend() -> None:
    assert len(forecast.picture(seen_of({}), Screen())) == 2


# What if ---------------------------------------------------------------------------------------


def numbers(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(words(capsys, *argv, "--json", code=code))
    return answer


def windows_of(outcome: dict[str, Any]) -> dict[str, tuple[int, int]]:
    names = {peer_id: name for name, peer_id in IDS.items()}
    return {names[w["peer_id"]]: (w["first"], w["last"]) for w in outcome["split"]["windows"]}


@pytest.mark.parametrize("slower", [1.0, 1.5, 2.5])
def test_a_what_if_of_nothing_is_the_plan_of_now(
    agent: AgentDouble, capsys: pytest.CaptureFixture[str], slower: float
) -> None:
    profiles = home()
    profiles = (*profiles[:2], peer("mini", 3 * GIB, 6e-3 / slower))
    agent.answers["/halka/profiles"] = told(profiles, made_of(profiles))
    answer = numbers(capsys, "--with", "desk:memory=+1")  # a byte
    assert answer["then"]["forecast"] == answer["now"]["forecast"]
    assert windows_of(answer["then"]) == windows_of(answer["now"])
    assert answer["moves"] == {"parts": 0, "bytes": 0}
    shown = words(capsys, "--with", "desk:memory=+1")
    assert "the same peers run the same layers" in " ".join(shown.split())


def test_more_memory_is_told_in_words_and_moves_parts(
    agent: AgentDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = numbers(capsys, "--with", "desk:memory=+8GiB")
    assert windows_of(answer["then"]) == {"desk": (0, 24)}
    # desk holds all but the last five layers and the output.
    assert answer["moves"] == {"parts": 6, "bytes": 5 * (200 << 20) + (64 << 20)}
    shown = words(capsys, "--with", "desk:memory=+8GiB")
    assert re.match(r"Now         desk 19, attic 5; TPOT \d\d\.\d ms, TTFT 6\.\d s\n", shown)
    assert "What would be, for tiny-q4_k_m" in shown
    told = " ".join(shown.partition("Difference")[2].split())
    assert re.match(
        r"TPOT 5\d\.\d ms instead of 7\d\.\d ms \(1\.4 times as fast\); TTFT 4\.8 s", told
    )
    assert "6 parts, 1.0 GiB would move" in told
    assert "Nothing was changed" in told
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        (["--without", "attic"], {"desk": 19, "mini": 5}),
        (["--only", "attic,mini"], {"attic": 19, "mini": 5}),
        (["--only", "attic", "--only", "mini"], {"attic": 19, "mini": 5}),
        (["--with", "desk:memory=16GiB"], {"desk": 24}),
        (["--with", "desk:memory==16GiB"], {"desk": 24}),
        (["--with", "desk:memory=-1GiB"], {"desk": 14, "attic": 10}),
        (["--with", "attic:speed=x9,memory=+4GiB"], {"attic": 24}),
        (["--window", "attic=0-7"], {"attic": 8, "desk": 16}),
        (["--window", f"{IDS['attic'][:3]}=0–7"], {"attic": 8, "desk": 16}),
    ],
)
def test_each_change_has_its_effect(
    agent: AgentDouble, capsys: pytest.CaptureFixture[str], argv: list[str], wanted: dict[str, int]
) -> None:
    then = windows_of(numbers(capsys, *argv)["then"])
    assert {name: last - first for name, (first, last) in then.items()} == wanted


def test_a_slower_cable_is_slower_and_rounds_and_context_are_as_wished(
    agent: AgentDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = numbers(capsys, "--link", "attic=1mbit,20ms", "--without", "mini")
    hops = [answer[when]["forecast"]["hops_s"] for when in ("now", "then")]
    assert hops[1] == pytest.approx(hops[0] + 2 * 19e-3 / 2 + 4096 / 1.25e5 - 4096 / 1e8)
    answer = numbers(capsys, "--rounds", "2", "--context", "1024")
    assert len(answer["then"]["split"]["windows"]) == 4
    assert answer["then"]["split"]["context"] == 1024
    shown = words(capsys, "--context", "1024", "--objective", "throughput")
    assert "1024 tokens of context instead of 4096" in " ".join(shown.split())


def test_another_type_of_kv_cache_is_told_with_what_it_saves(
    agent: AgentDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    agent.answers["/halka/profiles"]["shape"]["kv_types"] = ["f16", "q8_0"]
    agent.answers["/halka/profiles"]["plan"]["shape"]["kv_types"] = ["f16", "q8_0"]
    answer = numbers(capsys, "--kv", "q8_0", "--context", "4096")
    assert answer["then"]["split"]["kv_type"] == "q8_0"
    shown = " ".join(words(capsys, "--kv", "q8_0", "--context", "4096").split())
    assert "a KV cache of q8_0 instead of f16" in shown
    assert "slots · KV cache q8_0" in shown or "slots, KV cache q8_0" in shown


def test_a_cache_that_the_model_cannot_have_is_not_told_of_a_plan(
    agent: AgentDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = numbers(capsys, "--kv", "q8_0")
    assert "kv_type" not in answer["then"]["split"]
    assert "cannot have one of q8_0" in answer["then"]["split"]["why"]


def test_a_prompt_that_is_read_in_chunks_is_timed_stage_beside_stage(
    agent: AgentDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    agent.answers["/halka/plan"]["timed"]["peers"][B] = {"prefill_s": 0.005}
    agent.answers["/halka/plan"]["forecast"]["chunk_tokens"] = 64
    for stage in agent.answers["/halka/plan"]["forecast"]["peers"]:
        stage["prefill_s"] = 0.5
    # Eight chunks of 64 rows: 8.1 and 5 ms a row, the slower one eight times; and beside it what
    # the prediction has beside 0.5 s in each of two stages, eight times in one.
    expected = 64 * (8.1e-3 + 5e-3 + 7 * 8.1e-3) + (EXPECTED.ttft_s - 0.5 * 9)
    shown = " ".join(words(capsys).split())
    assert f"by what the stages took {expected:.1f} s for a prompt of 512 tokens, in chunks of" in (
        shown
    )


def test_a_cluster_that_would_be_too_small_is_no_plan_and_says_why(
    agent: AgentDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = words(capsys, "--only", "mini", code=4)
    assert shown.startswith("Now         desk 19, attic 5")
    assert "There is no plan for tiny-q4_k_m" in shown
    assert re.search(r"\d MiB\s+are\s+missing", shown)
    assert "missing" in numbers(capsys, "--only", "mini", code=4)["then"]["why"]


def test_another_model_is_planned_with_speeds_of_the_one_that_was_measured(
    agent: AgentDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = numbers(capsys, "--model", "3B:q4_k_m")
    assert answer["model"] == "llama-3.2-3b-q4_k_m"
    assert "then" not in answer
    shown = words(capsys, "--model", "3B:q4_k_m")
    assert "speeds of desk, attic, mini are reckoned from those of another model" in shown
    # desk reads 200 MiB in 2 ms; the 3B's 28 layers weigh 1.66 GiB, its output 0.3 GiB.
    assert answer["now"]["forecast"]["tpot_s"] == pytest.approx(0.0204, rel=0.05)
    assert words(capsys, "--model", "tiny").startswith("A plan for tiny-q4_k_m")


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["--without", "attik"], "--without attik: there is no such peer"),
        (["--with", "moon:memory=+1GiB"], "it is one of: attic, desk, mini"),
        (["--with", "desk:memory=+banana"], "memory is a size such as 8GiB"),
        (["--with", "desk:memory=-9GiB"], "--with desk:memory: nothing would be left"),
        (["--with", "desk:ram=9GiB"], "`ram=9GiB` is not understood"),
        (["--with", "desk:memory"], "`memory` is not understood"),
        (["--with", "desk:"], "it is NAME, or NAME:memory=+8GiB"),
        (["--with", "desk:speed=0"], "speed is a factor from x0.01"),
        (["--with", "desk:gpu_memory=8GiB"], "desk has no GPU"),
        (["--with", "desk:disk=1000000TB/s"], "no machine has"),
        (["--with", "nas"], "which file describes it?"),
        (["--link", "desk"], "it is NAME=1gbit"),
        (["--link", "desk=fast"], "it is a rate such as"),
        (["--link", "desk=0mbit"], "more than nothing"),
        (["--window", "desk=11-0"], "it is NAME=FIRST-LAST"),
        (["--window", "desk=0-99"], "tiny-q4_k_m has the layers 0 to 23"),
        (["--window", "desk=0-1", "--window", "desk=4-5"], "one peer is given two windows"),
        (["--rounds", "0"], "--rounds 0: it is a number from 1 to 64"),
        (["--context", "-5"], "--context -5: it is a number from 1"),
        (["--model", "gpt"], "no such model is here, and no such file"),
        (["--model", "9B:q4_k_m"], "SIZE:QUANT of 1B"),
        (["--profiles", "nowhere.toml"], "nowhere.toml: No such file"),
    ],
)
def test_what_cannot_be_is_refused_with_two(
    agent: AgentDouble, capsys: pytest.CaptureFixture[str], argv: list[str], why: str
) -> None:
    assert why in refused(capsys, *argv)


def test_a_name_that_could_be_two_peers_lists_both(
    agent: AgentDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    twins = (*home(), peer("deskette", 4 * GIB, 2e-3, peer_id="d" * 16, links=(link("desk", 1e8),)))
    agent.answers["/halka/profiles"] = told(home(), running()) | {
        "profiles": msgspec.to_builtins(twins)
    }
    assert windows_of(numbers(capsys, "--with", "desk:memory=9GiB")["then"]) == {"desk": (0, 24)}
    said = refused(capsys, "--without", "des")
    assert "--without des: that could be desk, deskette" in said


def test_an_agent_that_is_not_there_is_three_unless_a_file_is_given(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["plan", "--without", "attic"]) == 3
    capsys.readouterr()
    (tmp_path / "home.json").write_bytes(msgspec.json.encode(told(home(), running())))
    shown = words(capsys, "--profiles", str(tmp_path / "home.json"), "--without", "attic")
    assert "Now         desk 19, attic 5" in shown


def test_a_saved_home_gives_the_same_forecast_off_line(
    agent: AgentDouble, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    saved = tmp_path / "home.json"
    assert cli.main(["plan", "--save", str(saved)]) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert f"halka plan --profiles {saved}" in said.err
    asked = numbers(capsys, "--with", "desk:memory=+8GiB")
    assert asked == numbers(capsys, "--profiles", str(saved), "--with", "desk:memory=+8GiB")


def test_timings_without_a_forecast_are_still_told() -> None:
    seen = seen_of({})
    timed = TimedRing(0.0093, {A: TimedPeer(0.005)})
    alone = Seen(seen.shape, seen.split, None, timed)
    assert forecast.times(alone, Screen()) == ["  TPOT  measured 9.3 ms a token"]
    line = forecast.in_a_line(alone, Screen())
    assert line.endswith("what it takes cannot be predicted from these profiles")
