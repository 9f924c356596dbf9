"""What is known about GPUs, in one table: data sheets, and the rates that libraries' kernels reach. Imports no triton.

A data sheet gives the rate of dense products with accumulation in float32, at clocks that a long product does not hold: a
library's matrix product reaches 0.7 to 0.9 of it. Utilisation (MFU) is a share of the data sheet; the loss's cost model
(`loss/cost.py`) and the predicted step (`profiling/prediction.py`) use the rates that are reached.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# Costs that are the same for every GPU here, in seconds.
LAUNCH_SECONDS = 4e-6  # the device starts a kernel
CALL_SECONDS = 8e-6  # the host issues one operator in eager mode
COMPILED_CALL_SECONDS = 2e-6  # the host issues one kernel of a compiled graph
ALL_REDUCE_LATENCY = 20e-6  # an all-reduce of a few bytes


@dataclass(frozen=True)
class DataSheet:
    """The manufacturer's figures: FLOP/s of dense products in bfloat16 and float16, in TF32, in float32; bytes/s and bytes."""

    half: float
    tf32: float
    float32: float
    bandwidth: float
    memory: float


@dataclass(frozen=True)
class Reached:
    """Rates that libraries' kernels reach.

    Attributes:
        half_products: FLOP/s of a large product in float16 or bfloat16.
        float_products: FLOP/s of a large product in float32.
        bandwidth: bytes/s of traffic with the device's memory.
        cache: bytes/s of traffic with the second-level cache.
        exponentials: exponentials/s.
        all_reduce: bytes/s (bus bandwidth) of large all-reduces inside one machine, over NVLink.
        measured: field -> where it was measured. All other fields are published figures.
    """

    half_products: float
    float_products: float
    bandwidth: float
    cache: float
    exponentials: float
    all_reduce: float
    measured: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Device:
    """One GPU.

    Attributes:
        name: the model's short name, for people.
        words: the device is this one if all of them occur in the lower-case name that CUDA gives it.
        capability: the CUDA compute capability.
        processors: streaming multiprocessors.
    """

    name: str
    words: tuple[str, ...]
    capability: tuple[int, int]
    processors: int
    sheet: DataSheet
    reached: Reached


_A100 = Reached(250e12, 18e12, 1.7e12, 4.0e12, 2.4e12, 230e9)
_PRODUCT = "cuBLAS, 8192^3 in float16, on an H100 SXM (triton 3.6, torch 2.11): 772 TFLOP/s"
_H100 = Reached(
    772e12,
    50e12,
    3.0e12,
    5.5e12,
    3.7e12,
    370e9,
    {"half_products": _PRODUCT, "bandwidth": "a fill, on an H100 SXM (triton 3.6, torch 2.11): 3.1 TB/s"},
)
_H200 = Reached(772e12, 50e12, 4.3e12, 5.5e12, 3.7e12, 370e9, {"half_products": _PRODUCT})

# The first entry that fits a name counts, so that a model's general entry stands last: it is the SXM one. The rates reached and
# the number of processors are those of the SXM model for every form of it.
TABLE = (
    Device("A100", ("a100", "80gb", "pcie"), (8, 0), 108, DataSheet(312e12, 156e12, 19.5e12, 1.935e12, 80e9), _A100),
    Device("A100", ("a100", "80gb"), (8, 0), 108, DataSheet(312e12, 156e12, 19.5e12, 2.039e12, 80e9), _A100),
    Device("A100", ("a100",), (8, 0), 108, DataSheet(312e12, 156e12, 19.5e12, 1.555e12, 40e9), _A100),
    Device("H100", ("h100", "nvl"), (9, 0), 132, DataSheet(835e12, 417e12, 60e12, 3.9e12, 94e9), _H100),
    Device("H100", ("h100", "pcie"), (9, 0), 132, DataSheet(756e12, 378e12, 51e12, 2.0e12, 80e9), _H100),
    Device("H100", ("h100",), (9, 0), 132, DataSheet(989e12, 494e12, 67e12, 3.35e12, 80e9), _H100),
    Device("H200", ("h200", "nvl"), (9, 0), 132, DataSheet(835e12, 417e12, 60e12, 4.8e12, 141e9), _H200),
    Device("H200", ("h200",), (9, 0), 132, DataSheet(989e12, 494e12, 67e12, 4.8e12, 141e9), _H200),
)


def known_device(name: str) -> Device | None:
    """Return the entry for the name that CUDA gives a device ("NVIDIA H100 80GB HBM3"); None if the table has none."""
    lower = name.lower()
    return next((device for device in TABLE if all(word in lower for word in device.words)), None)


def _named(name: str) -> Device:
    device = known_device(name)
    assert device is not None, name
    return device


# The GPUs that `plan --gpu` and `profile --predict` accept: SXM, the A100 with 80 GB.
DEVICES = {"a100": _named("a100 80gb"), "h100": _named("h100"), "h200": _named("h200")}


def nearest_device(name: str, capability: tuple[int, int]) -> Device:
    """Return the entry for a device's name, or else that of the most similar GPU in the table."""
    return known_device(name) or DEVICES["a100" if capability[0] == 8 else "h100"]
