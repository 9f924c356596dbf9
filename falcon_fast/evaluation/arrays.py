"""Checks and transformations of input arrays that the measures of this package share: shapes, finiteness, standardisation."""

from __future__ import annotations

import numpy as np

from falcon_fast.errors import UsageError

# Below this ratio of standard deviation to mean, the variation of a feature is rounding noise: one float32 rounding is 6e-8 of
# the mean, and a sum of hundreds of terms in another order differs by about ten roundings.
CONSTANT = 1e-6


def check_features(features: np.ndarray, name: str = "features", finite: bool = True) -> None:
    """Raise UsageError unless `features` is a floating-point (n, d) array with n, d >= 1 (and, by default, finite values)."""
    if not isinstance(features, np.ndarray) or features.ndim != 2 or features.dtype.kind != "f":
        raise UsageError(f"{name} must be a floating-point numpy array of shape (images, features)")
    if 0 in features.shape:
        raise UsageError(f"{name} is empty: shape {features.shape}")
    if finite and not np.isfinite(features).all():
        raise UsageError(f"{name} holds NaN or infinity: the network that made it has diverged")


def check_labels(labels: np.ndarray, n: int, name: str = "labels") -> None:
    """Raise UsageError unless `labels` is an integer array of shape (n,)."""
    if not isinstance(labels, np.ndarray) or labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise UsageError(f"{name} must be an integer numpy array of shape (images,)")
    if len(labels) != n:
        raise UsageError(f"{name} has {len(labels)} entries for {n} images")


def check_split(
    train_features: np.ndarray, train_labels: np.ndarray, test_features: np.ndarray, test_labels: np.ndarray
) -> None:
    """Raise UsageError unless the four arrays are a labelled training set and a labelled test set of the same width."""
    check_features(train_features, "train_features")
    check_features(test_features, "test_features")
    check_labels(train_labels, len(train_features), "train_labels")
    check_labels(test_labels, len(test_features), "test_labels")
    if train_features.shape[1] != test_features.shape[1]:
        raise UsageError(
            f"train_features has {train_features.shape[1]} features per image, test_features {test_features.shape[1]}"
        )


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return mean (d,) and standard deviation (d,) in float64, and which features are constant up to rounding, (d,) bool."""
    mean = features.mean(axis=0, dtype=np.float64)
    std = features.std(axis=0, dtype=np.float64)
    return mean, std, std <= CONSTANT * np.abs(mean)


def standardise(reference: np.ndarray, *others: np.ndarray) -> tuple[np.ndarray, ...]:
    """Shift and scale `reference` and `others`, feature by feature, to mean 0 and variance 1 over `reference`.

    Constant features are only shifted (scale 1): dividing by their rounding noise would turn the noise into a feature.
    """
    mean, std, constant = moments(reference)
    std = np.where(constant, 1.0, std)
    return tuple(((x - mean) / std).astype(x.dtype) for x in (reference, *others))
