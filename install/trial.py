"""A throwaway cluster on this machine: several agents, one model, one question. Run by try.sh.

Only the first agent is given the model; the others fetch the parts of their own layers from it,
as they would from another machine. Whatever happens, every process that was started here is ended
and every folder that was made is removed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from peer.errors import HalkaError
from peer.models.pull import pull
from peer.models.store import Store
from peer.words.agent import Agent
from peer.words.pull import shown
from peer.words.screen import Screen, count, note, say, size
from peer.words.state import PeerState, Status

QUESTION = "What is the difference between a bicycle and a car? Answer in two sentences."
ANSWER_TOKENS_MAX = 160
START_S = 60.0  # for an agent's HTTP to answer
SERVE_S = 240.0  # for the ring to serve, parts fetched and windows loaded, on a slow laptop
END_S = 15.0  # for an agent to end after SIGTERM
LOOK_S = 0.25
CACHE = Path(__file__).resolve().parent.parent / ".cache" / "try"
SPEEDS = CACHE / "speeds.json"


class TrialFailed(HalkaError):
    """The trial cannot go on; says what was waited for."""


class Peer:
    """One agent of the trial: its folder, its process, its log."""

    def __init__(self, number: int, folder: Path, cluster: str) -> None:
        self.number, self.home = number, folder / f"peer-{number}"
        self.log = folder / f"peer-{number}.log"
        self.home.mkdir()
        if SPEEDS.exists():  # measured by an earlier trial: the peers' homes are always new
            shutil.copy(SPEEDS, self.home)
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HALKA_")}
        self.environment = kept | {
            "HALKA_HOME": str(self.home),
            "HALKA_CLUSTER": cluster,
            "HALKA_INTERFACES": "127.0.0.1",
            "HALKA_HTTP": "127.0.0.1:0",
            "HALKA_SPREAD": "all",
            "HALKA_SPARE": "off",  # it ends after an answer, and shows who holds which layers
            "HALKA_THREADS": "1",
        }
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, known: str = "") -> None:
        """Start the agent. `known`: host:port of one that runs, where multicast finds none."""
        environment = self.environment | ({"HALKA_PEERS": known} if known else {})
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "peer", "run"],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is ours; its stages end with its group
            )

    def status(self) -> Status | None:
        """What it says, or None while it does not answer. Raises TrialFailed if it is dead."""
        if self.process and (code := self.process.poll()) is not None:
            raise TrialFailed(f"peer {self.number} ended with exit code {code}")
        if not (self.home / "http").exists():
            return None
        with contextlib.suppress(HalkaError):
            return Agent(home=str(self.home)).status()
        return None

    def word(self, *words: str) -> int:
        """Run `halka ...` as this peer's user would. Returns its exit code."""
        command = [sys.executable, "-m", "peer", *words]
        return subprocess.run(command, env=self.environment, stdin=subprocess.DEVNULL).returncode

    def signal_group(self, number: signal.Signals) -> bool:
        """Signal the agent and whatever it started. Returns whether anything was left."""
        if self.process is None:
            return False
        try:
            os.killpg(self.process.pid, number)
        except (ProcessLookupError, PermissionError):  # macOS says the latter of zombies
            return False
        return True


class Progress:
    """What is being waited for: one line that changes on a terminal, a line a change elsewhere."""

    def __init__(self) -> None:
        self.last, self.began_s, self.tty = "", time.monotonic(), sys.stderr.isatty()

    def show(self, text: str) -> None:
        """Now it is this."""
        if self.tty:
            seconds = time.monotonic() - self.began_s
            sys.stderr.write(f"\r\033[K  {text}, {seconds:.0f} s")
            sys.stderr.flush()
        elif text != self.last:
            note(f"  {text}")
        self.last = text

    def end(self) -> None:
        """Leave the line clear."""
        if self.tty and self.last:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()
        self.last = ""


def main() -> int:
    """Returns 0 when the answer came from a ring of all peers."""
    args = arguments()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    folder = Path(tempfile.mkdtemp(prefix="halka-try-"))
    peers: list[Peer] = []
    try:
        cluster = f"try-{secrets.token_hex(4)}"
        peers += [Peer(number, folder, cluster) for number in range(1, args.peers + 1)]
        return trial(peers, args.question)
    except KeyboardInterrupt:
        note("\nhalka: stopped; ending what was started")
        return 130
    except HalkaError as error:
        note(f"\nhalka: the trial failed: {error}")
        for peer in peers:
            show_log(peer)
        return 1
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # nothing interrupts the clearing up
        end(peers)
        shutil.rmtree(folder, ignore_errors=True)


