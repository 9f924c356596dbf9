"""The projector on a GPU, forward and backward, under float16 autocast: torch's layers, the same compiled, and ours.

Run it with `pytest --benchmark benchmarks/bench_projector.py`. Milliseconds are medians of interleaved rounds in one run, called
directly and as a CUDA graph. Memory is what a step adds at its peak. The errors are those of the embeddings and of the weight's
gradient, relative to float64.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable

import pytest
import torch
from torch import nn

from falcon_fast import FalconProjector
from falcon_fast.models.batchnorm import per_view_batchnorm

from .conftest import as_graph, milliseconds, peak_bytes

# Images per view, width of the features, f.
SHAPES = [(64, 512, 2048), (256, 512, 2048), (1024, 2048, 2048), (1024, 512, 512), (4096, 384, 4096)]
ROUNDS = 30


class Layers(nn.Module):
    """The rival: torch's layers under autocast (a float16 product, BatchNorm's statistics in float32)."""

    def __init__(self, projector: FalconProjector) -> None:
        super().__init__()
        self.linear, self.norm, self.row_norm = projector.linear, projector.norm, projector.row_norm

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.linear(features)).float()
        return torch.tanh(y) if self.row_norm is None else nn.functional.normalize(y, dim=1) * self.row_norm


def medians(functions: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the median milliseconds of each function; every round runs all of them in turn."""
    found: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(ROUNDS):
        for name, function in functions.items():
            function()
            found[name].append(milliseconds(function))
    return {name: statistics.median(values) for name, values in found.items()}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels are timed on an NVIDIA GPU, and there is none")
@pytest.mark.parametrize("activation", ["tanh", "l2"])
@pytest.mark.parametrize(("n", "d", "f"), SHAPES)
def test_projector(table, n, d, f, activation) -> None:
    torch.manual_seed(0)
    ours = per_view_batchnorm(FalconProjector(d, f, activation, 64, implementation="triton")).cuda()
    layers = Layers(copy.deepcopy(ours))
    features = torch.randn(2 * n, d, device="cuda", dtype=torch.float16).requires_grad_()
    g = torch.randn(2 * n, f, device="cuda")

    def step(module: nn.Module) -> Callable[[], tuple[torch.Tensor, ...]]:
        parameters = list(module.parameters())

        def run() -> tuple[torch.Tensor, ...]:
            with torch.autocast("cuda", dtype=torch.float16, cache_enabled=False):
                h = module(features)
            return h.detach(), *torch.autograd.grad(h, (features, *parameters), g)

        return run

    steps = {"layers": step(layers), "compiled": step(torch.compile(copy.deepcopy(layers))), "ours": step(ours)}
    for run in steps.values():
        run()
    exact = copy.deepcopy(
        layers
    ).double()  # its one cast to float32 has an error of 6e-8, far below the errors compared
    x = features.detach().double()
    h = exact(x)
    truth = (h.detach(), torch.autograd.grad(h, exact.linear.weight, g.double())[0])
    graphs = {name: as_graph(run) for name, run in steps.items()}
    eager, replayed = medians(steps), medians(graphs)
    for name, run in steps.items():
        found = run()
        errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip((found[0], found[2]), truth, strict=True)]
        table.add(
            device=torch.cuda.get_device_name(),
            activation=activation,
            shape=f"({n}, {d}, {f})",
            which=name,
            **{"ms": eager[name], "ms as a graph": replayed[name], "times faster": replayed["layers"] / replayed[name]},
            **{"peak MiB": (peak_bytes(run) or 0) / 2**20, "h error": errors[0], "dW error": errors[1]},
        )
