"""The temperature of the assignments: a property of the run, fixed when training starts.

A row of embeddings that sits on a code should give every other code the probability epsilon. With embeddings scaled by
sqrt(f / n) (the `l2` projector) its logit is f / (tau sqrt(n)) ... and solving for tau gives

    tau = f / ( sqrt(n) ln( (1 - epsilon (c - 1)) / epsilon ) )

(paper, section 3). n is called the batch size there, but it only sets how sharp the softmax is: the same n must serve
training, a last smaller batch and evaluation, so it is a setting of the run (`temperature_batch`).
"""

from __future__ import annotations

import math


def temperature(f: int, c: int, n: int, epsilon: float = 1e-8) -> float:
    """The temperature tau of the published rule.

    Args:
        f: width of an embedding, at least 1.
        c: number of codes in the dictionary, at least 2.
        n: the batch size that the temperature is tied to (`temperature_batch`), at least 1.
        epsilon: probability that an optimal row leaves to every other code; needs epsilon (c - 1) < 1, and less than
            1/c, or the optimal row would not prefer its own code.

    Raises:
        ValueError: an argument out of range.
    """
    if f < 1:
        raise ValueError(f"the embedding width f must be at least 1, not {f}")
    if c < 2:
        raise ValueError(f"a dictionary needs at least 2 codes, not {c}")
    if n < 1:
        raise ValueError(f"the batch of the temperature must be at least 1, not {n}")
    if not epsilon > 0.0:
        raise ValueError(f"epsilon must be positive, not {epsilon}")
    if epsilon * (c - 1) >= 1.0:
        raise ValueError(
            f"epsilon (c - 1) must stay below 1: epsilon {epsilon} with {c} codes gives {epsilon * (c - 1):g}"
        )
    odds = math.log((1.0 - epsilon * (c - 1)) / epsilon)
    if odds <= 0.0:
        raise ValueError(f"epsilon {epsilon} leaves {c} codes no preferred one: it must be below 1/c = {1.0 / c:g}")
    return f / (math.sqrt(n) * odds)
