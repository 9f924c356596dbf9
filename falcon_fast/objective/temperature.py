"""The temperature of the assignments: a property of the run, fixed when training starts.

A row of embeddings that lies on a code should give every other code the probability epsilon. With embeddings of length
sqrt(f / n) (the `l2` projector) the logit of its own code is f / (tau sqrt(n)), and solving for tau gives

    tau = f / ( sqrt(n) ln( (1 - epsilon (c - 1)) / epsilon ) )

(paper, section 3). The paper calls n the batch size, but n only determines how sharp the softmax is. The same n must be used for
training, for a smaller last batch and for evaluation, so it is a setting of the run (`temperature_batch`).
"""

from __future__ import annotations

import math


def temperature(f: int, c: int, n: int, epsilon: float = 1e-8) -> float:
    """Return the temperature tau of the published rule.

    Args:
        f: width of an embedding, at least 1.
        c: number of codes in the dictionary, at least 2.
        n: batch size in the formula (`temperature_batch`), at least 1; a smaller value gives a softer softmax.
        epsilon: probability of every other code in an optimal row. epsilon (c - 1) must be below 1, and epsilon below 1/c:
            otherwise the optimal row would not prefer its own code.

    Raises:
        ValueError: if an argument is out of range.
    """
    if f < 1:
        raise ValueError(f"the embedding width f must be at least 1, not {f}")
    if c < 2:
        raise ValueError(f"a dictionary needs at least 2 codes, not {c}")
    if n < 1:
        raise ValueError(f"the batch size in the temperature formula must be at least 1, not {n}")
    if not epsilon > 0.0:
        raise ValueError(f"epsilon must be positive, not {epsilon}")
    if epsilon * (c - 1) >= 1.0:
        raise ValueError(
            f"epsilon (c - 1) must stay below 1: epsilon {epsilon} with {c} codes gives {epsilon * (c - 1):g}"
        )
    odds = math.log((1.0 - epsilon * (c - 1)) / epsilon)
    if odds <= 0.0:
        raise ValueError(f"with epsilon {epsilon} none of {c} codes is preferred: it must be below 1/c = {1.0 / c:g}")
    return f / (math.sqrt(n) * odds)
