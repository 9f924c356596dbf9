"""Whether the Triton kernels run on a device. Imports no triton: asking must be cheap, and possible without it."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

OLDEST_CAPABILITY = (8, 0)


def interpreting() -> bool:
    """Whether Triton was told (TRITON_INTERPRET=1) to run kernels on CPU tensors, in Python: for tests, very slowly."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("0", "")


@functools.cache
def why_not(device: torch.device) -> str | None:
    """None where the kernels run on `device`, else the reason in one phrase."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cpu" and interpreting():
        return None
    if device.type != "cuda":
        return "they need an NVIDIA GPU (or TRITON_INTERPRET=1)"
    if torch.version.hip is not None:
        return "they are written for NVIDIA GPUs, and this torch is built for AMD's"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        return f"they need compute capability 8.0 or newer, and {torch.cuda.get_device_name(device)} has " + (
            "{}.{}".format(*capability)
        )
    return None
