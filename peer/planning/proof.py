"""Is an engine's answer right? What it computed is compared with the truth: pure, numpy alone.

The truth is what the trusted engine (llama.cpp on the processor) computes with a copy of the model
in F32. A layer's error is what it puts out wrongly, as a share of what the layer adds to its input:
beside large hidden states a wrong layer would not be seen. Where both engines compute with the
quantised weights, an engine that keeps float32 activations must be far nearer to the truth than
llama.cpp itself, whose processor code quantises activations to 8 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

TRUSTED = "llama_cpp"
MODEL = "the built-in model"
NAMES = {"mlx": "MLX", "llama_cpp": "llama.cpp"}

# Bounds of a layer's error.
EXACT = 5e-5
"""Of an engine that computes in float32 with the weights as they are. Measured with MLX on a
processor: 2e-6. Scales of Q4_K in float16 would give 3e-4, in bfloat16 1e-3; Q4_1 with the bias of
Q4_0 more than 0.1."""
EXACT_GPU = 3e-3
"""The same on a GPU, which may multiply in TF32 (a mantissa of 10 bits) where float32 is asked."""
ROUNDED = 1e-3
"""Of weights that are kept in float16: half a unit of 11 bits, 2.4e-4 of each weight."""
SMALL = 2e-2
"""Of weights requantised to 8 bits: measured 4e-3 of the weights of Q6_K."""
OWN_TIMES, OWN_LEAST = 3.0, 5e-3
"""llama.cpp on another device: so many times its own distance from the truth on the processor, for
it quantises activations in its own way there; at least the second."""
LOOSE = 8e-2
"""Where there is no copy in F32: the engine may be as far from llama.cpp as that is from the truth
(5e-2 at most, in SmolLM2). Wrong weights of any kind give more than 0.1."""
REAL = 2e-3
"""In a model's own layers at least this: GELU is a table of float16 in llama.cpp (measured with
gemma3: 3e-4; SmolLM2 without it: 7e-6), and rows of very large numbers lose digits in any order of
additions."""
LOGITS_TIMES = 10.0
"""The logits, after all layers, may be so many times as far off (as a share of their size)."""
KL_MAX = 0.3
"""Nats, where there is no copy in F32. llama.cpp is as far from its own copy: 0.007 (SmolLM2 in
Q4_1), 0.08 (random experts in Q8_0, where routers choose others)."""
NO_NUMBERS = 1e9
"""The error, and the KL, of what is not finite or not there. JSON has no infinity."""
_LEAST = 1e-30


class Subject(msgspec.Struct, frozen=True):
    """What is proven. kind: cpu | cuda | metal | …; version: of the backend's library."""

    backend: str
    kind: str
    device: str = ""
    version: str = ""
    weights: str = "auto"

    @property
    def name(self) -> str:
        """For people: MLX 0.32.4."""
        release = self.version.partition(" ")[0]  # without those of libraries beside it
        return f"{NAMES.get(self.backend, self.backend)} {release}".strip()

    @property
    def trusted(self) -> bool:
        """Its backend is the one that others are compared with."""
        return self.backend == TRUSTED


class LayerFigure(msgspec.Struct, frozen=True):
    """How far a layer is off. holds: its types of tensors. own: llama.cpp's, with the same weights.

    rounded: the engine may keep these weights rounded. copied: there was a copy of it in F32.
    """

    layer: int
    holds: str
    error: float
    own: float = 0.0
    rounded: bool = False
    copied: bool = True


class LogitsFigure(msgspec.Struct, frozen=True):
    """The whole model. largest: difference of a logit. error: rms of it as a share of the logits'.

    top1: share of rows with the same likeliest token. kl: mean, in nats.
    """

    largest: float
    error: float
    top1: float
    kl: float


class Verdict(msgspec.Struct, frozen=True):
    """How an engine did with one model.

    how: passed | wrong (by figures) | failed (it ended, hung or gave up) | skipped (nothing of this
    could be compared here). why: in words, without the engine's name.
    """

    model: str
    how: Literal["passed", "wrong", "failed", "skipped"]
    why: str = ""
    layers: tuple[LayerFigure, ...] = ()
    logits: LogitsFigure | None = None
    own: LogitsFigure | None = None  # llama.cpp's with the same weights

    @property
    def worst(self) -> LayerFigure | None:
        """The layer that is farthest off."""
        return max(self.layers, key=lambda figure: figure.error, default=None)


# Figures ----------------------------------------------------------------------------------------


