"""What `halka bench` found, as values, and as a table that reads the same without a terminal."""

from __future__ import annotations

import msgspec

from peer.planning.profile import engine_name
from peer.words import ring
from peer.words.screen import Screen, count, moment, size


class Machine(msgspec.Struct, frozen=True):
    """A peer. layers: its windows, each [first, last)."""

    name: str
    os: str = ""
    cores: int = 0
    memory_total_bytes: int = 0
    engines: tuple[str, ...] = ()
    version: str = ""
    layers: tuple[tuple[int, int], ...] = ()


class Setup(msgspec.Struct, frozen=True):
    """What was measured, where and when. commit: of this program, "" where it is not known.

    asked_from: the processor of the machine that the clock was read on. busy: answers of others
    that ran or waited in the ring when it began.
    """

    date: str
    version: str
    commit: str
    asked_from: str
    machines: tuple[Machine, ...]
    model: str
    digest: str
    layers: int
    context: int
    plan: str
    slots: int
    kv_type: str = "f16"
    flash: str = "auto"
    speculation: str = "auto"
    quick: bool = False
    busy: int = 0


class Alone(msgspec.Struct, frozen=True):
    """The whole model in one process on this machine. memory_bytes: that it really used.

    why, mend: it was not measured, and what mends that. backend: that runs it.
    """

    measured: bool
    threads: int = 0
    memory_bytes: int = 0
    why: str = ""
    mend: str = ""
    backend: str = ""


class Beside(msgspec.Struct, frozen=True):
    """Medians of runs in turns, ring ÷ whole; 0.0: not measured. ring, whole: tokens a second."""

    tokens: int
    ring: float
    whole: float = 0.0
    ratio: float = 0.0
    ring_runs: tuple[float, ...] = ()
    whole_runs: tuple[float, ...] = ()


class Many(msgspec.Struct, frozen=True):
    """Answers at once. together: how many of them really ran at once at most; tokens_per_s: of all
    of them while they did, all_tokens_per_s: from the first question to the last token, prompts and
    queues included. whole: the same engine's in one process, as many in one batch."""

    answers: int
    together: int
    ttft_s_p50: float
    ttft_s_p95: float
    tpot_s_p50: float
    tokens: int
    tokens_per_s: float
    all_tokens_per_s: float
    whole: float = 0.0
    ratio: float = 0.0
    failed: int = 0
    cut: int = 0
    why: str = ""


class Reuse(msgspec.Struct, frozen=True):
    """A chat's second turn beside its first. reused: ids of its prompt that were in KV cache."""

    prompt_tokens: int
    first_ttft_s: float
    second_ttft_s: float
    ratio: float
    reused: int = 0


class Drafts(msgspec.Struct, frozen=True):
    """A text that is to be written again with small changes. drafted, accepted: ids, during it."""

    tokens: int
    tpot_s: float
    drafted: int = 0
    accepted: int = 0


class StageTimes(msgspec.Struct, frozen=True):
    """A stage, by its own word: medians for a token of one answer, and for a row of prompts."""

    name: str
    layers: tuple[tuple[int, int], ...]
    decode_s: float = 0.0
    wait_s: float = 0.0
    send_s: float = 0.0
    prefill_s: float = 0.0


class Results(msgspec.Struct, frozen=True):
    """All of it."""

    setup: Setup
    alone: Alone
    decode: Beside
    prefill: Beside
    many: tuple[Many, ...]
    reuse: Reuse
    drafts: Drafts
    stages: tuple[StageTimes, ...]
    ttft_s: float = 0.0  # of one short prompt
    tpot_s: float = 0.0
    drafted: int = 0  # while ordinary text was answered: all of `many` and `decode`
    accepted: int = 0


def lines(found: Results, screen: Screen) -> list[str]:
    """The table."""
    return [
        *_setup(found.setup, screen),
        "",
        *_alone(found, screen),
        "",
        *_many(found, screen),
        "",
        *_rest(found, screen),
        "",
        *_stages(found, screen),
    ]


def _setup(setup: Setup, screen: Screen) -> list[str]:
    commit = f" ({screen.clean(setup.commit)})" if setup.commit else ""
    head = screen.paint(screen.clean(setup.model), "bold")
    out = [
        f"{head}, {count(setup.layers, 'layer')}, plan {screen.clean(setup.plan)}, halka "
        f"{screen.clean(setup.version)}{commit}, {setup.date}"
    ]
    for machine in setup.machines:
        facts = [screen.clean(machine.os), count(machine.cores, "core")]
        if machine.memory_total_bytes:
            facts.append(size(machine.memory_total_bytes))
        facts += [screen.clean(engine) for engine in machine.engines]
        layers = ring.spans(screen, machine.layers) if machine.layers else "none"
        out += screen.wrap(f"{machine.name}: layers {layers}, {', '.join(facts)}", "  ", "    ")
    out += screen.wrap(f"asked from: {setup.asked_from}", "  ", "    ")
    what = (
        f"KV {setup.kv_type}, flash attention {setup.flash}, speculation {setup.speculation}, "
        f"{count(setup.slots, 'answer')} at once, {setup.context} tokens of context"
    )
    out += screen.wrap(what, "  ", "    ")
    if setup.quick:
        out.append("  --quick: short runs, so rough numbers")
    if setup.busy:
        busy = count(setup.busy, "other answer")
        text = f"the ring was busy with {busy} when this began: on its own it is faster"
        out += [screen.paint(line, "yellow") for line in screen.wrap(text, "  ", "  ")]
    return out


