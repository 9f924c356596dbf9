"""The cost model of the loss on a GPU, by which a plan is chosen. Does not import triton.

For one loss, forward and backward, with G = 4 N f c FLOP (the logits of both views computed once) and N c pairs of logits:

    stored      2 G on the tensor cores (logits once, dZ W^T once), 20 bytes of memory traffic a pair: fp16 logits of both views
                written, read for the columns, read and overwritten with dZ, read by the product; 6 exponentials a pair;
                2 f c bytes more for each product that takes expanded codes
    streaming   4 G (logits three times), 28 bytes a pair, but through the L2 cache; 8 exponentials
    hadamard    5 transforms of both views of 2 (A + 2 B) FLOP a logit with A B = f; 12 exponentials; hardly any traffic
    reference   2 G in float32 and 296 bytes a pair (eager PyTorch, each softmax once), of which 24 are saved for backward

A predicted time is the sum of products, traffic and exponentials, an upper bound that ignores their overlap. What a device
reaches is listed in `kernels/gpu/devices.py`. cuBLAS's product reached 788 TFLOP/s for dZ W^T in chunks of 8192 codes on an H100
(triton 3.6, torch 2.11); the shares of our kernels below were measured there, too.
"""

from __future__ import annotations

from typing import NamedTuple

from falcon_fast.kernels.gpu.devices import LAUNCH_SECONDS, Device
from falcon_fast.kernels.gpu.loss.plan import DEFAULT_BUDGET, EXPANDED_CODES, dense_plan, hadamard_plan, hadamard_served

# Shares of the library's rate. Signs are expanded between two products, not at the same time (270 TFLOP/s for 1024 images; 239
# for the logits of 64 images, but 83 for their dZ W^T, before its blocks were halved to give every processor work).
PACKED_PRODUCT = 0.35
EXPANDED_PRODUCT = 0.75  # 0.95 ms for 0.55 TFLOP, including the statistics of the logits, after 0.10 ms of expanding
# Small products with shuffles in between: 2.06 ms for (1024, 2048, 65536), of which the columns took 1.29 ms before their kernel
# lost a fifth of its instructions and ran two programs per processor.
TRANSFORM = 0.12


class Candidate(NamedTuple):
    """One way to compute the loss: FLOP, bytes of traffic, predicted seconds, peak bytes beyond the inputs, whether it fits."""

    name: str
    flop: float
    traffic: float
    seconds: float
    peak: int
    fits: bool


def candidates(n: int, f: int, c: int, codes: str, device: Device, memory_budget: int | None = None) -> list[Candidate]:
    """Return every plan for N = n, with the reference last.

    Args:
        codes: `rademacher` or `hadamard`.
        memory_budget: bytes beyond inputs and dictionary; None: 4 GiB.
    """
    budget = DEFAULT_BUDGET if memory_budget is None else memory_budget
    facts, rates = (device.capability, device.processors), device.reached
    logits, pairs = 4.0 * n * f * c, float(n) * c
    found = []
    if codes == "hadamard" and hadamard_served(f):
        transform = hadamard_plan(n, f, c, *facts)
        flop = 5 * 2 * pairs * 2 * (transform.b + 2 * transform.a if transform.a > 1 else f)
        seconds = flop / (TRANSFORM * rates.half_products) + 12 * pairs / rates.exponentials + 7 * LAUNCH_SECONDS
        found.append(Candidate("hadamard", flop, 24.0 * c, seconds, transform.peak, transform.peak <= budget))
    else:
        for name in ("stored", "streaming"):
            dense = dense_plan(n, f, c, name == "stored", budget, *facts)
            ranges = -(-c // dense.width)
            chunks = ranges * -(-min(dense.width, c) // EXPANDED_CODES)
            packed = PACKED_PRODUCT * rates.half_products
            forming, product, forming_launches, product_launches = logits / packed, logits / packed, ranges, ranges
            if dense.logits.expanded:
                forming = logits / (EXPANDED_PRODUCT * rates.half_products) + 2 * f * c / rates.bandwidth
                forming_launches = 2 * chunks
            if dense.library:
                product = logits / rates.half_products + 2 * f * c / rates.bandwidth
                product_launches = 2 * chunks
            if name == "stored":
                flop, traffic = 2 * logits, 20 * pairs
                seconds = forming + product + traffic / rates.bandwidth + 6 * pairs / rates.exponentials
                launches = 6 + forming_launches + product_launches
            else:
                flop, traffic = 4 * logits, 28 * pairs
                seconds = 3 * forming + product + traffic / rates.cache + 8 * pairs / rates.exponentials
                launches = 2 + 4 * ranges + 3 * forming_launches + product_launches
            found.append(
                Candidate(name, flop, traffic, seconds + launches * LAUNCH_SECONDS, dense.peak, dense.peak <= budget)
            )
    traffic, peak = 296 * pairs, 56 * n * c + 4 * f * c
    seconds = 2 * logits / rates.float_products + traffic / rates.bandwidth + 40 * LAUNCH_SECONDS
    return [*found, Candidate("reference", 2 * logits, traffic, seconds, peak, peak <= budget)]


def choose(n: int, f: int, c: int, codes: str, device: Device, memory_budget: int | None = None) -> Candidate:
    """Return the fastest of our plans that fits the budget, or, if none fits, the one that needs least (running it raises)."""
    ours = candidates(n, f, c, codes, device, memory_budget)[:-1]
    fitting = [candidate for candidate in ours if candidate.fits]
    return min(fitting, key=lambda x: x.seconds) if fitting else min(ours, key=lambda x: x.peak)