def layer_error(
    truth: Floats, found: Floats, x: Floats | None = None, *, routed: bool = False
) -> float:
    """How far a layer's rows are off, the worst of them. All: [rows, columns]; x: the input.

    Without x (where it is token ids, or the output logits): as a share of what it puts out. routed:
    the median row, for a router may choose other experts where two are nearly as good.
    """
    if found.shape != truth.shape or not np.isfinite(found).all():
        return NO_NUMBERS
    gives = truth.astype(np.float64) - (0.0 if x is None else x.astype(np.float64))
    wrong = found.astype(np.float64) - truth.astype(np.float64)
    rows = np.sqrt((wrong**2).mean(axis=1) / np.maximum((gives**2).mean(axis=1), _LEAST))
    return min(NO_NUMBERS, float(np.median(rows) if routed else rows.max()))


def logits_figure(truth: Floats, found: Floats) -> LogitsFigure:
    """The figures of logits [rows, vocabulary]."""
    if found.shape != truth.shape or not np.isfinite(found).all():
        return LogitsFigure(NO_NUMBERS, NO_NUMBERS, 0.0, NO_NUMBERS)
    right, given = truth.astype(np.float64), found.astype(np.float64)
    p, q = _log_softmax(right), _log_softmax(given)
    size = max(float(np.sqrt((right**2).mean())), _LEAST)
    return LogitsFigure(
        float(np.abs(given - right).max()),
        float(np.sqrt(((given - right) ** 2).mean())) / size,
        float((right.argmax(axis=1) == given.argmax(axis=1)).mean()),
        max(0.0, float((np.exp(p) * (p - q)).sum(axis=1).mean())),
    )


def _log_softmax(x: NDArray[np.float64]) -> NDArray[np.float64]:
    moved = x - x.max(axis=1, keepdims=True)
    shifted: NDArray[np.float64] = moved - np.log(np.exp(moved).sum(axis=1, keepdims=True))
    return shifted


# Bounds -----------------------------------------------------------------------------------------


def bound(subject: Subject, figure: LayerFigure, *, real: bool) -> float:
    """What a layer's error may be. real: of a model in use, not of the built-in one."""
    if not figure.copied:
        return LOOSE
    if subject.trusted:
        return max(OWN_LEAST, OWN_TIMES * figure.own)
    most = EXACT if subject.kind == "cpu" else EXACT_GPU
    if figure.rounded:
        most = max(most, SMALL if subject.weights == "small" else ROUNDED)
    return max(most, REAL) if real else most


def judge(
    subject: Subject,
    model: str,
    layers: Sequence[LayerFigure],
    logits: LogitsFigure | None,
    own: LogitsFigure | None,
    *,
    real: bool = False,
) -> Verdict:
    """Whether the engine is right. own: llama.cpp's logits; None where it ran no copy in F32."""

    def verdict(how: Literal["passed", "wrong"], why: str = "") -> Verdict:
        return Verdict(model, how, why, tuple(layers), logits, own)

    wrong = [
        (figure.error / most, figure)
        for figure in layers
        if not figure.error <= (most := bound(subject, figure, real=real))
    ]
    if wrong:
        _, worst = max(wrong, key=lambda pair: pair[0])
        return verdict("wrong", _sentence(worst, model))
    if logits is None or not (off := _logits_off(subject, layers, logits, own, real)):
        return verdict("passed")
    return verdict("wrong", f"the logits of {model} are {off} off, though no layer was seen to be")


def _logits_off(
    subject: Subject,
    layers: Sequence[LayerFigure],
    logits: LogitsFigure,
    own: LogitsFigure | None,
    real: bool,
) -> str:
    """By how much they are beyond their bound, or ""."""
    if logits.error >= NO_NUMBERS:
        return percent(logits.error)
    if own is None:
        return "" if logits.kl <= KL_MAX else f"{logits.kl:.2g} nats"
    most = max((bound(subject, figure, real=real) for figure in layers), default=LOOSE)
    if logits.error <= max(most * LOGITS_TIMES, OWN_TIMES * own.error * subject.trusted):
        return ""
    return percent(logits.error)


def _sentence(figure: LayerFigure, model: str) -> str:
    where = f"layer {figure.layer} of {model}"
    if figure.error >= NO_NUMBERS:
        return f"its {figure.holds} weights give no numbers ({where})"
    return f"its {figure.holds} weights give wrong numbers ({where}: {percent(figure.error)} off)"


def percent(share: float) -> str:
    """12 %, 0.31 %, 0.00042 %; 300 %."""
    if share >= NO_NUMBERS:
        return "without measure"
    return f"{share * 100:.2g} %" if share < 1 else f"{share * 100:.0f} %"


def refusal(subject: Subject, verdict: Verdict) -> str:
    """Why the engine is not used, and what mends it."""
    update = f"update it (halka verify tries again), or set backend = {TRUSTED}"
    if verdict.how == "wrong":
        return f"{subject.name} is refused: {verdict.why}; {update}"
    return f"{subject.name} is refused, for it could not be proven: {verdict.why}; {update}"
