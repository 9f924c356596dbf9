"""The projector: backbone features to embeddings that a code can be compared with."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

ACTIVATIONS = ("tanh", "l2")


class FalconProjector(nn.Module):
    """Linear(in_features, f) -> BatchNorm1d(f) -> activation.

    Args:
        in_features: width of the backbone's features.
        f: width of an embedding, that of a code.
        activation: `tanh` (ICML version and published code), entries in (-1, 1); or `l2` (first version), rows of length
            sqrt(f / temperature_batch), so that a row on a code has the logit ln((1 - epsilon (c-1)) / epsilon).
        temperature_batch: the n of the temperature (see `temperature`). `l2` needs it; `tanh` does not depend on it.

    `forward` takes features (N, in_features) of any float dtype and returns float32 embeddings (N, f), under autocast too:
    bfloat16 embeddings alone cost 5e-3 to 2e-2 of relative gradient error in the loss, more the sharper the softmax.

    Raises:
        ValueError: an argument out of range, an unknown activation, `l2` without `temperature_batch`.
    """

    def __init__(
        self, in_features: int, f: int, activation: str = "tanh", temperature_batch: int | None = None
    ) -> None:
        super().__init__()
        if in_features < 1 or f < 1:
            raise ValueError(f"a projector needs positive widths, not {in_features} -> {f}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}: choose one of {', '.join(ACTIVATIONS)}")
        if activation == "l2" and (temperature_batch is None or temperature_batch < 1):
            raise ValueError(
                "the l2 projector scales its rows by sqrt(f / temperature_batch): give temperature_batch >= 1"
            )
        self.linear = nn.Linear(in_features, f)
        self.norm = nn.BatchNorm1d(f)
        self.activation = activation
        self.row_norm = math.sqrt(f / temperature_batch) if activation == "l2" and temperature_batch else None

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        with torch.autocast(features.device.type, enabled=False):
            x = self.norm(self.linear(features.float()))
            return torch.tanh(x) if self.row_norm is None else F.normalize(x, dim=1) * self.row_norm

    def extra_repr(self) -> str:
        return f"activation={self.activation}"
