"""The most that a device could reach: by its data sheet where its name is known (`kernels/gpu/devices.py`), or as measured here.

A data sheet's rate is not reached in practice: a library's matrix product reaches 0.7 to 0.9 of it, which `measure` shows.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from falcon_fast.hardware.precision import Precision
from falcon_fast.kernels.gpu.devices import known_device


def known_rate(device: torch.device, precision: Precision) -> float | None:
    """Return the data sheet's FLOP/s of a device in a precision; None for a CPU or a GPU that the table does not have.

    If no precision was asked for, torch computes convolutions in TF32 and other products in float32: the peak is TF32's.
    """
    known = known_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if known is None:
        return None
    if precision.autocast is not None:
        return known.sheet.half
    return known.sheet.float32 if precision.name == "float32" and precision.asked else known.sheet.tf32


class Measured(NamedTuple):
    """Measured rates: FLOP/s of torch's own matrix product, with its side and dtype; bytes/s of a copy, read plus written."""

    rate: float
    side: int
    dtype: torch.dtype
    bandwidth: float


def measure(device: torch.device, precision: Precision) -> Measured:
    """Time a matrix product in the run's dtype and a copy; each is the fastest of five.

    The product is 8192^3 on a GPU and 2048^3 on a CPU, the copy 1 GiB and 256 MiB.
    """
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
    """Return the fastest of five runs of `work`, after two to warm up: other load on the machine can only make a run slower."""
    found = []
    for _ in range(7):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        found.append(time.perf_counter() - started)
    return min(found[2:])


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its work; do nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
