from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from falcon_fast.runs.layer_statistics import Row, Watch, first_bad, statistics_of


def test_the_four_numbers():
    found = statistics_of(torch.tensor([[1.0, -2.0, math.nan], [math.inf, 2.0, -math.inf]]), scale=2.0)
    assert found == (-1.0, 1.0, pytest.approx(math.sqrt(0.75)), 3, 6)
    assert statistics_of(torch.full((3,), math.nan)) == (None, None, None, 3, 3)
    assert not found.extreme and statistics_of(torch.tensor([-1.1e4])).extreme


class Network(nn.Module):
    """Two linear layers with an activation that overwrites its input, and a projector."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))
        self.projector = nn.Tanh()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.body(x)
        return y, self.projector(y)


def test_outputs_and_gradients_are_seen_as_they_are_made():
    torch.manual_seed(0)
    network, x = Network(), torch.randn(6, 4)
    watch = Watch(network)
    with watch.watching():
        _, h = network(x)
        (h * torch.arange(6.0)[:, None]).sum().backward()
    assert [layer.name for layer in watch.layers] == ["views", "body.0", "body.1", "body.2", "projector"]
    first = network.body[0](x).detach()
    assert watch.layers[1].forward == statistics_of(first)
    assert watch.layers[1].forward.minimum < 0  # before the activation overwrote it
    gradient = (1 - h.detach() ** 2) * torch.arange(6.0)[:, None]
    assert watch.layers[3].backward == pytest.approx(statistics_of(gradient), rel=1e-6)
    hidden = (gradient @ network.body[2].weight.detach()) * (first > 0)
    assert watch.layers[1].backward == pytest.approx(statistics_of(hidden), rel=1e-5)
    assert watch.gradient_norms == pytest.approx([math.hypot(i, i + 3) * math.sqrt(3) for i in range(3)])
    assert not any(module._forward_hooks for module in network.modules())


def test_what_is_not_finite_is_counted_by_image_and_view():
    network, x = Network(), torch.randn(6, 4)
    x[4, 1] = math.inf
    watch = Watch(network)
    with watch.watching():
        network(torch.randn(6, 4))
        network(x)
    bad, forward = first_bad(watch.layers)
    assert forward and bad.name == "views" and bad.forward.non_finite == 1
    assert bad.bad_rows == [Row(place=3 + 1, view=2)]  # the second micro-batch
    assert [layer.bad_rows for layer in watch.layers[:5]] == [[]] * 5


def test_the_first_bad_gradient_is_the_one_that_came_first():
    network = Network()
    network.body[2].register_forward_hook(lambda m, i, o: (o.register_hook(lambda g: g * math.nan), o)[1])
    watch = Watch(network)
    with watch.watching():
        network(torch.randn(6, 4))[1].sum().backward()
    bad, forward = first_bad(watch.layers)
    assert not forward and bad.name == "body.2"
    assert first_bad(watch.layers[:1]) is None


def test_parameters_that_are_not_finite_are_named():
    network = Network()
    with torch.no_grad():
        network.body[2].bias[0] = math.nan
    watch = Watch(network)
    with watch.watching():
        network(torch.randn(6, 4))
    bad, _ = first_bad(watch.layers)
    assert (bad.name, bad.kind, bad.bad_parameters) == ("body.2", "Linear", ["bias"])
