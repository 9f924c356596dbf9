"""The optimisation step with the network compiled against eager, side by side: images/s of whole steps, data already there."""

from __future__ import annotations

import copy
import time

import pytest
import torch

from falcon_fast import FalconLoss
from falcon_fast.batchnorm import per_view_batchnorm
from falcon_fast.config import Config, load_recipe, override
from falcon_fast.models import build_codes, build_network
from falcon_fast.training.compiled import compiled_network
from falcon_fast.training.optimizer import build_optimizer
from falcon_fast.training.step import Learner, training_step

from .conftest import interleaved

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = {  # recipe, changes, side of a view
    "cifar10-resnet8": ("cifar10-resnet8", {}, 32),
    "digits, width 8": (
        "digits",
        {"model.width": 8},
        16,
    ),  # bound by the number of operations rather than by their size
}


def steps(config: Config, size: int):
    """Two functions that each take a step and wait for it, from the same weights on the same views: eager, compiled."""
    network = per_view_batchnorm(build_network(config, size)).to(device=DEVICE, memory_format=torch.channels_last)
    codes, batch = build_codes(config).to(DEVICE), config.training.batch_size
    views = torch.randn(2 * batch, 3, size, size).to(device=DEVICE, memory_format=torch.channels_last)

    def step_of(network, called):
        criterion = FalconLoss(codes, config.tau, beta=config.loss.beta, prior=config.loss.prior)
        optimizer = build_optimizer(config.optimizer, network, None, 0.0)

        learner = Learner(called, criterion, None, optimizer)

        def step() -> float:
            return training_step(learner, views, None, 1.0).loss.item()

        return step

    other = copy.deepcopy(network)
    return {"eager": step_of(network, network), "compiled": step_of(other, compiled_network(other))}


@pytest.mark.parametrize("case", CASES)
def test_compiled_against_eager(table, case):
    recipe, changes, size = CASES[case]
    config = override(load_recipe(recipe), changes)
    functions = steps(config, size)
    start = time.perf_counter()
    functions["compiled"]()
    compiling = time.perf_counter() - start
    functions["eager"]()
    seconds = interleaved(functions, rounds=15)
    batch = config.training.batch_size
    table.add(
        case=case,
        batch=batch,
        eager=batch / seconds["eager"],
        compiled=batch / seconds["compiled"],
        ratio=seconds["eager"] / seconds["compiled"],
        compiling_s=compiling,
    )
