"""The host's memory during training on a CPU: freed blocks are kept for the next step."""

from __future__ import annotations

import ctypes

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def keep_host_memory(device: torch.device) -> bool:
    """For training on a CPU: what tensors leave is kept for the next ones, to the end of the process. False where it cannot be.

    glibc takes blocks of 32 MiB and more from the system each time and gives them back, and the system clears every page anew:
    a step of the cifar10-resnet8 recipe took 1.16 times as long (1.4 on a busy machine), one of the digits 1.12
    (benchmarks/bench_step.py), with 6 % less memory at the peak.
    """
    if device.type != "cpu":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))
