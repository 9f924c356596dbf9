"""Counted FLOP, compared with hand-computed ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from falcon_fast.config import load_recipe
from falcon_fast.hardware.flops import loss_flops, network_flops, step_flops
from falcon_fast.models.network import build_network
from falcon_fast.objective import FalconProjector


class Small(nn.Module):
    """A convolution 3 -> 5 of 3 x 3, a pooling, and a projector 5 -> 7."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1, bias=False)
        self.projector = FalconProjector(5, 7)

    def forward(self, images):
        features = torch.relu(self.conv(images)).mean((2, 3))
        return features, self.projector(features)


def test_a_convolution_and_a_linear_layer_by_hand():
    network = Small()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    convolution = 2 * 4 * 5 * 8 * 8 * (3 * 3 * 3)  # 4 images, 5 channels of 8 x 8, each a product of 27
    linear = 2 * 4 * 5 * 7
    # The images' gradient is not formed; the features' is.
    assert network_flops(network, 4, 8) == 2 * convolution + 3 * linear
    after = network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None for p in network.parameters())


class Attention(nn.Module):
    """One head over the rows of an image, as tokens of 3 S channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)

    def forward(self, images):
        tokens = images.transpose(1, 2).flatten(2)
        q, k, v = self.qkv(tokens).chunk(3, -1)
        return tokens, nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])


def test_attention_counts_its_products_and_not_what_is_recomputed():
    images, side = 4, 8
    width = 3 * side
    linear, products = 2 * images * side * width * 3 * width, 2 * (2 * images * side * side * width)
    assert network_flops(Attention(width), images, side) == 2 * linear + 3 * products


def test_the_losss_floor():
    assert loss_flops(64, 2048, 16384, "rademacher") == 8 * 64 * 2048 * 16384
    assert loss_flops(64, 2048, 16384, "hadamard") == 4 * 64 * 16384 * 11


@pytest.mark.parametrize(
    ("recipe", "size", "network"),
    [
        # Published are multiply-adds of one image forward: ViT-S/16 4.6 G, ResNet-18 at 32 px 0.56 G, here more by
        # the padded conv1, which makes 34 x 34. Backward is twice that.
        ("cifar10", 32, 6 * 0.70e9 * 128),
        ("imagenet100", 224, 6 * 4.61e9 * 512),
    ],
)
def test_networks_whose_cost_is_published(recipe, size, network):
    config = load_recipe(recipe)
    found = step_flops(config, build_network(config, size), size)
    assert found.network == pytest.approx(network, rel=0.02)
    assert found.total == found.network + found.loss
