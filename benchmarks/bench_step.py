"""A whole training step of the recipes that are meant for a CPU, with the reference loss and with the C++ one, in one run.

`pytest --benchmark benchmarks/bench_step.py`: views of noise, labels, forward, backward, update, by the trainer's own step, in
bfloat16 where the processor multiplies it. Loading is left out: it runs beside the step.
"""

from __future__ import annotations

import pytest
import torch

from falcon_fast import FalconLoss
from falcon_fast.batchnorm import per_view_batchnorm
from falcon_fast.config import TrainingConfig, load_recipe, override, validate
from falcon_fast.models import build_codes, build_network
from falcon_fast.training.optimizer import build_optimizer
from falcon_fast.training.precision import choose_precision
from falcon_fast.training.step import Learner, training_step

from .conftest import interleaved


@pytest.mark.parametrize("codes", ["rademacher", "hadamard"])
@pytest.mark.parametrize(("recipe", "size"), [("digits", 16), ("cifar10-resnet8", 32)])
def test_step(table, recipe, size, codes) -> None:
    config = validate(override(load_recipe(recipe), {"loss.codes": codes}))
    precision, _ = choose_precision(TrainingConfig(amp=True), torch.device("cpu"))
    torch.manual_seed(0)
    views = torch.randn(2 * config.training.batch_size, 3, size, size).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (config.training.batch_size,))

    def stepper(implementation: str):
        network = build_network(config, size)
        per_view_batchnorm(network)
        network.to(memory_format=torch.channels_last)
        criterion = FalconLoss(build_codes(config), config.tau, implementation=implementation)
        probe = torch.nn.Linear(network.backbone.num_features, 10)
        optimizer = build_optimizer(config.optimizer, network, probe, config.probe.lr)
        learner = Learner(network, criterion, probe, optimizer, precision.autocast)
        return lambda: training_step(learner, views, labels, 1.0)

    seconds = interleaved({"reference": stepper("reference"), "cpu": stepper("cpu")}, 9)
    table.add(
        recipe=recipe,
        codes=codes,
        **{f"{name} ms": 1e3 * value for name, value in seconds.items()},
        **{"times faster": seconds["reference"] / seconds["cpu"]},
    )
