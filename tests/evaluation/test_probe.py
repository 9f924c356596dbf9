"""The linear probe against the optimality conditions of its own objective, and on real digits."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from falcon_fast.errors import UsageError
from falcon_fast.evaluation import probe
from falcon_fast.evaluation.probe import linear_probe


@pytest.fixture(scope="module")
def digits():
    images, labels = load_digits(return_X_y=True)
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    images, labels = images.astype(np.float32), labels.astype(np.int64)
    return images[train], labels[train], images[test], labels[test]


def test_pixels_and_random_features(digits):
    train, train_labels, test, test_labels = digits
    weights = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    assert linear_probe(*digits) > 0.95
    assert (
        linear_probe(np.maximum(train @ weights, 0), train_labels, np.maximum(test @ weights, 0), test_labels) > 0.965
    )


def test_agrees_with_gradient_descent_on_the_documented_objective(digits):
    train, train_labels, test, test_labels = digits
    mean, std = train.mean(0), train.std(0)
    std[std == 0] = 1
    x, z = (train - mean) / std, (test - mean) / std
    weights, bias, targets = np.zeros((64, 10)), np.zeros(10), np.eye(10)[train_labels]
    for _ in range(2000):
        logits = x @ weights + bias
        p = np.exp(logits - logits.max(1, keepdims=True))
        residual = p / p.sum(1, keepdims=True) - targets
        weights -= 1e-4 * (x.T @ residual + weights / probe.C)
        bias -= 1e-4 * residual.sum(0)
    expected = ((z @ weights + bias).argmax(1) == test_labels).mean()
    assert abs(linear_probe(*digits) - expected) <= 1 / len(test_labels)


def test_is_deterministic_and_leaves_its_input_alone(digits):
    copies = [array.copy() for array in digits]
    assert linear_probe(*digits) == linear_probe(*digits)
    for array, copy in zip(digits, copies, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_scale_and_shift_of_features_do_not_matter(digits):
    train, train_labels, test, test_labels = digits
    scale = np.logspace(-3, 3, 64).astype(np.float32)
    moved = linear_probe(train * scale + 5 * scale, train_labels, test * scale + 5 * scale, test_labels)
    assert abs(moved - linear_probe(*digits)) < 0.01


def test_unfinished_optimisation_is_not_shown_to_users(digits, monkeypatch):
    monkeypatch.setattr(probe, "MAX_ITERATIONS", 2)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        assert linear_probe(*digits) > 0.5
    assert not shown


def test_labels_may_be_any_integers_and_unseen_ones_are_errors(digits):
    train, train_labels, test, test_labels = digits
    base = linear_probe(*digits)
    assert linear_probe(train, train_labels * 7 - 30, test, test_labels * 7 - 30) == base
    half = test_labels.copy()
    half[::2] = 99
    assert linear_probe(train, train_labels, test, half) <= 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_features": np.zeros(5, np.float32)}, "shape"),
        ({"train_features": np.zeros((5, 3), np.int64)}, "floating"),
        ({"train_features": np.full((6, 3), np.nan, np.float32)}, "NaN"),
        ({"test_features": np.zeros((4, 2), np.float32)}, "features per image"),
        ({"test_features": np.zeros((0, 3), np.float32)}, "empty"),
        ({"train_labels": np.zeros(6, np.int64)}, "two classes"),
        ({"train_labels": np.arange(5)}, "5 entries for 6"),
        ({"test_labels": np.zeros(4, np.float32)}, "integer"),
    ],
)
def test_bad_input_gets_one_line(change, message):
    arguments = {
        "train_features": np.ones((6, 3), np.float32),
        "train_labels": np.arange(6) % 2,
        "test_features": np.ones((4, 3), np.float32),
        "test_labels": np.zeros(4, np.int64),
    }
    with pytest.raises(UsageError, match=message) as error:
        linear_probe(**(arguments | change))
    assert "\n" not in str(error.value)
