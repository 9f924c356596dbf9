"""The arithmetic that has to be fast, by device. Knows nothing of training and imports nothing else of the package.

`cpu_extension` is the compiled C++ module, or None where it is missing (`why_no_extension` says why); every function here then
runs in PyTorch, with the same results. `falcon-fast info` tells which.
"""

from __future__ import annotations

import torch

from falcon_fast.kernels.cpu.extension import cpu_extension, team_members, why_no_extension
from falcon_fast.kernels.gpu.support import why_not as why_no_triton
from falcon_fast.kernels.signs import pack_signs, unpack_signs

__all__ = [
    "IMPLEMENTATIONS",
    "cpu_extension",
    "loss_implementations",
    "pack_signs",
    "team_members",
    "unpack_signs",
    "why_no_extension",
    "why_no_triton",
]

IMPLEMENTATIONS = ("cpu", "triton", "reference")


def loss_implementations(device: torch.device) -> tuple[str, ...]:
    """Return the names that `falcon_loss(implementation=...)` accepts for tensors on `device`; `auto` takes the first."""
    triton = () if why_no_triton(device) else ("triton",)
    return ("cpu", *triton, "reference") if device.type == "cpu" else (*triton, "reference")
