"""The NMI of codes and labels as the published code measures it, which is not the measure of this project.

Its script never calls `eval()`: BatchNorm normalises each batch of 64 images with the statistics of that batch. The figure then
depends on which images share a batch: on the digits the same network gives .77 to .79 with shuffled images and .51 with images
sorted by class. The images stay in the order of the data set here, as they do there.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch

from falcon_fast.data.loaders.evaluation import evaluation_batches
from falcon_fast.data.sources.images import Source
from falcon_fast.data.views.photometric import normalize
from falcon_fast.errors import UsageError
from falcon_fast.evaluation.clustering import nmi
from falcon_fast.models.network import FalconNetwork
from falcon_fast.objective.codes import Codes

BATCH_SIZE = 64  # the default of the published script


def check_published(source: Source) -> None:
    """Raise UsageError if the published protocol cannot run on the test split of `source`."""
    if source.test.labels is None:
        raise UsageError(
            "--protocol published is the NMI of codes and labels, and these images have no labels: sort them into class folders"
        )
    if len(source.test.images) % BATCH_SIZE == 1:
        raise UsageError(
            f"--protocol published leaves a last batch of one of {len(source.test.images)} test images, which BatchNorm cannot "
            "normalise: add or remove a test image"
        )


def published_nmi(
    network: FalconNetwork, codes: Codes, source: Source, device: torch.device, workers: int = 0
) -> dict[str, Any]:
    """Return the NMI of codes and labels on the test split, with BatchNorm on batches of 64 images in the data set's order.

    The network itself is not changed. The temperature does not matter, because it does not move the largest logit.

    Args:
        network: images to embeddings; in which mode it is does not matter.
        codes: its dictionary.

    Returns:
        `nmi_codes`, `codes_used`, `batch_size`, and `order`: whether the images of a class lie together.

    Raises:
        UsageError: there are no labels, the last batch would hold one image, or an image cannot be decoded.
    """
    check_published(source)
    network = copy.deepcopy(network).train()  # the running statistics of the copy follow the test images
    w = codes.dense(torch.float32)
    mean, std = source.normalization(device)
    found: list[torch.Tensor] = []
    bad: dict[int, str] = {}
    batches = evaluation_batches(source.test, source.size, device, BATCH_SIZE, workers, bad)
    with torch.inference_mode():
        for images in batches:
            if len(images) == 1:  # the other images of the batch cannot be decoded
                raise UsageError(
                    "--protocol published: a batch holds one image that can be decoded: remove the damaged files"
                )
            found.append((network(normalize(images, mean, std))[1] @ w).argmax(1).cpu())
    assignments, labels = torch.cat(found).numpy(), source.test.without(bad).labels
    assert labels is not None
    grouped = int((np.diff(labels) != 0).sum()) == len(np.unique(labels)) - 1
    return {
        "nmi_codes": nmi(labels, assignments),
        "codes_used": len(np.unique(assignments)),
        "batch_size": BATCH_SIZE,
        "order": "sorted by class" if grouped else "not sorted by class",
    }
