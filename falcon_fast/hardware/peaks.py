"""What a device could reach at most: from its maker's data sheet where it is known by name, or measured here.

A data sheet's rate is of dense products in a dtype with accumulation in float32, at clocks that a long product does not hold:
a library's matrix product reaches 0.7 to 0.9 of it, which `measure` shows. What the loss's cost model reckons with is what is
reached (`kernels/gpu/loss/cost.py`), not this.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from falcon_fast.hardware.precision import Precision


class Peak(NamedTuple):
    """A GPU's data sheet: FLOP/s of dense products in bfloat16 and float16, TF32, float32; bytes/s and bytes of memory."""

    half: float
    tf32: float
    float32: float
    bandwidth: float
    memory: float


# NVIDIA's data sheets; the first entry whose words all lie in the name that CUDA gives the device. H100 alone is the SXM one.
PEAKS: tuple[tuple[tuple[str, ...], Peak], ...] = (
    (("a100", "80gb", "pcie"), Peak(312e12, 156e12, 19.5e12, 1.935e12, 80e9)),
    (("a100", "80gb"), Peak(312e12, 156e12, 19.5e12, 2.039e12, 80e9)),
    (("a100",), Peak(312e12, 156e12, 19.5e12, 1.555e12, 40e9)),
    (("h100", "nvl"), Peak(835e12, 417e12, 60e12, 3.9e12, 94e9)),
    (("h100", "pcie"), Peak(756e12, 378e12, 51e12, 2.0e12, 80e9)),
    (("h100",), Peak(989e12, 494e12, 67e12, 3.35e12, 80e9)),
    (("h200", "nvl"), Peak(835e12, 417e12, 60e12, 4.8e12, 141e9)),
    (("h200",), Peak(989e12, 494e12, 67e12, 4.8e12, 141e9)),
)


def known_peak(name: str) -> Peak | None:
    """The data sheet of a device by its name ("NVIDIA H100 80GB HBM3"); None where there is none."""
    words = name.lower()
    return next((peak for parts, peak in PEAKS if all(part in words for part in parts)), None)


def known_rate(device: torch.device, precision: Precision) -> float | None:
    """FLOP/s that a device may reach in a precision, by its data sheet; None for a CPU or a GPU that is not listed.

    Where nobody asked for a precision, convolutions are TF32 and other products float32 (torch's switches): the peak is TF32's.
    """
    peak = known_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if peak is None:
        return None
    if precision.autocast is not None:
        return peak.half
    return peak.float32 if precision.name == "float32" and precision.asked else peak.tf32


class Measured(NamedTuple):
    """FLOP/s of torch's own matrix product, its side and dtype; bytes/s of a copy, reading and writing."""

    rate: float
    side: int
    dtype: torch.dtype
    bandwidth: float


def measure(device: torch.device, precision: Precision) -> Measured:
    """Time a product in the run's dtype (8192^3 on a GPU, 2048^3 on a CPU) and a copy of 1 GiB (256 MiB); the fastest of 5."""
    gpu, dtype = device.type == "cuda", precision.autocast or torch.float32
    side = 8192 if gpu else 2048
    return Measured(
        _product_rate(side, dtype, device, precision), side, dtype, _bandwidth(2**30 if gpu else 2**28, device)
    )


def _product_rate(side: int, dtype: torch.dtype, device: torch.device, precision: Precision) -> float:
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(a)
    with precision.switches():
        return 2.0 * side**3 / _seconds(lambda: torch.mm(a, b, out=product), device)


def _bandwidth(size: int, device: torch.device) -> float:
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2.0 * size / _seconds(lambda: target.copy_(source), device)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The fastest of five times that `work` takes, after two that warm up: what else the machine does only adds to it."""
    found = []
    for _ in range(7):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        found.append(time.perf_counter() - started)
    return min(found[2:])


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; a CPU has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
