"""The operators of a small network, with hand-computed FLOP and bytes; and their time on an imaginary device."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from falcon_fast.config import load_recipe
from falcon_fast.hardware.flops import network_flops
from falcon_fast.models.network import build_network
from falcon_fast.profiling.roofline import Bound, Operator, Rates, fused, trace


class Small(nn.Module):
    """Images (N, 3, 4, 4) as 48 numbers, a linear layer 48 -> 16, and a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(48, 16, bias=False)

    def forward(self, images):
        features = self.linear(images.permute(0, 2, 3, 1).flatten(1))  # a view of channels_last images
        return features, torch.relu(features)


def test_operators_bytes_and_flop_by_hand():
    traced = trace(Small(), 8, 4, None)
    x, w, y = 8 * 48 * 4, 48 * 16 * 4, 8 * 16 * 4
    found = [(o.name, o.backward, o.flop, o.bytes) for o in traced.operators]
    product = 2 * 8 * 48 * 16
    assert found == [
        ("mm", False, product, x + w + y),
        ("relu", False, 0, 2 * y),
        ("threshold_backward", True, 0, 3 * y),
        ("mm", True, product, x + w + y),  # of the weight; the images need no gradient
    ]
    assert traced.kept == x + y  # the product's input and ReLU's result
    assert not any(o.half or o.convolution for o in traced.operators)


def test_autocast_halves_the_bytes_of_what_it_multiplies():
    traced = trace(Small(), 8, 4, torch.bfloat16)
    casts = [o for o in traced.operators if o.name == "_to_copy" and not o.backward]
    assert [o.bytes for o in casts] == [48 * 16 * 6, 8 * 48 * 6] or [o.bytes for o in casts] == [
        8 * 48 * 6,
        48 * 16 * 6,
    ]
    forward, backward = (o for o in traced.operators if o.name == "mm")
    assert forward.half and backward.half and forward.bytes == 2 * (8 * 48 + 48 * 16 + 8 * 16)


@pytest.mark.parametrize(("recipe", "size"), [("cifar10", 32), ("imagenet100", 224)])
def test_flop_equal_the_counted_ones_except_for_recomputed_attention(recipe, size):
    network = build_network(load_recipe(recipe), size)
    counted = network_flops(network, 4, size)
    traced = trace(network, 4, size, torch.bfloat16)
    attention = sum(o.flop for o in traced.operators if o.name == "_scaled_dot_product_flash_attention")
    assert sum(o.flop for o in traced.operators) == pytest.approx(counted + attention / 2)  # one of two products again
    assert (attention > 0) == (recipe == "imagenet100")
    assert all(o.half for o in traced.operators if o.convolution)


def test_each_operator_takes_the_longer_of_its_times():
    rates = Rates(100.0, 10.0, 50.0, 5.0, bandwidth=1.0, launch=0.5)
    product = Operator("mm", False, 1000.0, 2.0, False, False, True)
    assert rates.seconds(product) == (10.0, 2.0)
    assert rates.seconds(product._replace(half=False)) == (100.0, 2.0)
    assert rates.seconds(product._replace(convolution=True)) == (20.0, 2.0)
    pointwise = Operator("relu", False, 0.0, 3.0, True, False, False)
    small = pointwise._replace(bytes=0.1)
    assert rates.total([product, pointwise, small]) == Bound(10.0, 3.0, 0.5)


def test_a_compiler_puts_together_what_follows_on_no_product():
    product = Operator("mm", False, 1000.0, 2.0, False, False, True)
    add = Operator("add", False, 0.0, 3.0, True, False, False)
    norm = Operator("native_batch_norm", False, 0.0, 8.0, False, False, False)
    copy = Operator("cat", False, 0.0, 6.0, False, False, False)
    assert fused([product, add, add, product]) == [product, add._replace(bytes=4.0), product]
    assert fused([norm, copy, add]) == [norm._replace(bytes=11.0)]
    assert fused([add, add._replace(backward=True)]) == [add, add._replace(backward=True)]


class Expanded(Small):
    """Adds one number to all features; it is in memory once, however often it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, images):
        features = self.linear(images.permute(0, 2, 3, 1).flatten(1))
        return features, features.add(self.bias.expand(8, 16))


def test_an_expanded_tensor_is_read_once():
    traced = trace(Expanded(), 8, 4, None)
    y = 8 * 16 * 4
    assert [o.bytes for o in traced.operators if o.name == "add"] == [y + 4 + y]
