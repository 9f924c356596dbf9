"""How worker processes hand their batches over: in shared memory where there is room, otherwise through a pipe.

Shared memory lies in /dev/shm, which has 64 MiB in a container of Docker or Kubernetes unless one asks for more. A batch of 256
images of 224 px takes 38.5 MB. torch moves tensors to shared memory in a thread of the worker, and when that fails, it shows
a traceback there while the trainer waits for the batch for ever. Here the worker does it before, and sends an array where there
is no room. That costs a copy through a pipe.
"""

from __future__ import annotations

import os

import numpy as np
import torch
from torch.utils.data import get_worker_info

DIRECTORY = "/dev/shm"


def free_bytes() -> int | None:
    """Return the bytes that are free in /dev/shm; None where there is no such directory."""
    try:
        found = os.statvfs(DIRECTORY)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def handed_over(tensor: torch.Tensor) -> torch.Tensor | np.ndarray:
    """Return a tensor as a worker process sends it: in shared memory, or as an array, which goes through a pipe.

    It takes at most half of what is free, because the processes of a run (NCCL) need shared memory, too. Outside of a worker the
    tensor is returned unchanged.
    """
    if get_worker_info() is None:
        return tensor
    free = free_bytes()
    if free is not None and free < 2 * tensor.nbytes:
        return tensor.numpy()
    try:
        shared: torch.Tensor = tensor.share_memory_()
        return shared
    except RuntimeError:  # another worker has taken the room meanwhile
        return tensor.numpy()


def received(item: torch.Tensor | np.ndarray) -> torch.Tensor:
    """Return what `handed_over` sent as a tensor."""
    return torch.from_numpy(item) if isinstance(item, np.ndarray) else item


def described() -> str:
    """Return a line on /dev/shm for `falcon-fast info`."""
    free = free_bytes()
    if free is None:
        return (
            f"shared memory: there is no {DIRECTORY}; batches of worker processes go through pipes where sharing fails"
        )
    size = os.statvfs(DIRECTORY)
    total = size.f_blocks * size.f_frsize
    line = f"shared memory: {free / 2**20:,.0f} of {total / 2**20:,.0f} MiB are free in {DIRECTORY}"
    return line if total >= 2**30 else f"{line}; {advice()}"


def advice() -> str:
    """Return what a user can do about a small /dev/shm."""
    return (
        "batches that do not fit go through pipes, which costs a copy; a container gets more with docker run --shm-size=8g (or "
        "--ipc=host), a Kubernetes pod with an emptyDir of medium Memory at /dev/shm"
    )
