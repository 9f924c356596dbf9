"""Clustering measures against their definitions, written out from counts, and brute force over matchings."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from falcon_fast.errors import UsageError
from falcon_fast.evaluation import clustering
from falcon_fast.evaluation.clustering import ari, hungarian_accuracy, kmeans_nmi, nmi

pairs = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=2, max_size=40).map(
    lambda rows: (np.array([r[0] for r in rows]), np.array([r[1] for r in rows]))
)


def entropy(counts):
    shares = np.array([c for c in counts if c]) / sum(counts)
    return -(shares * np.log(shares)).sum()


def table(labels, clusters):
    return np.array([[((labels == y) & (clusters == z)).sum() for z in set(clusters)] for y in set(labels)])


@given(pairs)
def test_nmi_is_twice_the_information_over_the_entropies(pair):
    labels, clusters = pair
    counts = table(labels, clusters)
    h_y, h_z, h_yz = entropy(counts.sum(1)), entropy(counts.sum(0)), entropy(counts.ravel())
    expected = 2 * (h_y + h_z - h_yz) / (h_y + h_z) if h_y + h_z > 0 else 1.0
    assert nmi(labels, clusters) == pytest.approx(expected, abs=1e-7)


@given(pairs)
def test_ari_counts_pairs_of_images(pair):
    labels, clusters = pair
    both = same_y = same_z = 0
    total = 0
    for i, j in itertools.combinations(range(len(labels)), 2):
        y, z = labels[i] == labels[j], clusters[i] == clusters[j]
        both, same_y, same_z, total = both + (y and z), same_y + y, same_z + z, total + 1
    chance = same_y * same_z / total
    top = (same_y + same_z) / 2
    expected = 1.0 if top == chance else (both - chance) / (top - chance)
    assert ari(labels, clusters) == pytest.approx(expected, abs=1e-9)


@settings(max_examples=25)
@given(pairs)
def test_hungarian_accuracy_is_the_best_matching(pair):
    labels, clusters = pair
    slots = [0, 1, 2, 3, None, None, None, None, None]  # classes, and "no class" for clusters left over
    best = max(
        sum((labels[clusters == z] == y).sum() for z, y in enumerate(choice) if y is not None)
        for choice in set(itertools.permutations(slots, 5))
    )
    assert hungarian_accuracy(labels, clusters) == pytest.approx(best / len(labels))


@settings(max_examples=50)
@given(pairs, st.permutations(range(5)))
def test_numbering_of_clusters_does_not_matter(pair, numbers):
    labels, clusters = pair
    renumbered = np.array(numbers)[clusters] * 1000 - 7
    for measure in (nmi, ari, hungarian_accuracy):
        assert measure(labels, renumbered) == pytest.approx(measure(labels, clusters), abs=1e-12)


def test_known_values():
    labels = np.repeat(np.arange(4), 25)
    for measure in (nmi, ari, hungarian_accuracy):
        assert measure(labels, 3 - labels) == pytest.approx(1)
    assert nmi(labels, np.zeros(100, np.int64)) == ari(labels, np.zeros(100, np.int64)) == 0
    assert hungarian_accuracy(labels, np.zeros(100, np.int64)) == 0.25
    # Five codes for each class: only one of the five is matched, though nothing is mixed.
    assert hungarian_accuracy(labels, np.arange(100) // 5) == pytest.approx(0.2)
    assert nmi(labels, np.arange(100) // 5) == pytest.approx(2 * np.log(4) / (np.log(4) + np.log(20)))


def test_kmeans_finds_separate_clusters_whatever_the_scale_of_features():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 400)
    clean = rng.choice([-1.0, 1.0], (5, 8))[labels] + 0.1 * rng.standard_normal((400, 8))
    useless_but_large = np.full((400, 1), 1e6)
    features = np.hstack([clean * np.logspace(-3, 3, 8), useless_but_large]).astype(np.float32)
    assert kmeans_nmi(features, labels, 5) == pytest.approx(1)
    assert kmeans_nmi(features, labels, 1) == 0


def test_kmeans_is_deterministic_and_mini_batches_agree(monkeypatch):
    images, labels = load_digits(return_X_y=True)
    images, labels = images.astype(np.float32), labels.astype(np.int64)
    full = kmeans_nmi(images, labels, 10)
    assert kmeans_nmi(images, labels, 10) == full
    assert 0.55 < full < 0.75
    monkeypatch.setattr(clustering, "FULL_KMEANS_WORK", 0)
    assert kmeans_nmi(images, labels, 10) == pytest.approx(full, abs=0.1)


def test_kmeans_of_collapsed_features_is_zero_without_a_warning():
    labels = np.arange(50) % 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kmeans_nmi(np.ones((50, 3), np.float32), labels, 5) == 0


def test_bad_input_gets_one_line():
    labels = np.arange(10) % 2
    with pytest.raises(UsageError, match="9 entries for 10"):
        nmi(labels, labels[:9])
    with pytest.raises(UsageError, match="integer"):
        ari(labels.astype(np.float32), labels)
    with pytest.raises(UsageError, match="no labels"):
        hungarian_accuracy(labels[:0], labels[:0])
    for clusters in (0, 11):
        with pytest.raises(UsageError, match="from 1 to 10 clusters"):
            kmeans_nmi(np.ones((10, 2), np.float32), labels, clusters)