def trial(peers: list[Peer], question: str) -> int:
    """Model, agents, ring, plan, answer."""
    first, last = peers[0], peers[-1]
    note("the model goes to peer 1 alone; the others fetch their layers from it")
    give_model(first)
    note(f"starting {count(len(peers), 'peer')} on this machine")
    with progress() as line:
        serve(peers, line)
    say()
    if first.word("plan"):
        raise TrialFailed("there is no plan to show")
    with contextlib.suppress(OSError):
        shutil.copy(first.home / SPEEDS.name, SPEEDS)
    say()
    show_disk(peers)
    note(f"asking peer {last.number}, over its own HTTP: {question}")
    say()
    words = ("chat", question, "--temperature", "0", "--max-tokens", str(ANSWER_TOKENS_MAX))
    if code := last.word(*words, "--stats"):
        raise TrialFailed(f"the question was not answered (exit code {code})")
    return 0


def give_model(peer: Peer) -> None:
    """Put the small model into the peer's store; it is kept in the checkout for the next time."""
    with shown("fetching the model smollm2") as update:
        manifest = pull("smollm2", Store(CACHE), update)
    folder = Path("models") / manifest.digest
    shutil.copytree(CACHE / folder, peer.home / folder)


def serve(peers: list[Peer], line: Progress) -> None:
    """Start all and wait until each of them says that all of them serve. Raises TrialFailed."""
    first = peers[0]
    first.start()
    deadline_s = time.monotonic() + START_S
    while (status := first.status()) is None:
        line.show("peer 1 is starting")
        pause(deadline_s, "peer 1 does not answer")
    for peer in peers[1:]:
        peer.start(known=f"127.0.0.1:{status.me.port}")
    deadline_s = time.monotonic() + SERVE_S
    while True:
        states = [peer.status() for peer in peers]
        if all(serves(state, len(peers)) for state in states):
            return
        text = describe(states[0], len(peers))
        line.show(text)
        pause(deadline_s, text)


def pause(deadline_s: float, text: str) -> None:
    """Look again a little later. Raises TrialFailed when that is too late."""
    if time.monotonic() > deadline_s:
        raise TrialFailed(f"it took too long; last seen: {text}")
    time.sleep(LOOK_S)


def serves(status: Status | None, peers: int) -> bool:
    """This agent knows a ring of so many peers that serves."""
    return (
        status is not None
        and status.model.phase == "serving"
        and sum(bool(peer.layers) for peer in status.peers) == peers
    )


def describe(status: Status | None, peers: int) -> str:
    """How far the cluster is, in a few words."""
    if status is None:
        return "peer 1 does not answer"
    here = sum(peer.state == "member" for peer in status.peers)
    if here < peers:
        return f"finding each other: {here} of {peers} peers"
    if not status.cluster.coordinator:
        return "choosing a coordinator"
    busy = [text for peer in status.peers if (text := doing(peer))]
    if busy:
        return ", ".join(sorted(busy))
    return status.model.why or f"the model is {status.model.phase}"


def doing(peer: PeerState) -> str:
    """What keeps this peer busy, or ""."""
    name = peer.peer_id[:4]
    if peer.phase == "failed":
        return f"{name} failed: {peer.why}"
    if peer.phase == "fetching":
        return f"{name} fetches {size(peer.done_bytes)} of {size(peer.total_bytes)}"
    return f"{name} loads" if peer.phase == "loading" else ""


def show_disk(peers: list[Peer]) -> None:
    """What each peer has on disk: only its own layers, but for the one that has the model."""
    held = [sum(f.stat().st_size for f in p.home.rglob("*") if f.is_file()) for p in peers]
    note(
        "  on disk: "
        + ", ".join(f"peer {p.number} {size(n)}" for p, n in zip(peers, held, strict=True))
    )


def show_log(peer: Peer, lines: int = 15) -> None:
    """The end of an agent's log."""
    screen = Screen.of(sys.stderr)
    with contextlib.suppress(OSError):
        text = peer.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
        note(f"--- the log of peer {peer.number} ends with")
        for line in text:
            note(screen.clean(line))


def end(peers: list[Peer]) -> None:
    """End every process that was started: politely, then not."""
    started = [peer for peer in peers if peer.process is not None]
    for peer in started:
        peer.signal_group(signal.SIGTERM)
    deadline_s = time.monotonic() + END_S
    for peer in started:
        assert peer.process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            peer.process.wait(max(0.1, deadline_s - time.monotonic()))
        if peer.process.poll() is None:
            note(f"halka: peer {peer.number} did not end by itself within {END_S:.0f} s")
        if peer.signal_group(signal.SIGKILL):
            peer.process.wait()


def arguments() -> argparse.Namespace:
    """What was typed after try.sh."""
    parser = argparse.ArgumentParser(prog="install/try.sh", description=__doc__)
    parser.add_argument("--peers", type=_peers, default=3, metavar="N", help="1 to 16 (3)")
    parser.add_argument("question", nargs="?", default=QUESTION)
    return parser.parse_args()


def _peers(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 16:
        raise argparse.ArgumentTypeError("a whole number from 1 to 16")
    return int(text)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def progress() -> Iterator[Progress]:
    """Progress whose line is cleared at the end, whatever the end is."""
    line = Progress()
    try:
        yield line
    finally:
        line.end()


if __name__ == "__main__":
    sys.exit(main())
