"""Compare training steps with a compiled objective and in eager mode, in one run: images/s of whole steps, without loading.

Both use float32, labels and probe, and the same views of noise. The small cases are the digits recipe at a quarter of its width,
which is limited by the number of operators rather than by their size; a smaller batch is limited by it even more.
"""

from __future__ import annotations

import copy
import time

import pytest
import torch

from falcon_fast.config import Config, load_recipe, override, validate
from falcon_fast.hardware.host_memory import keep_host_memory
from falcon_fast.models.batchnorm import per_view_batchnorm
from falcon_fast.models.network import build_codes, build_criterion, build_network
from falcon_fast.training.compiled import compiled_forward_and_loss
from falcon_fast.training.optimizer import build_optimizer
from falcon_fast.training.step import Learner, training_step

from .conftest import interleaved

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = {  # recipe, changes, side of a view, rounds
    "cifar10-resnet8": ("cifar10-resnet8", {}, 32, 10),
    "digits, width 8": ("digits", {"model.width": 8}, 16, 60),
    "digits, width 8, batch 16": ("digits", {"model.width": 8, "training.batch_size": 16}, 16, 100),
}


def steps(config: Config, size: int):
    """Return two functions that take a step and wait for it, from the same weights and on the same views: eager and compiled."""
    torch.manual_seed(0)
    network = per_view_batchnorm(build_network(config, size)).to(device=DEVICE, memory_format=torch.channels_last)
    probe = torch.nn.Linear(network.backbone.num_features, 10).to(DEVICE)
    codes, batch = build_codes(config).to(DEVICE), config.training.batch_size
    views = torch.randn(2 * batch, 3, size, size).to(device=DEVICE, memory_format=torch.channels_last)
    labels = torch.randint(10, (batch,), device=DEVICE)

    def stepper(compiled):
        own, own_probe = copy.deepcopy((network, probe))
        criterion = build_criterion(config, codes)
        optimizer = build_optimizer(config.optimizer, own, own_probe, config.probe.lr)
        learner = Learner(own, criterion, own_probe, optimizer, compiled=compiled)
        return lambda: training_step(learner, views, labels, 1.0).loss.item()

    return {"eager": stepper(None), "compiled": stepper(compiled_forward_and_loss())}


@pytest.mark.parametrize("case", CASES)
def test_compiled_against_eager(table, case):
    recipe, changes, size, rounds = CASES[case]
    config = validate(override(load_recipe(recipe), changes))
    keep_host_memory(DEVICE)  # as training does
    functions = steps(config, size)
    start = time.perf_counter()
    functions["compiled"]()
    compiling = time.perf_counter() - start
    functions["eager"]()
    seconds = interleaved(functions, rounds)
    batch = config.training.batch_size
    table.add(
        case=case,
        batch=batch,
        eager=batch / seconds["eager"],
        compiled=batch / seconds["compiled"],
        ratio=seconds["eager"] / seconds["compiled"],
        compiling_s=compiling,
    )
