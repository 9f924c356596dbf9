from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from falcon_fast.data.sources.images import ImageArray, Split
from falcon_fast.evaluation.protocol import UNLABELLED, scores

CPU = torch.device("cpu")


def split(labels):
    count = 40 if labels is None else len(labels)
    return Split(ImageArray(np.zeros((count, 4, 4, 3), np.uint8)), None if labels is None else np.asarray(labels))


@pytest.fixture
def blobs():
    """Two far clusters in 5 dimensions, their labels in turn."""
    labels = np.arange(40) % 2
    features = np.random.RandomState(0).randn(40, 5).astype(np.float32) + 20 * (2 * labels[:, None] - 1).astype(
        np.float32
    )
    return features, labels


def test_separate_clusters_score_full_marks(blobs):
    features, labels = blobs
    assert scores(features, features, split(labels), split(labels), 2, CPU) == {
        "probe": 1.0,
        "knn": 1.0,
        "nmi_kmeans": 1.0,
    }


def test_without_labels_there_is_nothing_to_score(blobs):
    assert scores(blobs[0], blobs[0], split(None), split(None), 0, CPU) == UNLABELLED


def test_fewer_test_images_than_classes(blobs):
    features, _ = blobs
    labels = np.arange(40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = scores(features, features[:3], split(labels), split(labels[:3]), 40, CPU)
    assert found["nmi_kmeans"] is None and found["probe"] is not None
