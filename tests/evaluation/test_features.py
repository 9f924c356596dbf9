"""Frozen features against a plain forward pass in evaluation mode, one image at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from falcon_fast import RademacherCodes
from falcon_fast.config import load_recipe, override
from falcon_fast.data.sources.images import ImageArray, Source, Split
from falcon_fast.evaluation.features import extract_assigned, extract_features, raw_pixels
from falcon_fast.models.network import build_network

CPU = torch.device("cpu")


@pytest.fixture
def source():
    pixels = np.random.RandomState(0).randint(0, 256, (300, 16, 16, 3)).astype(np.uint8)
    split = Split(ImageArray(pixels), None)
    return Source(split, split, (), 16, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), "x")


@pytest.fixture
def network():
    config = override(load_recipe("digits"), {"model.width": 4, "loss.embedding_dim": 32, "loss.num_codes": 64})
    network = build_network(config, 16)
    network(torch.randn(64, 3, 16, 16))  # running statistics of its own
    return network


def test_evaluation_mode_whatever_the_mode_before(network, source):
    """Equal to the network in eval mode on normalised images, one by one: no batch statistics, no order, no chunks."""
    codes, tau = RademacherCodes(32, 64), 3.0
    network.train()
    state = {k: v.clone() for k, v in network.state_dict().items()}
    seen = extract_assigned(network, codes, tau, source.test, source, CPU)
    assert network.training
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())
    network.eval()
    mean, std = torch.tensor(source.mean), torch.tensor(source.std)
    for i in (0, 7, 255, 256, 299):
        pixels = torch.from_numpy(source.test.images.pixels[i]).float() / 255
        with torch.no_grad():
            features, embeddings = network(((pixels - mean) / std).permute(2, 0, 1)[None])
        np.testing.assert_allclose(seen.features[i], features[0].numpy(), atol=2e-5)
        np.testing.assert_allclose(seen.embeddings[i], embeddings[0].numpy(), atol=2e-5)
        assert seen.assignments[i] == (embeddings @ codes.dense()).argmax()
    np.testing.assert_array_equal(extract_features(network, source.test, source, CPU), seen.features)


def test_the_mean_assignment_is_that_of_the_runs_temperature(network, source):
    codes = RademacherCodes(32, 64)
    for tau in (0.5, 8.0):
        seen = extract_assigned(network, codes, tau, source.test, source, CPU)
        expected = (torch.from_numpy(seen.embeddings) @ codes.dense() / tau).softmax(1).mean(0)
        np.testing.assert_allclose(seen.mean_assignment, expected.numpy(), rtol=1e-4, atol=1e-7)


def test_raw_pixels_are_the_images(source):
    features = raw_pixels(source.test, source)
    expected = source.test.images.pixels.transpose(0, 3, 1, 2).reshape(300, -1) / 255
    np.testing.assert_allclose(features, expected, atol=1e-6)


def test_large_images_are_compared_at_32_pixels():
    pixels = np.random.RandomState(0).randint(0, 256, (4, 64, 64, 3)).astype(np.uint8)
    split = Split(ImageArray(pixels), None)
    features = raw_pixels(split, Source(split, split, (), 64, (0.5,) * 3, (0.5,) * 3, "x"))
    means = pixels.reshape(4, 32, 2, 32, 2, 3).mean((2, 4)).transpose(0, 3, 1, 2) / 255
    np.testing.assert_allclose(features, means.reshape(4, -1), atol=1e-6)
