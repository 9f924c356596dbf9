"""The digits: scikit-learn's images, enlarged bilinearly, and their fixed split."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from falcon_fast.config import DataConfig
from falcon_fast.data.sources.images import Source
from falcon_fast.data.sources.opening import open_source

from .opened import pixels, refusal


@pytest.fixture(scope="module")
def digits() -> Source:
    return open_source(DataConfig(source="digits"))


def test_digits_are_all_there_once_and_upsampled_bilinearly(digits: Source) -> None:
    from scipy.spatial.distance import cdist
    from sklearn.datasets import load_digits

    theirs = load_digits()
    expected = torch.nn.functional.interpolate(
        torch.tensor(theirs.images * 255 / 16)[:, None], (16, 16), mode="bilinear", align_corners=False
    ).numpy()[:, 0]
    ours = np.concatenate([pixels(digits.train), pixels(digits.test)])
    assert ours.shape == (1797, 16, 16, 3) and ours.dtype == np.uint8
    assert ours.min() == 0 and ours.max() == 255
    assert (ours[..., 0] == ours[..., 1]).all() and (ours[..., 0] == ours[..., 2]).all()
    assert digits.train.labels is not None and digits.test.labels is not None
    labels = np.concatenate([digits.train.labels, digits.test.labels])

    # Each of ours is one of theirs, rounded (in float32, so half a level may fall on either side).
    distance = cdist(ours[..., 0].reshape(1797, -1).astype(float), expected.reshape(1797, -1), "chebyshev")
    match = distance.argmin(1)
    assert distance.min(1).max() <= 0.501
    assert sorted(match.tolist()) == list(range(1797))
    assert np.array_equal(labels, theirs.target[match])


def test_digits_at_their_own_size_are_exactly_theirs() -> None:
    from sklearn.datasets import load_digits

    theirs = load_digits()
    source = open_source(DataConfig(source="digits", size=8))
    ours = np.concatenate([pixels(source.train), pixels(source.test)])[..., 0]
    expected = np.rint(theirs.images * 255 / 16).astype(np.uint8)
    assert sorted(x.tobytes() for x in ours) == sorted(x.tobytes() for x in expected)  # disjoint and complete
    assert source.size == 8


def test_the_split_of_the_digits_is_stratified_and_fixed(digits: Source) -> None:
    assert digits.train.labels is not None and digits.test.labels is not None
    assert (len(digits.train.images), len(digits.test.images)) == (1437, 360)
    assert digits.train.labels.dtype == digits.test.labels.dtype == np.int64
    everything = Counter(digits.train.labels.tolist()) + Counter(digits.test.labels.tolist())
    for label, held in Counter(digits.test.labels.tolist()).items():
        assert abs(held - 0.2 * everything[label]) < 1
    again = open_source(DataConfig(source="digits"))
    assert np.array_equal(pixels(again.test), pixels(digits.test))
    assert again.fingerprint == digits.fingerprint


def test_digits_are_normalised_by_their_training_split(digits: Source) -> None:
    ours = pixels(digits.train).astype(np.float64) / 255
    np.testing.assert_allclose(digits.mean, ours.mean((0, 1, 2)), rtol=1e-9)
    np.testing.assert_allclose(digits.std, ours.std((0, 1, 2)), rtol=1e-9)
    mean, std = digits.normalization(torch.device("cpu"))
    assert mean.shape == std.shape == (3,) and mean.dtype == torch.float32
    assert digits.classes == tuple("0123456789") and digits.size == 16 and digits.notes == ()


def test_digits_take_no_path() -> None:
    assert "--recipe folder" in refusal(DataConfig(source="digits", path="/tmp"))
