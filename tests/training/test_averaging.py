from __future__ import annotations

import copy

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

from falcon_fast.training.averaging import WeightAverage


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))


def trained(net: nn.Module, steps: int, after) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(6, 3, 4, 4)).square().mean().backward()
        optimizer.step()
        after()


def test_it_is_timms_average():
    net = network()
    average, theirs = WeightAverage(net, 0.9), ModelEmaV3(net, decay=0.9)
    trained(net, 5, lambda: (average.update(), theirs.update(net)))
    expected = theirs.module.state_dict()
    assert not torch.allclose(average.state()["3.weight"], net[3].weight)
    assert average.state().keys() == expected.keys() - {"1.num_batches_tracked"}
    for name, tensor in average.state().items():
        torch.testing.assert_close(tensor, expected[name], msg=name)


def test_applied_and_back_to_the_bit_also_after_an_error():
    net = network().to(memory_format=torch.channels_last)
    average = WeightAverage(net, 0.5)
    trained(net, 3, average.update)
    weights = copy.deepcopy(net.state_dict())
    averages = {name: tensor.clone() for name, tensor in average.state().items()}
    places = [p.data_ptr() for p in net.parameters()]
    with pytest.raises(KeyError), average.applied(net):
        for name, tensor in averages.items():
            assert torch.equal(net.state_dict()[name], tensor), name
        raise KeyError
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in weights.items())
    assert all(torch.equal(average.state()[name], tensor) for name, tensor in averages.items())
    assert places == [p.data_ptr() for p in net.parameters()]  # nothing that points there notices
    assert average.state()["0.weight"].is_contiguous(memory_format=torch.channels_last)
    # Another network of the same names.
    other = network()
    average.swap(other)
    assert torch.equal(other[3].weight, averages["3.weight"])


def test_the_weights_learn_as_without_it():
    first = network()
    second = copy.deepcopy(first)
    for net, after in ((first, lambda: None), (second, WeightAverage(second, 0.9).update)):
        torch.manual_seed(3)
        trained(net, 3, after)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_a_decay_that_is_none(decay):
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        WeightAverage(network(), decay)
