from __future__ import annotations

import math

import pytest

from falcon_fast import temperature


def test_published_value():
    # arXiv 2410.04959's CIFAR setting
    assert temperature(2048, 16384, 64) == pytest.approx(13.898, abs=5e-4)


def test_a_row_on_its_code_leaves_epsilon_to_every_other():
    # With l2 embeddings (rows sqrt(f/n) long) and orthogonal codes, the softmax of the optimum is known exactly.
    f, c, n, epsilon = 64, 64, 16, 1e-4
    tau = temperature(f, c, n, epsilon)
    logit = math.sqrt(f / n) * math.sqrt(f) / tau  # h . w / tau with h along w; 0 for the others
    assert 1 / (math.exp(logit) + c - 1) == pytest.approx(epsilon, rel=1e-9)


@pytest.mark.parametrize(
    ("f", "c", "n", "epsilon", "word"),
    [
        (0, 16, 8, 1e-8, "width"),
        (8, 1, 8, 1e-8, "codes"),
        (8, 16, 0, 1e-8, "batch"),
        (8, 16, 8, 0.0, "positive"),
        (8, 16, 8, float("nan"), "positive"),
        (8, 101, 8, 0.01, "below 1"),
        (8, 11, 8, 0.095, "preferred"),
    ],
)
def test_out_of_range(f, c, n, epsilon, word):
    with pytest.raises(ValueError, match=word):
        temperature(f, c, n, epsilon)
