"""Profiles of uneven peers, measured inside of each as its agent would measure itself.

Speeds by the short-lived measuring process; links by the agents' own cluster part, a process of
which runs in every peer for some seconds (`tests.netns.measured`). One thing after another: these
peers share cores, and what one measures must not be what another takes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import msgspec

from peer import children
from peer.cluster.identity import Identity
from peer.planning.profile import Link, ModelShape, Profile
from tests.bench.inside import Said
from tests.bench.pace import Pace, is_even
from tests.bench.uneven import House, Peer
from tests.plans import PEERS

LINKS_S = 40.0  # for the peers to meet and to measure all links
SETTLE_S = 4.0  # after every link was told once: later figures are better
MEASURE_S = 200.0
PATIENCE_S = 60.0  # for a while in which the machine keeps its pace


def peer_ids(house: House) -> dict[str, str]:
    """An id for each peer's name, in the order of the description."""
    return {peer.name: PEERS[i] for i, peer in enumerate(house.peers)}


def surveyed(house: House, folder: Path, pace: Pace) -> tuple[list[Profile], ModelShape]:
    """Every peer's profile, and the model's shape. folder: of a store, complete. pace: its
    reference becomes the pace at which they all measured themselves."""
    ids = peer_ids(house)
    said = _at_one_pace(house, folder, pace)
    links = _links(house) if len(house.peers) > 1 else {}
    profiles = [
        msgspec.structs.replace(
            said[peer.name].profile,
            peer_id=ids[peer.name],
            name=peer.name,
            # A disk that streams beside a declared limit would read from memory here: no streaming.
            disk_read_bytes_per_s=0.0,
            links=tuple(links.get(peer.name, {}).values()),
        )
        for peer in house.peers
    ]
    return profiles, said[house.peers[0].name].shape


def _at_one_pace(house: House, folder: Path, pace: Pace) -> dict[str, Said]:
    """What the peers say, one after another; all again when the machine's pace changes, up to
    PATIENCE_S."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        pace.refer()
        said: dict[str, Said] = {}
        even = True
        for peer in house.peers:
            said[peer.name] = _said(house, peer, folder)
            even = is_even(pace.ratio())
            if not even and time.monotonic() < deadline:
                break
        if len(said) == len(house.peers) and (even or time.monotonic() > deadline):
            return said


def _environment(house: House, peer: Peer) -> dict[str, str]:
    clean = {k: v for k, v in children.environment().items() if not k.startswith("HALKA_")}
    given = {"HALKA_HOME": str(house.home(peer.name)), "HALKA_THREADS": "1",
             "HALKA_CLUSTER": house.tag}  # fmt: skip
    if peer.memory_bytes is not None:
        given["HALKA_MEMORY"] = str(peer.memory_bytes)
    return clean | given


def _said(house: House, peer: Peer, folder: Path) -> Said:
    words = house.module(peer.name, "tests.bench.inside", str(folder))
    done = subprocess.run(
        words, env=_environment(house, peer), capture_output=True, timeout=MEASURE_S, check=False
    )
    assert done.returncode == 0, f"{peer.name}: {done.stderr.decode()[-2000:]}"
    return msgspec.json.decode(done.stdout, type=Said)


def _links(house: House) -> dict[str, dict[str, Link]]:
    """By name, then by the other end's name, with the ids of `peer_ids`: what is told last."""
    ids = peer_ids(house)
    names = {}  # by the peer id that its identity has
    for peer in house.peers:
        identity = Identity(house.home(peer.name))
        names[identity.peer_id] = peer.name
        identity.close()  # its folder is locked until then
    found: dict[str, dict[str, Link]] = {peer.name: {} for peer in house.peers}
    running, readers = [], []
    for peer in house.peers:
        process = subprocess.Popen(
            house.module(peer.name, "tests.netns.measured", "run"),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, env=_environment(house, peer), cwd=os.sep,
        )  # fmt: skip
        running.append(process)
        reader = threading.Thread(target=_read, args=(process, found[peer.name], names, ids))
        reader.start()
        readers.append(reader)
    deadline, complete_at = time.monotonic() + LINKS_S, 0.0
    while True:
        now = time.monotonic()
        if all(
            len(told) == len(house.peers) - 1 and all(link.bytes_per_s for link in told.values())
            for told in found.values()
        ):
            complete_at = complete_at or now
            if now > complete_at + SETTLE_S:
                break
        if now > deadline:
            break
        time.sleep(0.1)
    for process in running:
        process.send_signal(signal.SIGTERM)
    for process, reader in zip(running, readers, strict=True):
        process.wait()
        reader.join()
    assert all(len(told) == len(house.peers) - 1 for told in found.values()), f"links: {found}"
    return found


def _read(
    process: subprocess.Popen[str],
    into: dict[str, Link],
    names: dict[str, str],
    ids: dict[str, str],
) -> None:
    assert process.stdout is not None
    with process.stdout as lines:
        for line in lines:
            told = json.loads(line)
            name = names[told["peer_id"]]
            into[name] = Link(ids[name], told["rtt_s"], told["bytes_per_s"])
