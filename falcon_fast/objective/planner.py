"""The loss on a GPU explained before it runs: the plans and what each would cost, and whether the softmax starts frozen."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from falcon_fast.kernels.gpu.cost import DEVICES, Candidate, Device, candidates, choose, nearest_device
from falcon_fast.kernels.gpu.plan import DEFAULT_BUDGET

__all__ = [
    "DEVICES",
    "Candidate",
    "Device",
    "Start",
    "candidates",
    "choose",
    "explain",
    "frozen_start",
    "nearest_device",
    "start",
]


def explain(n: int, f: int, c: int, codes: str, device: Device, memory_budget: int | None = None) -> Iterator[str]:
    """Lines that show the candidates and say why one is chosen."""
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
        yield f"chosen: {best.name}, which holds least; the budget is too small even for it"
    elif not others:
        yield f"chosen: {best.name}: logits are formed anew faster than they could be read back"
    elif others[0].fits:
        yield f"chosen: {best.name}, predicted {others[0].seconds / best.seconds:.1f} times as fast as {others[0].name}"
    else:
        yield f"chosen: {best.name}: {others[0].name} does not fit the budget"
    floor = 8.0 * n * f * c / device.half_products
    yield f"the dense floor, 8 N f c at the library's rate: {1e3 * floor:.3f} ms"


class Start(NamedTuple):
    """How a run starts: spread of the logits and the spread above which a softmax over c random codes is frozen."""

    spread: float
    freezing: float

    @property
    def frozen(self) -> bool:
        return self.spread > self.freezing


# Root mean square of tanh of a standard normal variable: what BatchNorm and tanh give at initialisation.
RMS_TANH = 0.6279


def start(f: int, c: int, tau: float, activation: str, temperature_batch: int) -> Start:
    """The logits' standard deviation at initialisation, against sqrt(2 ln c).

    Above it the largest of c independent normal logits holds nearly all of the softmax's mass, whatever the image: assignments
    are then one code each, and what remains of the gradient is that of a few codes. With `tanh` embeddings and the published
    temperature the spread is 11.6 sqrt(n / f), n the temperature's batch; with `l2` n cancels and it is 18.4 / sqrt(f).
    """
    entry = RMS_TANH if activation == "tanh" else 1.0 / math.sqrt(temperature_batch)
    return Start(entry * math.sqrt(f) / tau, math.sqrt(2.0 * math.log(c)))


def frozen_start(f: int, c: int, tau: float, activation: str, temperature_batch: int) -> str | None:
    """One line that says so, with the numbers and what to do, when a run starts frozen; else None."""
    found = start(f, c, tau, activation, temperature_batch)
    if not found.frozen:
        return None
    line = (
        f"the softmax starts frozen: logits spread by {found.spread:.1f} at initialisation, above sqrt(2 ln c) = "
        f"{found.freezing:.1f} for {c} codes"
    )
    if activation != "tanh":
        return f"{line}: use wider embeddings (loss.embedding_dim)"
    # The spread goes with sqrt(n): 0.7 of the freezing point did best in trials on CIFAR-10.
    advised = max(1, int(temperature_batch * (0.7 * found.freezing / found.spread) ** 2))
    return f"{line}: lower loss.temperature_batch from {temperature_batch} to about {advised}"
