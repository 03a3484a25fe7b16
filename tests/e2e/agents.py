"""Real agents as processes on 127.0.0.1: started, asked, killed, and gone at the end.

A `House` is a cluster of its own, of agents that run the fake engine, and sees their processes as
an administrator would: by their command lines and environments, also after their agent was killed.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from tests import conftest

START_S = 30.0  # for whatever has no bound of its own, on a busy machine
LOOK_S = 0.05
STAGE, TEXT, MEASURE = "peer.ring.stage", "peer.models.vocabulary", "peer.planning.measure"
CHECKOUT = Path(__file__).parents[2]


def until(condition: Callable[[], Any], within_s: float, what: str) -> Any:
    """What the condition gives once that is true. Fails after `within_s`."""
    deadline_s = time.monotonic() + within_s
    while not (found := condition()):
        assert time.monotonic() < deadline_s, f"not within {within_s:g} s: {what}"
        time.sleep(LOOK_S)
    return found


class Agent:
    """One agent: its folder, its process, its log."""

    def __init__(self, number: int, home: Path, cluster: str, settings: dict[str, str]) -> None:
        self.number, self.home, self.log = number, home, home.with_suffix(".log")
        home.mkdir(exist_ok=True)
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HALKA_")}
        self.environment = kept | {
            "PYTHONPATH": str(CHECKOUT),
            "HALKA_HOME": str(home),
            "HALKA_CLUSTER": cluster,
            "HALKA_INTERFACES": "127.0.0.1",
            "HALKA_HTTP": "127.0.0.1:0",
            "HALKA_SPREAD": "all",
            "HALKA_THREADS": "1",
            "HALKA_BACKEND": "fake",
            **settings,
        }
        self.process: subprocess.Popen[bytes] | None = None
        self.peer_id = ""
        self.module = "peer"  # that is run

    def start(self, known: str = "") -> None:
        """Start it (again). known: host:port of an agent that runs, where multicast finds none."""
        environment = self.environment | ({"HALKA_PEERS": known} if known else {})
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", self.module, "run"],
                env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        conftest.kept.add(self.process.pid)

    @property
    def pid(self) -> int:
        """Of the agent's own process."""
        assert self.process is not None
        return self.process.pid

    @property
    def runs(self) -> bool:
        """Whether it has not ended."""
        return self.process is not None and self.process.poll() is None

    @property
    def address(self) -> tuple[str, int]:
        """Where its API listens, by its own word. Raises OSError while there is none."""
        host, _, port = (self.home / "http").read_text().strip().rpartition(":")
        return host, int(port)

    @property
    def url(self) -> str:
        """OpenAI's base_url."""
        return "http://{}:{}/v1".format(*self.address)

    def request(
        self, method: str, path: str, body: bytes | None = None, timeout_s: float = 60.0
    ) -> tuple[int, Any]:
        """HTTP status and JSON. Raises OSError, http.client.HTTPException."""
        connection = http.client.HTTPConnection(*self.address, timeout=timeout_s)
        with contextlib.closing(connection):
            headers = {"Content-Type": "application/json"} if body is not None else {}
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, json.loads(response.read())

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        """Ask as a client does. body: bytes as they are, or values."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.request("POST", path, data)

    def status(self) -> dict[str, Any]:
        """Its status, {} while it does not answer."""
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            code, status = self.request("GET", "/halka/status", timeout_s=2.0)
            if code == 200:
                self.peer_id = status["me"]["peer_id"]
                return status  # type: ignore[no-any-return]
        return {}

    def members(self) -> frozenset[str]:
        """Peer ids of the cluster's members as this agent sees them, itself among them."""
        peers = self.status().get("peers", ())
        return frozenset(p["peer_id"] for p in peers if p.get("state", "member") == "member")

    def running(self) -> int:
        """Answers under way of which it is the entry."""
        answers = self.status().get("answers", {})
        return int(answers.get("running", 0))

    def word(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """`halka ...`, as this peer's user types it."""
        return subprocess.run(
            [sys.executable, "-m", "peer", *words],
            env=self.environment | environment, stdin=subprocess.DEVNULL, capture_output=True,
            text=True, timeout=60, check=False,
        )  # fmt: skip

    def processes(self, module: str) -> list[psutil.Process]:
        """Its processes of one kind, also those that outlived it."""
        return [p for p in _processes(self.home) if module in _words(p)]

    def stage(self, plan: str) -> psutil.Process:
        """Its stage of this plan, by its log."""
        started = re.findall(rf"stage=started plan={re.escape(plan)} pid=(\d+)", self.text())
        return psutil.Process(int(started[-1]))

    def text(self) -> str:
        """Its log."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def kill(self) -> float:
        """kill -9 of the agent alone. Returns when."""
        assert self.process is not None
        self.process.kill()
        at = time.monotonic()
        self.process.wait()
        return at

    def stop(self) -> tuple[int, float]:
        """SIGTERM. Returns its exit code and the seconds that it took."""
        assert self.process is not None
        began = time.monotonic()
        self.process.terminate()
        return self.process.wait(15), time.monotonic() - began


class House:
    """A cluster of its own. settings: HALKA_* for all of its agents."""

    def __init__(self, folder: Path, peers: int, **settings: str) -> None:
        self.folder, self.settings = folder, settings
        self.cluster = f"test-{secrets.token_hex(6)}"
        self.agents: list[Agent] = []
        for _ in range(peers):
            self.add()

    def add(self, home: Path | None = None) -> Agent:
        """One agent more, not started."""
        number = len(self.agents) + 1
        where = home or self.folder / f"peer-{number}"
        self.agents.append(Agent(number, where, self.cluster, self.settings))
        return self.agents[-1]

    def start(self, *agents: Agent) -> None:
        """Start these, or all, and wait until each of them answers HTTP."""
        for agent in agents or self.agents:
            agent.start(self._known(agent))
            until(lambda agent=agent: agent.status() or not agent.runs, START_S, "it answers")  # type: ignore[misc]
            assert agent.runs, f"agent {agent.number} ended: {agent.text()[-2000:]}"

    def _known(self, newcomer: Agent) -> str:
        for agent in self.agents:
            if agent is not newcomer and agent.runs and (status := agent.status()):
                return f"127.0.0.1:{status['me']['port']}"
        return ""

    def serves(self, agents: Sequence[Agent], model: str = "") -> str:
        """The plan that all of these serve and that has exactly them in its ring, or ""."""
        plans = set()
        for agent in agents:
            status = agent.status()
            found = status.get("model", {})
            ring = {p["peer_id"] for p in status.get("peers", ()) if p["layers"]}
            if found.get("phase") != "serving" or model not in ("", found["id"]):
                return ""
            if len(ring) != len(agents):
                return ""
            plans.add((found["plan"], frozenset(ring)))
        ids = frozenset(agent.peer_id for agent in agents)
        plan, ring_ids = next(iter(plans))
        return str(plan) if len(plans) == 1 and ring_ids == ids else ""

    def serving(self, *agents: Agent, model: str = "", within_s: float = START_S) -> str:
        """Wait until these (or all) serve one plan together; its number."""
        wanted = agents or tuple(self.agents)
        found = until(
            lambda: self.serves(wanted, model), within_s, f"{len(wanted)} peers serve {model}"
        )
        return str(found)

    def ring(self) -> list[Agent]:
        """The agents of the plan that is served, in ring order."""
        alive = next(agent for agent in self.agents if agent.runs)
        by_id = {agent.peer_id: agent for agent in self.agents}
        ring = [peer for peer in alive.status()["peers"] if peer["layers"]]
        return [by_id[p["peer_id"]] for p in sorted(ring, key=lambda p: p["layers"][0])]

    def coordinator(self) -> Agent:
        """The agent that coordinates, as all that run agree."""
        ids = {agent.status()["cluster"]["coordinator"] for agent in self.agents if agent.runs}
        assert len(ids) == 1, ids
        return next(agent for agent in self.agents if agent.peer_id in ids)

    def others(self, agent: Agent) -> list[Agent]:
        """All but this one."""
        return [other for other in self.agents if other is not agent]

    def close(self) -> None:
        """End every process that was started here. Fails where one outlives its agent."""
        for agent in self.agents:
            if agent.runs:
                assert agent.process is not None
                with contextlib.suppress(ProcessLookupError):
                    os.kill(agent.pid, signal.SIGCONT)
                agent.process.terminate()
        for agent in self.agents:
            if agent.process is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    agent.process.wait(10)
                if agent.runs:
                    agent.kill()
                conftest.kept.discard(agent.pid)
        left = [process for agent in self.agents for process in _processes(agent.home)]
        _, alive = psutil.wait_procs(left, 5)
        for process in alive:
            process.kill()
        assert not alive, f"outlived their agents: {[_words(p) for p in alive]}"

    @contextlib.contextmanager
    def whole(self, model: str) -> Iterator[None]:
        """Begin with all agents serving this model, and nothing left of older plans; what they log
        meanwhile goes to stdout."""
        with self.watched():
            for agent in self.agents:
                if not agent.runs:
                    self.start(agent)
            self.serving(model=model)
            until(self.one_stage_each, 15, "older plans are over")
            yield

    def one_stage_each(self) -> bool:
        """Whether nothing is left of older plans."""
        return all(len(agent.processes(STAGE)) == 1 for agent in self.agents)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """What the agents log meanwhile goes to stdout, which a failing test shows."""
        before = {agent.number: len(agent.text()) for agent in self.agents}
        try:
            yield
        finally:
            for agent in self.agents:
                text = agent.text()[before.get(agent.number, 0) :]
                sys.stdout.write(f"--- agent {agent.number} ({agent.peer_id}):\n{text}\n")


def _processes(home: Path) -> list[psutil.Process]:
    """All processes of one HALKA_HOME."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if (
                "peer" in _words(process)
                and process.environ().get("HALKA_HOME") == str(home)
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                found.append(process)
    return found


def _words(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
