"""Which device a run uses."""

from __future__ import annotations

import torch

from falcon_fast.errors import UsageError


def find_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda`, `cuda:1` ... as a device that is there. Raises UsageError otherwise."""
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
            f"device {name!r} is not there: {torch.cuda.device_count()} CUDA devices are visible; try --device cpu"
        )
    return device
