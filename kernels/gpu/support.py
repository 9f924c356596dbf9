"""Whether the Triton kernels run on a device. Imports no triton: asking must be cheap, and possible without it."""

from __future__ import annotations

import importlib.util
import os

import torch

OLDEST_CAPABILITY = (8, 0)

# Both are read once, at import: triton itself looks at the variable when a kernel is defined, and a compiler that traces through
# `why_not` meets constants. TRITON_INTERPRET=1 runs kernels on CPU tensors, in Python: for tests, very slowly.
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") not in ("0", "")


def why_not(device: torch.device) -> str | None:
    """None where the kernels run on `device`, else the reason in one phrase."""
    if not HAS_TRITON:
        return "triton is not installed"
    if device.type == "cpu" and INTERPRETING:
        return None
    if device.type != "cuda":
        return "it needs an NVIDIA GPU"
    if torch.version.hip is not None:
        return "it is written for NVIDIA GPUs, and this torch is built for AMD's"
    properties = torch.cuda.get_device_properties(device)
    if (properties.major, properties.minor) < OLDEST_CAPABILITY:
        return f"it needs compute capability 8.0, and this GPU has {properties.major}.{properties.minor}"
    return None
