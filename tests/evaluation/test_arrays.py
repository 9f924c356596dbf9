"""The checks and the standardisation that all measures share."""

from __future__ import annotations

import numpy as np
import pytest

from falcon_fast.errors import UsageError
from falcon_fast.evaluation import arrays


def test_standardise_uses_the_training_set_and_keeps_constants_quiet():
    rng = np.random.default_rng(0)
    train = rng.normal(3, 2, (500, 4)).astype(np.float32)
    train[:, 1] = 7
    train[:, 2] = 1000 * (1 + 6e-8 * rng.standard_normal(500))
    test = rng.normal(5, 1, (300, 4)).astype(np.float32)
    test[:, 1:3] = train[:300, 1:3]
    a, b = arrays.standardise(train, test)
    assert a.dtype == b.dtype == np.float32
    np.testing.assert_allclose(a[:, [0, 3]].mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(a[:, [0, 3]].std(0), 1, atol=1e-5)
    np.testing.assert_allclose(b[:, 0], (test[:, 0] - train[:, 0].mean()) / train[:, 0].std(), rtol=1e-3, atol=1e-4)
    assert np.abs(a[:, 1:3]).max() < 1e-3


def test_moments_are_in_float64_and_name_the_constant_features() -> None:
    x = np.random.default_rng(0).normal(5, 2, (400, 3)).astype(np.float32)
    x[:, 1] = 0
    mean, std, constant = arrays.moments(x)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(mean, wide.mean(0), rtol=1e-12)
    np.testing.assert_allclose(std, wide.std(0), rtol=1e-12)
    assert mean.dtype == std.dtype == np.float64 and constant.tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([[1.0]], "must be a floating-point"),
        (np.zeros((3, 2), np.int64), "must be a floating-point"),
        (np.zeros(3, np.float32), "must be a floating-point"),
        (np.zeros((0, 2), np.float32), "is empty"),
        (np.array([[1.0, np.inf]]), "mine holds NaN or infinity"),
    ],
)
def test_features_that_cannot_be_measured_are_refused(features: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        arrays.check_features(features, "mine")  # type: ignore[arg-type]
    arrays.check_features(np.array([[np.nan, 1.0]]), finite=False)


@pytest.mark.parametrize("labels", [[0, 1], np.zeros(2), np.zeros((2, 1), np.int64), np.zeros(3, np.int64)])
def test_labels_that_do_not_fit_are_refused(labels: object) -> None:
    with pytest.raises(UsageError, match="mine"):
        arrays.check_labels(labels, 2, "mine")  # type: ignore[arg-type]