def _alone(found: Results, screen: Screen) -> list[str]:
    alone = found.alone
    title = "One answer"
    if alone.measured:
        engine = f"{engine_name(alone.backend)}, " if alone.backend else ""
        title += (
            f", beside the whole model in one process on this machine ({engine}{alone.threads} "
            f"thread{'s' * (alone.threads != 1)})"
        )
    out = [*(screen.paint(line, "bold") for line in screen.wrap(title, "", ""))]
    out.append(
        f"  {'':22}{'ring':>12}" + (f"{'whole':>12}{'ring ÷ whole':>14}" if alone.measured else "")
    )
    for name, beside in (
        ("decode, tokens/s", found.decode),
        (f"prefill of {found.prefill.tokens}, /s", found.prefill),
    ):
        row = f"  {name:22}{beside.ring:12.1f}"
        if alone.measured:
            row += f"{_or_dash(beside.whole, '12.1f')}{_or_dash(beside.ratio, '14.2f')}"
        out.append(row)
    out.append(f"  TTFT {moment(found.ttft_s)} of a short prompt, TPOT {moment(found.tpot_s)}")
    if not alone.measured:
        out += screen.wrap(f"not beside the whole model in one process: {alone.why}", "  ", "  ")
        if alone.mend:
            out += screen.wrap(f"to have that: {alone.mend}", "  ", "  ")
    return [line if screen.unicode else line.replace("÷", "/") for line in out]


def _or_dash(value: float, form: str) -> str:
    return format(value, form) if value else format("-", f">{form.partition('.')[0]}")


def _many(found: Results, screen: Screen) -> list[str]:
    measured = found.alone.measured
    names = ("at once", "TTFT p50", "p95", "TPOT p50", "tokens/s")
    head = f"  asked {' '.join(f'{name:>9}' for name in names)}  overall"
    out = [
        screen.paint("Many answers at once", "bold"),
        head + (f" {'whole':>7} {'ratio':>5}" if measured else ""),
    ]
    for many in found.many:
        row = (
            f"  {many.answers:5} {many.together:9} {moment(many.ttft_s_p50):>9} "
            f"{moment(many.ttft_s_p95):>9} {moment(many.tpot_s_p50):>9} {many.tokens_per_s:9.1f} "
            f"{many.all_tokens_per_s:8.1f}"
        )
        if measured:
            row += f" {_or_dash(many.whole, '7.1f')} {_or_dash(many.ratio, '5.2f')}"
        out.append(row)
        if many.failed:
            why = f"{count(many.failed, 'answer')} of {many.answers} failed: {many.why}"
            out += screen.wrap(why, "        ", "        ")
    cut = sum(many.cut for many in found.many)
    note = "tokens/s: while most of them ran at once; overall: prompts and queues included"
    if cut:
        note += f"; {count(cut, 'answer')} cut when the time was over"
    return [*out, *screen.wrap(note, "  ", "  ")]


def _rest(found: Results, screen: Screen) -> list[str]:
    reuse, drafts = found.reuse, found.drafts
    out = [screen.paint("What is not computed again", "bold")]
    if reuse.ratio:
        text = (
            f"second turn of a chat of {reuse.prompt_tokens} tokens: TTFT "
            f"{moment(reuse.second_ttft_s)}, first turn's {moment(reuse.first_ttft_s)} "
            f"(x{reuse.ratio:.2f})"
        )
        if reuse.reused:
            text += f", {reuse.reused} tokens were in the KV cache"
        out += screen.wrap(text, "  ", "    ")
    usual = f", {moment(found.tpot_s)} of other text" if found.tpot_s else ""
    text = f"a text written again with changes: TPOT {moment(drafts.tpot_s)}{usual}; "
    text += _accepted(drafts.drafted, drafts.accepted)
    out += screen.wrap(text, "  ", "    ")
    text = f"all other text: {_accepted(found.drafted, found.accepted)}"
    return [*out, *screen.wrap(text, "  ", "    ")]


def _accepted(drafted: int, accepted: int) -> str:
    if not drafted:
        return "nothing was drafted"
    return f"{accepted} of {drafted} drafted tokens were right ({accepted / drafted:.0%})"


def _stages(found: Results, screen: Screen) -> list[str]:
    head = f"  {'':14} {'layers':9} {'compute':>9} {'wait':>9} {'send':>9} {'compute':>9}"
    out = [
        screen.paint(
            "Stages, for a token of one answer; last column: for a token of a prompt", "bold"
        ),
        head,
    ]
    for stage in found.stages:
        times = (stage.decode_s, stage.wait_s, stage.send_s, stage.prefill_s)
        told = " ".join(f"{moment(s) if s else '-':>9}" for s in times)
        name = screen.fit(screen.clean(stage.name), 14)
        out.append(f"  {name} {screen.fit(ring.spans(screen, stage.layers), 9)} {told}")
    return out
