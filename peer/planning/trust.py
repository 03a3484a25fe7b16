"""Whether a profile can be planned with. Pure.

Profiles are what other machines say of themselves. One that says nonsense is left out by name: a
plan made with it would be nobody's best. One that merely lies about its memory is believed until
its stage fails to load, and is then done without.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from peer.planning.profile import Profile, Speed

MEMORY_BYTES_MAX = 1 << 50  # a pebibyte: no home has it
BYTES_PER_S = (1.0, 1e13)  # of disks and links, where told: memory itself is slower than the most
RTT_S_MAX = 60.0
DECODE_S = (1e-9, 1e4)  # of a layer for a token: between what no processor does and no user awaits
CORRECTION = (0.01, 100.0)
THREADS_MAX = 4096
CPU_SHARE_LEAST = 0.001  # a millisecond of each second


def fault(profile: Profile) -> str:
    """What is wrong with a profile, naming its peer and the value, or ""."""
    wrong = next(_faults(profile), "")
    return f"the profile of {profile.name} is refused: {wrong}" if wrong else ""


def _faults(profile: Profile) -> Iterator[str]:
    available, total = profile.memory_available_bytes, profile.memory_total_bytes
    if not 0 < available <= MEMORY_BYTES_MAX:
        yield f"{available} bytes of memory for stages"
    if total and available > total * 1.05:
        yield f"{available} bytes of memory for stages, of {total} in all"
    for engine in profile.engines:
        if not 0 <= engine.memory_free_bytes <= MEMORY_BYTES_MAX:
            yield f"{engine.memory_free_bytes} bytes of memory on {engine.device}"
    if not CPU_SHARE_LEAST <= profile.cpu_share <= 1:
        yield f"{profile.cpu_share} as its share of the processor"
    if not 0 <= profile.threads <= THREADS_MAX:
        yield f"{profile.threads} threads"
    if not _rate(profile.disk_read_bytes_per_s):
        yield f"a disk of {profile.disk_read_bytes_per_s:g} bytes a second"
    for link in profile.links:
        if not 0 <= link.rtt_s <= RTT_S_MAX or not _rate(link.bytes_per_s):
            yield f"a link of {link.rtt_s:g} s and {link.bytes_per_s:g} bytes a second"
    for speed in profile.speeds:
        yield from of_speed(speed)


def of_speed(speed: Speed) -> Iterator[str]:
    """What is wrong with what was measured of one model."""
    if not speed.decode_s or not speed.prefill_s or not speed.prefill_tokens:
        yield f"a speed of {speed.kind} without layers"
    times = (*speed.decode_s, *speed.prefill_s)
    if not all(DECODE_S[0] <= seconds <= DECODE_S[1] for seconds in times):
        bad = next(s for s in times if not DECODE_S[0] <= s <= DECODE_S[1])
        yield f"{bad:g} s for a layer on {speed.kind}"
    if not all(0 <= s <= DECODE_S[1] for s in (speed.window_s, speed.output_s)):
        yield f"{speed.window_s:g} s around a window on {speed.kind}"
    if not all(CORRECTION[0] <= each <= CORRECTION[1] for _, each in speed.short_chunks):
        yield f"short chunks that take {speed.short_chunks} times as long on {speed.kind}"
    if not CORRECTION[0] <= speed.correction <= CORRECTION[1] or math.isnan(speed.correction):
        yield f"a correction of {speed.correction:g} on {speed.kind}"


def _rate(bytes_per_s: float) -> bool:
    """Whether it can be, or says that it is unknown. So little that dividing by it gives infinity
    would make nonsense of every sum with it."""
    return bytes_per_s == 0 or BYTES_PER_S[0] <= bytes_per_s <= BYTES_PER_S[1]
