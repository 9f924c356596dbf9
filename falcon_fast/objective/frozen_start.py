"""Whether a run's softmax over the codes is frozen at initialisation."""

from __future__ import annotations

import math
from typing import NamedTuple


class Start(NamedTuple):
    """The start of a run: the standard deviation of the logits, and the one above which a softmax over c random codes is
    frozen."""

    spread: float
    freezing: float

    @property
    def frozen(self) -> bool:
        return self.spread > self.freezing


# Root mean square of tanh of a standard normal variable: the entries of the embeddings at initialisation, after BatchNorm and
# tanh.
RMS_TANH = 0.6279


def start(f: int, c: int, tau: float, activation: str, temperature_batch: int) -> Start:
    """Return the standard deviation of the logits at initialisation, and sqrt(2 ln c).

    Above sqrt(2 ln c) the largest of c independent normal logits has nearly all of the softmax's mass, whatever the image: every
    assignment is then a single code, and only a few codes contribute to the gradient. With `tanh` embeddings and the published
    temperature the spread is 11.6 sqrt(n / f), where n is the batch size in the temperature formula; with `l2`, n cancels and it
    is 18.4 / sqrt(f).
    """
    entry = RMS_TANH if activation == "tanh" else 1.0 / math.sqrt(temperature_batch)
    return Start(entry * math.sqrt(f) / tau, math.sqrt(2.0 * math.log(c)))


def frozen_start(f: int, c: int, tau: float, activation: str, temperature_batch: int) -> str | None:
    """Return a one-line warning with the numbers and what to do if a run starts frozen, else None."""
    found = start(f, c, tau, activation, temperature_batch)
    if not found.frozen:
        return None
    line = (
        f"the softmax starts frozen: the standard deviation of the logits is {found.spread:.1f} at initialisation, above "
        f"sqrt(2 ln c) = {found.freezing:.1f} for {c} codes"
    )
    if activation != "tanh":
        return f"{line}: use wider embeddings (loss.embedding_dim)"
    # The spread is proportional to sqrt(n). In trials on CIFAR-10, 0.7 of the freezing point gave the best results.
    advised = max(1, int(temperature_batch * (0.7 * found.freezing / found.spread) ** 2))
    return f"{line}: lower loss.temperature_batch from {temperature_batch} to about {advised}"
