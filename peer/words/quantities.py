"""Sizes, rates, times and operations as people write them: 8GiB, 2GB/s, 1gbit, 5ms, 40G.

What is nothing, not a number or beyond what any machine has is refused, with what would be right.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

_NUMBER = re.compile(r"([+-]?[0-9.]+(?:e[+-]?[0-9]+)?|[+-]?nan|[+-]?inf)\s*([a-zµμ/]*)", re.I)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def _units(ends: Mapping[str, float], binary: tuple[str, ...] = ()) -> dict[str, float]:
    """Every prefix before every end; those of `binary` also by 1024, as in GiB."""
    units = {p + end: one * 1000.0**n for p, n in _POWERS.items() for end, one in ends.items()}
    units |= {
        f"{p}i{end}": ends[end] * 1024.0**n for p, n in _POWERS.items() if n for end in binary
    }
    return units


@dataclass(frozen=True, slots=True)
class Quantity:
    """One kind of number. most: beyond it, nothing is. units: in lower case, as multiples of what
    halka reckons with (bytes, bytes a second, seconds, operations a second)."""

    what: str
    most: float
    units: Mapping[str, float] = field(repr=False)

    def read(self, given: object) -> float:
        """The number; a bare one is in halka's own unit. Raises ValueError, a sentence's end."""
        value = self.signed(given)
        if value <= 0:
            raise ValueError(f"is {self.what}, not {_shown(given)}: more than nothing")
        return value

    def signed(self, given: object) -> float:
        """The same where + and - have a meaning."""
        found = None
        if isinstance(given, str):
            found = _NUMBER.fullmatch(given.strip())
        elif isinstance(given, int | float) and not isinstance(given, bool):
            found = _NUMBER.fullmatch(repr(given))
        if not found or found[2].lower() not in self.units:
            raise ValueError(f"is {self.what}, not {_shown(given)}")
        try:
            value = float(found[1]) * self.units[found[2].lower()]
        except ValueError:  # 1.2.3
            raise ValueError(f"is {self.what}, not {_shown(given)}") from None
        if not math.isfinite(value) or abs(value) > self.most:
            raise ValueError(f"is {self.what}; no machine has {_shown(given)}")
        return value


def _shown(given: object) -> str:
    text = given if isinstance(given, str) else repr(given)
    return f"`{text[:40]}`"


SIZE = Quantity("a size such as 8GiB", float(1 << 50), {"": 1.0, **_units({"b": 1.0}, ("b",))})
RATE = Quantity(
    "a rate such as 2GB/s or 100mbit",
    1e13,
    {"": 1.0}
    | _units({"b/s": 1.0, "bit": 1 / 8, "bit/s": 1 / 8}, ("b/s",)),
)  # fmt: skip
BANDWIDTH = Quantity("a rate such as 40GB/s", 1e13, RATE.units)
SPAN = Quantity(
    "a time such as 5ms", 60.0, {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "μs": 1e-6}
)
OPERATIONS = Quantity(
    "a number of operations a second such as 500G or 8TFLOPS",
    1e17,
    {**_units({"": 1.0, "flops": 1.0, "flop/s": 1.0})},
)
