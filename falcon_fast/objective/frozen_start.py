"""Whether a run's softmax over the codes is frozen at initialisation."""

from __future__ import annotations

import math
from typing import NamedTuple


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
