"""How `halka verify` shows its proofs: a table, what is wrong, and what was checked. Pure text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

from peer.planning.proof import MODEL, NO_NUMBERS, Subject, Verdict, bound, percent, refusal
from peer.words.screen import Screen

METAL_TYPES = ("MXFP4", "Q4_1", "Q4_K", "Q6_K")


class Proof(msgspec.Struct, frozen=True):
    """How one engine did: with the built-in model, then with the one in use (None: there is none).

    memory_total_bytes: of its device.
    """

    subject: Subject
    builtin: Verdict
    canary: Verdict | None = None
    memory_total_bytes: int = 0

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """All of them."""
        return (self.builtin, self.canary) if self.canary else (self.builtin,)

    @property
    def wrong(self) -> bool:
        """The engine is not to be used."""
        return any(verdict.how in ("wrong", "failed") for verdict in self.verdicts)


class Checked(msgspec.Struct, frozen=True):
    """A line of the checklist. state: yes | no (it is wrong) | not here (cannot be seen here)."""

    what: str
    state: Literal["yes", "no", "not here"]
    told: str = ""


class Told(msgspec.Struct, frozen=True):
    """All that `halka verify --json` says."""

    proofs: tuple[Proof, ...]
    checklist: tuple[Checked, ...]
    versions: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def lines(told: Told, screen: Screen) -> list[str]:
    """The table, the reasons, the checklist."""
    width = screen.width - 63
    head = (
        f"{'ENGINE':<17} {'ON':<6} {'MODEL':<{width}} {'WORST LAYER':<15} {'TOP-1':>5} {'KL':>6}"
        "  RESULT"
    )
    out = [screen.paint(head, "dim")]
    for proof in told.proofs:
        out += [_row(proof.subject, verdict, screen, width) for verdict in proof.verdicts]
    out += _reasons(told.proofs, screen)
    for text in told.notes:
        out += screen.wrap(text, "  ")
    out += screen.wrap(_LEGEND, "  ")
    out += ["", screen.paint("What was checked on this machine, and what could not be", "bold")]
    for item in _grouped(told.checklist):
        mark, style = _MARKS[item.state]
        line = f"{item.what}{': ' if item.told else ''}{item.told}"
        wrapped = screen.wrap(line, f"  {mark} ", "      ")
        out += [wrapped[0].replace(mark, screen.paint(mark, style), 1), *wrapped[1:]]
    return out


_LEGEND = (
    "WORST LAYER: how far it is from the truth, a copy of the model in F32. llama.cpp rounds what "
    "goes through quantised layers to 8 bits: its 1 to 5 % are no mistake. TOP-1: rows with the "
    "same likeliest token."
)
_MARKS = {"yes": ("[x]", "green"), "no": ("[!]", "red"), "not here": ("[ ]", "dim")}


def _grouped(items: Sequence[Checked]) -> Iterable[Checked]:
    """What cannot be seen here, together by its reason."""
    missing: dict[str, list[str]] = {}
    for item in items:
        if item.state == "not here":
            missing.setdefault(item.told, []).append(item.what)
        else:
            yield item
    for why, what in missing.items():
        yield Checked(why, "not here", "; ".join(what))


def _row(subject: Subject, verdict: Verdict, screen: Screen, width: int) -> str:
    worst, logits = verdict.worst, verdict.logits
    layer = f"{_short(worst.holds)} {percent(worst.error)}" if worst else "-"
    top1 = f"{logits.top1 * 100:.0f} %" if logits and logits.error < NO_NUMBERS else "-"
    kl = f"{logits.kl:.0e}" if logits and logits.kl < NO_NUMBERS else "-"
    style = {"passed": "green", "skipped": "dim"}.get(verdict.how, "red")
    how = verdict.how.upper() if style == "red" else verdict.how
    model = "built-in" if verdict.model == MODEL else verdict.model
    return (
        f"{screen.fit(screen.clean(subject.name), 17)} {screen.fit(subject.kind, 6)} "
        f"{screen.fit(screen.clean(model), width)} {screen.fit(layer, 15)} "
        f"{top1:>5} {kl:>6}  {screen.paint(how, style)}"
    )


def _short(holds: str) -> str:
    return holds.partition(" and ")[0]


def _reasons(proofs: Sequence[Proof], screen: Screen) -> Iterable[str]:
    out: list[str] = []
    for proof in proofs:
        for verdict in proof.verdicts:
            if verdict.how == "skipped":
                out += screen.wrap(f"{proof.subject.name}, {verdict.model}: {verdict.why}", "  ")
            elif verdict.how != "passed":
                out += ["", *screen.wrap(_why(proof.subject, verdict), "  ! ")]
    return out


def _why(subject: Subject, verdict: Verdict) -> str:
    if not subject.trusted:
        return refusal(subject, verdict)
    if subject.kind == "cpu":
        return (
            f"{subject.name} itself does not compute rightly: {verdict.why}. Install it again: "
            "pip install --force-reinstall llama-cpp-python, in halka's environment"
        )
    return (
        f"{subject.name} does not compute rightly on {subject.device}: {verdict.why}. Update the "
        "driver or llama.cpp, or keep it from the GPU"
    )


# The checklist ----------------------------------------------------------------------------------


def checklist(proofs: Sequence[Proof], system: str) -> tuple[Checked, ...]:
    """What this machine has shown, and what only another kind of machine can. system: darwin, …"""
    mlx = next((p for p in proofs if p.subject.backend == "mlx"), None)
    metal = mlx if mlx and mlx.subject.kind == "metal" else None
    mac = (
        "needs a Mac with an Apple chip"
        if system != "darwin"
        else "MLX is not installed: " + ("pip install 'halka[mlx]' in halka's environment")
    )
    return (
        *(_engine(proof) for proof in proofs),
        _metal("MLX on Metal computes in float32", metal, "", mac),
        *(
            _metal(f"MLX on Metal reads {kind} as it should", metal, kind, mac)
            for kind in METAL_TYPES
        ),
        _memory(metal, mac),
        _metal("MLX on Metal computes from one thread of its process", metal, "", mac),
        Checked("contexts longer than 32 tokens", "not here", "halka bench runs some"),
        Checked(
            "Thunderbolt: cables, their addresses, RDMA; layers computed by two Macs together",
            "not here",
            "halka doctor, and a second Mac" if system == "darwin" else "needs two Macs",
        ),
    )


def _engine(proof: Proof) -> Checked:
    types = [_short(figure.holds) for figure in proof.builtin.layers]
    what = f"{proof.subject.name} on {proof.subject.device or proof.subject.kind}"
    return Checked(what, "no" if proof.wrong else "yes", ", ".join(types))


def _metal(what: str, metal: Proof | None, kind: str, mac: str) -> Checked:
    if metal is None:
        return Checked(what, "not here", mac)
    figures = [f for f in metal.builtin.layers if _short(f.holds) == (kind or "F32")]
    if not figures:
        return Checked(what, "no", metal.builtin.why or "this type was left out")
    right = all(f.error <= bound(metal.subject, f, real=False) for f in figures)
    worst = max(figure.error for figure in figures)
    return Checked(what, "yes" if right else "no", f"{percent(worst)} off")


def _memory(metal: Proof | None, mac: str) -> Checked:
    what = "the GPU's share of the memory is told"
    if metal is None:
        return Checked(what, "not here", mac)
    told = f"{metal.memory_total_bytes / (1 << 30):.1f} GiB"
    return Checked(what, "yes" if metal.memory_total_bytes else "no", told)
