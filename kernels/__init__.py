"""Arithmetic only: what runs fast where. Knows nothing of training, imports nothing else of the package.

`cpu_extension` is the compiled C++ module, or None where the installation had no compiler; every function here then runs
in PyTorch, with the same results. `falcon-fast info` says which.
"""

from __future__ import annotations

import torch

from falcon_fast.kernels.cpu.extension import cpu_extension
from falcon_fast.kernels.gpu.support import why_not as why_no_triton

__all__ = ["IMPLEMENTATIONS", "cpu_extension", "loss_implementations", "pack_signs", "unpack_signs", "why_no_triton"]

IMPLEMENTATIONS = ("cpu", "triton", "reference")


def loss_implementations(device: torch.device) -> tuple[str, ...]:
    """The names `falcon_loss(implementation=...)` accepts for tensors on `device`, the one that `auto` takes first."""
    triton = () if why_no_triton(device) else ("triton",)
    return ("cpu", *triton, "reference") if device.type == "cpu" else (*triton, "reference")


def pack_signs(signs: torch.Tensor) -> torch.Tensor:
    """Pack bool (rows, f), row-major, into int32 (rows, ceil(f/32)): bit b of word k is column 32 k + b, padding 0."""
    rows, f = signs.shape
    if cpu_extension is not None and signs.device.type == "cpu":
        words = torch.empty(rows, -(-f // 32), dtype=torch.int32)
        cpu_extension.pack_signs(signs.contiguous().view(torch.uint8).numpy(), words.numpy())
        return words
    padded = torch.nn.functional.pad(signs, (0, -f % 32)).view(rows, -1, 32)
    weights = torch.ones(32, dtype=torch.int64, device=signs.device) << torch.arange(32, device=signs.device)
    return (padded * weights).sum(-1).to(torch.int32)  # 2**31 and above wrap to the negative word with the same bits


def unpack_signs(words: torch.Tensor, f: int, dtype: torch.dtype) -> torch.Tensor:
    """Unpack int32 (rows, ceil(f/32)) into (rows, f) of -1 and +1 in `dtype`, on the same device. Inverse of `pack_signs`."""
    on_cpu = words.device.type == "cpu" and dtype == torch.float32 and not torch.compiler.is_compiling()
    if cpu_extension is not None and on_cpu:
        # 2 M signs (f = 128, c = 16384): 0.6 ms here, 17 ms by the shifts below (one core).
        signs = torch.empty(words.shape[0], f)
        cpu_extension.unpack_signs(words.contiguous().numpy(), signs.numpy())
        return signs
    shifts = torch.arange(32, dtype=torch.int32, device=words.device)
    bits = ((words[:, :, None] >> shifts) & 1).flatten(1)[:, :f]
    return bits.to(dtype).mul_(2).sub_(1)
