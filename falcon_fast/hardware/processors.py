"""How many processors this process may use, and how busy other programs keep them, from what Linux reports in /proc and /sys."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from math import ceil, inf
from pathlib import Path

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def usable_processors() -> float:
    """Return the number of processors that this process may keep busy: those of its affinity, or its cgroup's quota if less.

    A container with 1.5 CPUs on a machine with 64 sees all 64 of them; its quota is 1.5.
    """
    return min(len(os.sched_getaffinity(0)), cgroup_quota())


def usable_threads() -> int:
    """Return the number of threads that can work at the same time: `usable_processors`, rounded up.

    Rounded up, because a quota of 1.5 lets two threads run three quarters of the time, which is more than one thread does.
    """
    return max(1, ceil(usable_processors()))


def cgroup_quota(proc: Path = PROC, cgroups: Path = CGROUPS) -> float:
    """Return the processors that the cgroups of this process may use, the smallest quota on its path; infinite without one.

    Args:
        proc, cgroups: where the two file systems are mounted.
    """
    return min(_quotas(proc, cgroups), default=inf)


def _quotas(proc: Path, cgroups: Path) -> Iterator[float]:
    """Yield the quotas of this process's cgroups and of those that contain them, of version 2 and version 1."""
    for line in _text(proc / "self" / "cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, name = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        # Version 2 has no controllers here. A container's own namespace may show a path that is not mounted in it: then the
        # files at the root of the mount are those of the container.
        roots = [cgroups / "cpu", cgroups / "cpu,cpuacct"] if controllers else [cgroups, cgroups / "unified"]
        for root in roots:
            directory = root / name.lstrip("/")
            while True:
                yield from _quota(directory)
                if directory == root or root not in directory.parents:
                    break
                directory = directory.parent


def _quota(directory: Path) -> Iterator[float]:
    """Yield the quota that one cgroup has itself, in processors, if it has one."""
    with suppress(ValueError):  # "max", or no such file
        quota, period = _text(directory / "cpu.max").split()
        yield int(quota) / int(period)
    with suppress(ValueError):
        quota_v1, period_v1 = int(_text(directory / "cpu.cfs_quota_us")), int(_text(directory / "cpu.cfs_period_us"))
        if quota_v1 > 0:  # -1 for none
            yield quota_v1 / period_v1


@dataclass(frozen=True)
class Usage:
    """Processor time until now, in seconds; the difference of two is that of the time between them.

    Attributes:
        all_busy: that all programs used on the processors that this process may use, with the time that a hypervisor took away.
        own: that the given threads of this process used.
    """

    all_busy: float
    own: float


def usage(threads: Collection[int], proc: Path = PROC) -> Usage | None:
    """Return the processor time that was used until now; None if the system does not report it.

    A program with a positive nice value gives way to a busy program without one, so its time is left out, unless this process
    is itself such a program.

    Args:
        threads: kernel's numbers of this process's threads.
        proc: where the file system is mounted.
    """
    processors = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    counts_nice = os.getpriority(os.PRIO_PROCESS, 0) > 0
    ticks, found = 0, False
    for line in _text(proc / "stat").splitlines():
        name, *fields = line.split()
        if name in processors and len(fields) >= 8:
            user, nice, system, _idle, _iowait, interrupts, soft_interrupts, steal = map(int, fields[:8])
            ticks += user + system + interrupts + soft_interrupts + steal + (nice if counts_nice else 0)
            found = True
    own = [_thread_seconds(proc / "self" / "task" / str(thread)) for thread in threads]
    if not found or None in own:
        return None
    return Usage(ticks / os.sysconf("SC_CLK_TCK"), sum(seconds for seconds in own if seconds is not None))


def _thread_seconds(directory: Path) -> float | None:
    """Return the processor time of one thread in seconds; None if there is no such thread."""
    fields = _text(directory / "stat").rpartition(")")[2].split()  # the name before the bracket may contain blanks
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if len(fields) > 12 else None


def _text(path: Path) -> str:
    """Return the content of a file, empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
