"""The published NMI protocol against the published script's own loop, written here with torch's modules."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from sklearn.metrics import normalized_mutual_info_score

from falcon_fast.config import load_recipe, override
from falcon_fast.data.sources.digits import open_digits
from falcon_fast.data.sources.images import ImageArray, Source, Split
from falcon_fast.errors import UsageError
from falcon_fast.evaluation.published import published_nmi
from falcon_fast.models.network import FalconNetwork, build_codes, build_network

CPU = torch.device("cpu")
CONFIG = override(
    load_recipe("digits"),
    {"model.width": 8, "loss.embedding_dim": 32, "loss.num_codes": 64, "loss.temperature_batch": 1},
)


@pytest.fixture(scope="module")
def digits() -> Source:
    return open_digits(16)


@pytest.fixture(scope="module")
def network() -> FalconNetwork:
    """Random weights: the clusters of a network need not be good to depend on the protocol."""
    network = build_network(CONFIG, 16)
    for module in network.modules():
        if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
    return network.eval()


def published_loop(network: FalconNetwork, source: Source) -> tuple[float, np.ndarray]:
    """Batches of 64 in order, through a network that nobody put into evaluation mode."""
    network = copy.deepcopy(network).train()
    w = build_codes(CONFIG).dense()
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (source.mean, source.std))
    images = torch.stack(
        [
            torch.from_numpy(np.array(source.test.images.image(i))).permute(2, 0, 1)
            for i in range(len(source.test.images))
        ]
    )
    predictions = np.array([])
    for batch in images.split(64):
        _, h = network((batch / 255 - mean) / std)
        predictions = np.concatenate((predictions, (h @ w).max(dim=1)[1].numpy()))
    return normalized_mutual_info_score(source.test.labels, predictions), predictions


def arranged(source: Source, order: np.ndarray) -> Source:
    pixels = np.stack([np.asarray(source.test.images.image(int(i))) for i in order])
    labels = None if source.test.labels is None else source.test.labels[order]
    return dataclasses.replace(source, test=Split(ImageArray(pixels), labels))


def test_it_is_the_published_loop(digits: Source, network: FalconNetwork) -> None:
    source = arranged(digits, np.arange(300))  # a last batch of 44
    before = copy.deepcopy(network.state_dict())
    with torch.no_grad():
        expected, predictions = published_loop(network, source)
    found = published_nmi(network, build_codes(CONFIG), source, CPU)
    assert found == {
        "nmi_codes": pytest.approx(expected, abs=1e-9),
        "codes_used": len(np.unique(predictions)),
        "batch_size": 64,
        "order": "not sorted by class",
    }
    assert not network.training and all(torch.equal(tensor, before[k]) for k, tensor in network.state_dict().items())


def test_it_depends_on_the_order_of_the_images_and_says_which(digits: Source, network: FalconNetwork) -> None:
    order = np.argsort(digits.test.labels, kind="stable")
    by_class = published_nmi(network, build_codes(CONFIG), arranged(digits, order), CPU)
    shuffled = np.random.RandomState(0).permutation(order)
    mixed = published_nmi(network, build_codes(CONFIG), arranged(digits, shuffled), CPU)
    assert by_class["order"] == "sorted by class" and mixed["order"] == "not sorted by class"
    assert by_class["nmi_codes"] < mixed["nmi_codes"] - 0.02


def test_what_it_cannot_measure_is_one_line(digits: Source, network: FalconNetwork) -> None:
    unlabelled = dataclasses.replace(digits, test=Split(digits.test.images, None))
    with pytest.raises(UsageError, match="no labels: sort them into class folders"):
        published_nmi(network, build_codes(CONFIG), unlabelled, CPU)
    with pytest.raises(UsageError, match="last batch of one of 65 test images"):
        published_nmi(network, build_codes(CONFIG), arranged(digits, np.arange(65)), CPU)
