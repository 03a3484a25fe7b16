"""Where multicast does not reach, and where another version is met."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.netns.world import Machine, members, world

FAKE = {"backend": "fake", "spread": "all"}
PORT = 42553
ALONE_S = 4.0  # by then mDNS would have been heard, if the switch had passed it on


def refused(machine: Machine) -> dict[str, str]:
    """Why, by address, as `halka status --json` tells it."""
    done = machine.halka("status", "--json")
    shown = json.loads(done.stdout) if done.returncode in (0, 4) else {"refused": ()}
    return {entry["address"]: entry["why"] for entry in shown["refused"]}


def test_where_multicast_does_not_reach_the_setting_peers_does(tmp_path: Path) -> None:
    with world(tmp_path) as made:
        pinned, told, untold = (made.machine(name) for name in ("oak", "elm", "ash"))
        for machine in (pinned, told, untold):
            machine.no_multicast()
        pinned.start("--port", str(PORT), **FAKE)
        (told.home / "config.toml").write_text(f'peers = ["{pinned.address}:{PORT}"]\n')
        untold.start(**FAKE)
        told.start(**FAKE)
        pair = ["elm", "oak"]
        made.until(
            lambda: all(members(m.status() or {"peers": ()}) == pair for m in (pinned, told)),
            20, "the peer that was told an address joins there",
        )  # fmt: skip
        made.until(
            lambda: len({m.status()["cluster"]["coordinator"] for m in (pinned, told)}) == 1,
            10, "both follow one coordinator",
        )  # fmt: skip
        assert pinned.status()["me"]["port"] == PORT
        # So it was not mDNS, which takes a second: the third one has met nobody.
        made.until(
            lambda: untold.status() and untold.status()["me"]["uptime_s"] > ALONE_S,
            20, "the third one has had time to meet the others",
        )  # fmt: skip
        assert members(untold.status()) == ["ash"]

        # Told once, it tells on: who joins one member meets them all.
        assert untold.stop() == 0
        untold.start(**FAKE, peers=f"{pinned.address}:{PORT}")
        everybody = ["ash", "elm", "oak"]
        made.until(
            lambda: all(members(m.status() or {"peers": ()}) == everybody for m in (told, untold)),
            20, "the third one, told too, meets both",
        )  # fmt: skip


def test_another_protocol_version_is_refused_by_name_on_both_sides(tmp_path: Path) -> None:
    with world(tmp_path) as made:
        old, same, new = (made.machine(name) for name in ("oak", "elm", "ash"))
        new.start(**FAKE, program=["-m", "tests.netns.other_version"])
        for machine in (old, same):
            machine.start(**FAKE)
        made.until(lambda: members(old.status() or {"peers": ()}) == ["elm", "oak"], 20, "two meet")
        pairs = [(old, new), (same, new), (new, old), (new, same)]
        made.until(
            lambda: all(other.address in refused(machine) for machine, other in pairs),
            20, "each shows whom it refused, or who refused it",
        )  # fmt: skip
        for machine, other in pairs:
            why = refused(machine)[other.address]
            assert re.match(r"(oak|elm|ash) speaks version \d+ of halka's protocol", why)
            assert "99" in why
            assert "update halka" in why
            assert f"host={other.address} code=protocol" in machine.log()
            assert why in " ".join(machine.halka("status").stdout.split())
        assert members(new.status()) == ["ash"]
        assert members(old.status()) == members(same.status()) == ["elm", "oak"]
