"""The batch that every loader yields."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from falcon_fast.data.views.photometric import PhotometricTensors


class Batch(NamedTuple):
    """One step's images on the device, as every loader yields them.

    Attributes:
        step: number of the optimisation step, counted over the whole run.
        views: uint8 (2 B, 3, S, S), channels_last: view 1 of the B images, then view 2 of the same images.
        parameters: what the photometric stage does to each of the 2 B views.
        labels: int64 (B,), or None if the source has no labels.
    """

    step: int
    views: torch.Tensor
    parameters: PhotometricTensors
    labels: torch.Tensor | None


def labels_of(labels: np.ndarray | None, indices: np.ndarray, device: torch.device) -> torch.Tensor | None:
    """Return the labels of the images of a batch, int64 (B,), on `device`; the copy is asynchronous. None without labels."""
    return None if labels is None else torch.from_numpy(labels[indices]).to(device, non_blocking=True)
