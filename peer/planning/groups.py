"""What the control groups around this process allow: memory and processor time (Linux).

Version 1 and 2, and both at once. Every group up to the root counts: a limit on a parent limits
its children.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

OWN = Path("/proc/self/cgroup")
MOUNTED = Path("/sys/fs/cgroup")


def control_group_bytes(own: Path = OWN, mounted: Path = MOUNTED) -> int | None:
    """What the memory limits of the control groups around this process leave; None: no limit.

    Pages of files that the kernel could drop are not counted as used: mapped weights are such
    pages, and while a stage computes they count as active ones.
    """
    one = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file",
           "total_active_file")  # fmt: skip
    two = ("memory.max", "memory.current", "inactive_file", "active_file")
    left: list[int] = []
    for version, group in _groups("memory", own, mounted):
        left += _left_bytes(group, *(one if version == 1 else two))
    return min(left, default=None)


def processors(own: Path = OWN, mounted: Path = MOUNTED) -> float | None:
    """How many processors' time the control groups allow; None: no limit."""
    allowed: list[float] = []
    for version, group in _groups("cpu", own, mounted):
        allowed += _processors(group, version)
    return min(allowed, default=None)


def share(threads: int, allowed: float | None) -> float:
    """Of the time that so many threads could use, what is allowed; 1.0 where there is no limit."""
    return 1.0 if allowed is None else min(1.0, max(0.0, allowed / max(1, threads)))


def _groups(controller: str, own: Path, mounted: Path) -> Iterator[tuple[int, Path]]:
    """(version, folder) of every control group that limits this process."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return  # not Linux
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers == "":
            version, roots = 2, [mounted, mounted / "unified"]
        elif controller in controllers.split(","):
            version, roots = 1, [mounted / controller]
        else:
            continue
        for root in roots:
            # In a container the path may be the host's; the container's own group is the root then.
            folder = root / path.strip("/")
            for group in (folder, *folder.parents):
                if group.is_relative_to(root):
                    yield version, group


def _left_bytes(group: Path, limit_file: str, usage_file: str, *droppable: str) -> list[int]:
    """[bytes left] in one control group, [] where it has no limit."""
    try:
        limit = int((group / limit_file).read_text(encoding="utf-8"))
        used = int((group / usage_file).read_text(encoding="utf-8"))
        pairs = (line.split() for line in (group / "memory.stat").read_text().splitlines())
        stat = {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}
    except (OSError, ValueError):  # ValueError: "max"
        return []
    if limit >= 1 << 60:  # how version 1 says "none"
        return []
    return [max(0, limit - used + sum(stat.get(name, 0) for name in droppable))]


def _processors(group: Path, version: int) -> list[float]:
    """[processors' time] of one control group, [] where it has no limit."""
    try:
        if version == 2:
            quota, period = map(int, (group / "cpu.max").read_text(encoding="utf-8").split())
        else:
            quota = int((group / "cpu.cfs_quota_us").read_text(encoding="utf-8"))
            period = int((group / "cpu.cfs_period_us").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # ValueError: "max 100000"
        return []
    return [quota / period] if quota > 0 and period > 0 else []  # -1: how version 1 says "none"
