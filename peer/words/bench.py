"""`halka bench`: how fast the ring answers, and the whole model in one process beside it.

A client of the agent: it asks as others do and reads the clock. Where this machine has the whole
model, a process of its own runs it on the same engine in the same minutes, in turns with the ring,
so that the ratio holds though the machine be busy. Takes a few minutes, `--quick` less than one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from peer.errors import CommandError
from peer.planning.plan import Plan
from peer.words import bench_results as results
from peer.words.agent import Agent
from peer.words.basis import Basis, TimedRing
from peer.words.bench_alone import Alongside
from peer.words.bench_results import Machine, Results, Setup
from peer.words.bench_runs import AT_ONCE, QUICK, USUAL, Runs
from peer.words.screen import Screen, count, note, say
from peer.words.state import Status

_CPU_INFO = Path("/proc/cpuinfo")


class Shown(msgspec.Struct, frozen=True):
    """What the agent adds to its plan."""

    timed: TimedRing = TimedRing()


def command(args: Namespace) -> int:
    """Returns 0. Raises: CommandError (3: not running, 4: nothing is served), KeyboardInterrupt,
    once every answer and process that it began has ended."""
    agent = Agent(args.home, args.http)
    status = agent.status()
    plan = _plan(agent, status)
    basis = agent.question("/halka/profiles", Basis)
    timed = agent.question("/halka/plan", Shown).timed
    busy = max(status.answers.running, timed.active)
    pace = QUICK if args.quick else USUAL
    setup = _setup(status, plan, args.quick, busy)
    if busy:
        note(
            f"the ring is busy with {count(busy, 'other answer')}: this will look slower than it is"
        )
    own = next((p for p in basis.profiles if p.peer_id == status.me.peer_id), None)
    beside = Alongside(plan, status, own, max(AT_ONCE))
    hurry = True
    try:
        found = measured(Runs(agent, plan, beside, pace), setup, beside)
        hurry = False
    finally:
        beside.close(hurry)
    if args.json:
        say(json.dumps(msgspec.to_builtins(found), indent=2))
    else:
        say("\n".join(results.lines(found, Screen.of(sys.stdout))))
    return 0


def _plan(agent: Agent, status: Status) -> Plan:
    model = status.model
    if not model.id and (not model.why or model.why.startswith("no model yet")):
        raise CommandError("the cluster has no model yet", "get one: halka pull smollm2", 4)
    plan = agent.question("/halka/plan", Plan | None)  # type: ignore[arg-type]
    if plan is None or model.phase != "serving":
        why = model.why or "its ring is being made ready"
        raise CommandError(f"nothing is served now: {why}", "halka status --watch", 4)
    return plan


def measured(runs: Runs, setup: Setup, beside: Alongside) -> Results:
    """Everything, with a line before each part of it."""
    steps = 6 + len(AT_ONCE)
    at = iter(range(1, steps + 1))

    def going(what: str) -> None:
        note(f"[{next(at)}/{steps}] {what}")

    going("loading the whole model into one process, for comparison")
    beside.open()
    if not beside.said.measured:
        note(f"  it cannot be: {beside.said.why}")
        note(f"  mend it: {beside.said.mend}")
    going("warming up: how fast is this ring?")
    runs.warm_up()
    before = runs.drafts()
    going(f"one answer, decode{runs.turns}")
    decode, ttft_s, tpot_s = runs.decode()
    many = []
    for answers in AT_ONCE:
        going(f"{count(answers, 'answer')} at once")
        many.append(runs.many(answers))
    drafted, accepted = runs.drafted_since(before)
    going(f"a long prompt{runs.turns}")
    prefill = runs.prefill()
    going("a chat's second turn")
    reuse = runs.reuse()
    going("a text to be written again with changes")
    drafts = runs.edit()
    timed = runs.timed()
    names = {machine.name: machine for machine in setup.machines}
    stages = tuple(
        results.StageTimes(
            name, names[name].layers if name in names else (),
            took.decode_s, took.wait_s, took.send_s, took.prefill_s,
        )
        for name, took in runs.named(timed)
    )  # fmt: skip
    return Results(
        setup, beside.said, decode, prefill, tuple(many), reuse, drafts, stages,
        ttft_s, tpot_s, drafted, accepted,
    )  # fmt: skip


def _setup(status: Status, plan: Plan, quick: bool, busy: int) -> Setup:
    labels, split = status.labels(), plan.split
    peers = {peer.peer_id: peer for peer in status.peers}
    machines = [
        Machine(
            labels[peer_id],
            peer.os,
            peer.cores,
            peer.memory_total_bytes,
            tuple(dict.fromkeys(e.device or e.kind for e in peer.engines)),
            peer.version,
            tuple(
                (split.windows[i].first, split.windows[i].last) for i in plan.windows_of(peer_id)
            ),
        )
        for peer_id in plan.peers
        if (peer := peers.get(peer_id))
    ]
    return Setup(
        date=datetime.now(UTC).date().isoformat(),
        version=status.version,
        commit=commit(),
        asked_from=processor(),
        machines=tuple(machines),
        model=plan.shape.model,
        digest=plan.shape.digest,
        layers=plan.shape.layers,
        context=split.context,
        plan=str(plan.id),
        slots=split.slots,
        kv_type=split.kv_type,
        flash=split.flash,
        speculation=split.speculation,
        quick=quick,
        busy=busy,
    )


def commit() -> str:
    """Of the checkout that this program runs from, "" where it is installed otherwise."""
    top = Path(__file__).parents[2]
    if not (top / ".git").exists():
        return ""
    words = ["git", "-C", str(top), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def processor() -> str:
    """This machine's, with its cores, as far as it tells."""
    import os
    import platform

    name = platform.processor() or platform.machine()
    try:
        for line in _CPU_INFO.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:  # not Linux
        pass
    return f"{os.cpu_count() or 1} x {name}"
