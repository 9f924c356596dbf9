"""Keep freed host memory for the next step during training on a CPU."""

from __future__ import annotations

import ctypes

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
