"""Sizes, rates and times as people write them, and what of them cannot be."""

from __future__ import annotations

import pytest

from peer.words.quantities import OPERATIONS, RATE, SIZE, SPAN, Quantity
from peer.words.screen import moment


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (SIZE, "8GiB", 8 << 30), (SIZE, "8 GiB", 8 << 30), (SIZE, "512mib", 512 << 20),
        (SIZE, "1.5GB", 1.5e9), (SIZE, 1024, 1024), (SIZE, "2e9", 2e9), (SIZE, "100B", 100),
        (RATE, "2GB/s", 2e9), (RATE, "1gbit", 1.25e8), (RATE, "100mbit", 1.25e7),
        (RATE, "2.5Gbit/s", 3.125e8), (RATE, "720MB/s", 7.2e8), (RATE, "1GiB/s", 1 << 30),
        (SPAN, "5ms", 5e-3), (SPAN, "0.4ms", 4e-4), (SPAN, "300us", 3e-4), (SPAN, "2µs", 2e-6),
        (SPAN, 0.001, 1e-3), (OPERATIONS, "500G", 5e11), (OPERATIONS, "1.5TFLOPS", 1.5e12),
        (OPERATIONS, 4e10, 4e10),
    ],
)  # fmt: skip
def test_numbers_are_read_as_people_write_them(kind: Quantity, text: object, value: float) -> None:
    assert kind.read(text) == pytest.approx(value)


@pytest.mark.parametrize(
    ("kind", "text", "why"),
    [
        (SIZE, "banana", "is a size such as 8GiB, not `banana`"),
        (SIZE, "8GB/s", "is a size such as 8GiB, not"),
        (SIZE, "0", "more than nothing"), (SIZE, 0, "more than nothing"),
        (SIZE, "-2GiB", "more than nothing"), (SIZE, float("nan"), "no machine has `nan`"),
        (SIZE, float("inf"), "no machine has"), (SIZE, "9999999GiB", "no machine has"),
        (SIZE, True, "not `True`"), (SIZE, None, "not `None`"), (SIZE, "1.2.3GiB", "not"),
        (SIZE, "1e999", "no machine has"), (SIZE, [8], "not"), (SIZE, "", "not"),
        (RATE, 1e18, "is a rate such as 2GB/s or 100mbit; no machine has"), (RATE, "5ms", "not"),
        (SPAN, "5min", "not `5min`"), (SPAN, "90s", "no machine has"), (SPAN, "1gbit", "not"),
        (OPERATIONS, "8GiB", "not"), (OPERATIONS, "nan", "no machine has"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_what_would_be_right(
    kind: Quantity, text: object, why: str
) -> None:
    with pytest.raises(ValueError, match=why.replace("?", r"\?")):
        kind.read(text)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (3.1e-4, "0.31 ms"), (8.94e-3, "8.9 ms"), (0.0412, "41.2 ms"), (0.0996, "100 ms"),
        (0.412, "412 ms"), (0.9996, "1.0 s"), (2.44, "2.4 s"), (200.0, "3 min 20 s"),
    ],
)  # fmt: skip
def test_moments_have_three_digits_at_most(seconds: float, shown: str) -> None:
    assert moment(seconds) == shown
