"""Whether the Triton kernels run on a device. Does not import triton: the question must be cheap, and possible without triton."""

from __future__ import annotations

import importlib.util
import os

import torch

OLDEST_CAPABILITY = (8, 0)

# Both are read once, at import: triton reads the variable when a kernel is defined, and a compiler that traces through `why_not`
# finds constants. TRITON_INTERPRET=1 runs the kernels on CPU tensors in Python: very slow, for tests.
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") not in ("0", "")


def why_not(device: torch.device) -> str | None:
    """Return None if the kernels run on `device`, else the reason in one phrase."""
    if not HAS_TRITON:
        return "triton is not installed"
    if device.type == "cpu" and INTERPRETING:
        return None
    if device.type != "cuda":
        return "it needs an NVIDIA GPU"
    if torch.version.hip is not None:
        return "it needs an NVIDIA GPU, and this torch is built for AMD GPUs"
    properties = torch.cuda.get_device_properties(device)
    if (properties.major, properties.minor) < OLDEST_CAPABILITY:
        return f"it needs compute capability 8.0, and this GPU has {properties.major}.{properties.minor}"
    return None
