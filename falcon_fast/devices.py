"""Which device a run uses, and in which precision."""

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


def native_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX-512 BF16 or AMX)."""
    # Not torch.cpu.get_capabilities(), which is newer than the oldest torch supported.
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def mixed_precision(amp: bool, device: torch.device) -> tuple[torch.dtype | None, tuple[str, ...]]:
    """The autocast dtype for `--amp` on a device, and lines for the user.

    bfloat16, on a CPU only where it multiplies bfloat16 natively: emulated, it was slower than float32.
    """
    if not amp:
        return None, ()
    if device.type == "cpu" and not native_bfloat16():
        return None, ("--amp: this CPU has no native bfloat16 products, training in float32",)
    return torch.bfloat16, ()
