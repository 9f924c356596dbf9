"""Weighted k-nearest-neighbour classification of frozen features.

The protocol is that of Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination" (CVPR 2018), with
k = 20 and temperature 0.07 as in DINO (Caron et al., ICCV 2021). Features are L2-normalised, and neither centred nor scaled. The
k training images with the highest cosine similarity s vote for their class with weight exp(s / temperature).
"""

from __future__ import annotations

import numpy as np
import torch

from falcon_fast.errors import UsageError
from falcon_fast.evaluation.arrays import check_split

# Size of the similarities computed at once, in bytes: enough for full-speed products, and small compared with any features.
SIMILARITY_BYTES = 256 * 2**20


@torch.inference_mode()
def weighted_knn(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    k: int = 20,
    temperature: float = 0.07,
    device: torch.device | str | None = None,
) -> float:
    """Return the test accuracy, in [0, 1], of the weighted k-nearest-neighbour vote (Wu et al. 2018, section 3.4).

    Args:
        train_features, test_features: (n, d) and (m, d), floating point; converted to float32. A zero vector has similarity 0 to
            everything.
        train_labels, test_labels: (n,) and (m,) integers, any values; a test label that does not occur in training counts as an
            error.
        k: number of neighbours that vote; all n if n < k.
        temperature: must be positive; a smaller value gives near neighbours more weight.
        device: where to compute; the CPU by default.

    Raises:
        UsageError: shapes do not match, features hold NaN or infinity, k < 1, or temperature <= 0.
    """
    check_split(train_features, train_labels, test_features, test_labels)
    if k < 1:
        raise UsageError(f"kNN needs k of at least 1, not {k}")
    if not temperature > 0:
        raise UsageError(f"kNN needs a temperature above 0, not {temperature}")
    k = min(k, len(train_features))
    classes, train_index = np.unique(train_labels, return_inverse=True)
    train = _normalised(train_features, device)
    label_of = torch.as_tensor(train_index, device=device)
    rows = max(1, SIMILARITY_BYTES // (4 * len(train)))
    correct = 0
    for start in range(0, len(test_features), rows):
        test = _normalised(test_features[start : start + rows], device)
        similarity, neighbour = (test @ train.T).topk(k, dim=1)
        # Subtracting a row's largest similarity leaves the vote unchanged and avoids overflow at any temperature.
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = weight.new_zeros(len(test), len(classes)).scatter_add_(1, label_of[neighbour], weight)
        predicted = classes[votes.argmax(dim=1).cpu().numpy()]
        correct += int((predicted == test_labels[start : start + rows]).sum())
    return correct / len(test_features)


def _normalised(features: np.ndarray, device: torch.device | str | None) -> torch.Tensor:
    """Return the features as float32 rows of length 1."""
    return torch.nn.functional.normalize(torch.as_tensor(features, dtype=torch.float32, device=device), dim=1)
