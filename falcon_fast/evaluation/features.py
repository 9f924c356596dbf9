"""Frozen features and code assignments, always in evaluation mode, under inference_mode, in float32, at the run's temperature.

In `extract_features`, `extract_assigned` and `raw_pixels`, `bad` receives the images that cannot be decoded, number -> reason.
These images have no row in the result; the rows are those of `split.without(bad)`. If `bad` is None, such an image raises
UsageError.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from falcon_fast.data.loaders.evaluation import evaluation_batches
from falcon_fast.data.sources.images import Source, Split
from falcon_fast.data.views.photometric import normalize
from falcon_fast.hardware.threads import check_threads
from falcon_fast.models.network import FalconNetwork
from falcon_fast.objective.codes import Codes

PIXEL_SIDE = 32  # largest side of raw pixels as features: a probe of 150,528 pixels would say more about its solver


class Assigned(NamedTuple):
    """What the trained network computes for a split.

    Attributes:
        features: float32 (n, d), from the backbone.
        embeddings: float32 (n, f), from the projector.
        assignments: int64 (n,), the code with the largest logit.
        mean_assignment: float32 (c,), the mean over the images of the softmax over the codes.
    """

    features: np.ndarray
    embeddings: np.ndarray
    assignments: np.ndarray
    mean_assignment: np.ndarray


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Put the network in evaluation mode under `inference_mode`, and restore its previous mode at the end."""
    was_training = network.training
    network.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        network.train(was_training)


def extract_features(
    network: FalconNetwork,
    split: Split,
    source: Source,
    device: torch.device,
    workers: int = 0,
    bad: dict[int, str] | None = None,
) -> np.ndarray:
    """Return the backbone's features of a split: float32 (n, d)."""
    mean, std = source.normalization(device)
    parts = []
    with evaluation_mode(network):
        for images in evaluation_batches(split, source.size, device, workers=workers, bad=bad):
            parts.append(network.backbone(normalize(images, mean, std)).float().cpu())
            check_threads()
    return torch.cat(parts).numpy()


def extract_assigned(
    network: FalconNetwork,
    codes: Codes,
    tau: float,
    split: Split,
    source: Source,
    device: torch.device,
    workers: int = 0,
    bad: dict[int, str] | None = None,
) -> Assigned:
    """Return features, embeddings and code assignments of a split, at the temperature `tau`."""
    w = codes.dense(torch.float32)
    features, embeddings, assignments = [], [], []
    mean, std = source.normalization(device)
    total = torch.zeros(codes.c, dtype=torch.float64, device=device)
    with evaluation_mode(network):
        for images in evaluation_batches(split, source.size, device, workers=workers, bad=bad):
            feature, embedding = network(normalize(images, mean, std))
            logits = (embedding / tau) @ w
            features.append(feature.float().cpu())
            embeddings.append(embedding.cpu())
            assignments.append(logits.argmax(1).cpu())
            total += logits.softmax(1).double().sum(0)
            check_threads()
    n = sum(map(len, features))
    return Assigned(
        torch.cat(features).numpy(),
        torch.cat(embeddings).numpy(),
        torch.cat(assignments).numpy(),
        (total / n).float().cpu().numpy(),
    )


def raw_pixels(split: Split, source: Source, workers: int = 0, bad: dict[int, str] | None = None) -> np.ndarray:
    """Return the images themselves as features: float32 (n, 3 s s) in [0, 1], where s is the side of a view, at most 32."""
    cpu = torch.device("cpu")
    parts = []
    for images in evaluation_batches(split, source.size, cpu, workers=workers, bad=bad):
        pixels = images.float() / 255
        if source.size > PIXEL_SIDE:
            pixels = torch.nn.functional.interpolate(pixels, (PIXEL_SIDE, PIXEL_SIDE), mode="area")
        parts.append(pixels.flatten(1))
    return torch.cat(parts).numpy()
