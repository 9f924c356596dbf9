"""The host's memory: how much of it a run can get, and freed memory that is kept for the next step."""

from __future__ import annotations

import ctypes
import resource
from pathlib import Path

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def keep_host_memory(device: torch.device) -> bool:
    """Tell the C library to keep the memory of freed tensors for the next ones, until the process ends; only for a CPU.

    Return False if nothing was changed: on another device, or if the C library does not support it.

    By default glibc requests blocks of 32 MiB and more from the system each time and returns them, and the system clears every
    page again. A step of the cifar10-resnet8 recipe then took 1.16 times as long (1.4 on a busy machine), a step of the digits
    recipe 1.12 times (benchmarks/bench_step.py), with 6 % less memory at the peak.
    """
    if device.type != "cpu":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))


def available_memory(device: torch.device) -> int:
    """Return the bytes that this process can still get on `device`: free memory of the GPU, or of the host within its limits.

    The limits of the host's memory are what the kernel says is available, the limit of the control group (containers), and the
    address space of the process (`ulimit -v`).
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limits = [_meminfo("MemAvailable"), _cgroup(), _address_space()]
    return min((limit for limit in limits if limit is not None), default=2**62)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the host or on a GPU: CUDA and its libraries have other errors than torch's."""
    kinds = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return kinds or (isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS))


# Parts of the messages of failed allocations. The last two are torch's on a CPU.
SIGNS = ("out of memory", "_STATUS_ALLOC_FAILED", "can't allocate memory", "not enough memory")


def _meminfo(name: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
    except (OSError, ValueError, StopIteration):  # another operating system
        return None


def _cgroup() -> int | None:
    """Return what the memory limit of this control group (version 2) leaves; cached files can be given up, and do not count."""
    root = Path("/sys/fs/cgroup")
    try:
        limit, used = int((root / "memory.max").read_text()), int((root / "memory.current").read_text())
        lines = (root / "memory.stat").read_text().splitlines()
        cached = next(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
    except (OSError, ValueError, StopIteration):  # "max" is no number: there is no limit
        return None
    return max(0, limit - used + cached)


def _address_space() -> int | None:
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    try:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        used = 0
    return max(0, limit - used)
