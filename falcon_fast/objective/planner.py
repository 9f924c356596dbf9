"""The plans for the loss on a GPU, what each would cost, and why one is chosen; nothing is run."""

from __future__ import annotations

from collections.abc import Iterator

from falcon_fast.kernels.gpu.devices import DEVICES, Device, nearest_device
from falcon_fast.kernels.gpu.loss.cost import Candidate, candidates, choose
from falcon_fast.kernels.gpu.loss.plan import DEFAULT_BUDGET

__all__ = [
    "DEVICES",
    "Candidate",
    "Device",
    "candidates",
    "choose",
    "explain",
    "nearest_device",
]


def explain(n: int, f: int, c: int, codes: str, device: Device, memory_budget: int | None = None) -> Iterator[str]:
    """Yield lines that show the candidates and say why one is chosen (arguments as those of `candidates`)."""
    budget = DEFAULT_BUDGET if memory_budget is None else memory_budget
    yield f"loss of {n} images, f = {f}, {c:,} {codes} codes on {device.name}, forward and backward; budget {budget >> 20:,} MiB"
    yield f"{'plan':10} {'TFLOP':>8} {'traffic GB':>10} {'predicted ms':>12} {'peak MiB':>9}"
    for x in candidates(n, f, c, codes, device, memory_budget):
        fits = "" if x.fits else "  over the budget"
        yield (
            f"{x.name:10} {x.flop / 1e12:8.3f} {x.traffic / 1e9:10.2f} {1e3 * x.seconds:12.3f} {x.peak / 2**20:9.1f}{fits}"
        )
    best = choose(n, f, c, codes, device, memory_budget)
    others = [x for x in candidates(n, f, c, codes, device, memory_budget)[:-1] if x.name != best.name]
    if not best.fits:
        yield f"chosen: {best.name}, which needs the least memory; the budget is too small even for it"
    elif not others:
        yield f"chosen: {best.name}: computing the logits again is faster than reading them back"
    elif others[0].fits:
        yield f"chosen: {best.name}, predicted {others[0].seconds / best.seconds:.1f} times as fast as {others[0].name}"
    else:
        yield f"chosen: {best.name}: {others[0].name} does not fit the budget"
    floor = 8.0 * n * f * c / device.reached.half_products
    yield f"the dense floor, 8 N f c at the library's rate: {1e3 * floor:.3f} ms"
