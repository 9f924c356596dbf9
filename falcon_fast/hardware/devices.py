"""Find the device that a run uses. (What is known about models of GPUs is in kernels/gpu/devices.py.)"""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from falcon_fast.errors import UsageError


def find_device(name: str) -> torch.device:
    """Return the device that `name` stands for: `auto`, `cpu`, `cuda`, `cuda:1` ...

    Raises:
        UsageError: the name is not known, or the machine does not have this device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"unknown device {name!r}: use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device {name!r} is not supported: use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device {name!r} does not exist: {torch.cuda.device_count()} CUDA devices are visible; try --device cpu"
        )
    return device


def cpu_name() -> str:
    """Return the processor's model name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
