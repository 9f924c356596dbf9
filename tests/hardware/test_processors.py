"""What this process may use of the machine's processors, and what other programs use of them."""

from __future__ import annotations

import math
import os
import threading
import time
from pathlib import Path

import pytest

from falcon_fast.hardware import processors
from falcon_fast.hardware.processors import cgroup_quota, usable_processors, usable_threads, usage


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def mounted(tmp_path: Path, cgroup: str, files: dict[str, str]) -> tuple[Path, Path]:
    """Return made-up mounts of /proc and /sys/fs/cgroup with the given files."""
    write(tmp_path / "proc/self/cgroup", cgroup)
    for name, text in files.items():
        write(tmp_path / "cgroup" / name, text)
    return tmp_path / "proc", tmp_path / "cgroup"


@pytest.mark.parametrize(
    ("cgroup", "files", "quota"),
    [
        ("0::/\n", {}, math.inf),
        ("0::/\n", {"cpu.max": "max 100000\n"}, math.inf),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),  # a container's own namespace
        ("0::/a/b\n", {"cpu.max": "max 100000", "a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, 3.0),
        ("0::/a/b\n", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "50000 100000"}, 0.5),
        ("0::/not/mounted/here\n", {"cpu.max": "200000 100000"}, 2.0),
        ("3:cpu,cpuacct:/x\n0::/\n", {"cpu/x/cpu.cfs_quota_us": "400000", "cpu/x/cpu.cfs_period_us": "100000"}, 4.0),
        ("3:cpuset:/x\n", {"cpu/x/cpu.cfs_quota_us": "400000", "cpu/x/cpu.cfs_period_us": "100000"}, math.inf),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, math.inf),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "many", "cpu/cpu.cfs_period_us": "100000"}, math.inf),
        ("not a line\n", {"cpu.max": "nonsense"}, math.inf),
        ("", {}, math.inf),
    ],
)
def test_the_smallest_quota_on_the_path_counts(tmp_path, cgroup, files, quota) -> None:
    assert cgroup_quota(*mounted(tmp_path, cgroup, files)) == quota


def test_a_quota_and_the_affinity_limit_what_is_usable(monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    for quota, threads in ((1.5, 2), (0.2, 1), (1.0, 1), (64.0, 64), (math.inf, 64)):
        monkeypatch.setattr(processors, "cgroup_quota", lambda quota=quota: quota)
        assert usable_processors() == min(64, quota)
        assert usable_threads() == threads


def made_up(tmp_path: Path, stat: str, threads: dict[int, tuple[int, int]]) -> Path:
    write(tmp_path / "stat", stat)
    for number, (user, system) in threads.items():
        write(tmp_path / f"self/task/{number}/stat", f"{number} (a) b) S " + "0 " * 10 + f"{user} {system} 0 0\n")
    return tmp_path


def test_usage_counts_the_processors_of_the_affinity_with_steal_and_without_nice(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2})
    stat = "cpu 9 9 9 9 9 9 9 9\ncpu0 100 7 20 999 5 3 2 1 0 0\ncpu1 5 5 5 5 5 5 5 5 0 0\ncpu2 10 0 0 0 0 0 0 4 0 0\nctxt 1\n"
    proc = made_up(tmp_path, stat, {11: (30, 4), 12: (5, 0)})
    hertz = os.sysconf("SC_CLK_TCK")
    monkeypatch.setattr(os, "getpriority", lambda *_: 0)
    assert usage([11, 12], proc) == processors.Usage((100 + 20 + 3 + 2 + 1 + 14) / hertz, 39 / hertz)
    monkeypatch.setattr(os, "getpriority", lambda *_: 10)
    assert usage([11], proc) == processors.Usage((126 + 14 + 7) / hertz, 34 / hertz)


def test_usage_is_none_where_the_system_does_not_tell(tmp_path) -> None:
    assert usage([1], tmp_path / "nowhere") is None
    assert usage([404], made_up(tmp_path, "cpu0 1 1 1 1 1 1 1 1\n", {})) is None


def test_a_thread_that_computes_is_seen_on_this_machine() -> None:
    own = [threading.get_native_id()]
    before = usage(own)
    if before is None:
        pytest.skip("the system does not report processor time")
    start = time.thread_time()
    while time.thread_time() - start < 0.3:
        pass
    after = usage(own)
    assert after is not None
    assert after.own - before.own == pytest.approx(0.3, abs=0.05)
    assert after.all_busy - before.all_busy > 0.2
