"""The weighted kNN against a brute-force vote in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier

from falcon_fast.errors import UsageError
from falcon_fast.evaluation import knn
from falcon_fast.evaluation.knn import weighted_knn


def make(seed: int, n: int = 60, m: int = 40, d: int = 7, classes: int = 4):
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((classes, d))
    train_labels, test_labels = rng.integers(0, classes, n), rng.integers(0, classes, m)
    train = (centres[train_labels] + rng.standard_normal((n, d)) + 0.5).astype(np.float32)
    test = (centres[test_labels] + rng.standard_normal((m, d)) + 0.5).astype(np.float32)
    return train, train_labels, test, test_labels


def brute_force(train, train_labels, test, test_labels, k, temperature):
    correct = 0
    for x, label in zip(test.astype(np.float64), test_labels, strict=True):
        votes: dict[int, float] = {}
        similarity = [x @ t / np.linalg.norm(x) / np.linalg.norm(t) for t in train.astype(np.float64)]
        for i in np.argsort(similarity)[::-1][:k]:
            votes[train_labels[i]] = votes.get(train_labels[i], 0) + np.exp(similarity[i] / temperature)
        correct += max(votes, key=lambda c: votes[c]) == label
    return correct / len(test_labels)


@given(seed=st.integers(0, 10**6), k=st.integers(1, 80), temperature=st.sampled_from([0.03, 0.07, 1.0]))
@settings(max_examples=30)
def test_agrees_with_brute_force(seed, k, temperature):
    data = make(seed)
    assert weighted_knn(*data, k=k, temperature=temperature) == brute_force(*data, k, temperature)


def test_one_neighbour_is_sklearns_and_high_temperature_its_majority():
    train, train_labels, test, test_labels = make(3, n=300, m=200)
    nearest = KNeighborsClassifier(1, metric="cosine").fit(train, train_labels).score(test, test_labels)
    assert weighted_knn(train, train_labels, test, test_labels, k=1) == nearest
    closeness = KNeighborsClassifier(9, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
    expected = closeness.fit(train, train_labels).score(test, test_labels)
    assert weighted_knn(train, train_labels, test, test_labels, k=9) == expected


def test_the_weights_decide_against_the_majority():
    train = np.array([[1, 0], [0.6, 0.8], [0.6, -0.8]], np.float32)
    labels, test = np.array([0, 1, 1]), np.array([[1, 0.01]], np.float32)
    assert weighted_knn(train, labels, test, np.array([0]), k=3, temperature=0.07) == 1
    assert weighted_knn(train, labels, test, np.array([1]), k=3, temperature=10) == 1


def test_features_are_not_centred():
    shift = np.float32(10)
    train = np.array([[1, 0], [-1, 0], [1.1, 0], [-1.1, 0]], np.float32)
    labels = np.array([0, 1, 0, 1])
    assert weighted_knn(train, labels, train, labels, k=2) == 1
    offset = train + np.array([0, shift])
    data = (offset, labels, offset, labels)
    assert weighted_knn(*data, k=4, temperature=0.07) == brute_force(*data, 4, 0.07)


def test_chunks_do_not_change_the_result(monkeypatch):
    data = make(5, n=100, m=57)
    whole = weighted_knn(*data)
    monkeypatch.setattr(knn, "SIMILARITY_BYTES", 3 * 4 * 100)
    assert weighted_knn(*data) == whole
    monkeypatch.setattr(knn, "SIMILARITY_BYTES", 1)
    assert weighted_knn(*data) == whole


@given(scale=st.floats(1e-6, 1e6), seed=st.integers(0, 1000))
@settings(max_examples=20)
def test_lengths_do_not_matter(scale, seed):
    train, train_labels, test, test_labels = make(seed)
    expected = weighted_knn(train, train_labels, test, test_labels)
    assert weighted_knn(train * np.float32(scale), train_labels, test, test_labels) == expected


def test_extremes():
    train, train_labels, test, test_labels = make(1)
    assert weighted_knn(train, train_labels, train, train_labels, k=1) == 1
    assert weighted_knn(train, train_labels, train, train_labels, k=60, temperature=1e-6) == 1
    assert weighted_knn(train, train_labels, test, test_labels, k=10**9, temperature=1e9) <= 1
    assert weighted_knn(np.zeros_like(train), train_labels, test, test_labels) <= 1
    assert weighted_knn(train, train_labels * 5 - 3, test, test_labels * 5 - 3) == weighted_knn(
        train, train_labels, test, test_labels
    )
    assert weighted_knn(train, train_labels, test, test_labels + 100) == 0


@pytest.mark.parametrize("bad", [{"k": 0}, {"temperature": 0.0}, {"temperature": float("nan")}])
def test_bad_settings_get_one_line(bad):
    with pytest.raises(UsageError, match="kNN needs"):
        weighted_knn(*make(0), **bad)


def test_bad_arrays_get_one_line():
    train, train_labels, test, test_labels = make(0)
    test[3, 2] = np.inf
    with pytest.raises(UsageError, match="test_features holds NaN"):
        weighted_knn(train, train_labels, test, test_labels)
