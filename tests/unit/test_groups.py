"""planning.groups: the processor time that control groups allow."""

from __future__ import annotations

from pathlib import Path

import pytest

from peer.planning.groups import processors, share


def limit(folder: Path, version: int, quota: str, period: str = "100000") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if version == 2:
        (folder / "cpu.max").write_text(f"{quota} {period}\n")
    else:
        (folder / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        (folder / "cpu.cfs_period_us").write_text(f"{period}\n")


@pytest.mark.parametrize(
    ("version", "line"), [(1, "4:cpu,cpuacct:/a/b"), (1, "1:cpu:/a/b"), (2, "0::/a/b")]
)
def test_the_tightest_quota_above_counts(tmp_path: Path, version: int, line: str) -> None:
    own, mounted = tmp_path / "cgroup", tmp_path / "sys"
    own.write_text(f"7:cpuset:/x\n3:cpuacct:/a/b\n{line}\n")
    root = mounted / "cpu" if version == 1 else mounted
    limit(root / "a" / "b", version, "max" if version == 2 else "-1")
    assert processors(own, mounted) is None
    limit(root / "a", version, "150000")
    assert processors(own, mounted) == 1.5
    limit(root / "a" / "b", version, "30000", "50000")
    assert processors(own, mounted) == 0.6
    limit(root, version, "20000")
    assert processors(own, mounted) == 0.2


def test_where_there_are_no_groups_there_is_no_limit(tmp_path: Path) -> None:
    assert processors(tmp_path / "none", tmp_path) is None
    own = tmp_path / "cgroup"
    own.write_text("rubbish\n0::/a\n1:cpu:/a\n")
    for quota in ("", "0", "-5", "many"):
        limit(tmp_path / "cpu" / "a", 1, quota)
        limit(tmp_path / "a", 2, quota)
        assert processors(own, tmp_path) is None


def test_the_share_is_of_what_the_threads_could_use() -> None:
    assert share(4, None) == 1.0
    assert share(4, 1.0) == 0.25
    assert share(1, 1.5) == 1.0
    assert share(0, 0.5) == 0.5
